//! The pager: the one thread that reads the userfaultfd and the channel.
//!
//! It never touches a mapped page, never waits to send, never takes a lock that is held by somebody
//! who may fault, and never moves pages: whatever waits for faults to be served would wait forever.

mod faults;
mod granted;
mod messages;
mod service;
pub(crate) mod space;
pub(crate) mod worker;

use crate::error::LostWhy;
use crate::file::FileInner;
use crate::granted::{Pages, Told};
use crate::limits::IN_FLIGHT_MAX;
use crate::quiet::Quiet;
use crate::session::Shared;
use copage_coherence::msg::{MESSAGE_BYTES_MAX, Request};
use crossbeam_channel::Receiver;
use faults::Faults;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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

/// The state of the pager's thread.
pub(crate) struct Pager {
    shared: Arc<Shared>,
    faults: Faults,
    lease: Lease,
    /// What came; as long as a message can be.
    inbound: Vec<u8>,
    /// What goes; used again.
    outgoing: Vec<u8>,
    /// What other threads have to say.
    told: Receiver<Told>,
    /// What was given back and was not said yet: it is on its way again.
    given_back: Vec<(Arc<FileInner>, Pages)>,
    /// The loss has been handed to the worker.
    ending: bool,
    finished: Arc<AtomicBool>,
}

impl Pager {
    /// `welcomed_ms`: when Hello was sent.
    pub(crate) fn new(
        shared: Arc<Shared>,
        welcomed_ms: u64,
        finished: Arc<AtomicBool>,
        told: Receiver<Told>,
    ) -> Self {
        let ttl_ms = u64::from(shared.welcome.lease_ttl_ms).max(3);
        shared.session.set_lease(welcomed_ms + ttl_ms);
        Self {
            shared,
            faults: Faults::default(),
            lease: Lease {
                ttl_ms,
                ends_ms: welcomed_ms + ttl_ms,
                renew_ms: welcomed_ms + ttl_ms / 3,
                asked: None,
            },
            inbound: vec![0; MESSAGE_BYTES_MAX],
            outgoing: Vec::new(),
            told,
            given_back: Vec::new(),
            ending: false,
            finished,
        }
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
        self.shared.session.channel.shutdown();
    }

    /// Waits for something and deals with it.
    fn turn(&mut self) {
        let shared = Arc::clone(&self.shared);
        let session = &shared.session;
        let channel = &session.channel;
        let out = !self.ending && (session.has_outbound() || channel.has_rest());
        let mut fds = Vec::with_capacity(4);
        fds.push(PollFd::new(&session.wake, PollFlags::IN));
        if !self.ending {
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
        let (woken, spoken) = (ready(0), !self.ending && ready(1));
        let faulted = uffd.is_some() && ready(fds.len() - 1);
        drop(fds);
        if woken {
            session.wake.drain();
            self.told();
        }
        if spoken {
            self.messages();
        }
        if faulted {
            self.events();
        }
        self.say_given_back();
        if !self.ending {
            session.flush();
            if session.is_closing() {
                session.post(&Request::Bye);
                self.lose(LostWhy::Closed);
            } else if session.overflowed() {
                let why = "the daemon reads nothing; the queue to it is full";
                self.lose(LostWhy::Protocol(why.into()));
            } else {
                self.renew();
            }
        }
    }

    /// How long to wait: until the next renewal is due or the lease ends.
    fn timeout(&self) -> Option<Timespec> {
        if self.ending {
            return None;
        }
        let due = match self.lease.asked {
            Some(_) => self.lease.ends_ms,
            None => self.lease.renew_ms.min(self.lease.ends_ms),
        };
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
            let number = self.shared.session.number();
            self.lease.asked = Some((number, now));
            self.send(number, &Request::Renew);
        }
    }

    fn send(&mut self, number: u64, request: &Request<'_>) {
        let session = &self.shared.session;
        match request.encode(number, session.epoch(), &mut self.outgoing) {
            Ok(()) => session.send(&self.outgoing),
            // The pager sends numbers only, and they are in range.
            Err(e) => tracing::error!(error = %e, "a request could not be encoded"),
        }
    }

    /// Ends the session: calls fail now, mappings as soon as the worker gets to them.
    fn lose(&mut self, why: LostWhy) {
        if self.ending {
            return;
        }
        self.ending = true;
        if why != LostWhy::Closed {
            tracing::info!(%why, "session lost");
        }
        self.shared.session.lose(why);
        self.faults.clear();
        self.given_back.clear();
        // The worker lives as long as this thread.
        let _ = self.shared.jobs.send(Job::Lost);
    }
}
