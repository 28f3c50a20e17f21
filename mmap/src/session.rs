//! One session with a daemon as every thread but the pager sees it: calls that wait, posts that do
//! not, and the end. A client has one after the other ([`crate::line`]).

use crate::client::Welcome;
use crate::error::{LostWhy, MmapError, Result};
use crate::limits::OUTBOUND_MESSAGES_MAX;
use crate::pager::now_ms;
use crate::quiet::Leaf;
use crate::stamp::SessionNo;
use crate::sys::EventFd;
use copage_coherence::msg::{Frame, Reply, Request, decode_header};
use copage_grants::Epoch;
use copage_grants::channel::{Channel, ChannelError};
use crossbeam_channel::{Sender, bounded};
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// One reply as it came.
pub(crate) struct Answer {
    bytes: Vec<u8>,
    pub(crate) fd: Option<OwnedFd>,
}

impl Answer {
    pub(crate) fn new(bytes: Vec<u8>, fd: Option<OwnedFd>) -> Self {
        Self { bytes, fd }
    }

    /// The reply; an Error reply as [`MmapError::Refused`].
    pub(crate) fn reply(&self) -> Result<Reply<'_>> {
        let frame: Frame<'_> = decode_header(&self.bytes)?;
        match Reply::decode(&frame)? {
            Reply::Error { errno, text } => Err(MmapError::Refused {
                errno,
                text: String::from_utf8_lossy(text).into_owned(),
            }),
            reply => Ok(reply),
        }
    }
}

#[derive(Default)]
struct Calls {
    ended: bool,
    waiting: HashMap<u64, Sender<Answer>>,
}

/// What all sessions of a client have in common.
#[derive(Clone)]
pub(crate) struct Common {
    /// Brings the pager out of its poll.
    pub(crate) wake: Arc<EventFd>,
    /// Of requests: never used again, in a later session neither, so that an answer of the worker's
    /// that comes late is nobody's.
    next_request: Arc<AtomicU64>,
}

impl Common {
    pub(crate) fn new(wake: EventFd, next_request: u64) -> Self {
        Self {
            wake: Arc::new(wake),
            next_request: Arc::new(AtomicU64::new(next_request)),
        }
    }
}

/// See the module.
pub(crate) struct Session {
    number: SessionNo,
    welcome: Welcome,
    common: Common,
    pub(crate) channel: Channel,
    /// What the socket did not take at once, in order. A leaf lock, held over a send that does not
    /// wait, of bytes that are not mapped from the daemon.
    outbound: Leaf<VecDeque<Vec<u8>>>,
    overflow: AtomicBool,
    /// When the lease ends by this side's clock, in ms of CLOCK_BOOTTIME; the pager's to set.
    lease_ends_ms: AtomicU64,
    /// A leaf lock.
    calls: Leaf<Calls>,
}

impl Session {
    pub(crate) fn new(
        number: SessionNo,
        welcome: Welcome,
        channel: Channel,
        common: Common,
    ) -> Self {
        Self {
            number,
            welcome,
            common,
            channel,
            outbound: Leaf::new(VecDeque::new()),
            overflow: AtomicBool::new(false),
            lease_ends_ms: AtomicU64::new(0),
            calls: Leaf::new(Calls::default()),
        }
    }

    pub(crate) fn number(&self) -> SessionNo {
        self.number
    }

    /// What the daemon said as it began.
    pub(crate) fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// The session's epoch.
    pub(crate) fn epoch(&self) -> Epoch {
        self.welcome.epoch
    }

    pub(crate) fn set_lease(&self, ends_ms: u64) {
        self.lease_ends_ms.store(ends_ms, Ordering::SeqCst);
    }

    /// Does the lease still run, by this side's clock?
    pub(crate) fn has_lease(&self) -> bool {
        now_ms() < self.lease_ends_ms.load(Ordering::SeqCst)
    }

    /// A number no request had.
    pub(crate) fn next_request(&self) -> u64 {
        self.common.next_request.fetch_add(1, Ordering::Relaxed)
    }

