//! Changes of the host below an export: kernel leases, and notifications where there are none.

use crate::cache::{Cache, now_ms};
use crate::error::CacheError;
use crate::events::RecallReason;
use crate::file::{CachedFile, Cookie, Inner, Lease};
use crate::limits::{CHURN_MAX, HOST_EVENTS_MAX};
use copage_grants::sys::{self, LeaseKind};
use parking_lot::Mutex;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Weak};

/// Bytes of inotify events read in one call: an event of a watched file has 16.
const EVENT_BYTES: usize = 4096;

/// The inotify watches of cached files. Files of several share groups may watch one inode.
#[derive(Debug)]
pub(crate) struct Watches {
    fd: OwnedFd,
    files: Mutex<HashMap<i32, Vec<Weak<CachedFile>>>>,
    /// How many own writes had ended when notifications were last read.
    own_writes: AtomicU64,
}

impl Watches {
    pub(crate) fn new() -> Result<Self, CacheError> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .map_err(|e| CacheError::io("inotify_init1", e))?;
        Ok(Self {
            fd,
            files: Mutex::default(),
            own_writes: AtomicU64::new(0),
        })
    }

    /// `None` where no watch is to be had (fs.inotify.max_user_watches): leases and comparing remain.
    pub(crate) fn add(&self, file: &Arc<CachedFile>) -> Option<i32> {
        let mut flags = WatchFlags::MODIFY | WatchFlags::CLOSE_WRITE | WatchFlags::ATTRIB;
        // Of several files with one inode, each has what it asked for.
        flags |= WatchFlags::MASK_ADD;
        if file.is_coherent() {
            // Readers stand in the way of its lease too.
            flags |= WatchFlags::CLOSE_NOWRITE;
        }
        let mut files = self.files.lock();
        let watch = inotify::add_watch(&self.fd, file.node.proc_path(), flags).ok()?;
        files.entry(watch).or_default().push(Arc::downgrade(file));
        Some(watch)
    }

    pub(crate) fn remove(&self, watch: i32, file: &Arc<CachedFile>) {
        let mut files = self.files.lock();
        let Some(list) = files.get_mut(&watch) else {
            return;
        };
        list.retain(|f| !std::ptr::eq(f.as_ptr(), Arc::as_ptr(file)) && f.strong_count() > 0);
        if list.is_empty() {
            files.remove(&watch);
            // Gone already when the inode is.
            let _ = inotify::remove_watch(&self.fd, watch);
        }
    }

    fn files(&self, watch: i32) -> Vec<Arc<CachedFile>> {
        let files = self.files.lock();
        files
            .get(&watch)
            .into_iter()
            .flatten()
            .filter_map(Weak::upgrade)
            .collect()
    }

    fn all(&self) -> Vec<Arc<CachedFile>> {
        self.files
            .lock()
            .values()
            .flatten()
            .filter_map(Weak::upgrade)
            .collect()
    }
}

