//! What the cache tells the daemon, and the answers it gives.

use crate::config::GuestId;
use crate::error::CacheError;
use crate::file::CachedFile;
use crate::meta::MetaReply;
use copage_grants::{DomId, FrameNo, PageIndex, Version};
use std::sync::Arc;

/// What an open is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpenHow {
    /// To map with a fault handler.
    Map,
    /// To map or run without one: filled and pinned before it is answered.
    Pin,
    /// To read by messages only.
    Read,
}

/// What is known of the next faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultHint {
    /// Nothing: exactly what was asked is filled.
    Random,
    /// The guest goes on behind: the window grows.
    Sequential,
    /// Asked for ahead of use: exactly what was asked.
    Populate,
}

/// A file's newest content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileState {
    /// Counts the contents in this daemon's life.
    pub generation: u32,
    /// The version of every page of it.
    pub version: Version,
    /// Length in bytes.
    pub bytes: u64,
    /// The daemon holds no kernel lease: changes are noticed at open and on notification only.
    pub host_bounded: bool,
    /// Guests may write it, and its pages are the machine's: see [`crate::Cache::strict_grant`].
    pub coherent: bool,
}

/// The entries by which a guest maps pages that it was granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantedRefs {
    /// The domain whose table holds them.
    pub granter: DomId,
    /// One for each page, in order.
    pub refs: Vec<u32>,
}

/// The end of a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FaultDone {
    /// The pages are there and granted. Begins at the first page asked for, holds at least that one,
    /// may hold fewer or more than were asked for.
    Granted {
        /// Of which generation.
        generation: u32,
        /// The first page.
        first: PageIndex,
        /// How many.
        count: u32,
        /// By what the guest maps them; `None` where it has a descriptor.
        grants: Option<GrantedRefs>,
    },
    /// The guest's generation is not the newest, which is this.
    Stale(FileState),
}

/// What `fault` returns at once.
#[derive(Clone, Debug)]
pub enum FaultOutcome {
    /// Done without a disk.
    Ready(Result<FaultDone, CacheError>),
    /// A [`CacheEvent::Faulted`] with the ticket will come.
    Pending,
}

/// The end of an open.
#[derive(Clone, Debug)]
pub struct OpenDone {
    /// The open file.
    pub file: Arc<CachedFile>,
    /// Its content; for a pinned open, the generation that is pinned.
    pub state: FileState,
    /// As asked.
    pub how: OpenHow,
}

/// Why pages are recalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecallReason {
    /// Memory is short.
    Reclaim,
    /// The content changed.
    Changed,
    /// The right to the file ended.
    Withdrawn,
}

/// How a recall ended for one domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecallEnd {
    /// The guest said that it unmapped the pages.
    Acked,
    /// It missed its deadline.
    Fenced,
}

/// What happened. Delivered in no particular order except that events of one file come in the order
/// in which they happened.
#[derive(Debug)]
pub enum CacheEvent {
    /// A pending fault ended.
    Faulted {
        /// The caller's.
        ticket: u64,
        /// How.
        result: Result<FaultDone, CacheError>,
    },
    /// An open ended.
    Opened {
        /// The caller's.
        ticket: u64,
        /// How.
        result: Result<OpenDone, CacheError>,
    },
    /// A read ended.
    Read {
        /// The caller's.
        ticket: u64,
        /// The bytes; fewer than asked only at the end of the file.
        result: Result<Vec<u8>, CacheError>,
    },
    /// A metadata operation ended.
    Meta {
        /// The caller's.
        ticket: u64,
        /// How.
        result: Result<MetaReply, CacheError>,
    },
    /// A file has a newer content: sessions that have it open may be told to fetch it. `generation`
    /// is the one that ended.
    Retired {
        /// Which.
        file: Arc<CachedFile>,
        /// The generation that ended.
        generation: u32,
    },
    /// A file is withdrawn: who has it open through that export has nothing any more.
    Withdrawn {
        /// Which.
        file: Arc<CachedFile>,
        /// Whose opens ended.
        dom: DomId,
        /// The same by name.
        guest: GuestId,
    },
    /// Pages are wanted back (backends without force): each holder is asked to unmap, then
    /// [`crate::Cache::recall_done`] is called for it.
    Recall {
        /// Of what.
        file: Arc<CachedFile>,
        /// Of which generation.
        generation: u32,
        /// From where.
        first: PageIndex,
        /// How many.
        count: u32,
        /// Who holds grants of them.
        holders: Vec<DomId>,
        /// Why.
        reason: RecallReason,
    },
    /// A page of [`crate::Cache::strict_fill`] or [`crate::Cache::strict_copy`] is in a frame, or is not.
    Placed {
        /// Of what.
        file: Arc<CachedFile>,
        /// Which.
        page: PageIndex,
        /// Where.
        result: Result<FrameNo, CacheError>,
    },
    /// [`crate::Cache::strict_save`] ended.
    Saved {
        /// Of what.
        file: Arc<CachedFile>,
        /// Which page.
        page: PageIndex,
        /// As asked.
        version: Version,
        /// How.
        result: Result<(), CacheError>,
    },
    /// [`crate::Cache::strict_sync`] ended.
    Synced {
        /// The caller's.
        ticket: u64,
        /// Of what.
        file: Arc<CachedFile>,
        /// How.
        result: Result<(), CacheError>,
    },
    /// [`crate::Cache::strict_reserve`] ended.
    Reserved {
        /// The caller's.
        ticket: u64,
        /// Of what.
        file: Arc<CachedFile>,
        /// How.
        result: Result<(), CacheError>,
    },
    /// [`crate::Cache::strict_resize`] ended.
    Resized {
        /// The caller's.
        ticket: u64,
        /// Which.
        file: Arc<CachedFile>,
        /// What it is now.
        result: Result<FileState, CacheError>,
    },
    /// Pages of a coherent file are to be taken and freed; what cannot be is told by
    /// [`crate::Cache::strict_keep`].
    WantBack {
        /// Of what.
        file: Arc<CachedFile>,
        /// Which.
        pages: Vec<PageIndex>,
    },
    /// A process of the host waits for a coherent file: all its pages are to be taken and freed, then comes
    /// [`crate::Cache::strict_let_host_in`].
    HostWants {
        /// Which.
        file: Arc<CachedFile>,
    },
    /// The host changed a coherent file: all its pages are to be taken and freed, then comes
    /// [`crate::Cache::strict_rehome`].
    HostChanged {
        /// Which.
        file: Arc<CachedFile>,
    },
}

/// Where events go: a channel, and a callback that wakes the thread that drains it.
#[derive(Clone)]
pub struct EventSink {
    sender: crossbeam_channel::Sender<CacheEvent>,
    wake: Arc<dyn Fn() + Send + Sync>,
}

impl EventSink {
    /// Events go to `sender` (unbounded: what is in it is bounded by what was asked for), then `wake`
    /// is called, from any thread, also with locks of the cache held: it must not call the cache.
    pub fn new(
        sender: crossbeam_channel::Sender<CacheEvent>,
        wake: Arc<dyn Fn() + Send + Sync>,
    ) -> Self {
        Self { sender, wake }
    }

    pub(crate) fn send(&self, event: CacheEvent) {
        // A receiver that is gone wants no events: the daemon is stopping.
        if self.sender.send(event).is_ok() {
            (self.wake)();
        }
    }

    /// Wakes the receiver although there is no event: [`crate::Cache::tick`] wants to be called.
    pub(crate) fn wake(&self) {
        (self.wake)();
    }
}

impl std::fmt::Debug for EventSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventSink").finish_non_exhaustive()
    }
}
