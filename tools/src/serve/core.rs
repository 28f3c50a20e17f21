//! The loop: one thread that waits, takes what is ready, and does what comes of it.

use super::admin::AdminServer;
use super::clock::now_ms;
use super::complete::Answer;
use super::ctx::Ctx;
use super::dispatch::After;
use super::limits::{
    ACCEPT_PAUSE_MS, ACCEPTS_PER_TURN, CACHE_EVENTS_PER_ROUND, GREETING_MAX, GREETING_MS,
    MESSAGES_PER_TURN,
};
use super::poll::{Interest, Poller, Ready, Source};
use super::session::Conn;
use super::wake::Wake;
use super::xen::XenSide;
use copage_cache::CacheEvent;
use copage_coherence::msg::{FenceReason, MESSAGE_BYTES_MAX, Notice};
use copage_coherence::session::Event;
use copage_coherence::strict::{self, Input};
use copage_grants::channel::{Channel, ChannelError, Listener, Peer};
use copage_grants::sys::SignalFd;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

/// See the module.
pub(super) struct Core {
    pub(super) ctx: Ctx,
    pub(super) conns: HashMap<u64, Conn>,
    pub(super) poller: Poller,
    pub(super) admin: AdminServer,
    pub(super) wake: Arc<Wake>,
    /// Where guests are domains too.
    pub(super) xen: Option<XenSide>,
    pub(super) events: crossbeam_channel::Receiver<CacheEvent>,
    listener: Listener,
    signals: Option<SignalFd>,
    /// Nobody is accepted before: the process ran out of descriptors.
    accept_after_ms: Option<u64>,
    greeting: usize,
    next_conn: u64,
    cache_due_ms: Option<u64>,
    pub(super) buffer: Vec<u8>,
    stopping: bool,
    pub(super) epoch: u32,
    pub(super) started_ms: u64,
}

impl Core {
    pub(super) fn new(
        ctx: Ctx,
        admin: AdminServer,
        wake: Arc<Wake>,
        events: crossbeam_channel::Receiver<CacheEvent>,
        listener: Listener,
        signals: Option<SignalFd>,
        epoch: u32,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        listener.set_nonblocking(true).map_err(io::Error::other)?;
        poller.add(&listener, Source::Listener, Interest::READ)?;
        poller.add(admin.listener(), Source::AdminListener, Interest::READ)?;
        poller.add(&*wake, Source::Wake, Interest::READ)?;
        if let Some(signals) = &signals {
            poller.add(signals, Source::Signals, Interest::READ)?;
        }
        poller.add(ctx.cache.inotify_fd(), Source::Host, Interest::READ)?;
        Ok(Self {
            ctx,
            conns: HashMap::new(),
            poller,
            admin,
            wake,
            xen: None,
            events,
            listener,
            signals,
            accept_after_ms: None,
            greeting: 0,
            next_conn: 0,
            cache_due_ms: None,
            buffer: vec![0; MESSAGE_BYTES_MAX + 1],
            stopping: false,
            epoch,
            started_ms: now_ms(),
        })
    }

