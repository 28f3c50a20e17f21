//! How sessions begin and end: what the machine says is done here.

use super::core::Core;
use super::ctx::{Bound, Ctx};
use super::dispatch::After;
use super::handles::Handles;
use super::limits::LAST_MESSAGES_MAX;
use super::outbox::Unsent;
use super::session::{Conn, Session};
use copage_cache::{CachedFile, GuestLimits, Holder};
use copage_coherence::msg::{FenceReason, FileToken, Notice, Reply, WelcomeFlags};
use copage_coherence::session::{Action, Event, Guest, Refusal, Subject};
use copage_coherence::strict::Output;
use copage_grants::channel::{Channel, Peer, ProcessPeer};
use copage_grants::xen::channel::limits::CONTROL_DOMID;
use copage_grants::{DomId, Epoch, TrustClass};
use std::collections::HashMap;
use std::sync::Arc;

/// A session that is over.
struct Over {
    epoch: Epoch,
    dom: DomId,
    guest: u32,
    /// Why it was fenced; `None`: it ended by itself.
    fenced: Option<FenceReason>,
}

impl Ctx {
    /// Makes a guest's limits known to the cache.
    pub(super) fn limit_guest(&self, guest: u32) {
        if let Some(entry) = self.guests.get(guest) {
            let limits = GuestLimits {
                frames_max: entry.limits.frames_max(),
                grants_max: entry.limits.grants_max,
                pinned_pages_max: entry.limits.pinned_pages_max(),
            };
            self.cache.set_limits(guest, limits);
        }
    }

    /// Begins a session and answers its Hello.
    fn welcome(&mut self, conn: &mut Conn, dom: DomId, epoch: Epoch) {
        let Some(hello) = conn.hello else { return };
        let Some(entry) = self.guests.get_mut(hello.guest) else {
            return;
        };
        entry.sessions += 1;
        let (name, limits) = (entry.name.clone(), entry.limits);
        let who = Holder {
            dom,
            guest: hello.guest,
            class: self.class_of(&conn.peer),
        };
        // Processes of this domain map grants as guests do, where the backend grants.
        let domid = match &conn.peer {
            Peer::Process(_) => CONTROL_DOMID,
            Peer::Domain(domain) => domain.domid,
        };
        let bound = self.backend.bind(dom, domid);
        self.bound.insert(dom, Bound { who, domid });
        conn.session = Some(Box::new(Session {
            epoch,
            who,
            name: name.clone(),
            handles: Handles::new(epoch),
            files: HashMap::new(),
            connected_ms: self.now_ms,
            in_flight: 0,
            bytes_in_flight: 0,
            requests: 0,
        }));
        self.by_dom.insert(dom, conn.id);
        self.by_epoch.insert(epoch, conn.id);
        self.coherent.who.insert(epoch, who);
        self.counts.sessions += 1;
        if let Err(error) = bound {
            tracing::error!(%error, guest = %name, "a session cannot be bound to its domain");
            self.refuse_with(
                conn,
                epoch,
                hello.request,
                error.errno(),
                &error.to_string(),
            );
            self.event(Event::End { epoch });
            return;
        }
        match &conn.peer {
            Peer::Process(ProcessPeer { pid, uid, .. }) => {
                tracing::info!(guest = %name, dom = dom.0, pid, uid, "connected");
            }
            Peer::Domain(domain) => {
                let (domain, domid) = (&domain.name, domain.domid);
                tracing::info!(guest = %name, dom = dom.0, %domain, domid, "connected");
            }
        }
        let carries = conn.channel.as_ref();
        let carries = carries.is_some_and(Channel::carries_descriptors);
        let fd = if hello.wants_userfaultfd && carries {
            self.userfaultfd.as_ref().and_then(|fd| fd.try_clone().ok())
        } else {
            None
        };
        let can = self.backend.capabilities();
        let config = self.machine.sessions().config();
        // A guest under the daemon's own uid is cooperative, whatever the backend enforces.
        let contained = match &conn.peer {
            Peer::Process(process) => process.uid != self.own_uid && process.uid != 0,
            Peer::Domain(_) => true,
        };
        let reply = Reply::Welcome {
            dom,
            epoch,
            lease_ttl_ms: config.lease_ttl_ms,
            invalidate_deadline_ms: config.invalidate_deadline_ms,
            handles_max: limits.handles_max,
            files_max: limits.files_max,
            flags: WelcomeFlags {
                forced_revoke: can.forced_revoke,
                read_only_enforced: can.read_only_enforced && contained,
                userfaultfd: fd.is_some(),
            },
            name: name.as_bytes(),
        };
        self.answer_with(conn, epoch, hello.request, &reply, fd);
    }
}

