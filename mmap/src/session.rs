//! The conversation with the daemon as every thread but the pager sees it: calls that wait, posts
//! that do not, and the end.

use crate::client::Welcome;
use crate::error::{LostWhy, MmapError, Result};
use crate::file::FileInner;
use crate::granted::{Granted, Opener, Told};
use crate::limits::OUTBOUND_MESSAGES_MAX;
use crate::pager::now_ms;
use crate::pager::space::Space;
use crate::pager::worker::Job;
use crate::quiet::Leaf;
use crate::sys::{EventFd, process_id};
use crate::uffd::Uffd;
use copage_coherence::msg::{FileToken, Frame, Reply, Request, decode_header};
use copage_grants::Epoch;
use copage_grants::channel::{Channel, ChannelError};
use crossbeam_channel::{Sender, bounded};
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

/// Called when the session is lost.
pub(crate) type LostCallback = Box<dyn FnOnce(&LostWhy) + Send>;

/// All that the threads of one session share.
pub(crate) struct Shared {
    pub(crate) session: Session,
    pub(crate) welcome: Welcome,
    /// The userfaultfd of this session, or why there is none.
    pub(crate) uffd: std::result::Result<Uffd, String>,
    /// The mappings by address. A leaf lock: nothing is called under it.
    pub(crate) space: Leaf<Space>,
    /// Open files by token, for notices. A leaf lock.
    files: Leaf<HashMap<FileToken, Weak<FileInner>>>,
    /// To the worker thread.
    pub(crate) jobs: Sender<Job>,
    /// An empty file: what pages that are SIGBUS are mapped from.
    pub(crate) empty: OwnedFd,
    /// To the pager, which is woken when it is idle.
    told: Sender<Told>,
    opener: Opener,
    /// What granted files are mapped with, from the first of them on.
    granted: OnceLock<std::result::Result<Granted, String>>,
}

impl Shared {
    pub(crate) fn new(
        session: Session,
        welcome: Welcome,
        uffd: std::result::Result<Uffd, String>,
        (jobs, told): (Sender<Job>, Sender<Told>),
        empty: OwnedFd,
        opener: Opener,
    ) -> Self {
        Self {
            session,
            welcome,
            uffd,
            space: Leaf::new(Space::default()),
            files: Leaf::new(HashMap::new()),
            jobs,
            empty,
            told,
            opener,
            granted: OnceLock::new(),
        }
    }

    /// Hands something to the pager. Never waits, never fails: a pager that has ended has nobody to
    /// tell.
    pub(crate) fn tell(&self, told: Told) {
        if self.told.send(told).is_ok() {
            self.session.wake.signal();
        }
    }

    /// What granted files are mapped with, or the error that says why they cannot be.
    pub(crate) fn granted(&self) -> Result<&Granted> {
        let granted = self
            .granted
            .get_or_init(|| (self.opener)().map(Granted::new));
        granted
            .as_ref()
            .map_err(|why| MmapError::NoGrants(why.clone()))
    }

    pub(crate) fn remember_file(&self, token: FileToken, file: &Arc<FileInner>) {
        self.files.lock().insert(token, Arc::downgrade(file));
    }

    /// Called as a file is dropped, in a forked child too.
    pub(crate) fn forget_file(&self, token: FileToken) {
        if self.session.check_process().is_ok() {
            self.files.lock().remove(&token);
        }
    }

    pub(crate) fn file(&self, token: FileToken) -> Option<Arc<FileInner>> {
        self.files.lock().get(&token).and_then(Weak::upgrade)
    }

    /// The userfaultfd, or the error that says why there is none.
    pub(crate) fn uffd(&self) -> Result<&Uffd> {
        self.uffd
            .as_ref()
            .map_err(|why| MmapError::NoUserfaultfd(why.clone()))
    }
}

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
    lost: Option<LostWhy>,
    waiting: HashMap<u64, Sender<Answer>>,
    callbacks: Vec<LostCallback>,
    /// The callbacks that were there have been called.
    told: bool,
}

/// See the module.
pub(crate) struct Session {
    pid: u32,
    epoch: Epoch,
    pub(crate) channel: Channel,
    /// Brings the pager out of its poll.
    pub(crate) wake: EventFd,
    next_request: AtomicU64,
    /// What the socket did not take at once, in order. A leaf lock, held over a send that does not
    /// wait, of bytes that are not mapped from the daemon.
    outbound: Leaf<VecDeque<Vec<u8>>>,
    overflow: AtomicBool,
    closing: AtomicBool,
    /// When the lease ends by this side's clock, in ms of CLOCK_BOOTTIME; the pager's to set.
    lease_ends_ms: AtomicU64,
    /// A leaf lock.
    calls: Leaf<Calls>,
}

