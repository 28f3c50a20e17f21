//! What needs a file for itself: works under way end first, later ones are parked, the pages concerned are
//! taken from everybody, then it is done.

use super::super::complete::Answer;
use super::super::ctx::Ctx;
use super::super::limits::{EXCLUSIVE_RETRY_MS, NO_ROOM_RETRY_MS, RESIZE_TRIES_MAX, TAKES_AT_ONCE};
use super::work::{split, ticket};
use copage_cache::{CacheError, FileId, FileState};
use copage_coherence::strict::{Event, Input, Place};
use copage_grants::{PAGE_SIZE_U64, PageIndex};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::serve) enum Exclusive {
    /// Another length, for the request of this ticket.
    Truncate { ticket: u64, bytes: u64 },
    /// At least this length, for the write of this number.
    Grow { work: u64, end: u64 },
    /// A new home: a session that was fenced has the old one's descriptor.
    Rehome,
    /// A process of the host wants the file.
    LetHostIn,
    /// The host changed the file.
    Reload,
}

/// How far the first of a file's exclusive works is.
#[derive(Debug)]
pub(in crate::serve) struct Running {
    /// Its number, by which the cache answers.
    number: u64,
    /// Pages to be taken still.
    todo: Vec<PageIndex>,
    /// Some are being taken.
    is_taking: bool,
    /// Its pages are out, and the cache works on it.
    is_job: bool,
}

/// Pages that the daemon takes.
#[derive(Debug)]
pub(super) struct Taking {
    file: FileId,
    pages: Vec<PageIndex>,
    left: usize,
    /// Why some of them could not be had.
    errno: Option<i32>,
    /// For the file's exclusive work; else to give the frames back.
    is_exclusive: bool,
}

impl Ctx {
    /// Queues what needs the file for itself.
    pub(in crate::serve) fn exclusive(&mut self, id: FileId, what: Exclusive) {
        let Some(file) = self.coherent.files.get_mut(&id) else {
            return self.exclusive_failed(what, libc::ESTALE);
        };
        // Two new homes, or two visits of the host, one after the other are one.
        let waiting = file
            .exclusive
            .iter()
            .skip(usize::from(file.running.is_some()));
        let again = matches!(
            what,
            Exclusive::Rehome | Exclusive::LetHostIn | Exclusive::Reload
        );
        if !(again && waiting.into_iter().any(|one| *one == what)) {
            file.exclusive.push_back(what);
        }
        self.coherent.ready.push_back(id);
    }

    /// Files whose exclusive work may begin, or has ended.
    pub(in crate::serve) fn exclusives(&mut self) -> bool {
        let Some(id) = self.coherent.ready.pop_front() else {
            return false;
        };
        self.begin_exclusive(id);
        true
    }

    fn begin_exclusive(&mut self, id: FileId) {
        let number = self.number();
        let Some(file) = self.coherent.files.get_mut(&id) else {
            return;
        };
        if let Some(running) = &file.running {
            if !running.is_taking && !running.is_job {
                self.take_more(id);
            }
            return;
        }
        if file.active > 0 {
            return;
        }
        let Some(&what) = file.exclusive.front() else {
            return self.unpark(id);
        };
        let now = self.cache.current(&file.file).bytes;
        let first = match what {
            Exclusive::Truncate { bytes, .. } => bytes.min(now) / PAGE_SIZE_U64,
            Exclusive::Grow { end, .. } if end <= now => {
                // Somebody else did it.
                return self.end_exclusive(id, None);
            }
            Exclusive::Grow { .. } => now / PAGE_SIZE_U64,
            Exclusive::Rehome | Exclusive::LetHostIn | Exclusive::Reload => 0,
        };
        let pages = self.machine.pages().pages_of(id.0);
        let mut todo: Vec<PageIndex> = pages
            .map(|state| state.page)
            .filter(|page| page.0 >= first)
            .collect();
        // The last ones first, as they are taken from the end of the list.
        todo.reverse();
        file.running = Some(Running {
            number,
            todo,
            is_taking: false,
            is_job: false,
        });
        self.take_more(id);
    }

