//! The thread that takes pages out of guests' files, for those of one trust class.
//!
//! That gives memory back, and takes the page from a guest that was fenced; nobody who is believed has it
//! mapped any more, and nobody reads it there, so it may come late. A guest can hold it up for ever: then
//! files of its own class keep their pages.

use super::guest_file::GuestFile;
use crate::error::GrantError;
use crate::ids::PAGE_SIZE_U64;
use crate::limits::{ENDED_FILES_MAX, SWEEP_REST_MS, SWEEP_WAIT_MS, SWEEP_WAIT_PERCENT};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

const REST: Duration = Duration::from_millis(SWEEP_REST_MS);
/// The most that is waited for at one time.
const PATIENCE: Duration = Duration::from_millis(SWEEP_WAIT_MS);

/// A file among those of one sweeper.
type Number = u64;

#[derive(Default)]
struct Todo {
    next: Number,
    pages: BTreeSet<(Number, u64)>,
    files: Vec<(Number, Arc<GuestFile>)>,
    /// Files that nobody has any more but guests.
    ended: Vec<Arc<GuestFile>>,
    running: Option<Running>,
    waits: Waits,
    /// So many wait until nothing is left to do.
    hurried: u32,
    is_over: bool,
}

/// How long those who want a page put somewhere have waited for the sweeper, which a guest can hold up again and
/// again: of all time only a part.
struct Waits {
    left: Duration,
    at: Instant,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            left: PATIENCE,
            at: Instant::now(),
        }
    }
}

impl Waits {
    /// So long may be waited now.
    fn patience(&mut self) -> Duration {
        let now = Instant::now();
        let more = now.duration_since(self.at) * SWEEP_WAIT_PERCENT / 100;
        self.at = now;
        self.left = (self.left + more).min(PATIENCE);
        self.left
    }

    fn waited(&mut self) {
        self.left = self.left.saturating_sub(self.at.elapsed());
        self.at = Instant::now();
    }
}

struct Running {
    /// `None`: a file that has ended.
    pages: Option<(Number, Range<u64>)>,
    since: Instant,
}

/// What there is to do, and for whom to wait.
#[derive(Default)]
struct Shared {
    todo: Mutex<Todo>,
    changed: Condvar,
}

/// See the module.
pub(super) struct Sweeper(Arc<Shared>);

/// A file whose pages are taken out by a sweeper.
pub(super) struct SweptFile {
    pub(super) file: Arc<GuestFile>,
    number: Number,
    shared: Arc<Shared>,
}

impl Sweeper {
    pub(super) fn new() -> Result<Self, GrantError> {
        let shared = Arc::<Shared>::default();
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("sweeper".to_owned())
            .spawn(move || of_thread.run())
            .map_err(|source| GrantError::Sys {
                call: "starting a thread",
                source,
            })?;
        Ok(Self(shared))
    }

    /// Takes a file in charge.
    ///
    /// # Errors
    /// A guest holds up the emptying of too many files that were there before.
    pub(super) fn take_up(&self, file: GuestFile) -> Result<SweptFile, GrantError> {
        let file = Arc::new(file);
        let mut todo = self.0.todo.lock();
        if todo.ended.len() >= ENDED_FILES_MAX && todo.is_held_up() {
            let busy = io::Error::from_raw_os_error(libc::EDQUOT);
            return Err(GrantError::NoMemory(busy));
        }
        let number = todo.next;
        todo.next += 1;
        todo.files.push((number, Arc::clone(&file)));
        Ok(SweptFile {
            file,
            number,
            shared: Arc::clone(&self.0),
        })
    }

    /// Waits until nothing is left to do; `false`: it takes longer than `patience`.
    pub(super) fn wait(&self, patience: Duration) -> bool {
        self.0.is_idle_in(&mut self.0.todo.lock(), patience)
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.0.todo.lock().is_over = true;
        self.0.changed.notify_all();
    }
}

impl SweptFile {
    /// A page is to be taken out.
    pub(super) fn sweep(&self, page: u64) {
        let mut todo = self.shared.todo.lock();
        todo.pages.insert((self.number, page));
        // Else it is awake, or rests.
        if todo.pages.len() == 1 {
            self.shared.changed.notify_all();
        }
    }

    /// Writes within one page, which is not taken out from now on.
    ///
    /// # Errors
    /// `NoMemory` as of [`GuestFile::write`]. EBUSY: the guest holds up that the page is taken out.
    pub(super) fn write(&self, from: u64, data: &[u8]) -> Result<(), GrantError> {
        self.keep(from / PAGE_SIZE_U64)?;
        match self.file.write(from, data) {
            // Perhaps there is room when all is out that is to be.
            Err(GrantError::NoMemory(_)) if self.is_idle_soon() => self.file.write(from, data),
            written => written,
        }
    }

