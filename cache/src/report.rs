//! What the cache shows of itself.

use crate::cache::Cache;
use crate::config::{GuestId, GuestLimits};
use crate::error::CacheError;
use crate::file::{CachedFile, FileKey};
use crate::frames::{BankStats, FrameState};
use crate::limits::HUGE_PAGES;
use crate::tree::NodeRef;
use copage_grants::{DomId, LedgerAudit, PageIndex, Version};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// Counts since the start, and sizes now.
#[derive(Clone, Debug, Default)]
pub struct CacheStats {
    /// The budget, in frames.
    pub frames_max: u32,
    /// Frames that hold nothing, of the budget.
    pub frames_free: u32,
    /// Frames that hold a page of a live generation.
    pub frames_resident: u32,
    /// Of these, granted to somebody.
    pub frames_granted: u32,
    /// Of these, pinned (or still open from a pin).
    pub frames_pinned: u32,
    /// Frames being filled.
    pub frames_filling: u32,
    /// Frames of retired homes that somebody may have mapped.
    pub frames_quarantined: u32,
    /// 2 MiB units backed by one huge frame.
    pub huge_units: u64,
    /// Files known, and of these open by somebody.
    pub files: u64,
    /// Files that somebody has open.
    pub files_open: u64,
    /// Files without a kernel lease.
    pub files_host_bounded: u64,
    /// Retired homes not yet ended.
    pub homes_retired: u64,
    /// Nodes held.
    pub nodes: u64,
    /// Faults answered without a disk.
    pub fault_hits: u64,
    /// Faults that waited for a fill.
    pub fault_misses: u64,
    /// Faults answered Stale.
    pub fault_stale: u64,
    /// Fills (reads of up to 2 MiB).
    pub fills: u64,
    /// Pages filled.
    pub pages_filled: u64,
    /// Of these, ones given back not long before.
    pub pages_refilled: u64,
    /// Bytes read with `O_DIRECT`.
    pub bytes_direct: u64,
    /// Bytes read through the host's page cache.
    pub bytes_buffered: u64,
    /// Fills that failed.
    pub fill_errors: u64,
    /// Fills whose result was dropped because the file changed.
    pub fills_dropped: u64,
    /// Pages given back that nobody held.
    pub reclaimed_idle: u64,
    /// Pages given back that somebody held.
    pub reclaimed_granted: u64,
    /// Calls to the backend for these.
    pub reclaim_calls: u64,
    /// Recalls asked of guests.
    pub recalls: u64,
    /// Generations ended.
    pub generations_retired: u64,
    /// Leases broken by the host.
    pub leases_broken: u64,
    /// Files that guests may write.
    pub files_coherent: u64,
    /// Pages of them granted.
    pub strict_grants: u64,
    /// Pages of them written to the host's files.
    pub pages_saved: u64,
    /// Syncs of them, and write-backs.
    pub syncs: u64,
    /// Those of them to which the disk said an error.
    pub sync_errors: u64,
    /// Pages of them that were wanted back for want of memory.
    pub want_backs: u64,
    /// Requests waiting for a fill.
    pub waiting: u64,
    /// Fills that had to wait for frames, so far.
    pub parked: u64,
    /// Bytes of the daemon's memory for frames: the array, the ghosts and the indexes.
    pub metadata_bytes: u64,
    /// Guests with charges.
    pub guests: Vec<GuestStats>,
    /// The banks that frames are in.
    pub banks: Vec<BankStats>,
}

/// One guest's charges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestStats {
    /// Who.
    pub guest: GuestId,
    /// Its limits.
    pub limits: GuestLimits,
    /// Frames charged to it.
    pub frames: u64,
    /// Pages it has pinned.
    pub pinned_pages: u64,
    /// Quarantined pages it is the cause of.
    pub quarantined_pages: u64,
}

/// A run of resident pages with the same holders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The first page.
    pub first: PageIndex,
    /// How many.
    pub count: u32,
    /// Who holds grants of every one of them.
    pub holders: Vec<DomId>,
    /// Backed by a 2 MiB frame.
    pub huge: bool,
}

/// What is known of one file's pages.
#[derive(Clone, Debug, Default)]
pub struct FilePages {
    /// The newest generation.
    pub generation: u32,
    /// Its version.
    pub version: Version,
    /// Length in bytes.
    pub bytes: u64,
    /// No kernel lease is held.
    pub host_bounded: bool,
    /// Pages resident.
    pub resident: u64,
    /// Pinned opens.
    pub pins: u32,
    /// Runs of resident pages.
    pub runs: Vec<PageRun>,
    /// Pages of older generations that somebody may have mapped.
    pub quarantined: u64,
}

/// What the audit found: everything is equal when both `differences` are empty.
#[derive(Clone, Debug, Default)]
pub struct AuditReport {
    /// Ledger against grant tables.
    pub ledger: LedgerAudit,
    /// Cache against ledger, backend and itself: at most a hundred lines.
    pub differences: Vec<String>,
    /// Frames looked at.
    pub frames: u64,
    /// Grants looked at.
    pub grants: u64,
    /// Files looked at.
    pub files: u64,
    /// Last pages whose tails were read.
    pub tails: u64,
}

impl AuditReport {
    /// Nothing differs.
    pub fn is_clean(&self) -> bool {
        self.differences.is_empty() && self.ledger.differences.is_empty()
    }
}

