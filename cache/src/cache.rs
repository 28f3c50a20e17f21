//! The cache itself: what it is made of, and how it starts and stops.

use crate::coherent::DiskWork;
use crate::config::{CacheConfig, ExportId, ExportInfo, ExportMode, ExportSpec, GuestId};
use crate::error::CacheError;
use crate::events::{CacheEvent, EventSink, FileState, RecallReason};
use crate::exports::Exports;
use crate::file::{CachedFile, FileId, FileKey};
use crate::fill::{Buffer, Job};
use crate::frames::FrameTable;
use crate::host::Watches;
use crate::left_over::LeftOver;
use crate::limits::{META_THREADS, META_WAITING_MAX};
use crate::meta::MetaOp;
use crate::pool::Pool;
use crate::report::Counters;
use crate::resize::Resize;
use crate::tree::Nodes;
use copage_grants::{Backend, DomId, Version};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// Pages of the files of some exports in frames of a backend, for all sessions of a daemon.
///
/// All methods may be called from any thread. Those of names and attributes (`root` to `statfs`)
/// may wait for a disk: a thread that must not wait uses [`Cache::submit`]. `fault`, `close`,
/// `current`, `recall_done` and the like do not.
pub struct Cache {
    pub(crate) me: Weak<Cache>,
    pub(crate) backend: Arc<dyn Backend>,
    /// The backend takes pages back without asking.
    pub(crate) force: bool,
    /// Guests get descriptors of whole homes; else entries, one a page, for themselves alone.
    pub(crate) descriptors: bool,
    pub(crate) config: CacheConfig,
    pub(crate) events: EventSink,
    pub(crate) exports: Exports,
    pub(crate) nodes: Nodes,
    pub(crate) meta_pool: Pool<(u64, MetaOp)>,
    pub(crate) fill_pool: Pool<Job>,
    /// What writes to the host's files.
    pub(crate) disk_work: DiskWork,
    /// Held while a coherent file is opened on the host.
    pub(crate) opening: Mutex<()>,
    /// Its thread ends what the budget does not need, which takes seconds.
    pub(crate) resize_pool: Pool<()>,
    pub(crate) files: Mutex<HashMap<FileKey, Arc<CachedFile>>>,
    pub(crate) frames: Mutex<FrameTable>,
    /// Files that `tick` looks at, and when, in ms.
    pub(crate) attention: Mutex<HashMap<FileId, (Arc<CachedFile>, u64)>>,
    /// Files with requests that wait for frames or grants.
    pub(crate) parked: Mutex<HashMap<FileId, Arc<CachedFile>>>,
    /// When the first of these was put there, in ms.
    pub(crate) parked_ms: AtomicU64,
    /// Files that nobody has open, oldest first.
    pub(crate) idle: Mutex<BTreeMap<u64, FileKey>>,
    /// How many sessions of each domid have ended: an open that began before does not count after.
    pub(crate) lives: Mutex<HashMap<DomId, u64>>,
    /// The guest of each domain that opened anything.
    pub(crate) guests: Mutex<HashMap<DomId, GuestId>>,
    /// Files by the descriptor that carries their lease.
    pub(crate) leases: Mutex<HashMap<RawFd, Weak<CachedFile>>>,
    pub(crate) watches: Watches,
    pub(crate) left_over: Mutex<LeftOver>,
    pub(crate) resize: Resize,
    pub(crate) counters: Counters,
    pub(crate) refilling: AtomicBool,
    next_file: AtomicU64,
    next_version: AtomicU32,
    next_idle: AtomicU64,
}