impl Core {
    /// Does what the machine said, until it has nothing more to say.
    pub(super) fn act(&mut self) {
        loop {
            self.act_sessions();
            if !self.act_strict() && self.ctx.actions.is_empty() {
                self.ctx.coherent.end_round();
                self.ctx.fill_pages();
                self.send_asks();
                if self.ctx.actions.is_empty() {
                    return;
                }
            }
        }
    }

    fn act_sessions(&mut self) {
        while let Some(output) = self.ctx.actions.pop_front() {
            let action = match output {
                Output::Session(action) => action,
                Output::Page(action) => {
                    self.ctx.page_action(action);
                    continue;
                }
            };
            match action {
                Action::Welcome {
                    conn: id,
                    dom,
                    epoch,
                } => match self.conns.get_mut(&id) {
                    Some(conn) => {
                        self.ctx.welcome(conn, dom, epoch);
                        self.greeted();
                        self.settle_conn(id);
                    }
                    // It went away meanwhile.
                    None => self.ctx.event(Event::End { epoch }),
                },
                Action::Refuse { conn: id, why } => self.refused(id, why),
                // Answered where it was asked.
                Action::Renewed { .. } => {}
                Action::Ask {
                    epoch,
                    recall,
                    subject: Subject::Place(place),
                } => self.ctx.ask_page(epoch, recall, place),
                Action::Ask {
                    epoch,
                    recall,
                    subject,
                } => {
                    if let Some(&id) = self.ctx.by_epoch.get(&epoch)
                        && let Some(conn) = self.conns.get_mut(&id)
                    {
                        self.ctx.send_recall(conn, epoch, recall, subject);
                        self.settle_conn(id);
                    }
                }
                Action::Settled {
                    recall, outcome, ..
                } => self.settled(recall, outcome),
                Action::Fenced {
                    epoch,
                    dom,
                    guest: Guest(guest),
                    reason,
                } => {
                    self.over(&Over {
                        epoch,
                        dom,
                        guest,
                        fenced: Some(reason),
                    });
                }
                Action::Ended {
                    epoch,
                    dom,
                    guest: Guest(guest),
                } => {
                    self.over(&Over {
                        epoch,
                        dom,
                        guest,
                        fenced: None,
                    });
                }
            }
        }
    }

    fn refused(&mut self, id: u64, why: Refusal) {
        self.ctx.counts.sessions_refused += 1;
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        if let Some(hello) = conn.hello {
            self.ctx
                .refuse(conn, hello.request, libc::EUSERS, &why.to_string());
        }
        self.drop_conn(id);
    }

    /// A session counts for nothing any more.
    fn over(&mut self, over: &Over) {
        self.ctx.by_dom.remove(&over.dom);
        let Some(id) = self.ctx.by_epoch.remove(&over.epoch) else {
            return;
        };
        let Some(mut conn) = self.conns.remove(&id) else {
            return;
        };
        let Some(session) = conn.session.take() else {
            return;
        };
        self.unwatch(&conn);
        let counts = &mut self.ctx.counts;
        match over.fenced {
            None => counts.ended += 1,
            Some(FenceReason::LeaseExpired) => counts.fenced_lease += 1,
            Some(FenceReason::DeadlineMissed) => counts.fenced_deadline += 1,
            Some(FenceReason::Protocol) => counts.fenced_protocol += 1,
            Some(FenceReason::Removed) => counts.fenced_removed += 1,
        }
        match over.fenced {
            Some(reason) => {
                tracing::warn!(guest = %session.name, dom = over.dom.0, ?reason, "fenced");
                // What waits in front of it counts for nothing either.
                conn.outbox = super::outbox::Outbox::default();
                self.ctx
                    .notify(&mut conn, over.epoch, &Notice::Fenced { reason }, None);
                self.ctx.cache.guest_fenced(session.who);
            }
            None => {
                tracing::info!(guest = %session.name, dom = over.dom.0, "ended");
                self.ctx.cache.guest_ended(session.who);
            }
        }
        if session.in_flight > 0 {
            self.ctx.late.insert(over.dom, session.in_flight);
        }
        if let Some(guest) = self.ctx.guests.get_mut(over.guest) {
            guest.handles = guest.handles.saturating_sub(session.handles.len());
        }
        for (token, open) in &session.files {
            self.ctx.forget_open(id, over.guest, *token, open);
        }
        let coherent = session
            .files
            .values()
            .filter(|open| open.file.is_coherent());
        let maps = coherent.map(|open| (open.file.id, open.how == copage_cache::OpenHow::Map));
        let fenced = over.fenced.is_some();
        let process = match conn.peer {
            Peer::Process(process) => Some(process.pidfd),
            Peer::Domain(_) => None,
        };
        self.ctx
            .strict_over(over.epoch, maps.collect(), fenced, process);
    }

