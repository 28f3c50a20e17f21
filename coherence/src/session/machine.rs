//! The machine.

use super::{Action, Event, Guest, RecallOutcome, Refusal, SessionConfig, Subject};
use crate::limits::{
    DOM_END, DOM_FIRST, DRIFT_PERMILLE, LEASE_TTL_MS_MAX, LEASE_TTL_MS_MIN, RECALLS_MAX,
    SESSIONS_MAX,
};
use crate::msg::FenceReason;
use copage_grants::{DomId, Epoch};
use std::collections::{BTreeMap, BTreeSet};

/// All sessions of a daemon. Equal states behave equally: a model checker can hash them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sessions {
    config: SessionConfig,
    /// The latest time seen: time that goes back counts as standing still.
    now_ms: u64,
    next_epoch: u64,
    next_recall: u64,
    next_dom: u16,
    live: BTreeMap<Epoch, Session>,
    /// Domids of sessions that are gone, until no entry names them.
    draining: BTreeMap<DomId, Guest>,
    /// Everything that falls due: when, whose, and which recall (0: the lease).
    due: BTreeSet<(u64, Epoch, u64)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Session {
    dom: DomId,
    guest: Guest,
    lease_until_ms: u64,
    /// Deadlines of what it has not answered, by number.
    recalls: BTreeMap<u64, u64>,
}

const LEASE: u64 = 0;

impl Sessions {
    /// No sessions. Epochs are given from `first_epoch` on, which must be above every epoch of
    /// earlier daemons. Terms and limits out of bounds are moved to the nearest bound.
    pub fn new(config: SessionConfig, first_epoch: Epoch) -> Self {
        let config = SessionConfig {
            lease_ttl_ms: config
                .lease_ttl_ms
                .clamp(LEASE_TTL_MS_MIN, LEASE_TTL_MS_MAX),
            invalidate_deadline_ms: config
                .invalidate_deadline_ms
                .clamp(LEASE_TTL_MS_MIN, LEASE_TTL_MS_MAX),
            sessions_max: config.sessions_max.clamp(1, SESSIONS_MAX),
            guest_sessions_max: config.guest_sessions_max.clamp(1, SESSIONS_MAX),
            recalls_max: config.recalls_max.clamp(1, RECALLS_MAX),
        };
        Self {
            config,
            now_ms: 0,
            next_epoch: first_epoch.0.max(1),
            next_recall: LEASE + 1,
            next_dom: DOM_FIRST,
            live: BTreeMap::new(),
            draining: BTreeMap::new(),
            due: BTreeSet::new(),
        }
    }

    /// The terms and limits in force.
    pub const fn config(&self) -> SessionConfig {
        self.config
    }

    /// Takes one event at a time `now_ms` of a clock that also runs while the machine sleeps, and
    /// appends what is to be done to `out`. What fell due by then comes first: a renewal or an ack
    /// that is late is too late, whoever noticed.
    pub fn step(&mut self, now_ms: u64, event: Event, out: &mut Vec<Action>) {
        self.now_ms = self.now_ms.max(now_ms);
        self.expire(out);
        match event {
            Event::Connect { conn, guest } => self.connect(conn, guest, out),
            Event::Renew { epoch } => self.renew(epoch, out),
            Event::Ack { epoch, recall } | Event::Settle { epoch, recall } => {
                self.ack(epoch, recall, out);
            }
            Event::Recall { epoch, subject } => self.recall(epoch, subject, out),
            Event::Fence { epoch, reason } => self.fence(epoch, reason, out),
            Event::End { epoch } => self.end(epoch, out),
            Event::Drained { dom } => {
                self.draining.remove(&dom);
            }
            Event::Tick => {}
        }
    }

    /// When the next thing falls due, in ms; `None` while there is no session.
    pub fn next_due_ms(&self) -> Option<u64> {
        self.due.first().map(|&(at, _, _)| at)
    }

    /// Does a message that carries this epoch count at `now_ms`?
    pub fn counts(&self, now_ms: u64, epoch: Epoch) -> bool {
        self.live
            .get(&epoch)
            .is_some_and(|s| self.now_ms.max(now_ms) < s.lease_until_ms)
    }

    /// Live sessions.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// No live session.
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// What is left of a session's lease, in ms, and how many recalls it owes an answer.
    pub fn standing(&self, now_ms: u64, epoch: Epoch) -> Option<(u64, usize)> {
        let s = self.live.get(&epoch)?;
        Some((
            s.lease_until_ms.saturating_sub(self.now_ms.max(now_ms)),
            s.recalls.len(),
        ))
    }