    /// Takes some pages more for a file's exclusive work, or does it when none is left.
    fn take_more(&mut self, id: FileId) {
        let number = self.number();
        let Some(running) = self
            .coherent
            .files
            .get_mut(&id)
            .and_then(|file| file.running.as_mut())
        else {
            return;
        };
        let rest = running.todo.len().saturating_sub(TAKES_AT_ONCE);
        let pages = running.todo.split_off(rest);
        if pages.is_empty() {
            return self.do_exclusive(id);
        }
        running.is_taking = true;
        self.take(number, id, pages, true);
    }

    fn take(&mut self, number: u64, id: FileId, pages: Vec<PageIndex>, is_exclusive: bool) {
        let taking = Taking {
            file: id,
            left: pages.len(),
            pages: pages.clone(),
            errno: None,
            is_exclusive,
        };
        self.coherent.takes.insert(number, taking);
        for (nth, page) in pages.into_iter().enumerate() {
            let place = Place { file: id.0, page };
            let ticket = ticket(number, nth);
            self.step(Input::Page(Event::Take { ticket, place }));
        }
    }

    /// The cache wants the frames of these pages back.
    pub(in crate::serve) fn want_back(&mut self, id: FileId, pages: &[PageIndex]) {
        for some in pages.chunks(TAKES_AT_ONCE) {
            let number = self.number();
            self.take(number, id, some.to_vec(), false);
        }
    }

    /// A page is taken, or cannot be. `false`: this ticket is of no such thing.
    pub(super) fn taken(&mut self, ticket: u64, errno: Option<i32>) -> bool {
        let (number, nth) = split(ticket);
        let Some(taking) = self.coherent.takes.get_mut(&number) else {
            return false;
        };
        taking.left = taking.left.saturating_sub(1);
        taking.errno = taking.errno.or(errno);
        if errno.is_some()
            && !taking.is_exclusive
            && let Some(page) = taking.pages.get(nth)
            && let Some(file) = self.coherent.files.get(&taking.file)
        {
            self.cache.strict_keep(&file.file, *page);
        }
        if taking.left > 0 {
            return true;
        }
        let Some(taking) = self.coherent.takes.remove(&number) else {
            return true;
        };
        let id = taking.file;
        match (taking.is_exclusive, taking.errno) {
            (false, _) => self.forget_file(id),
            (true, None) => {
                // It goes on when all that came of the last step is done: frames are freed behind this.
                let file = self.coherent.files.get_mut(&id);
                if let Some(running) = file.and_then(|file| file.running.as_mut()) {
                    running.is_taking = false;
                }
                self.coherent.ready.push_back(id);
            }
            (true, Some(errno)) => self.cannot_take(id, errno),
        }
        true
    }

    /// All pages concerned are out.
    fn do_exclusive(&mut self, id: FileId) {
        let Some(file) = self.coherent.files.get_mut(&id) else {
            return;
        };
        let (Some(running), Some(&what)) = (file.running.as_mut(), file.exclusive.front()) else {
            return;
        };
        running.is_job = true;
        let number = running.number;
        let cached = file.file.clone();
        let counts = &mut self.coherent.counts.told;
        match what {
            Exclusive::Truncate { bytes, .. } | Exclusive::Grow { end: bytes, .. } => {
                counts.resizes += 1;
                self.cache.strict_resize(number, &cached, bytes);
            }
            Exclusive::LetHostIn => {
                counts.hosts_let_in += 1;
                self.cache.strict_let_host_in(&cached);
                self.end_exclusive(id, None);
            }
            Exclusive::Rehome | Exclusive::Reload => {
                counts.rehomes += 1;
                match self.cache.strict_rehome(&cached) {
                    Ok(_) => {
                        self.coherent.rehomed.push(id);
                        self.end_exclusive(id, None);
                    }
                    // Nobody finds this one any more: who opens the file by its name gets another.
                    Err(error @ CacheError::Withdrawn) => {
                        self.end_exclusive(id, Some(error.errno()));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a file cannot be served anew yet");
                        self.cannot_take(id, error.errno());
                    }
                }
            }
        }
    }