    fn is_idle_soon(&self) -> bool {
        let todo = &mut self.shared.todo.lock();
        let patience = todo.waits.patience();
        let is_idle = self.shared.is_idle_in(todo, patience);
        todo.waits.waited();
        is_idle
    }

    fn keep(&self, page: u64) -> Result<(), GrantError> {
        let todo = &mut self.shared.todo.lock();
        todo.pages.remove(&(self.number, page));
        let is_running = |todo: &mut Todo| {
            let running = todo.running.as_ref();
            let pages = running.and_then(|running| running.pages.as_ref());
            pages.is_some_and(|(number, pages)| *number == self.number && pages.contains(&page))
        };
        if !is_running(todo) {
            return Ok(());
        }
        let patience = todo.waits.patience();
        let changed = &self.shared.changed;
        let waited = changed.wait_while_for(todo, is_running, patience);
        todo.waits.waited();
        if waited.timed_out() {
            return Err(GrantError::Sys {
                call: "fallocate(punch) of an arena",
                source: io::Error::from_raw_os_error(libc::EBUSY),
            });
        }
        Ok(())
    }
}

impl Drop for SweptFile {
    fn drop(&mut self) {
        let todo = &mut *self.shared.todo.lock();
        todo.files.retain(|(number, _)| *number != self.number);
        let others = todo.pages.split_off(&(self.number, 0));
        todo.pages.extend(
            others
                .into_iter()
                .filter(|(number, _)| *number != self.number),
        );
        todo.ended.push(Arc::clone(&self.file));
        self.shared.changed.notify_all();
    }
}

impl Todo {
    fn is_idle(&self) -> bool {
        self.pages.is_empty() && self.ended.is_empty() && self.running.is_none()
    }

    fn is_held_up(&self) -> bool {
        let running = self.running.as_ref();
        running.is_some_and(|running| running.since.elapsed() >= PATIENCE)
    }

    /// The next run of pages, up to one that is not to be taken out.
    fn next_run(&mut self) -> Option<(Arc<GuestFile>, Range<u64>)> {
        let (number, first) = self.pages.pop_first()?;
        let mut end = first + 1;
        while self.pages.remove(&(number, end)) {
            end += 1;
        }
        let mut files = self.files.iter();
        let (_, file) = files.find(|(known, _)| *known == number)?;
        let file = Arc::clone(file);
        self.begin(Some((number, first..end)));
        Some((file, first..end))
    }

    fn next_ended(&mut self) -> Option<Arc<GuestFile>> {
        let file = self.ended.pop()?;
        self.begin(None);
        Some(file)
    }

    fn begin(&mut self, pages: Option<(Number, Range<u64>)>) {
        let since = Instant::now();
        self.running = Some(Running { pages, since });
    }
}

impl Shared {
    /// Waits until nothing is left to do; `false`: it takes longer.
    fn is_idle_in(&self, todo: &mut MutexGuard<'_, Todo>, patience: Duration) -> bool {
        todo.hurried += 1;
        self.changed.notify_all();
        let is_busy = |todo: &mut Todo| !todo.is_idle();
        let waited = self.changed.wait_while_for(todo, is_busy, patience);
        todo.hurried -= 1;
        !waited.timed_out()
    }

    fn run(&self) {
        let mut todo = self.todo.lock();
        while !todo.is_over {
            // Pages that come back soon are better left where they are.
            if !todo.pages.is_empty() {
                let has_time = |todo: &mut Todo| todo.hurried == 0 && !todo.is_over;
                self.changed.wait_while_for(&mut todo, has_time, REST);
            }
            self.sweep_all(&mut todo);
            if todo.is_idle() && !todo.is_over {
                self.changed.wait(&mut todo);
            }
        }
    }

    /// Does what there is to do.
    fn sweep_all(&self, todo: &mut MutexGuard<'_, Todo>) {
        while !todo.is_over {
            if let Some((file, pages)) = todo.next_run() {
                MutexGuard::unlocked(todo, || report(file.punch(pages.start, pages.end)));
            } else if let Some(file) = todo.next_ended() {
                // It closes the file too, and then the tmpfs of the last one.
                MutexGuard::unlocked(todo, || {
                    report(file.empty());
                    drop(file);
                });
            } else {
                return;
            }
            todo.running = None;
            self.changed.notify_all();
        }
    }
}

/// It is memory that stays with its guest, within its limit.
fn report(result: Result<(), GrantError>) {
    if let Err(error) = result {
        tracing::debug!(%error, "a page stays in an arena");
    }
}
