//! A home: which frames hold the pages of one generation of a file.

use crate::error::GrantError;
use crate::ids::{FrameNo, HomeId, PAGE_SIZE, PageIndex, pages_for};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages with their frames: of a page one that is current, and those that somebody still had mapped
/// when it got another.
pub(super) type Pages = BTreeSet<(u64, FrameNo)>;

/// See the module. While `pages` is locked, the records of the home's frames and the map agree.
pub(super) struct Home {
    pub id: HomeId,
    bytes: AtomicU64,
    pub pages: Mutex<Pages>,
}

impl Home {
    pub(super) fn new(id: HomeId, bytes: u64) -> Self {
        Self {
            id,
            bytes: AtomicU64::new(bytes),
            pages: Mutex::default(),
        }
    }

    /// Pages `first..first + count` are within the file.
    pub(super) fn check(&self, first: PageIndex, count: usize) -> Result<(), GrantError> {
        let pages_max = pages_for(self.bytes.load(Ordering::Relaxed));
        match first.checked_add(count as u64) {
            Some(end) if end.0 <= pages_max => Ok(()),
            _ => Err(GrantError::BadRange(format!(
                "{count} pages from {} on are not within {pages_max} pages",
                first.0
            ))),
        }
    }

    /// The file has another length.
    pub(super) fn resize(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    /// So many bytes of a page are within the file.
    pub(super) fn bytes_of(&self, page: PageIndex) -> usize {
        let bytes = self.bytes.load(Ordering::Relaxed);
        let start = page.byte_offset().unwrap_or(u64::MAX);
        let within = usize::try_from(bytes.saturating_sub(start)).unwrap_or(PAGE_SIZE);
        within.min(PAGE_SIZE)
    }
}

/// Is each of `frames` where `pages` has it?
pub(super) fn check_placed(
    pages: &Pages,
    first: PageIndex,
    frames: &[FrameNo],
) -> Result<(), GrantError> {
    for (page, &frame) in (first.0..).zip(frames) {
        if !pages.contains(&(page, frame)) {
            return Err(GrantError::BadRange(format!(
                "page {page} of the home is not in frame {}",
                frame.0
            )));
        }
    }
    Ok(())
}
