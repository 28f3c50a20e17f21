//! What waits for time: files whose content settles, old homes that are in use, parked requests.

use crate::cache::{Cache, now_ms};
use crate::events::RecallReason;
use crate::file::{CachedFile, Home, Inner};
use crate::fill::Job;
use crate::limits::{DRAIN_POLL_MS, DRAIN_POLL_MS_MAX, PARKED_POLL_MS};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

impl Cache {
    /// Does what is due. `now_ms` is CLOCK_BOOTTIME in ms. Returns when it wants to be called next,
    /// in ms of the same clock; `None`: nothing waits. Also called after every wake of the sink.
    pub fn tick(&self, now_ms: u64) -> Option<u64> {
        let files: Vec<Arc<CachedFile>> = self.attention.lock().values().cloned().collect();
        let mut next: Option<u64> = None;
        for file in files {
            let mut inner = file.inner.lock();
            let due = self.attend(&file, &mut inner, now_ms);
            let waiting = !inner.waiters.is_empty() && inner.live.is_some();
            if due.is_none() {
                self.attention.lock().remove(&file.id);
            }
            drop(inner);
            if waiting {
                self.push_job(Job::Advance(file));
            }
            next = match (next, due) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        if !self.parked.lock().is_empty() {
            let mut parked_ms = self.parked_ms.load(Relaxed) + PARKED_POLL_MS;
            if now_ms >= parked_ms {
                self.kick_parked();
                parked_ms = now_ms + PARKED_POLL_MS;
            }
            next = Some(next.map_or(parked_ms, |n| n.min(parked_ms)));
        }
        next.map(|n| n.max(now_ms + 1))
    }

    /// One file's due things; when to come again, or `None`.
    fn attend(&self, file: &Arc<CachedFile>, inner: &mut Inner, now_ms: u64) -> Option<u64> {
        self.try_settle(file, inner, now_ms);
        self.drain_old(file, inner, now_ms);
        if !inner.lingering.is_empty() {
            self.retry_lingering(inner);
        }
        if let Some(home) = inner.live.as_mut() {
            if home.exposed {
                self.unhold(home, now_ms);
            }
            if home.recalling > 0 {
                self.poll_recalls(file, home);
            }
        }
        self.rotate_if_short(file, inner, now_ms);
        self.settle_idle(file, inner);
        if !inner.needs_attention() {
            return None;
        }
        let mut due = now_ms + DRAIN_POLL_MS_MAX;
        if inner.live.is_none() && !inner.dead {
            due = due.min(inner.settle_until_ms.max(now_ms + 1));
        }
        for home in inner.old.iter().chain(&inner.live) {
            if home.exposed && !home.is_pinned() || home.recalling > 0 || home.recalled {
                due = due.min(home.poll_ms.max(now_ms + DRAIN_POLL_MS));
            }
        }
        if !inner.lingering.is_empty() {
            due = due.min(now_ms + 4 * DRAIN_POLL_MS);
        }
        Some(due)
    }

    /// A home that was pinned once stays whole while anybody has it open, those too that map it with
    /// a fault handler. When memory is short these are moved to a new home, so that the old one can end.
    fn rotate_if_short(&self, file: &Arc<CachedFile>, inner: &mut Inner, now_ms: u64) {
        let Some(home) = inner.live.as_ref() else {
            return;
        };
        let stuck = home.exposed && !home.is_pinned() && now_ms > home.since_ms + DRAIN_POLL_MS_MAX;
        let short = {
            let frames = self.frames.lock();
            frames.available() < frames.watermark()
        };
        if stuck && short {
            self.retire(file, inner, RecallReason::Reclaim, now_ms);
            self.settle_now(file, inner);
        }
    }

    pub(crate) fn poll_after(&self, home: &Home, now_ms: u64) -> u64 {
        (now_ms.saturating_sub(home.since_ms) / 4).clamp(DRAIN_POLL_MS, DRAIN_POLL_MS_MAX)
    }

    /// Has `tick` look at the file, if there is a reason. The file's lock is held.
    pub(crate) fn look_at(&self, file: &Arc<CachedFile>, inner: &Inner) {
        if inner.needs_attention()
            && self
                .attention
                .lock()
                .insert(file.id, file.clone())
                .is_none()
        {
            self.events.wake();
        }
    }

    /// The clock of [`Cache::tick`].
    pub fn now_ms() -> u64 {
        now_ms()
    }
}
