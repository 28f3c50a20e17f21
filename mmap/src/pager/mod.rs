//! The pager: the one thread that reads the userfaultfd and the channel.
//!
//! It never touches a mapped page, never waits to send, never takes a lock that is held by somebody
//! who may fault, and never moves pages: whatever waits for faults to be served would wait forever.

mod absence;
mod faults;
mod granted;
mod messages;
mod moved;
mod recalls;
mod service;
pub(crate) mod space;
pub(crate) mod told;
pub(crate) mod worker;

use crate::error::LostWhy;
use crate::file::FileInner;
use crate::granted::Pages;
use crate::limits::IN_FLIGHT_MAX;
use crate::quiet::Quiet;
use crate::session::Session;
use crate::shared::Shared;
use absence::Absence;
use copage_coherence::msg::{MESSAGE_BYTES_MAX, Request};
use crossbeam_channel::Receiver;
use faults::Faults;
use recalls::Recalls;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use told::Told;
use worker::Job;

/// Milliseconds of CLOCK_BOOTTIME, which goes on while the machine sleeps.
pub(crate) fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    // Both are positive.
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// The session lease as this side sees it.
struct Lease {
    ttl_ms: u64,
    /// When the lease ends: counted from when the last renewal that was granted was sent.
    ends_ms: u64,
    /// When to send the next renewal.
    renew_ms: u64,
    /// The renewal that is under way: its number and when it was sent.
    asked: Option<(u64, u64)>,
}

impl Lease {
    fn begun(session: &Session, hello_ms: u64) -> Self {
        let mut lease = Self {
            ttl_ms: 0,
            ends_ms: 0,
            renew_ms: 0,
            asked: None,
        };
        lease.granted(session, hello_ms, session.welcome().lease_ttl_ms);
        lease
    }

    /// Counted from when it was asked for: the daemon counts from when it heard, which is later.
    fn granted(&mut self, session: &Session, asked_ms: u64, ttl_ms: u32) {
        self.ttl_ms = u64::from(ttl_ms).max(3);
        self.ends_ms = asked_ms + self.ttl_ms;
        self.renew_ms = asked_ms + self.ttl_ms / 3;
        session.set_lease(self.ends_ms);
    }
}

/// How the session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// It serves.
    Live,
    /// It is over, and the daemon is looked for.
    Away,
    /// A new one is there; what was open is being opened again in it.
    Returning,
    /// The loss has been handed to the worker.
    Ending,
}

/// The state of the pager's thread.
pub(crate) struct Pager {
    shared: Arc<Shared>,
    /// The present session; while the daemon is away, the last.
    session: Arc<Session>,
    phase: Phase,
    /// From the end of a session that served until another serves.
    absence: Option<Absence>,
    /// Sessions that ended soon after they began, one after the other: how patiently to look for the
    /// next.
    short_lives: u32,
    live_since_ms: u64,
    faults: Faults,
    lease: Lease,
    /// What came; as long as a message can be.
    inbound: Vec<u8>,
    /// What goes; used again.
    outgoing: Vec<u8>,
    /// What other threads have to say.
    told: Receiver<Told>,
    /// What was given back and was not said yet: it is on its way again.
    unsaid: Vec<(Arc<FileInner>, Pages)>,
    recalls: Recalls,
    finished: Arc<AtomicBool>,
}

impl Pager {
    /// `hello_ms`: when Hello was sent.
    pub(crate) fn new(
        shared: Arc<Shared>,
        session: Arc<Session>,
        hello_ms: u64,
        finished: Arc<AtomicBool>,
        told: Receiver<Told>,
    ) -> Self {
        Self {
            shared,
            lease: Lease::begun(&session, hello_ms),
            session,
            phase: Phase::Live,
            absence: None,
            short_lives: 0,
            live_since_ms: hello_ms,
            faults: Faults::default(),
            inbound: vec![0; MESSAGE_BYTES_MAX],
            outgoing: Vec::new(),
            told,
            unsaid: Vec::new(),
            recalls: Recalls::default(),
            finished,
        }
    }

    /// Is there a session to speak in?
    fn speaks(&self) -> bool {
        matches!(self.phase, Phase::Live | Phase::Returning)
    }

    /// The pager's thread.
    pub(crate) fn run(mut self) {
        Quiet::forever();
        while !self.finished.load(Ordering::Acquire) {
            // A bug here must not leave threads waiting in their faults: it ends the session.
            if catch_unwind(AssertUnwindSafe(|| self.turn())).is_err() {
                self.lose(LostWhy::Internal);
            }
        }
        self.session.end();
        // One that was begun meanwhile, for nobody.
        while let Ok(told) = self.told.try_recv() {
            if let Told::Connected { session, .. } = told {
                session.end();
            }
        }
    }