impl Cache {
    /// Readable when [`Cache::host_events`] has something to read.
    pub fn inotify_fd(&self) -> BorrowedFd<'_> {
        self.watches.fd.as_fd()
    }

    /// Reads what the host did to cached files and acts on it.
    pub fn host_events(&self) {
        let now = self.counters.own_writes.load(SeqCst);
        let before = self.watches.own_writes.swap(now, SeqCst);
        let mut buffer = [MaybeUninit::uninit(); EVENT_BYTES];
        let mut reader = inotify::Reader::new(&self.watches.fd, &mut buffer);
        let mut touched: HashMap<i32, ReadFlags> = HashMap::new();
        let mut overflow = false;
        // Bounded, should the host write faster than this reads: what is left is readable still.
        let mut count = 0;
        while count < HOST_EVENTS_MAX {
            let Ok(event) = reader.next() else { break };
            count += 1;
            overflow |= event.events().contains(ReadFlags::QUEUE_OVERFLOW);
            *touched.entry(event.wd()).or_insert(ReadFlags::empty()) |= event.events();
        }
        if overflow || count == HOST_EVENTS_MAX {
            // What is left to read may be older.
            self.watches.own_writes.store(before, SeqCst);
        }
        if overflow {
            self.watches
                .all()
                .iter()
                .for_each(|file| self.look_at_host(file, ReadFlags::MODIFY, before));
            return;
        }
        for (watch, events) in touched {
            for file in self.watches.files(watch) {
                self.look_at_host(&file, events, before);
            }
        }
    }

    fn look_at_host(&self, file: &Arc<CachedFile>, events: ReadFlags, before: u64) {
        let links_changed = events.contains(ReadFlags::ATTRIB);
        let mut inner = file.inner.lock();
        if file.is_coherent() {
            return self.look_at_strict(file, &mut inner, events, before);
        }
        // The times change when a write begins, and this comes when it ends: they are no help here.
        // Under a lease that is older than the generation it tells of what was before.
        let is_told = inner.live.as_ref().is_some_and(|h| !h.leased);
        if events.contains(ReadFlags::MODIFY) && is_told && !self.is_put_off(&mut inner) {
            inner.churn = inner.churn.saturating_add(1);
            self.retire(file, &mut inner, RecallReason::Changed, now_ms());
        }
        self.check_host(file, &mut inner);
        // Unlinked, and nobody has it open: nobody can ask for it again.
        if links_changed && inner.is_idle() && file.read_cookie().is_ok_and(|(_, links)| links == 0)
        {
            self.bury(file, &mut inner, now_ms());
        }
        let waiting = !inner.waiters.is_empty();
        self.look_at(file, &inner);
        drop(inner);
        if waiting {
            self.push_advance(file);
        }
    }

    /// Looks at every lease: when the kernel had no room for signals, some of the breaks were not
    /// reported.
    pub fn check_leases(&self) {
        let all: Vec<RawFd> = self.leases.lock().keys().copied().collect();
        all.into_iter().for_each(|fd| self.lease_broken(fd));
    }

    /// The kernel reports (by the configured signal, `si_fd`) that a host process wants to write a
    /// file whose lease is carried by `fd`, or to open one that guests may write. Its pages are taken back; then
    /// its open goes on.
    pub fn lease_broken(&self, fd: RawFd) {
        let Some(file) = self.leases.lock().get(&fd).and_then(Weak::upgrade) else {
            return;
        };
        let mut inner = file.inner.lock();
        // The signal of another file that had the number before, or of a lease given up since.
        let is_there = |lease| lease == file.lease_kind();
        if inner.lease != Lease::Held || sys::lease(file.data()).is_ok_and(is_there) {
            return;
        }
        if file.is_coherent() {
            self.ask_for_host(&file, &mut inner);
            return self.look_at(&file, &inner);
        }
        self.counters.leases_broken.fetch_add(1, Relaxed);
        inner.lease = Lease::Breaking;
        inner.state.host_bounded = true;
        self.retire(&file, &mut inner, RecallReason::Changed, now_ms());
        self.drain_old(&file, &mut inner, now_ms());
        self.look_at(&file, &inner);
    }

    /// Looks whether the host's file is still what the newest generation holds. Without a lease only.
    pub(crate) fn check_host(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        if inner.dead || inner.lease == Lease::Held && inner.live.is_some() {
            return;
        }
        if file.is_coherent() && inner.live.is_some() {
            return self.check_strict_host(file, inner);
        }
        if inner.lease == Lease::Breaking {
            self.drain_old(file, inner, now_ms());
        }
        if inner.live.is_none() {
            return self.try_settle(file, inner, now_ms());
        }
        self.try_lease(file, inner);
        if let Ok((cookie, _)) = file.read_cookie()
            && self.is_changed(inner, cookie)
        {
            self.retire(file, inner, RecallReason::Changed, now_ms());
            self.try_settle(file, inner, now_ms());
        } else {
            // Only now: a change from before the lease counts in full.
            inner.state.host_bounded = inner.lease != Lease::Held;
        }
    }

    /// Does `cookie` mean another content? Adopts it when it does not.
    pub(crate) fn is_changed(&self, inner: &mut Inner, cookie: Cookie) -> bool {
        if cookie == inner.cookie {
            return false;
        }
        // Under a lease nobody writes: only names or permissions changed.
        let unwritten = cookie.mtime == inner.cookie.mtime && cookie.bytes == inner.cookie.bytes;
        let calm = inner.lease == Lease::Held && unwritten && !inner.state.host_bounded;
        if calm {
            inner.churn = 0;
        }
        if calm || cookie.bytes == inner.cookie.bytes && self.is_put_off(inner) {
            inner.cookie = cookie;
            return false;
        }
        inner.churn = inner.churn.saturating_add(1);
        true
    }

    /// A file that never stands still is served as it is read, once that was established: for a
    /// while, after which the generation ends, whether or not more changes were seen.
    fn is_put_off(&self, inner: &mut Inner) -> bool {
        if inner.lease == Lease::Held || inner.churn < CHURN_MAX {
            return false;
        }
        let until_ms = now_ms() + u64::from(self.config.host_settle_ms);
        inner.doubt_ms.get_or_insert(until_ms);
        true
    }

    pub(crate) fn try_lease(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        if inner.lease != Lease::Wanted {
            return;
        }
        let Some(signal) = self.config.lease_signal else {
            inner.lease = Lease::Never;
            return;
        };
        let fd = file.data();
        let number = fd.as_raw_fd();
        // Before the lease: its break may come at once.
        self.leases.lock().insert(number, Arc::downgrade(file));
        let taken =
            sys::set_lease_signal(fd, signal).and_then(|()| sys::set_lease(fd, file.lease_kind()));
        match taken {
            Ok(()) => inner.lease = Lease::Held,
            Err(e) => {
                self.leases.lock().remove(&number);
                if e.kind() != std::io::ErrorKind::WouldBlock {
                    inner.lease = Lease::Never;
                }
            }
        }
    }

    pub(crate) fn give_up_lease(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        self.leases.lock().remove(&file.data().as_raw_fd());
        if let Err(error) = sys::set_lease(file.data(), LeaseKind::None) {
            tracing::debug!(%error, "a lease was gone already");
        }
        inner.lease = Lease::Wanted;
    }
}
