//! The host beside a coherent file: it waits for the lease, or what it does is noticed afterwards.

use crate::cache::{Cache, now_ms};
use crate::events::CacheEvent;
use crate::file::{CachedFile, Inner, Lease};
use crate::limits::{DRAIN_POLL_MS, LEASE_PAUSE_MS_MAX};
use copage_grants::sys::LeaseKind;
use rustix::fs::inotify::ReadFlags;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

impl CachedFile {
    /// Of a file that guests may write nobody else is to have it open; of others, nobody for writing.
    pub(crate) fn lease_kind(&self) -> LeaseKind {
        match &self.coherent {
            Some(coherent) if coherent.writable.is_ok() => LeaseKind::Write,
            _ => LeaseKind::Read,
        }
    }
}

impl Cache {
    /// The kernel reports that the host wants the file: the loop takes all pages.
    pub(crate) fn ask_for_host(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        self.counters.leases_broken.fetch_add(1, Relaxed);
        inner.lease = Lease::Breaking;
        inner.state.host_bounded = true;
        self.events
            .send(CacheEvent::HostWants { file: file.clone() });
    }

    /// All pages of the file are taken: whoever of the host waits for it goes on. The file is host-bounded until the
    /// lease is to be had again.
    pub fn strict_let_host_in(&self, file: &Arc<CachedFile>) {
        let mut inner = file.inner.lock();
        if inner.lease == Lease::Breaking {
            self.give_up_lease(file, &mut inner);
        }
        inner.state.host_bounded = true;
        self.try_lease_soon(file, &mut inner);
    }

    /// The lease is tried for a few times, then when the host is heard of again.
    fn try_lease_soon(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        if inner.lease == Lease::Wanted && !inner.dead {
            inner.strict.lease_retry = Some((now_ms() + DRAIN_POLL_MS, DRAIN_POLL_MS));
            self.look_at(file, inner);
        }
    }

    /// From `tick`.
    pub(crate) fn retry_lease(&self, file: &Arc<CachedFile>, inner: &mut Inner, now_ms: u64) {
        let Some((at_ms, pause_ms)) = inner.strict.lease_retry else {
            return;
        };
        if inner.dead || inner.live.is_none() || now_ms < at_ms {
            return;
        }
        self.take_lease(file, inner);
        let next_ms = pause_ms * 2;
        let again = inner.lease == Lease::Wanted && next_ms <= LEASE_PAUSE_MS_MAX;
        inner.strict.lease_retry = again.then_some((now_ms + next_ms, next_ms));
    }

    /// What the host did while there was no lease counts in full: also through mappings, which change no times.
    fn take_lease(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        if inner.lease != Lease::Wanted {
            return;
        }
        self.try_lease(file, inner);
        if inner.lease != Lease::Held {
            return;
        }
        let is_same = file.read_cookie().is_ok_and(|(c, _)| c == inner.cookie);
        if inner.has_pages() || !is_same || inner.strict.is_changed {
            self.tell_changed(file, inner);
        } else {
            inner.state.host_bounded = false;
        }
    }

    /// Looks whether the host's file is still what the daemon knows. Without a lease only.
    pub(crate) fn check_strict_host(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        let Some(coherent) = &file.coherent else {
            return;
        };
        let has_lease = matches!(inner.lease, Lease::Held | Lease::Breaking);
        if inner.dead || inner.live.is_none() || has_lease {
            return;
        }
        // One of its own is under way: who writes looks itself.
        if coherent.is_writing.load(SeqCst) {
            return;
        }
        if let Ok((cookie, _)) = file.read_cookie()
            && !self.is_own(inner, cookie)
        {
            self.tell_changed(file, inner);
        }
        self.take_lease(file, inner);
        if inner.strict.lease_retry.is_none() {
            self.try_lease_soon(file, inner);
        }
    }

    /// A notification that was not there yet when the own write numbered `before` had ended.
    pub(crate) fn look_at_strict(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
        events: ReadFlags,
        before: u64,
    ) {
        let Some(coherent) = &file.coherent else {
            return;
        };
        // An own write's comes before it ends. Where there was one, only the times tell.
        let is_own = coherent.is_writing.load(SeqCst) || coherent.own_write.load(SeqCst) > before;
        let is_bounded = inner.lease != Lease::Held && inner.live.is_some();
        if events.contains(ReadFlags::MODIFY) && is_bounded && !is_own {
            self.tell_changed(file, inner);
        }
        self.check_strict_host(file, inner);
        if events.intersects(ReadFlags::CLOSE_WRITE | ReadFlags::CLOSE_NOWRITE) {
            // The kernel tells it before it lets go.
            self.try_lease_soon(file, inner);
        }
        // Unlinked, and nobody has it open: nobody can ask for it again.
        let is_gone = || file.read_cookie().is_ok_and(|(_, links)| links == 0);
        if events.contains(ReadFlags::ATTRIB) && inner.is_idle() && is_gone() {
            self.leave(file, inner);
        }
    }
}