    /// Domids that no entry names any more may be used again.
    pub(super) fn drained(&mut self) {
        if !self.ctx.machine.sessions().is_draining() {
            return;
        }
        let empty: Vec<(DomId, Guest)> = self
            .ctx
            .machine
            .sessions()
            .draining()
            .filter(|(dom, _)| {
                !self.ctx.late.contains_key(dom) && self.ctx.backend.grant_count(*dom) == 0
            })
            .collect();
        for (dom, Guest(guest)) in empty {
            if let Some(guest) = self.ctx.guests.get_mut(guest) {
                guest.sessions = guest.sessions.saturating_sub(1);
            }
            self.ctx.bound.remove(&dom);
            self.ctx.event(Event::Drained { dom });
        }
    }

    /// A guest said Bye: it has unmapped and closed, as by Close.
    pub(super) fn said_bye(&mut self, id: u64) {
        match self
            .conns
            .get(&id)
            .map(|c| c.session.as_ref().map(|s| s.epoch))
        {
            Some(Some(epoch)) => {
                self.ctx.event(Event::End { epoch });
                self.act();
            }
            Some(None) => self.drop_conn(id),
            None => {}
        }
    }

    /// A guest's process is gone, and its mappings with it.
    pub(super) fn process_ended(&mut self, id: u64) {
        self.said_bye(id);
    }

    /// A guest closed its channel. Its process may live and have pages mapped, so nothing is taken
    /// for unmapped: either the process ends next, or the lease does, and it is fenced.
    pub(super) fn hung_up(&mut self, id: u64) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        if conn.session.is_none() {
            self.drop_conn(id);
            return;
        }
        if matches!(conn.peer, Peer::Domain(_)) {
            // What is still mapped is seen in the grant table, whatever became of the process: there
            // is nobody whose word would be needed.
            self.said_bye(id);
            return;
        }
        conn.outbox = super::outbox::Outbox::default();
        let Some(channel) = conn.channel.take() else {
            return;
        };
        self.poller.remove_channel(&channel);
        // What it had said before: a reply that could not be sent must not hide the Bye behind it.
        for _ in 0..LAST_MESSAGES_MAX {
            let Some(conn) = self.conns.get_mut(&id).filter(|c| c.session.is_some()) else {
                return;
            };
            let Ok(received) = channel.try_recv(&mut self.buffer) else {
                return;
            };
            let bytes = self.buffer.get(..received.len).unwrap_or_default();
            if self.ctx.message(conn, bytes) == After::Close {
                self.said_bye(id);
                return;
            }
            self.act();
        }
    }

    pub(super) fn could_not_send(&mut self, id: u64, unsent: Unsent) {
        let epoch = self
            .conns
            .get(&id)
            .and_then(|c| c.session.as_ref())
            .map(|s| s.epoch);
        match (unsent, epoch) {
            (Unsent::Overflow, Some(epoch)) => {
                self.ctx.fence(epoch, FenceReason::Protocol);
                self.act();
            }
            _ => self.hung_up(id),
        }
    }

    /// A file has a newer content: who has it open is told.
    pub(super) fn retired(&mut self, file: &Arc<CachedFile>) {
        for (id, token) in self.openers_of(file) {
            if let Some(conn) = self.conns.get_mut(&id) {
                self.ctx.rebase(conn, token);
            }
        }
    }

    /// The cache ended a domain's opens of a file.
    pub(super) fn withdrawn(&mut self, file: &Arc<CachedFile>, dom: DomId) {
        let Some(&id) = self.ctx.by_dom.get(&dom) else {
            return;
        };
        for (_, token) in self.openers_of(file).into_iter().filter(|(c, _)| *c == id) {
            let session = self.conns.get_mut(&id).and_then(|c| c.session.as_mut());
            if let Some(open) = session.and_then(|s| s.files.get_mut(&token)) {
                open.withdrawn = true;
            }
        }
    }

    fn openers_of(&self, file: &Arc<CachedFile>) -> Vec<(u64, FileToken)> {
        self.ctx.openers.get(&file.id).cloned().unwrap_or_default()
    }
}

impl Ctx {
    /// Where there are no descriptors, grants keep guests apart.
    fn class_of(&self, peer: &Peer) -> TrustClass {
        match peer {
            Peer::Process(process) if self.backend.capabilities().descriptors => {
                trust_class(process.uid)
            }
            _ => TrustClass::OWN,
        }
    }
}

/// Processes of one user can read and stop each other anyway; root's and the daemon's can do more.
fn trust_class(uid: u32) -> TrustClass {
    let own = uid == 0 || uid == rustix::process::geteuid().as_raw();
    if own {
        TrustClass::OWN
    } else {
        TrustClass(uid)
    }
}
