//! A client's line to the daemon: which session there is, who waits for the next one, and the end.

use crate::client::Welcome;
use crate::error::{LostWhy, MmapError, Result};
use crate::quiet::Leaf;
use crate::session::{Common, Session};
use crate::stamp::SessionNo;
use crate::sys::process_id;
use crossbeam_channel::{Sender, bounded};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Called when the line is lost.
pub(crate) type LostCallback = Box<dyn FnOnce(&LostWhy) + Send>;

enum State {
    /// The session serves.
    Live(Arc<Session>),
    /// It is there, and files are being opened again in it: who asks waits.
    Returning(Arc<Session>),
    /// The daemon is gone and looked for: who asks waits.
    Away,
    /// For good.
    Lost(LostWhy),
}

struct Inner {
    state: State,
    /// The last session's.
    welcome: Welcome,
    /// Dropped when the state changes.
    waiting: Vec<Sender<()>>,
    callbacks: Vec<LostCallback>,
    /// The callbacks that were there have been called.
    told: bool,
}

/// See the module. Only the pager changes the state, but for [`Line::lose`].
pub(crate) struct Line {
    pid: u32,
    pub(crate) common: Common,
    closing: AtomicBool,
    reconnects: AtomicU64,
    /// A leaf lock.
    inner: Leaf<Inner>,
}

impl Line {
    pub(crate) fn new(session: Arc<Session>, common: Common) -> Self {
        let welcome = session.welcome().clone();
        Self {
            pid: process_id(),
            common,
            closing: AtomicBool::new(false),
            reconnects: AtomicU64::new(0),
            inner: Leaf::new(Inner {
                state: State::Live(session),
                welcome,
                waiting: Vec::new(),
                callbacks: Vec::new(),
                told: false,
            }),
        }
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

    /// The session that serves; waits while the daemon is away. Never from a thread of the library.
    pub(crate) fn session(&self) -> Result<Arc<Session>> {
        self.check_process()?;
        loop {
            let changed = {
                let mut inner = self.inner.lock();
                match &inner.state {
                    State::Live(session) => return Ok(Arc::clone(session)),
                    State::Lost(why) => return Err(MmapError::Lost(why.clone())),
                    State::Returning(_) | State::Away => {}
                }
                let (sender, changed) = bounded(0);
                inner.waiting.push(sender);
                changed
            };
            // Not under the lock, with which signals are blocked: a user may give up waiting.
            let _ = changed.recv();
        }
    }

    /// The session that the daemon has of us now, without waiting: to give back what is of it.
    pub(crate) fn present(&self) -> Option<Arc<Session>> {
        self.check_process().ok()?;
        match &self.inner.lock().state {
            State::Live(session) | State::Returning(session) => Some(Arc::clone(session)),
            State::Away | State::Lost(_) => None,
        }
    }

    /// Does this session serve?
    pub(crate) fn is_live(&self, number: SessionNo) -> bool {
        matches!(&self.inner.lock().state, State::Live(session) if session.number() == number)
    }

    /// Is the daemon away, or are files being opened again?
    pub(crate) fn is_away(&self) -> bool {
        self.check_process().is_ok()
            && matches!(self.inner.lock().state, State::Returning(_) | State::Away)
    }

    fn set(&self, state: State) -> bool {
        let waiting = {
            let mut inner = self.inner.lock();
            if matches!(inner.state, State::Lost(_)) {
                return false;
            }
            if let State::Live(session) | State::Returning(session) = &state {
                inner.welcome = session.welcome().clone();
            }
            inner.state = state;
            std::mem::take(&mut inner.waiting)
        };
        drop(waiting);
        true
    }

    /// The session is over and the daemon is looked for.
    pub(crate) fn away(&self) {
        self.set(State::Away);
    }

    /// A new session is there.
    pub(crate) fn returning(&self, session: Arc<Session>) {
        self.set(State::Returning(session));
    }

    /// It serves.
    pub(crate) fn live(&self, session: Arc<Session>) {
        self.reconnects.fetch_add(1, Ordering::Relaxed);
        self.set(State::Live(session));
    }

    /// Ends all calls, now and from now on. `false`: it was lost before.
    pub(crate) fn lose(&self, why: LostWhy) -> bool {
        let session = self.present();
        let lost = self.set(State::Lost(why));
        if let Some(session) = session.filter(|_| lost) {
            session.end();
        }
        lost
    }

    pub(crate) fn lost(&self) -> Option<LostWhy> {
        self.check_process().ok()?;
        match &self.inner.lock().state {
            State::Lost(why) => Some(why.clone()),
            _ => None,
        }
    }

    pub(crate) fn lost_error(&self) -> MmapError {
        MmapError::Lost(self.lost().unwrap_or(LostWhy::HungUp))
    }

    pub(crate) fn welcome(&self) -> Welcome {
        self.inner.lock().welcome.clone()
    }

    pub(crate) fn reconnects(&self) -> u64 {
        self.reconnects.load(Ordering::Relaxed)
    }

    /// Asks the pager to end it all. Never waits.
    pub(crate) fn close(&self) {
        if self.check_process().is_ok() {
            self.closing.store(true, Ordering::Release);
            self.common.wake.signal();
        }
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Keeps a callback, or calls it when it is too late for keeping.
    pub(crate) fn on_lost(&self, callback: LostCallback) {
        if self.check_process().is_err() {
            return;
        }
        {
            let mut inner = self.inner.lock();
            if !inner.told {
                inner.callbacks.push(callback);
                return;
            }
        }
        if let Some(why) = self.lost().filter(|why| *why != LostWhy::Closed) {
            callback(&why);
        }
    }

    /// Calls the callbacks. From the worker, when every mapping is SIGBUS.
    pub(crate) fn tell_lost(&self) {
        let callbacks = {
            let mut inner = self.inner.lock();
            inner.told = true;
            std::mem::take(&mut inner.callbacks)
        };
        if let Some(why) = self.lost().filter(|why| *why != LostWhy::Closed) {
            for callback in callbacks {
                callback(&why);
            }
        }
    }
}