    /// Runs until somebody asks the daemon to stop.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let (mut events, mut ready) = (Vec::new(), Vec::new());
        while !self.stopping {
            self.arm()?;
            self.poller.wait(&mut events, &mut ready)?;
            self.ctx.now_ms = now_ms();
            self.ctx.counts.rounds += 1;
            // What fell due comes before what came late.
            self.ctx.event(Event::Tick);
            self.ctx.step(Input::Page(strict::Event::Tick));
            self.act();
            for one in &ready {
                self.take(*one);
                self.act();
            }
            self.xen_events();
            self.drain_cache_events();
            self.greetings();
            self.cache_due_ms = self.ctx.cache.tick(self.ctx.now_ms);
            self.drained();
            self.ctx.strict_due();
            self.act();
            self.stopping |= self.wake.is_stopping();
        }
        self.goodbye();
        Ok(())
    }

    fn arm(&mut self) -> io::Result<()> {
        // All greetings have the same term, so the oldest is due first.
        let greeting = if self.greeting == 0 {
            None
        } else {
            let waiting = self.conns.values().filter(|c| c.session.is_none());
            waiting.map(|c| c.since_ms + GREETING_MS).min()
        };
        let due = [
            self.ctx.machine.next_due_ms(),
            self.cache_due_ms,
            greeting,
            self.accept_after_ms,
            self.ctx.coherent.next_due_ms(),
        ];
        self.poller.arm(due.into_iter().flatten().min())
    }

    fn take(&mut self, ready: Ready) {
        match ready.source {
            Source::Listener => self.accept(),
            Source::AdminListener => self.admin_accept(),
            Source::Wake => self.wake.clear(),
            Source::Signals => self.signal(),
            Source::Timer => self.poller.rang(),
            Source::Host => self.ctx.cache.host_events(),
            Source::Guest(id) | Source::Room(id) => self.guest(id, ready),
            Source::Peer(id) => self.process_ended(id),
            Source::Admin(id) => self.admin_ready(id, ready),
        }
    }

    fn signal(&mut self) {
        while let Some(Ok(Some(info))) = self.signals.as_ref().map(SignalFd::read) {
            if info.signal == copage_grants::sys::lease_signal() {
                self.ctx.cache.lease_broken(info.fd);
            } else if info.signal == libc::SIGIO {
                // The kernel had no room for all of the lease breaks.
                self.ctx.cache.check_leases();
            } else {
                tracing::info!(signal = info.signal, "stopping");
                self.stopping = true;
            }
        }
    }

    /// A connection begins.
    pub(super) fn begin(&mut self, channel: Channel, peer: Peer) {
        if self.greeting >= GREETING_MAX {
            // Whoever has waited longest without a word makes room.
            let silent = self.conns.values().filter(|c| c.session.is_none());
            if let Some(oldest) = silent.min_by_key(|c| c.id).map(|c| c.id) {
                self.drop_conn(oldest);
            }
        }
        self.next_conn += 1;
        let conn = Conn::new(self.next_conn, channel, peer, self.ctx.now_ms);
        if let Err(error) = self.watch(&conn) {
            tracing::warn!(%error, "a connection could not be watched");
            return;
        }
        self.ctx.counts.connections += 1;
        self.greeting += 1;
        self.conns.insert(conn.id, conn);
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS_PER_TURN {
            match self.listener.accept() {
                Ok((channel, peer)) => self.begin(channel, Peer::Process(peer)),
                Err(ChannelError::WouldBlock) => return,
                Err(ChannelError::Sys {
                    call: "accept",
                    source,
                }) => {
                    tracing::warn!(error = %source, "no connection can be accepted now");
                    self.poller.remove(&self.listener);
                    self.accept_after_ms = Some(self.ctx.now_ms + ACCEPT_PAUSE_MS);
                    return;
                }
                // This one connection only.
                Err(error) => tracing::debug!(%error, "a connection went away"),
            }
        }
    }

    fn watch(&self, conn: &Conn) -> io::Result<()> {
        if let Peer::Process(process) = &conn.peer {
            self.poller
                .add(&process.pidfd, Source::Peer(conn.id), Interest::READ)?;
        }
        if let Some(channel) = &conn.channel
            && let Err(error) = self.poller.add_channel(channel, conn.id, conn.interest)
        {
            if let Peer::Process(process) = &conn.peer {
                self.poller.remove(&process.pidfd);
            }
            return Err(error);
        }
        Ok(())
    }

    /// A guest's channel is ready: some messages, then it is the next one's turn.
    fn guest(&mut self, id: u64, ready: Ready) {
        if ready.write
            && let Some(conn) = self.conns.get_mut(&id)
        {
            conn.flush();
            self.rebase_more(id);
        }
        let mut hung_up = ready.hung_up && !ready.read;
        let mut close = false;
        if ready.read {
            for _ in 0..MESSAGES_PER_TURN {
                // What the last message led to may have ended it.
                self.act();
                let Some(conn) = self.conns.get_mut(&id) else {
                    return;
                };
                let Some(channel) = &conn.channel else { return };
                if !conn.may_read() {
                    break;
                }
                match channel.try_recv(&mut self.buffer) {
                    Ok(received) => {
                        let bytes = self.buffer.get(..received.len).unwrap_or_default();
                        if self.ctx.message(conn, bytes) == After::Close {
                            close = true;
                            break;
                        }
                    }
                    Err(ChannelError::WouldBlock) => break,
                    Err(ChannelError::Truncated { .. } | ChannelError::Nonsense(_)) => {
                        self.ctx.counts.messages_bad += 1;
                        match &conn.session {
                            Some(session) => {
                                let epoch = session.epoch;
                                self.ctx.fence(epoch, FenceReason::Protocol);
                            }
                            None => close = true,
                        }
                        break;
                    }
                    Err(_) => {
                        hung_up = true;
                        break;
                    }
                }
            }
        }
        self.act();
        if close {
            self.said_bye(id);
        } else if hung_up {
            self.hung_up(id);
        }
        self.settle_conn(id);
    }

    /// Tells a guest of the new contents for which there was no room before.
    fn rebase_more(&mut self, id: u64) {
        while let Some(conn) = self.conns.get_mut(&id)
            && let Some(token) = conn.next_rebase()
        {
            self.ctx.rebase(conn, token);
            self.act();
        }
        while let Some(conn) = self.conns.get_mut(&id)
            && let Some(token) = conn.next_length()
        {
            self.tell_length(id, token);
            self.act();
        }
    }

    /// Brings what the poller waits for in line with what the connection is ready for, and sees to
    /// messages that could not be sent.
    pub(super) fn settle_conn(&mut self, id: u64) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        if let Some(unsent) = conn.unsent.take() {
            self.could_not_send(id, unsent);
            return;
        }
        let wanted = conn.wanted();
        if wanted == conn.interest {
            return;
        }
        let Some(channel) = &conn.channel else { return };
        match self.poller.change_channel(channel, id, wanted) {
            Ok(()) => conn.interest = wanted,
            Err(error) => {
                tracing::warn!(%error, "a connection can be watched no more");
                self.hung_up(id);
            }
        }
    }

    fn greetings(&mut self) {
        let now_ms = self.ctx.now_ms;
        if self.accept_after_ms.is_some_and(|at| at <= now_ms) {
            self.accept_after_ms = None;
            if self
                .poller
                .add(&self.listener, Source::Listener, Interest::READ)
                .is_err()
            {
                self.accept_after_ms = Some(now_ms + ACCEPT_PAUSE_MS);
            }
        }
        if self.greeting == 0 {
            return;
        }
        let late: Vec<u64> = self
            .conns
            .values()
            .filter(|c| c.session.is_none() && c.since_ms + GREETING_MS <= now_ms)
            .map(|c| c.id)
            .collect();
        for id in late {
            self.drop_conn(id);
        }
    }

    /// A connection without a session ends.
    pub(super) fn drop_conn(&mut self, id: u64) {
        let Some(conn) = self.conns.remove(&id) else {
            return;
        };
        self.unwatch(&conn);
        if conn.session.is_none() {
            self.greeting -= 1;
        }
    }

    /// A connection became a session.
    pub(super) fn greeted(&mut self) {
        self.greeting -= 1;
    }

    pub(super) fn unwatch(&self, conn: &Conn) {
        if let Peer::Process(process) = &conn.peer {
            self.poller.remove(&process.pidfd);
        }
        if let Some(channel) = &conn.channel {
            self.poller.remove_channel(channel);
        }
    }

    /// Passes on what the cache found, some at a time.
    fn drain_cache_events(&mut self) {
        for _ in 0..CACHE_EVENTS_PER_ROUND {
            let Ok(event) = self.events.try_recv() else {
                break;
            };
            self.cache_event(event);
            self.act();
        }
        if !self.events.is_empty() {
            self.wake.wake();
        }
        self.admin_answers();
    }

    fn cache_event(&mut self, event: CacheEvent) {
        let Some(event) = self.ctx.strict_event(event) else {
            return;
        };
        match event {
            CacheEvent::Meta { ticket, result } => self.answer(ticket, Answer::Meta(result)),
            CacheEvent::Opened { ticket, result } => self.answer(ticket, Answer::Opened(result)),
            CacheEvent::Read { ticket, result } => self.answer(ticket, Answer::Read(result)),
            CacheEvent::Faulted { ticket, result } => self.answer(ticket, Answer::Faulted(result)),
            CacheEvent::Retired {
                file,
                generation: _,
            } => self.retired(&file),
            CacheEvent::Withdrawn {
                file,
                dom,
                guest: _,
            } => self.withdrawn(&file, dom),
            // Of coherent files: taken above.
            CacheEvent::Placed { .. }
            | CacheEvent::Saved { .. }
            | CacheEvent::Synced { .. }
            | CacheEvent::Reserved { .. }
            | CacheEvent::Resized { .. }
            | CacheEvent::WantBack { .. }
            | CacheEvent::HostWants { .. }
            | CacheEvent::HostChanged { .. } => {}
            CacheEvent::Recall {
                file,
                generation,
                first,
                count,
                holders,
                reason,
            } => {
                let reason = super::convert::recall_reason(reason);
                for dom in holders {
                    let conn = self
                        .ctx
                        .by_dom
                        .get(&dom)
                        .and_then(|id| self.conns.get_mut(id));
                    let pages = (generation, first, count);
                    self.ctx.recall_pages(conn, &file, pages, dom, reason);
                }
            }
        }
    }

    pub(super) fn answer(&mut self, number: u64, answer: Answer) {
        let Some(ticket) = self.ctx.tickets.remove(&number) else {
            return;
        };
        let conn = self.conns.get_mut(&ticket.conn);
        self.ctx.complete(conn, ticket, answer);
        self.settle_conn(ticket.conn);
    }

    /// The daemon stops: everybody is told, nobody is waited for.
    fn goodbye(&mut self) {
        for conn in self.conns.values_mut() {
            if let Some(epoch) = conn.session.as_ref().map(|s| s.epoch) {
                self.ctx.notify(conn, epoch, &Notice::Goodbye, None);
            }
        }
        self.admin.flush_all();
        self.conns.clear();
    }
}