/// What is counted while it happens.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// 2 MiB units in a row that the kernel would not make huge.
    pub huge_refusals: AtomicU64,
    pub fault_hits: AtomicU64,
    pub fault_misses: AtomicU64,
    pub fault_stale: AtomicU64,
    pub fills: AtomicU64,
    pub pages_filled: AtomicU64,
    pub pages_refilled: AtomicU64,
    pub bytes_direct: AtomicU64,
    pub bytes_buffered: AtomicU64,
    pub fill_errors: AtomicU64,
    pub fills_dropped: AtomicU64,
    pub reclaimed_idle: AtomicU64,
    pub reclaimed_granted: AtomicU64,
    pub reclaim_calls: AtomicU64,
    pub recalls: AtomicU64,
    pub generations_retired: AtomicU64,
    pub leases_broken: AtomicU64,
    pub parked: AtomicU64,
    /// The daemon's own writes to host files that ended.
    pub own_writes: AtomicU64,
    pub strict_grants: AtomicU64,
    pub pages_saved: AtomicU64,
    pub syncs: AtomicU64,
    pub sync_errors: AtomicU64,
    pub want_backs: AtomicU64,
}

impl Cache {
    /// Counts and sizes.
    pub fn stats(&self) -> CacheStats {
        let c = &self.counters;
        let mut stats = CacheStats {
            nodes: self.nodes.live(),
            fault_hits: c.fault_hits.load(Relaxed),
            fault_misses: c.fault_misses.load(Relaxed),
            fault_stale: c.fault_stale.load(Relaxed),
            fills: c.fills.load(Relaxed),
            pages_filled: c.pages_filled.load(Relaxed),
            pages_refilled: c.pages_refilled.load(Relaxed),
            bytes_direct: c.bytes_direct.load(Relaxed),
            bytes_buffered: c.bytes_buffered.load(Relaxed),
            fill_errors: c.fill_errors.load(Relaxed),
            fills_dropped: c.fills_dropped.load(Relaxed),
            reclaimed_idle: c.reclaimed_idle.load(Relaxed),
            reclaimed_granted: c.reclaimed_granted.load(Relaxed),
            reclaim_calls: c.reclaim_calls.load(Relaxed),
            recalls: c.recalls.load(Relaxed),
            generations_retired: c.generations_retired.load(Relaxed),
            leases_broken: c.leases_broken.load(Relaxed),
            parked: c.parked.load(Relaxed),
            strict_grants: c.strict_grants.load(Relaxed),
            pages_saved: c.pages_saved.load(Relaxed),
            syncs: c.syncs.load(Relaxed),
            sync_errors: c.sync_errors.load(Relaxed),
            want_backs: c.want_backs.load(Relaxed),
            ..CacheStats::default()
        };
        let mut index_bytes = 0;
        for file in self.all_files() {
            let inner = file.inner.lock();
            stats.files += 1;
            stats.files_coherent += u64::from(file.is_coherent());
            stats.files_open += u64::from(!inner.opens.is_empty());
            stats.files_host_bounded += u64::from(inner.state.host_bounded);
            stats.homes_retired += inner.old.len() as u64;
            stats.waiting += (inner.waiters.len() + inner.strict.fills.len()) as u64;
            for home in inner.old.iter().chain(&inner.live) {
                stats.huge_units += home.huge.len() as u64;
                index_bytes += home.index.bytes();
            }
        }
        let table = self.frames.lock();
        let count = |state| table.count(state);
        stats.frames_max = table.budget();
        stats.frames_free = table.available();
        stats.frames_granted = count(FrameState::Granted) + count(FrameState::Recalling);
        stats.frames_pinned = count(FrameState::Held);
        stats.frames_filling = count(FrameState::Filling);
        stats.frames_quarantined = count(FrameState::Quarantined);
        stats.frames_resident = table.used() - stats.frames_filling - stats.frames_quarantined;
        stats.metadata_bytes = table.bytes() + index_bytes;
        stats.banks = table.bank_stats();
        stats.guests = table
            .accounts
            .all()
            .map(|(guest, a)| GuestStats {
                guest,
                limits: a.limits,
                frames: a.frames,
                pinned_pages: a.pinned,
                quarantined_pages: a.quarantined,
            })
            .collect();
        stats
    }

    /// The resident pages of a file, if it is cached: of all classes, one behind the other.
    pub fn pages(&self, node: &NodeRef) -> Result<Option<FilePages>, CacheError> {
        let group = self.exports.group(node.export)?;
        let of_node = |key: &FileKey| (key.group, key.dev, key.ino) == (group, node.dev, node.ino);
        let mut files: Vec<_> = self
            .files
            .lock()
            .iter()
            .filter(|(key, _)| of_node(key))
            .map(|(_, f)| f.clone())
            .collect();
        files.sort_by_key(|file| file.key.class);
        let mut out: Option<FilePages> = None;
        for file in files {
            self.add_pages(&file, out.get_or_insert_default());
        }
        Ok(out)
    }

    fn add_pages(&self, file: &CachedFile, out: &mut FilePages) {
        let inner = file.inner.lock();
        out.generation = out.generation.max(inner.state.generation);
        out.version = out.version.max(inner.state.version);
        out.bytes = inner.state.bytes;
        out.host_bounded |= inner.state.host_bounded;
        out.quarantined += inner.old.iter().map(|h| h.index.len() as u64).sum::<u64>();
        let Some(home) = inner.live.as_ref() else {
            return;
        };
        out.resident += home.index.len() as u64;
        out.pins += home.pinners.len() as u32;
        for (page, frame) in home.index.pages() {
            let mut holders = Vec::new();
            self.backend.holders(frame, &mut holders);
            holders.sort_unstable();
            let huge = home.huge.contains(&(page / HUGE_PAGES));
            match out.runs.last_mut() {
                Some(run)
                    if run.first.0 + u64::from(run.count) == u64::from(page)
                        && run.holders == holders
                        && run.huge == huge =>
                {
                    run.count += 1;
                }
                _ => out.runs.push(PageRun {
                    first: PageIndex(page.into()),
                    count: 1,
                    holders,
                    huge,
                }),
            }
        }
    }
}