impl Cache {
    /// A cache without exports, with its threads.
    pub fn new(
        backend: Arc<dyn Backend>,
        config: CacheConfig,
        events: EventSink,
    ) -> Result<Arc<Self>, CacheError> {
        config.check()?;
        let watches = Watches::new()?;
        let there = backend.make_frames(config.frames_max)?;
        let mut frames = FrameTable::new(there.bank_frames);
        frames.have(there.end);
        let cache = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            force: backend.capabilities().forced_revoke,
            descriptors: backend.capabilities().descriptors,
            backend,
            frames: Mutex::new(frames),
            config,
            events,
            exports: Exports::default(),
            nodes: Nodes::default(),
            meta_pool: Pool::new(META_WAITING_MAX),
            // Bounded by the requests that wait: each has at most one fill's worth of jobs.
            fill_pool: Pool::new(usize::MAX),
            disk_work: DiskWork::new(),
            opening: Mutex::default(),
            // `Resize::queued`: one at a time.
            resize_pool: Pool::new(1),
            files: Mutex::default(),
            attention: Mutex::default(),
            parked: Mutex::default(),
            parked_ms: AtomicU64::new(0),
            idle: Mutex::default(),
            lives: Mutex::default(),
            guests: Mutex::default(),
            leases: Mutex::default(),
            watches,
            left_over: Mutex::default(),
            resize: Resize::default(),
            counters: Counters::default(),
            refilling: AtomicBool::new(false),
            next_file: AtomicU64::new(1),
            next_version: AtomicU32::new(1),
            next_idle: AtomicU64::new(1),
        });
        cache.keep_to(&mut cache.frames.lock(), cache.config.frames_max);
        cache.find_left_over();
        for n in 0..META_THREADS {
            let weak = cache.me.clone();
            cache
                .meta_pool
                .spawn(format!("meta-{n}"), move |(ticket, op)| {
                    let Some(cache) = weak.upgrade() else {
                        return false;
                    };
                    let result = cache.run_meta(op);
                    cache.events.send(CacheEvent::Meta { ticket, result });
                    true
                })?;
        }
        let weak = cache.me.clone();
        cache.resize_pool.spawn("resize".to_owned(), move |()| {
            let Some(cache) = weak.upgrade() else {
                return false;
            };
            cache.run_resize();
            true
        })?;
        for n in 0..cache.config.fill_threads {
            let weak = cache.me.clone();
            let mut buffer = Buffer::new();
            cache.fill_pool.spawn(format!("fill-{n}"), move |job| {
                let Some(cache) = weak.upgrade() else {
                    return false;
                };
                cache.run_job(job, &mut buffer);
                true
            })?;
        }
        Ok(cache)
    }

    /// Offers a directory. Refused when it is missing, no directory, or overlaps another export.
    pub fn add_export(&self, spec: ExportSpec) -> Result<ExportId, CacheError> {
        if spec.mode == ExportMode::Coherent {
            self.start_disk_work()?;
        }
        self.exports.add(spec, &self.nodes)
    }

    /// Withdraws an export: nothing of it can be named any more; opens through it end, each told by
    /// [`CacheEvent::Withdrawn`]; their pages are taken back.
    pub fn remove_export(&self, id: ExportId) -> Result<(), CacheError> {
        self.exports.remove(id)?;
        for file in self.all_files() {
            self.withdraw(&file, id);
        }
        self.kick_parked();
        Ok(())
    }

    /// The exports offered.
    pub fn exports(&self) -> Vec<ExportInfo> {
        self.exports.list()
    }

    fn withdraw(&self, file: &Arc<CachedFile>, id: ExportId) {
        let mut inner = file.inner.lock();
        let (gone, left): (Vec<_>, Vec<_>) = inner.opens.iter().partition(|e| e.export == id);
        if gone.is_empty() && file.node.export != id {
            return;
        }
        inner.opens = left;
        let now_ms = now_ms();
        for entry in &gone {
            self.end_opens(file, &mut inner, entry.who, false);
            let who = entry.who;
            let file = file.clone();
            self.events.send(CacheEvent::Withdrawn {
                file,
                dom: who.dom,
                guest: who.guest,
            });
        }
        if file.is_coherent() {
            // Its pages are the machine's, which hears of it by the event.
            if inner.opens.is_empty() {
                self.leave(file, &mut inner);
            }
        } else if inner.opens.is_empty() {
            self.bury(file, &mut inner, now_ms);
        } else if !gone.is_empty() {
            self.retire(file, &mut inner, RecallReason::Withdrawn, now_ms);
            self.settle_now(file, &mut inner);
        }
        self.look_at(file, &inner);
        drop(inner);
        self.advance(file, true);
    }

    /// The newest content of a file.
    pub fn current(&self, file: &Arc<CachedFile>) -> FileState {
        file.inner.lock().state
    }

    /// A new read-only descriptor of the home of `generation`, if that is the newest or is pinned.
    pub fn descriptor(
        &self,
        file: &Arc<CachedFile>,
        generation: u32,
    ) -> Result<OwnedFd, CacheError> {
        let mut inner = file.inner.lock();
        let newest = inner.state.generation == generation;
        let home = inner
            .home_of(generation)
            .filter(|h| newest || h.is_pinned() && h.exposed)
            .ok_or(CacheError::GenerationGone(generation))?;
        if home.exposed {
            // Its pages stay as long as anybody has it: programs may run from it.
            self.backend.make_runnable(home.id)?;
        }
        Ok(self.backend.home_descriptor(home.id)?)
    }

    /// Stops the threads. Requests that wait are answered with [`CacheError::Stopped`]; calls that
    /// would need a thread are too.
    pub fn shutdown(&self) {
        self.meta_pool.stop();
        self.fill_pool.stop();
        self.disk_work.stop();
        self.resize_pool.stop();
        for file in self.all_files() {
            let mut inner = file.inner.lock();
            for waiter in std::mem::take(&mut inner.waiters) {
                self.answer_error(&waiter, CacheError::Stopped);
            }
        }
    }

    /// Every file known, retired ones too.
    pub(crate) fn all_files(&self) -> Vec<Arc<CachedFile>> {
        let mut files: HashMap<_, _> = self
            .files
            .lock()
            .values()
            .map(|f| (f.id, f.clone()))
            .collect();
        let attention = self.attention.lock();
        files.extend(attention.iter().map(|(id, (f, _))| (*id, f.clone())));
        files.into_values().collect()
    }

    pub(crate) fn new_file_id(&self) -> FileId {
        FileId(self.next_file.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn new_version(&self) -> Version {
        Version::new(
            self.config.epoch,
            self.next_version.fetch_add(1, Ordering::Relaxed),
        )
    }

    pub(crate) fn new_idle_seq(&self) -> u64 {
        self.next_idle.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn life(&self, dom: DomId) -> u64 {
        self.lives.lock().get(&dom).copied().unwrap_or(0)
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.meta_pool.stop();
        self.fill_pool.stop();
        self.disk_work.stop();
        self.resize_pool.stop();
    }
}

/// CLOCK_BOOTTIME in ms: the clock of every time in this crate.
pub(crate) fn now_ms() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    (t.tv_sec as u64).saturating_mul(1000) + t.tv_nsec as u64 / 1_000_000
}
