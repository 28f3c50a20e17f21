//! What a cache is told: sizes, limits, exports.

use crate::error::CacheError;
use crate::limits::{FILL_PAGES_MAX, FILL_THREADS_MAX, FRAMES_MAX, FRAMES_MIN, LABEL_BYTES_MAX};
use std::path::PathBuf;

/// The settings of one cache.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// The budget, in frames of 4 KiB; [`crate::Cache::set_frames_max`] changes it.
    pub frames_max: u32,
    /// Threads that read files.
    pub fill_threads: usize,
    /// The longest readahead window, in pages; a power of two, at most 512.
    pub readahead_pages_max: u32,
    /// The longest file that is pinned, in pages.
    pub pin_file_pages_max: u64,
    /// How long faults wait for a host writer to close the file, in ms.
    pub host_settle_ms: u32,
    /// How long a guest may take over a recall before its frames count as quarantined, in ms.
    pub recall_deadline_ms: u32,
    /// The daemon's epoch: the upper half of every version.
    pub epoch: u32,
    /// Back fully resident 2 MiB units by one huge frame where the backend can.
    pub collapse: bool,
    /// The signal that announces a broken lease on a host file (`SIGRTMIN + 1`). The process
    /// blocks it and passes each `si_fd` to [`crate::Cache::lease_broken`]. `None`: no leases are
    /// taken, every file is host-bounded.
    pub lease_signal: Option<i32>,
}

impl Default for CacheConfig {
    /// 1 GiB, two threads, 2 MiB of readahead, files to 256 MiB pinned.
    fn default() -> Self {
        Self {
            frames_max: 262_144,
            fill_threads: 2,
            readahead_pages_max: 512,
            pin_file_pages_max: 65_536,
            host_settle_ms: 200,
            recall_deadline_ms: 5000,
            epoch: 1,
            collapse: true,
            lease_signal: None,
        }
    }
}

impl CacheConfig {
    pub(crate) fn check(&self) -> Result<(), CacheError> {
        if !(FRAMES_MIN..=FRAMES_MAX).contains(&self.frames_max) {
            return Err(CacheError::BudgetOutOfBounds {
                min: FRAMES_MIN,
                max: FRAMES_MAX,
            });
        }
        let bad = |text: String| Err(CacheError::BadConfig(text));
        if !(1..=FILL_THREADS_MAX).contains(&self.fill_threads) {
            return bad(format!("fill_threads must be 1 to {FILL_THREADS_MAX}"));
        }
        if !self.readahead_pages_max.is_power_of_two() || self.readahead_pages_max > FILL_PAGES_MAX
        {
            return bad(format!(
                "readahead_pages_max must be a power of two up to {FILL_PAGES_MAX}"
            ));
        }
        Ok(())
    }
}

/// A guest as the daemon's configuration knows it. Charges are keyed by it, across reconnects.
pub type GuestId = u32;

/// Who does something: the domain that holds the grants, and the guest that is charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Holder {
    /// The domain of this session.
    pub dom: copage_grants::DomId,
    /// The guest by name.
    pub guest: GuestId,
    /// Whose lazily filled homes it maps.
    pub class: copage_grants::TrustClass,
}

/// What one guest may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestLimits {
    /// Frames charged to it: those it was the first to hold grants of. Beyond it, its own oldest go.
    pub frames_max: u64,
    /// Grants of each of its domains. Beyond it, its own oldest go.
    pub grants_max: u64,
    /// Pages it has pinned, and quarantined pages it is the cause of.
    pub pinned_pages_max: u64,
}

impl Default for GuestLimits {
    /// 1 GiB of grants, 256 MiB pinned, frames as many as there are.
    fn default() -> Self {
        Self {
            frames_max: u64::MAX,
            grants_max: 262_144,
            pinned_pages_max: 65_536,
        }
    }
}

/// Names an export in the life of one cache; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExportId(pub u32);

/// What may be done with an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportMode {
    /// Nobody writes.
    ReadOnly,
    /// All guests see one file, which they may write.
    Coherent,
}

/// A directory to offer.
#[derive(Clone, Debug)]
pub struct ExportSpec {
    /// The name guests use.
    pub name: String,
    /// The host's directory; absolute.
    pub path: PathBuf,
    /// Frames are shared only within a share group.
    pub group: String,
    /// The mode.
    pub mode: ExportMode,
}

impl ExportSpec {
    pub(crate) fn check_labels(&self) -> Result<(), &'static str> {
        for label in [&self.name, &self.group] {
            if label.is_empty() || label.len() > LABEL_BYTES_MAX {
                return Err("names of exports and groups have 1 to 64 bytes");
            }
            if label
                .bytes()
                .any(|b| b == 0 || b == b'/' || b.is_ascii_control())
            {
                return Err("names of exports and groups have no '/' and no control characters");
            }
        }
        Ok(())
    }
}

/// An export as it stands.
#[derive(Clone, Debug)]
pub struct ExportInfo {
    /// Its number.
    pub id: ExportId,
    /// What it was made from; the path with all symbolic links resolved.
    pub spec: ExportSpec,
}
