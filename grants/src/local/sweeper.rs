//! The thread that takes pages out of guests' files, for those of one trust class.
//!
//! That gives memory back, and takes the page from a guest that was fenced; nobody who is believed has it
//! mapped any more, and nobody reads it there, so it may come late. A guest can hold it up for ever: then
//! files of its own class keep their pages.

use super::guest_file::GuestFile;
use crate::error::GrantError;
use crate::limits::{ENDED_FILES_MAX, SWEEP_WAIT_MS};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
    is_over: bool,
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
        let mut todo = self.0.todo.lock();
        let is_busy = |todo: &mut Todo| !todo.is_idle();
        let waited = self.0.changed.wait_while_for(&mut todo, is_busy, patience);
        !waited.timed_out()
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
        self.shared.todo.lock().pages.insert((self.number, page));
        self.shared.changed.notify_all();
    }

    /// A page comes there again: it is not taken out from now on.
    ///
    /// # Errors
    /// The guest holds it up.
    pub(super) fn keep(&self, page: u64) -> Result<(), GrantError> {
        let mut todo = self.shared.todo.lock();
        todo.pages.remove(&(self.number, page));
        let is_running = |todo: &mut Todo| {
            let running = todo
                .running
                .as_ref()
                .and_then(|running| running.pages.as_ref());
            running.is_some_and(|(number, pages)| *number == self.number && pages.contains(&page))
        };
        // Who is waited for in vain once is not waited for again.
        let patience = match todo.is_held_up() {
            true => Duration::ZERO,
            false => PATIENCE,
        };
        let waited = self
            .shared
            .changed
            .wait_while_for(&mut todo, is_running, patience);
        if waited.timed_out() {
            let busy = io::Error::from_raw_os_error(libc::EBUSY);
            return Err(GrantError::Sys {
                call: "fallocate(punch) of an arena",
                source: busy,
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
    fn run(&self) {
        let mut todo = self.todo.lock();
        while !todo.is_over {
            if let Some((file, pages)) = todo.next_run() {
                MutexGuard::unlocked(&mut todo, || report(file.punch(pages.start, pages.end)));
            } else if let Some(file) = todo.next_ended() {
                // It closes the file too, and then the tmpfs of the last one.
                MutexGuard::unlocked(&mut todo, || {
                    report(file.empty());
                    drop(file);
                });
            } else {
                self.changed.wait(&mut todo);
                continue;
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
