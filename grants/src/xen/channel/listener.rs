//! The thread that speaks to xenstored for the daemon, and maps what guests publish.
//!
//! Calls to xenstored and to the drivers wait, so the daemon's loop makes none of them.

use super::accept::accept;
use super::limits::STORE_RETRY;
use super::registry::{Counts, ListenerEvent, Registry, Wanted, With};
use crate::xen::lib::{Evtchn, Gnttab, Store, XenError};
use crossbeam_channel::{Receiver, Sender, TryRecvError, unbounded};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What the listener counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XenListenerStats {
    /// Events of xenstore.
    pub events: u64,
    /// Sessions accepted.
    pub accepted: u64,
    /// Sessions refused: too many, or what they published cannot be.
    pub refused: u64,
    /// Times that a domain was not listened to for a while.
    pub floods: u64,
    /// Domains that there are now and that may have sessions.
    pub attached_now: u64,
}

/// See the module. Dropping it ends the thread; sessions go on.
pub struct XenListener {
    orders: Option<Sender<Vec<Wanted>>>,
    wake: Arc<OwnedFd>,
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

impl XenListener {
    /// Starts to listen to the domains that are `wanted`, each of which may have `sessions_max`
    /// sessions. After an event was sent, `told` is called.
    pub fn start(
        wanted: Vec<Wanted>,
        sessions_max: u32,
        events: Sender<ListenerEvent>,
        told: Box<dyn Fn() + Send>,
    ) -> Result<Self, XenError> {
        // Asked here, so that a daemon which cannot have them says so when it starts.
        let (store, gnttab) = (Store::open()?, Gnttab::open()?);
        Evtchn::open()?;
        let sys = |call, source| XenError::Sys { call, source };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = eventfd(0, flags).map_err(|e| sys("eventfd", e.into()))?;
        let wake = Arc::new(wake);
        let counts = Arc::new(Counts::default());
        let (orders, todo) = unbounded();
        let thread = Thread {
            registry: Registry::new(wanted, sessions_max, Arc::clone(&counts)),
            gnttab,
            todo,
            wake: Arc::clone(&wake),
            events,
            told,
        };
        let thread = std::thread::Builder::new()
            .name("copage-xenstore".into())
            .spawn(move || thread.run(store))
            .map_err(|e| sys("starting a thread", e))?;
        Ok(Self {
            orders: Some(orders),
            wake,
            counts,
            thread: Some(thread),
        })
    }

    /// From now on these domains may have sessions, and no others.
    pub fn set_wanted(&self, wanted: Vec<Wanted>) {
        if let Some(orders) = &self.orders {
            // The thread takes orders until `orders` is dropped.
            let _ = orders.send(wanted);
        }
        self.wake();
    }

    fn wake(&self) {
        // It can only fail when the count is at its end, and then it is readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// What was counted since the start.
    pub fn stats(&self) -> XenListenerStats {
        let counts = &self.counts;
        XenListenerStats {
            events: counts.events.load(Ordering::Relaxed),
            accepted: counts.accepted.load(Ordering::Relaxed),
            refused: counts.refused.load(Ordering::Relaxed),
            floods: counts.floods.load(Ordering::Relaxed),
            attached_now: counts.attached_now.load(Ordering::Relaxed),
        }
    }
}

impl Drop for XenListener {
    fn drop(&mut self) {
        self.orders = None;
        self.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread for xenstore had panicked");
        }
    }
}

struct Thread {
    registry: Registry,
    gnttab: Gnttab,
    todo: Receiver<Vec<Wanted>>,
    wake: Arc<OwnedFd>,
    events: Sender<ListenerEvent>,
    told: Box<dyn Fn() + Send>,
}

/// Why a connection to xenstored is used no more.
enum Over {
    /// The daemon stops.
    Stop,
    /// It failed.
    Failed(XenError),
}

impl From<XenError> for Over {
    fn from(error: XenError) -> Self {
        Self::Failed(error)
    }
}

impl Thread {
    fn run(mut self, mut store: Store) {
        loop {
            match self.serve(&store) {
                Over::Stop => return,
                Over::Failed(error) => {
                    tracing::error!(%error, "xenstore fails; domains that come or go meanwhile are seen later");
                }
            }
            loop {
                self.wait(None, Some(STORE_RETRY));
                if matches!(self.todo.try_recv(), Err(TryRecvError::Disconnected)) {
                    return;
                }
                if let Ok(new) = Store::open() {
                    store = new;
                    break;
                }
            }
        }
    }

    /// Waits for xenstore, an order, or a time.
    fn wait(&self, store: Option<&Store>, most: Option<Duration>) {
        let timeout = most.map(|most| Timespec {
            tv_sec: i64::try_from(most.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(most.subsec_nanos()),
        });
        let mut fds = vec![PollFd::new(&*self.wake, PollFlags::IN)];
        if let Some(store) = store {
            fds.push(PollFd::from_borrowed_fd(store.watch_fd(), PollFlags::IN));
        }
        if let Err(error) = poll(&mut fds, timeout.as_ref())
            && error != rustix::io::Errno::INTR
        {
            tracing::error!(%error, "poll");
            std::thread::sleep(STORE_RETRY);
        }
        let _ = rustix::io::read(&*self.wake, &mut [0u8; 8]);
    }

    fn serve(&mut self, store: &Store) -> Over {
        let over = self.step(store, |registry, with| registry.start(with));
        if let Err(over) = over {
            return over;
        }
        loop {
            let due = self.registry.due();
            let most = due.map(|at| at.saturating_duration_since(Instant::now()));
            self.wait(Some(store), most);
            loop {
                let wanted = match self.todo.try_recv() {
                    Ok(wanted) => wanted,
                    Err(TryRecvError::Disconnected) => return Over::Stop,
                    Err(TryRecvError::Empty) => break,
                };
                if let Err(over) = self.step(store, |r, with| r.set_wanted(wanted, with)) {
                    return over;
                }
            }
            if let Err(over) = self.step(store, Registry::tick) {
                return over;
            }
            loop {
                let (path, token) = match store.next_watch() {
                    Ok(Some(event)) => event,
                    Ok(None) => break,
                    Err(error) => return error.into(),
                };
                let over = self.step(store, |r, with| r.event(&path, &token, with));
                if let Err(over) = over {
                    return over;
                }
            }
        }
    }

    /// Makes a call of the registry and passes on what came of it, also when it failed.
    fn step(
        &mut self,
        store: &Store,
        call: impl FnOnce(&mut Registry, &mut With<'_>) -> Result<(), XenError>,
    ) -> Result<(), Over> {
        let mut out = Vec::new();
        let gnttab = &self.gnttab;
        let mut with = With {
            store,
            accept: &mut |domid, published, slot| accept(gnttab, domid, published, slot),
            now: Instant::now(),
            out: &mut out,
        };
        let called = call(&mut self.registry, &mut with);
        if !out.is_empty() {
            for event in out {
                if self.events.send(event).is_err() {
                    return Err(Over::Stop);
                }
            }
            (self.told)();
        }
        called.map_err(Over::Failed)
    }
}