impl Session {
    pub(crate) fn new(epoch: Epoch, channel: Channel, wake: EventFd, next_request: u64) -> Self {
        Self {
            pid: process_id(),
            epoch,
            channel,
            wake,
            next_request: AtomicU64::new(next_request),
            outbound: Leaf::new(VecDeque::new()),
            overflow: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            lease_ends_ms: AtomicU64::new(0),
            calls: Leaf::new(Calls::default()),
        }
    }

    /// The session's epoch.
    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Fails in a forked child. Checked before any lock: a lock may have been held by another
    /// thread at the fork, and nobody would ever release it here.
    pub(crate) fn check_process(&self) -> Result<()> {
        if process_id() == self.pid {
            Ok(())
        } else {
            Err(MmapError::Forked)
        }
    }

    pub(crate) fn set_lease(&self, ends_ms: u64) {
        self.lease_ends_ms.store(ends_ms, Ordering::SeqCst);
    }

    /// Does the lease still run, by this side's clock?
    pub(crate) fn has_lease(&self) -> bool {
        now_ms() < self.lease_ends_ms.load(Ordering::SeqCst)
    }

    /// A number no request had.
    pub(crate) fn number(&self) -> u64 {
        self.next_request.fetch_add(1, Ordering::Relaxed)
    }

    /// Asks and waits for the reply. Never from the pager thread, and never with a lock held that
    /// the pager takes.
    pub(crate) fn call(&self, request: &Request<'_>) -> Result<Answer> {
        self.check_process()?;
        let number = self.number();
        // Encoded before any lock is taken: names may lie in mapped memory.
        let mut bytes = Vec::new();
        request.encode(number, self.epoch, &mut bytes)?;
        let (sender, receiver) = bounded(1);
        {
            let mut calls = self.calls.lock();
            if let Some(why) = &calls.lost {
                return Err(MmapError::Lost(why.clone()));
            }
            calls.waiting.insert(number, sender);
        }
        self.send(&bytes);
        receiver.recv().map_err(|_| self.lost_error())
    }

    /// Sends what has no reply, or one that nobody waits for. Never waits, never fails: a session
    /// that is lost has nobody to tell.
    pub(crate) fn post(&self, request: &Request<'_>) {
        if self.check_process().is_err() || self.calls.lock().lost.is_some() {
            return;
        }
        let mut bytes = Vec::new();
        if request
            .encode(self.number(), self.epoch, &mut bytes)
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
                    Ok(()) if self.channel.has_rest() => return self.wake.signal(),
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
        self.wake.signal();
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

    /// Asks the pager to end the session. Never waits.
    pub(crate) fn close(&self) {
        if self.check_process().is_ok() {
            self.closing.store(true, Ordering::Release);
            self.wake.signal();
        }
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Hands a reply to who waits for it. Nobody: it was posted.
    pub(crate) fn answer(&self, number: u64, answer: Answer) {
        let waiter = self.calls.lock().waiting.remove(&number);
        if let Some(waiter) = waiter {
            // A caller waits until it has the answer; it cannot be gone.
            let _ = waiter.send(answer);
        }
    }

    /// Ends all calls, now and from now on. `false`: the session was lost before.
    pub(crate) fn lose(&self, why: LostWhy) -> bool {
        let waiting = {
            let mut calls = self.calls.lock();
            if calls.lost.is_some() {
                return false;
            }
            calls.lost = Some(why);
            std::mem::take(&mut calls.waiting)
        };
        drop(waiting);
        true
    }

    pub(crate) fn lost(&self) -> Option<LostWhy> {
        if self.check_process().is_err() {
            return None;
        }
        self.calls.lock().lost.clone()
    }

    pub(crate) fn lost_error(&self) -> MmapError {
        MmapError::Lost(self.lost().unwrap_or(LostWhy::HungUp))
    }

    /// Keeps a callback, or calls it when it is too late for keeping.
    pub(crate) fn on_lost(&self, callback: LostCallback) {
        if self.check_process().is_err() {
            return;
        }
        let why = {
            let mut calls = self.calls.lock();
            if !calls.told {
                calls.callbacks.push(callback);
                return;
            }
            calls.lost.clone()
        };
        if let Some(why) = why.filter(|why| *why != LostWhy::Closed) {
            callback(&why);
        }
    }

    /// Calls the callbacks. From the worker, when every mapping is SIGBUS.
    pub(crate) fn tell_lost(&self) {
        let (callbacks, why) = {
            let mut calls = self.calls.lock();
            calls.told = true;
            (std::mem::take(&mut calls.callbacks), calls.lost.clone())
        };
        if let Some(why) = why.filter(|why| *why != LostWhy::Closed) {
            for callback in callbacks {
                callback(&why);
            }
        }
    }
}
