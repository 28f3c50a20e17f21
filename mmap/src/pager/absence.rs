//! The daemon is gone: what is shown until it is back, and for how long that is waited for.
//!
//! What is mapped stays readable until the lease of the session that gave it ends: until then the daemon,
//! or the next one, lets nobody change it. From then on, at once when the daemon said Goodbye, it is
//! hollow: memory in which every access is a fault. Faults are read, so that nothing that moves pages
//! waits, and let lie. When another session serves, whoever waits is woken and faults again.

use super::{Lease, Pager, Phase, now_ms};
use crate::error::LostWhy;
use crate::limits::STEADY_MS;
use crate::pager::worker::Job;
use crate::returning;
use crate::session::Session;
use crate::stamp::SessionNo;
use crossbeam_channel::Sender;
use std::sync::Arc;

/// See the module.
pub(super) struct Absence {
    /// Why the last session that served ended.
    why: LostWhy,
    /// When it is given up.
    until_ms: u64,
    /// When what is shown must go; `None`: it has gone.
    hollow_ms: Option<u64>,
    /// Dropped: who looks for the daemon stops.
    _looking: Sender<()>,
}

impl Pager {
    /// Looks for the daemon, if this kind of loss can be made good. `false`: nothing was done.
    pub(super) fn go_away(&mut self, why: &LostWhy) -> bool {
        let gone = match why {
            LostWhy::HungUp | LostWhy::Stopped => true,
            // It was there a moment ago, and then no more.
            LostWhy::LeaseExpired => self.phase == Phase::Returning,
            _ => false,
        };
        let Some(dialer) = self.shared.dialer.as_ref().filter(|_| gone) else {
            return false;
        };
        if !self.speaks() || self.shared.line.is_closing() {
            return false;
        }
        let now = now_ms();
        let before = self.absence.take();
        let served = before.is_none();
        self.short_lives = match served && now >= self.live_since_ms + STEADY_MS {
            true => 0,
            false => self.short_lives.saturating_add(1),
        };
        // Of a session that never served some files may be shown already.
        let hollow_ms = match (served, why) {
            (true, LostWhy::HungUp) => self.lease.ends_ms,
            _ => now,
        };
        let (why, until_ms) = match before {
            Some(before) => (before.why, before.until_ms),
            None => {
                tracing::info!(%why, "the daemon is gone; looking for the next one");
                (why.clone(), now + dialer.reconnect_ms)
            }
        };
        self.phase = Phase::Away;
        self.shared.line.away();
        self.session.end();
        self.forget_requests();
        let last = (self.session.number(), self.session.epoch());
        match returning::look(&self.shared, last, self.short_lives) {
            Ok(looking) => {
                self.absence = Some(Absence {
                    why,
                    until_ms,
                    hollow_ms: Some(hollow_ms),
                    _looking: looking,
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the daemon cannot be looked for");
                self.end(why);
            }
        }
        true
    }

    /// When it is given up. Not while the daemon is there again: then the new lease is what counts.
    fn given_up_ms(&self) -> u64 {
        let absence = self.absence.as_ref();
        let away = absence.filter(|_| self.phase == Phase::Away);
        away.map_or(u64::MAX, |absence| absence.until_ms)
    }

    /// When something is due while the daemon is away.
    pub(super) fn absence_due(&self) -> Option<u64> {
        let hollow_ms = self.absence.as_ref()?.hollow_ms.unwrap_or(u64::MAX);
        Some(self.given_up_ms().min(hollow_ms)).filter(|due| *due != u64::MAX)
    }

    /// Does what is due while the daemon is away.
    pub(super) fn wait_on(&mut self) {
        let given_up = now_ms() >= self.given_up_ms();
        let Some(absence) = &mut self.absence else {
            return;
        };
        if absence.hollow_ms.is_some_and(|at| now_ms() >= at) {
            absence.hollow_ms = None;
            let last = match self.phase {
                Phase::Returning => self.session.number().before(),
                _ => Some(self.session.number()),
            };
            if let Some(last) = last {
                let _ = self.shared.jobs.send(Job::Hollow(last));
            }
        }
        if given_up {
            let why = absence.why.clone();
            self.end(why);
        }
    }

    /// A daemon is there.
    pub(super) fn connected(&mut self, session: Arc<Session>, hello_ms: u64) {
        if self.phase != Phase::Away {
            session.end();
            return;
        }
        self.lease = Lease::begun(&session, hello_ms);
        self.phase = Phase::Returning;
        self.shared.line.returning(Arc::clone(&session));
        self.session = session;
    }

    /// All that was open is open again, or known to be gone; the jobs that show it are with the worker.
    pub(super) fn returned(&mut self, number: SessionNo) {
        if self.phase != Phase::Returning || self.session.number() != number {
            return;
        }
        self.phase = Phase::Live;
        self.absence = None;
        self.live_since_ms = now_ms();
        self.shared.line.live(Arc::clone(&self.session));
        tracing::info!(epoch = self.session.epoch().0, "connected again");
        // Those whose faults were let lie.
        if let Ok(uffd) = &self.shared.uffd {
            let mappings = self.shared.space.lock().all();
            for mapped in mappings {
                mapped.wake_all(uffd);
            }
        }
    }
}
