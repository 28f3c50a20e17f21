//! What the cache shows of itself.

use crate::config::{GuestId, GuestLimits};
use copage_grants::{DomId, LedgerAudit, PageIndex, Version};

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
    /// Requests waiting for a fill.
    pub waiting: u64,
    /// Fills waiting for frames.
    pub parked: u64,
    /// Bytes of the daemon's memory for frames: the array, the ghosts and the indexes.
    pub metadata_bytes: u64,
    /// Guests with charges.
    pub guests: Vec<GuestStats>,
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
#[derive(Clone, Debug)]
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
