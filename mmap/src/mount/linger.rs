//! Files on frames that nobody has open any more and that stay pinned for a moment, because the next
//! program is likely to open them again.

use super::core::Core;
use super::limits::{LINGER, LINGER_BYTES_MAX, LINGER_FILES_MAX};
use super::link::Live;
use super::open::OpenFile;
use std::collections::VecDeque;
use std::time::Instant;

/// One of them: since when, which node id, how long it is in bytes.
#[derive(Clone, Copy, Debug)]
struct Lingerer {
    since: Instant,
    id: u64,
    bytes: u64,
}

/// The longest closed first. A leaf lock's content; which files really linger is what their node ids'
/// entries say, so one that was opened again meanwhile is no harm here.
#[derive(Debug, Default)]
pub(super) struct Lingering {
    queue: VecDeque<Lingerer>,
    bytes: u64,
}

impl Lingering {
    pub(super) fn push(&mut self, id: u64, bytes: u64) {
        let since = Instant::now();
        self.queue.push_back(Lingerer { since, id, bytes });
        self.bytes += bytes;
    }

    /// Takes the one that must go: its time is over, or there are too many, or `all` must.
    fn pop(&mut self, now: Instant, all: bool) -> Option<u64> {
        let first = self.queue.front()?;
        let over = now.saturating_duration_since(first.since) >= LINGER;
        let many = self.queue.len() > LINGER_FILES_MAX || self.bytes > LINGER_BYTES_MAX;
        if !(over || many || all) {
            return None;
        }
        let gone = self.queue.pop_front()?;
        self.bytes -= gone.bytes;
        Some(gone.id)
    }
}

impl Core {
    /// Does anything linger?
    pub(super) fn lingers(&self) -> bool {
        !self.lingering.lock().queue.is_empty()
    }

    /// Unpins what has lingered long enough, or `all`. How many were unpinned.
    pub(super) fn end_lingering(&self, all: bool) -> usize {
        let now = Instant::now();
        let mut ended = Vec::new();
        loop {
            let Some(id) = self.lingering.lock().pop(now, all) else {
                break;
            };
            let file = self
                .table
                .lock()
                .get_mut(id)
                .and_then(|e| e.open.end_linger());
            ended.extend(file);
        }
        // Dropped outside the locks: dropping tells the kernel and the daemon.
        ended.len()
    }

    /// May a file that was open be used for another open without asking the daemon?
    /// `last` was asked for before the table was locked: a new session is begun the other way round.
    pub(super) fn is_current(last: &Live, file: &OpenFile) -> bool {
        file.session() == last.number
            && !last.is_lost()
            && !file.outlived_daemon()
            && !file.changed()
            && !file.host_bounded()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_and_too_old_go_the_oldest_first() {
        let mut lingering = Lingering::default();
        for id in 0..=LINGER_FILES_MAX as u64 {
            lingering.push(id, 1);
        }
        let now = Instant::now();
        assert_eq!(
            (lingering.pop(now, false), lingering.pop(now, false)),
            (Some(0), None)
        );
        assert_eq!(lingering.pop(now + LINGER, false), Some(1));
        lingering.push(1000, LINGER_BYTES_MAX);
        assert_eq!(lingering.pop(now, false), Some(2), "too many bytes");
        while lingering.pop(now, true).is_some() {}
        assert_eq!((lingering.bytes, lingering.queue.len()), (0, 0));
    }
}