    /// A resize has ended.
    pub(super) fn resized(
        &mut self,
        id: FileId,
        number: u64,
        result: Result<FileState, CacheError>,
    ) {
        let running = self
            .coherent
            .files
            .get(&id)
            .and_then(|f| f.running.as_ref());
        if running.is_none_or(|running| running.number != number) {
            return;
        }
        match result {
            Ok(_) => {
                self.coherent.resized.push(id);
                self.end_exclusive(id, None);
            }
            Err(error) if error.errno() == libc::EAGAIN => self.resize_again(id),
            Err(error) => self.end_exclusive(id, Some(error.errno())),
        }
    }

    /// Something of what was taken is not out yet, as a frame that somebody who is gone has mapped.
    fn resize_again(&mut self, id: FileId) {
        let Some(file) = self.coherent.files.get_mut(&id) else {
            return;
        };
        file.tries += 1;
        if file.tries > RESIZE_TRIES_MAX {
            return self.end_exclusive(id, Some(libc::EBUSY));
        }
        file.running = None;
        let at_ms = self.now_ms + NO_ROOM_RETRY_MS;
        self.coherent.retries.insert((at_ms, id));
    }

    /// Some pages could not be saved, so they were not given up.
    fn cannot_take(&mut self, id: FileId, errno: i32) {
        let Some(file) = self.coherent.files.get_mut(&id) else {
            return;
        };
        match file.exclusive.front() {
            None | Some(Exclusive::Truncate { .. } | Exclusive::Grow { .. }) => {
                self.end_exclusive(id, Some(errno));
            }
            // These have to be, sooner or later. Who waits does so no longer.
            Some(Exclusive::Rehome | Exclusive::LetHostIn | Exclusive::Reload) => {
                file.running = None;
                let parked = std::mem::take(&mut file.parked);
                self.coherent
                    .retries
                    .insert((self.now_ms + EXCLUSIVE_RETRY_MS, id));
                for number in parked {
                    self.coherent.works.remove(&number);
                    let answer = Answer::failed(errno);
                    self.coherent.answers.push_back((number, answer));
                }
            }
        }
    }

    /// Exclusive work that failed is tried again.
    pub(in crate::serve) fn retry_exclusives(&mut self) {
        while let Some(&(at_ms, id)) = self.coherent.retries.first() {
            if at_ms > self.now_ms {
                return;
            }
            self.coherent.retries.pop_first();
            self.coherent.ready.push_back(id);
        }
    }

    /// The first exclusive work of a file has ended.
    fn end_exclusive(&mut self, id: FileId, errno: Option<i32>) {
        let Some(file) = self.coherent.files.get_mut(&id) else {
            return;
        };
        file.running = None;
        file.tries = 0;
        let what = file.exclusive.pop_front();
        self.coherent.ready.push_back(id);
        match (what, errno) {
            (Some(what), Some(errno)) => self.exclusive_failed(what, errno),
            (Some(Exclusive::Truncate { ticket, .. }), None) => {
                self.coherent.answers.push_back((ticket, Answer::Done));
            }
            (Some(Exclusive::Grow { work, .. }), None) => self.start_work(work),
            _ => {}
        }
    }

    fn exclusive_failed(&mut self, what: Exclusive, errno: i32) {
        match what {
            Exclusive::Truncate { ticket, .. } => {
                let answer = Answer::failed(errno);
                self.coherent.answers.push_back((ticket, answer));
            }
            Exclusive::Grow { work, .. } => {
                // It was not counted among those under way.
                self.coherent.works.remove(&work);
                let answer = Answer::failed(errno);
                self.coherent.answers.push_back((work, answer));
            }
            Exclusive::Rehome | Exclusive::LetHostIn | Exclusive::Reload => {}
        }
    }

    /// Nothing needs the file for itself any more.
    fn unpark(&mut self, id: FileId) {
        let Some(file) = self.coherent.files.get_mut(&id) else {
            return;
        };
        for number in std::mem::take(&mut file.parked) {
            self.start_work(number);
        }
        self.forget_file(id);
    }
}
