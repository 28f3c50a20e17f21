//! The home of one generation: where its pages live.

use super::index::Index;
use crate::config::GuestId;
use crate::events::RecallReason;
use copage_grants::{DomId, FrameNo, HomeId, Where, pages_for};
use std::collections::{BTreeMap, BTreeSet};

/// A guest that pinned the home. It is charged until the kernel says that nobody has it open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Charge {
    pub guest: GuestId,
    pub quarantined: bool,
}

#[derive(Debug)]
pub(crate) struct Home {
    pub id: HomeId,
    /// The number by which frames name it.
    pub slot: u32,
    pub generation: u32,
    pub bytes: u64,
    /// The host's file was under our lease when it was begun, so that all writes are told beforehand.
    pub leased: bool,
    pub index: Index,
    /// 2 MiB units backed by one huge frame, by number.
    pub huge: BTreeSet<u32>,
    /// Stores and collapses under way without the file's lock: it cannot be emptied meanwhile.
    pub busy: u32,
    /// Units being collapsed: none of their pages is taken away.
    pub collapsing: BTreeSet<u32>,
    /// A descriptor went out that maps without a fault handler: a hole would read as zeros.
    pub exposed: bool,
    /// One entry for each open that pins it, also while it is being filled.
    pub pinners: Vec<DomId>,
    pub charges: Vec<Charge>,
    /// Its pages are in the count of pinned pages of the frame table.
    pub reserved: bool,
    /// Pages for which a recall is under way.
    pub recalling: u32,
    /// When the first of these recalls was sent, in ms.
    pub recall_ms: u64,
    /// When it was retired, or last unpinned, in ms.
    pub since_ms: u64,
    /// When the kernel is asked next whether it is in use, in ms.
    pub poll_ms: u64,
    /// Recalls of all its pages went out.
    pub recalled: bool,
    pub reason: RecallReason,
    /// Of a coherent file: pages that are not where guests read them.
    pub places: BTreeMap<u32, Where>,
    /// Of a coherent file: frames that the home's pages are in no more, with the page and where it was.
    pub lost: BTreeMap<FrameNo, (u32, Where)>,
    /// Those of them that are free but for the backend, which could not empty them.
    pub unfreed: Vec<FrameNo>,
    /// Who has an arena of it.
    pub arenas: BTreeSet<DomId>,
    /// Which common file guests have.
    pub common_serial: Option<u32>,
    /// Somebody who is gone may have it mapped still: nothing more is put there.
    pub common_stale: bool,
}

impl Home {
    pub(crate) fn new(id: HomeId, slot: u32, generation: u32, bytes: u64) -> Self {
        Self {
            id,
            slot,
            generation,
            bytes,
            leased: false,
            index: Index::default(),
            huge: BTreeSet::new(),
            busy: 0,
            collapsing: BTreeSet::new(),
            exposed: false,
            pinners: Vec::new(),
            charges: Vec::new(),
            reserved: false,
            recalling: 0,
            recall_ms: 0,
            since_ms: 0,
            poll_ms: 0,
            recalled: false,
            reason: RecallReason::Changed,
            places: BTreeMap::new(),
            lost: BTreeMap::new(),
            unfreed: Vec::new(),
            arenas: BTreeSet::new(),
            common_serial: None,
            common_stale: false,
        }
    }

    /// Its length in pages.
    pub(crate) fn pages(&self) -> u64 {
        pages_for(self.bytes)
    }

    pub(crate) fn is_pinned(&self) -> bool {
        !self.pinners.is_empty()
    }

    /// Frames of it are in no queue.
    pub(crate) fn holds_frames(&self) -> bool {
        !self.pinners.is_empty() || self.exposed
    }
}
