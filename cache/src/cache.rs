//! The cache itself.

use crate::config::{CacheConfig, ExportId, ExportInfo, ExportSpec, GuestId, GuestLimits, Holder};
use crate::error::CacheError;
use crate::events::*;
use crate::exports::Exports;
use crate::file::CachedFile;
use crate::limits::{META_THREADS, META_WAITING_MAX};
use crate::meta::MetaOp;
use crate::pool::Pool;
use crate::report::*;
use crate::tree::{NodeRef, Nodes};
use copage_grants::{Backend, DomId, PageIndex};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

/// The cache.
pub struct Cache {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) events: EventSink,
    pub(crate) exports: Exports,
    pub(crate) nodes: Nodes,
    pub(crate) meta_pool: Pool<(u64, MetaOp)>,
}

#[allow(unused_variables, missing_docs)]
impl Cache {
    pub fn new(backend: Arc<dyn Backend>, config: CacheConfig, events: EventSink) -> Result<Arc<Self>, CacheError> {
        config.check()?;
        let cache = Arc::new(Self { backend, events, exports: Exports::default(), nodes: Nodes::default(), meta_pool: Pool::new(META_WAITING_MAX) });
        for n in 0..META_THREADS {
            let weak = Arc::downgrade(&cache);
            cache.meta_pool.spawn(format!("meta-{n}"), move |(ticket, op)| {
                let Some(cache) = weak.upgrade() else { return false };
                let result = cache.run_meta(op);
                cache.events.send(CacheEvent::Meta { ticket, result });
                true
            })?;
        }
        Ok(cache)
    }
    pub fn add_export(&self, spec: ExportSpec) -> Result<ExportId, CacheError> { self.exports.add(spec, &self.nodes) }
    pub fn remove_export(&self, id: ExportId) -> Result<(), CacheError> { self.exports.remove(id) }
    pub fn exports(&self) -> Vec<ExportInfo> { self.exports.list() }
    pub fn open(&self, ticket: u64, node: NodeRef, how: OpenHow, who: Holder) {
        self.events.send(CacheEvent::Opened { ticket, result: Err(CacheError::Stopped) });
    }
    pub fn close(&self, file: &Arc<CachedFile>, how: OpenHow, who: Holder) {}
    pub fn fault(&self, ticket: u64, file: &Arc<CachedFile>, who: Holder, generation: u32, first: PageIndex, count: u32, hint: FaultHint) -> FaultOutcome {
        FaultOutcome::Ready(Err(CacheError::Stopped))
    }
    pub fn read(&self, ticket: u64, file: &Arc<CachedFile>, who: Holder, offset: u64, len: u32) {
        self.events.send(CacheEvent::Read { ticket, result: Err(CacheError::Stopped) });
    }
    pub fn current(&self, file: &Arc<CachedFile>) -> FileState {
        FileState { generation: 0, version: copage_grants::Version(0), bytes: 0, host_bounded: true }
    }
    pub fn descriptor(&self, file: &Arc<CachedFile>, generation: u32) -> Result<OwnedFd, CacheError> { Err(CacheError::GenerationGone(generation)) }
    pub fn unmapped(&self, file: &Arc<CachedFile>, who: Holder, generation: u32, first: PageIndex, count: u32) {}
    pub fn recall_done(&self, file: &Arc<CachedFile>, generation: u32, first: PageIndex, count: u32, dom: DomId, end: RecallEnd) {}
    pub fn guest_fenced(&self, who: Holder) {}
    pub fn guest_ended(&self, who: Holder) {}
    pub fn set_limits(&self, guest: GuestId, limits: GuestLimits) {}
    pub fn lease_broken(&self, fd: RawFd) {}
    pub fn inotify_fd(&self) -> Option<BorrowedFd<'_>> { None }
    pub fn host_events(&self) {}
    /// `now_ms` is CLOCK_BOOTTIME in ms, rising; every call of the cache that needs the time uses the last one given... 
    /// Returns when it wants to be called next, in ms of the same clock; None: nothing waits.
    pub fn tick(&self, now_ms: u64) -> Option<u64> { None }
    pub fn reclaim(&self, pages: u64) -> u64 { 0 }
    pub fn drop_all(&self) {}
    pub fn set_frames_max(&self, frames_max: u32) -> Result<(), CacheError> { Err(CacheError::Stopped) }
    pub fn stats(&self) -> CacheStats { CacheStats::default() }
    pub fn pages(&self, node: &NodeRef) -> Result<Option<FilePages>, CacheError> { Ok(None) }
    pub fn audit(&self) -> AuditReport { AuditReport::default() }
    /// Stops the threads; requests that wait are answered Stopped.
    pub fn shutdown(&self) { self.meta_pool.stop(); }
}
