//! A home: which frames hold the pages of one generation of a file.

use crate::error::GrantError;
use crate::ids::{FrameNo, HomeId, PageIndex, pages_for};
use parking_lot::Mutex;
use std::collections::BTreeMap;

/// See the module. While `pages` is locked, the records of the home's frames and the map agree.
pub(super) struct Home {
    pub id: HomeId,
    pages_max: u64,
    pub pages: Mutex<BTreeMap<u64, FrameNo>>,
}

impl Home {
    pub(super) fn new(id: HomeId, bytes: u64) -> Self {
        Self {
            id,
            pages_max: pages_for(bytes),
            pages: Mutex::default(),
        }
    }

    /// Pages `first..first + count` are within the file.
    pub(super) fn check(&self, first: PageIndex, count: usize) -> Result<(), GrantError> {
        match first.checked_add(count as u64) {
            Some(end) if end.0 <= self.pages_max => Ok(()),
            _ => Err(GrantError::BadRange(format!(
                "{count} pages from {} on are not within {} pages",
                first.0, self.pages_max
            ))),
        }
    }
}

/// Is each of `frames` where `pages` has it?
pub(super) fn check_placed(
    pages: &BTreeMap<u64, FrameNo>,
    first: PageIndex,
    frames: &[FrameNo],
) -> Result<(), GrantError> {
    for (page, frame) in (first.0..).zip(frames) {
        if pages.get(&page) != Some(frame) {
            return Err(GrantError::BadRange(format!(
                "page {page} of the home is not in frame {}",
                frame.0
            )));
        }
    }
    Ok(())
}