    /// Domids of sessions that are gone and not drained yet, with whose they were.
    pub fn draining(&self) -> impl Iterator<Item = (DomId, Guest)> + '_ {
        self.draining.iter().map(|(&d, &g)| (d, g))
    }

    /// Something waits for [`Event::Drained`].
    pub fn is_draining(&self) -> bool {
        !self.draining.is_empty()
    }

    fn expire(&mut self, out: &mut Vec<Action>) {
        while let Some(&(at, epoch, what)) = self.due.first() {
            if at > self.now_ms {
                break;
            }
            let reason = if what == LEASE {
                FenceReason::LeaseExpired
            } else {
                FenceReason::DeadlineMissed
            };
            self.fence(epoch, reason, out);
            // A fence removes all of a session's entries; an entry without one must not stay.
            self.due.remove(&(at, epoch, what));
        }
    }

    fn connect(&mut self, conn: u64, guest: Guest, out: &mut Vec<Action>) {
        let of_guest = self.live.values().filter(|s| s.guest == guest).count()
            + self.draining.values().filter(|&&g| g == guest).count();
        let why = if of_guest >= self.config.guest_sessions_max {
            Some(Refusal::GuestSessions(of_guest))
        } else if self.live.len() + self.draining.len() >= self.config.sessions_max {
            Some(Refusal::Sessions(self.live.len() + self.draining.len()))
        } else {
            None
        };
        // There are more domids than sessions_max can take, so one is free when `why` is None.
        let (None, Some(dom)) = (why, self.free_dom()) else {
            let why = why.unwrap_or(Refusal::Sessions(self.live.len()));
            out.push(Action::Refuse { conn, why });
            return;
        };
        let epoch = Epoch(self.next_epoch);
        self.next_epoch += 1;
        let lease_until_ms = self.after(self.config.lease_ttl_ms);
        self.due.insert((lease_until_ms, epoch, LEASE));
        self.live.insert(
            epoch,
            Session {
                dom,
                guest,
                lease_until_ms,
                recalls: BTreeMap::new(),
            },
        );
        out.push(Action::Welcome { conn, dom, epoch });
    }

    /// The next domid in the round that nobody has: one that was given back is used as late as can be.
    fn free_dom(&mut self) -> Option<DomId> {
        let taken: BTreeSet<DomId> = self
            .live
            .values()
            .map(|s| s.dom)
            .chain(self.draining.keys().copied())
            .collect();
        let round = (self.next_dom..DOM_END).chain(DOM_FIRST..self.next_dom);
        let dom = round.map(DomId).find(|dom| !taken.contains(dom))?;
        self.next_dom = if dom.0 + 1 < DOM_END {
            dom.0 + 1
        } else {
            DOM_FIRST
        };
        Some(dom)
    }

    fn renew(&mut self, epoch: Epoch, out: &mut Vec<Action>) {
        let until = self.after(self.config.lease_ttl_ms);
        let Some(session) = self.live.get_mut(&epoch) else {
            return;
        };
        self.due.remove(&(session.lease_until_ms, epoch, LEASE));
        self.due.insert((until, epoch, LEASE));
        session.lease_until_ms = until;
        out.push(Action::Renewed { epoch });
    }

    fn ack(&mut self, epoch: Epoch, recall: u64, out: &mut Vec<Action>) {
        let Some(session) = self.live.get_mut(&epoch) else {
            return;
        };
        let Some(deadline_ms) = session.recalls.remove(&recall) else {
            return;
        };
        self.due.remove(&(deadline_ms, epoch, recall));
        out.push(Action::Settled {
            epoch,
            recall,
            outcome: RecallOutcome::Acked,
        });
    }

    fn recall(&mut self, epoch: Epoch, subject: Subject, out: &mut Vec<Action>) {
        let deadline_ms = self.after(self.config.invalidate_deadline_ms);
        let Some(session) = self.live.get_mut(&epoch) else {
            return;
        };
        if session.recalls.len() >= self.config.recalls_max {
            self.fence(epoch, FenceReason::Protocol, out);
            return;
        }
        let recall = self.next_recall;
        self.next_recall += 1;
        session.recalls.insert(recall, deadline_ms);
        self.due.insert((deadline_ms, epoch, recall));
        out.push(Action::Ask {
            epoch,
            recall,
            subject,
        });
    }

    fn fence(&mut self, epoch: Epoch, reason: FenceReason, out: &mut Vec<Action>) {
        if let Some(Session { dom, guest, .. }) = self.remove(epoch, RecallOutcome::Fenced, out) {
            out.push(Action::Fenced {
                epoch,
                dom,
                guest,
                reason,
            });
        }
    }

    fn end(&mut self, epoch: Epoch, out: &mut Vec<Action>) {
        if let Some(Session { dom, guest, .. }) = self.remove(epoch, RecallOutcome::Ended, out) {
            out.push(Action::Ended { epoch, dom, guest });
        }
    }

    /// Takes a session out; its domid waits to be drained.
    fn remove(
        &mut self,
        epoch: Epoch,
        outcome: RecallOutcome,
        out: &mut Vec<Action>,
    ) -> Option<Session> {
        let session = self.live.remove(&epoch)?;
        self.due.remove(&(session.lease_until_ms, epoch, LEASE));
        for (&recall, &deadline_ms) in &session.recalls {
            self.due.remove(&(deadline_ms, epoch, recall));
            out.push(Action::Settled {
                epoch,
                recall,
                outcome,
            });
        }
        self.draining.insert(session.dom, session.guest);
        Some(session)
    }

    /// `term_ms` from now, and the drift that two clocks may have in it.
    fn after(&self, term_ms: u32) -> u64 {
        let term_ms = u64::from(term_ms);
        self.now_ms
            .saturating_add(term_ms)
            .saturating_add(term_ms * DRIFT_PERMILLE / 1000)
    }
}