    /// Waits for something and deals with it.
    fn turn(&mut self) {
        let (shared, session) = (Arc::clone(&self.shared), Arc::clone(&self.session));
        let channel = &session.channel;
        let speaks = self.speaks();
        let out = speaks && (session.has_outbound() || channel.has_rest());
        let mut fds = Vec::with_capacity(4);
        fds.push(PollFd::from_borrowed_fd(
            shared.line.common.wake.as_fd(),
            PollFlags::IN,
        ));
        if speaks {
            let room = if out && channel.carries_descriptors() {
                PollFlags::OUT
            } else {
                PollFlags::empty()
            };
            fds.push(PollFd::from_borrowed_fd(
                channel.read_fd(),
                PollFlags::IN | room,
            ));
        }
        // A ring has an event channel for each direction.
        if out && !channel.carries_descriptors() {
            fds.push(PollFd::from_borrowed_fd(channel.write_fd(), PollFlags::IN));
        }
        // With too many requests under way the faults wait in the kernel.
        let uffd = shared
            .uffd
            .as_ref()
            .ok()
            .filter(|_| self.faults.len() < IN_FLIGHT_MAX);
        if let Some(uffd) = uffd {
            fds.push(PollFd::new(uffd, PollFlags::IN));
        }
        let timeout = self.timeout();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => self.lose(LostWhy::Sys {
                call: "poll",
                errno: e.raw_os_error(),
            }),
        }
        let ready = |i: usize| fds.get(i).is_some_and(|fd| !fd.revents().is_empty());
        let (woken, spoken) = (ready(0), speaks && ready(1));
        let faulted = uffd.is_some() && ready(fds.len() - 1);
        drop(fds);
        if woken {
            shared.line.common.wake.drain();
            self.told();
        }
        // Unless the session that was polled is over.
        if spoken && self.speaks() {
            self.messages();
        }
        if faulted {
            self.events();
        }
        self.say_given_back();
        if self.phase != Phase::Ending && shared.line.is_closing() {
            self.session.post(&Request::Bye);
            self.lose(LostWhy::Closed);
        }
        if self.speaks() {
            self.session.flush();
            if self.session.overflowed() {
                let why = "the daemon reads nothing; the queue to it is full";
                self.lose(LostWhy::Protocol(why.into()));
            } else {
                self.renew();
            }
        }
        self.wait_on();
    }

    /// How long to wait: until the next renewal is due or the lease ends; while the daemon is away, until
    /// something is due for that.
    fn timeout(&self) -> Option<Timespec> {
        let of_lease = self.speaks().then_some(match self.lease.asked {
            Some(_) => self.lease.ends_ms,
            None => self.lease.renew_ms.min(self.lease.ends_ms),
        });
        let due = of_lease.into_iter().chain(self.absence_due()).min()?;
        // One more, so that it is past when the wait ends.
        let ms = due.saturating_sub(now_ms()) + 1;
        Some(Timespec {
            tv_sec: (ms / 1000) as i64,
            tv_nsec: (ms % 1000 * 1_000_000) as i64,
        })
    }

    /// Renews the lease when it is time; ends the session when the lease is over. What the daemon
    /// had to say was read before.
    fn renew(&mut self) {
        let now = now_ms();
        if now >= self.lease.ends_ms {
            self.lose(LostWhy::LeaseExpired);
        } else if now >= self.lease.renew_ms && self.lease.asked.is_none() {
            let number = self.session.next_request();
            self.lease.asked = Some((number, now));
            self.send(number, &Request::Renew);
        }
    }

    fn send(&mut self, number: u64, request: &Request<'_>) {
        let session = &self.session;
        match request.encode(number, session.epoch(), &mut self.outgoing) {
            Ok(()) => session.send(&self.outgoing),
            // The pager sends numbers only, and they are in range.
            Err(e) => tracing::error!(error = %e, "a request could not be encoded"),
        }
    }

    /// The session is over: the daemon is looked for if it may be there again, else all ends.
    fn lose(&mut self, why: LostWhy) {
        if !self.go_away(&why) {
            self.end(why);
        }
    }

    /// Ends it all: calls fail now, mappings as soon as the worker gets to them.
    fn end(&mut self, why: LostWhy) {
        if self.phase == Phase::Ending {
            return;
        }
        self.phase = Phase::Ending;
        // Who looks for the daemon stops.
        self.absence = None;
        if why != LostWhy::Closed {
            tracing::info!(%why, "lost");
        }
        self.shared.line.lose(why);
        self.forget_requests();
        // The worker lives as long as this thread.
        let _ = self.shared.jobs.send(Job::Lost);
    }

    /// Nothing that is under way comes to an end.
    fn forget_requests(&mut self) {
        self.faults.clear();
        self.unsaid.clear();
        self.recalls.clear();
        self.lease.asked = None;
    }
}
