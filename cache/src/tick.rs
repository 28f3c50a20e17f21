//! What waits for time: files whose content settles, old homes that are in use, parked requests.

use crate::cache::{Cache, now_ms};
use crate::events::RecallReason;
use crate::file::{CachedFile, Home, Inner};
use crate::limits::{DRAIN_POLL_MS, DRAIN_POLL_MS_MAX, PARKED_POLL_MS};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

impl Cache {
    /// Does what is due. `now_ms` is CLOCK_BOOTTIME in ms. Returns when it wants to be called next,
    /// in ms of the same clock; `None`: nothing waits. Also called after every wake of the sink.
    pub fn tick(&self, now_ms: u64) -> Option<u64> {
        let due = |(file, at): &(Arc<CachedFile>, u64)| (*at <= now_ms).then(|| file.clone());
        let files: Vec<_> = self.attention.lock().values().filter_map(due).collect();
        for file in files {
            let mut inner = file.inner.lock();
            // With the file's lock: who has it looked at meanwhile does so afterwards.
            match self.attend(&file, &mut inner, now_ms) {
                Some(at) => self.attention.lock().insert(file.id, (file.clone(), at)),
                None => self.attention.lock().remove(&file.id),
            };
            let waiting = !inner.waiters.is_empty() && inner.live.is_some();
            drop(inner);
            if waiting {
                self.push_advance(&file);
            }
        }
        let mut next = self.attention.lock().values().map(|(_, at)| *at).min();
        if let Some(left_ms) = self.poll_left_over(now_ms) {
            next = Some(next.map_or(left_ms, |n| n.min(left_ms)));
        }
        if let Some(resize_ms) = self.poll_resize(now_ms) {
            next = Some(next.map_or(resize_ms, |n| n.min(resize_ms)));
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
        self.retry_unmapping(inner, now_ms);
        if let Some(home) = inner.live.as_mut().filter(|h| h.exposed) {
            self.unhold(home, now_ms);
        }
        self.poll_recalls(file, inner, now_ms);
        if inner.doubt_ms.is_some_and(|at| at <= now_ms) {
            self.retire(file, inner, RecallReason::Changed, now_ms);
            self.try_settle(file, inner, now_ms);
        }
        self.rotate_if_short(file, inner, now_ms);
        self.retry_lease(file, inner, now_ms);
        self.retry_unfreed(file, inner);
        self.settle_idle(file, inner);
        if !inner.needs_attention() {
            return None;
        }
        let mut due = now_ms + DRAIN_POLL_MS_MAX;
        if inner.live.is_none() && !inner.dead {
            due = due.min(inner.settle_until_ms.max(now_ms + 1));
        }
        if let Some((at, _)) = inner.strict.lease_retry {
            due = due.min(at.max(now_ms + 1));
        }
        if let Some(at) = inner.doubt_ms {
            due = due.min(at.max(now_ms + 1));
        }
        let old = inner.old.iter();
        let live = inner.live.iter();
        let polled = old.chain(live.filter(|h| h.exposed || h.recalling > 0));
        for home in polled.filter(|h| !h.is_pinned()) {
            due = due.min(home.poll_ms.max(now_ms + DRAIN_POLL_MS));
        }
        if !inner.unmapping.is_empty() {
            due = due.min(now_ms + DRAIN_POLL_MS);
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
            self.rotate(file, inner);
        }
    }

    /// The longer it has been in use the more seldom, but once when recalls fall due.
    pub(crate) fn poll_after(&self, home: &Home, now_ms: u64) -> u64 {
        let age_ms = now_ms.saturating_sub(home.since_ms);
        let after_ms = (age_ms / 4).clamp(DRAIN_POLL_MS, DRAIN_POLL_MS_MAX);
        match u64::from(self.config.recall_deadline_ms).checked_sub(age_ms) {
            Some(left_ms) if left_ms > 0 => after_ms.min(left_ms),
            _ => after_ms,
        }
    }

    /// Has `tick` look at the file, if there is a reason. The file's lock is held.
    pub(crate) fn look_at(&self, file: &Arc<CachedFile>, inner: &Inner) {
        if !inner.needs_attention() {
            return;
        }
        let before = self.attention.lock().insert(file.id, (file.clone(), 0));
        if before.is_none_or(|(_, at)| at > 0) {
            self.events.wake();
        }
    }

    /// The clock of [`Cache::tick`].
    pub fn now_ms() -> u64 {
        now_ms()
    }
}