    /// Asks and waits for the reply; [`MmapError::Lost`] when the session ended before it came. Never
    /// from the pager thread, and never with a lock held that the pager takes.
    pub(crate) fn call(&self, request: &Request<'_>) -> Result<Answer> {
        let number = self.next_request();
        // Encoded before any lock is taken: names may lie in mapped memory.
        let mut bytes = Vec::new();
        request.encode(number, self.epoch(), &mut bytes)?;
        let (sender, receiver) = bounded(1);
        {
            let mut calls = self.calls.lock();
            if calls.ended {
                return Err(ended());
            }
            calls.waiting.insert(number, sender);
        }
        self.send(&bytes);
        receiver.recv().map_err(|_| ended())
    }

    /// Sends what has no reply, or one that nobody waits for. Never waits, never fails: a session
    /// that has ended has nobody to tell.
    pub(crate) fn post(&self, request: &Request<'_>) {
        if self.calls.lock().ended {
            return;
        }
        let mut bytes = Vec::new();
        if request
            .encode(self.next_request(), self.epoch(), &mut bytes)
            .is_ok()
        {
            self.send(&bytes);
        }
    }

    /// Sends one encoded message, or queues it.
    pub(crate) fn send(&self, bytes: &[u8]) {
        {
            let mut outbound = self.outbound.lock();
            if outbound.is_empty() {
                match self.channel.try_send(bytes, None) {
                    Err(ChannelError::WouldBlock) => {}
                    // The pager waits for room for the rest.
                    Ok(()) if self.channel.has_rest() => return self.common.wake.signal(),
                    // Broken: the pager sees the hang-up and ends the session.
                    Ok(()) | Err(_) => return,
                }
            }
            if outbound.len() >= OUTBOUND_MESSAGES_MAX {
                self.overflow.store(true, Ordering::Relaxed);
            } else {
                outbound.push_back(bytes.to_vec());
            }
        }
        self.common.wake.signal();
    }

    /// Sends what is queued as far as the socket takes it. `true`: more is queued.
    pub(crate) fn flush(&self) -> bool {
        let mut outbound = self.outbound.lock();
        if self.channel.has_rest() && matches!(self.channel.flush(), Err(ChannelError::WouldBlock))
        {
            return true;
        }
        while let Some(bytes) = outbound.front() {
            if matches!(
                self.channel.try_send(bytes, None),
                Err(ChannelError::WouldBlock)
            ) {
                return true;
            }
            outbound.pop_front();
        }
        false
    }

    /// Is anything queued?
    pub(crate) fn has_outbound(&self) -> bool {
        !self.outbound.lock().is_empty()
    }

    /// The queue was full once.
    pub(crate) fn overflowed(&self) -> bool {
        self.overflow.load(Ordering::Relaxed)
    }

    /// Hands a reply to who waits for it. Nobody: it was posted.
    pub(crate) fn answer(&self, number: u64, answer: Answer) {
        let waiter = self.calls.lock().waiting.remove(&number);
        if let Some(waiter) = waiter {
            // A caller waits until it has the answer; it cannot be gone.
            let _ = waiter.send(answer);
        }
    }

    /// Ends all calls, now and from now on. Whoever calls this has told the line before, so that who
    /// asks again finds another session, or why there is none.
    pub(crate) fn end(&self) {
        let waiting = {
            let mut calls = self.calls.lock();
            calls.ended = true;
            std::mem::take(&mut calls.waiting)
        };
        drop(waiting);
        self.channel.shutdown();
    }
}

/// The session is over, whatever comes next; [`crate::shared::Shared::in_session`] knows what.
pub(crate) fn ended() -> MmapError {
    MmapError::Lost(LostWhy::HungUp)
}

/// A recall, to be acked in the session that it came in.
#[derive(Clone)]
pub(crate) struct Recall {
    pub(crate) session: Arc<Session>,
    pub(crate) number: u64,
}

impl Recall {
    pub(crate) fn ack(&self) {
        self.session.post(&Request::Ack {
            recall: self.number,
        });
    }
}
