//! Cached files: what is open by whom, which generation is served, and what waits.

mod home;
mod index;
mod wait;

pub(crate) use home::{Charge, Home};
pub(crate) use index::each_run;
pub(crate) use wait::{Flight, WaitKind, Waiter};

use crate::coherent::{Coherent, Strict};
use crate::config::{ExportId, Holder};
use crate::error::CacheError;
use crate::events::{FileState, OpenHow};
use crate::tree::NodeRef;
use copage_grants::{DomId, FrameNo, Grant, PageIndex, TrustClass, Version};
use parking_lot::Mutex;
use rustix::fs::Stat;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Names a cached file in the life of one cache; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u64);

/// What frames are shared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FileKey {
    /// The share group.
    pub group: u32,
    /// Who gets descriptors while there are holes. Files that are only read are of
    /// [`TrustClass::OWN`], whoever opens them. What other users pin is of [`TrustClass::PINNED`]: a
    /// descriptor goes out when no hole is left, but nobody knows that it does not come back when
    /// there are some again.
    pub class: TrustClass,
    /// The host's device number.
    pub dev: u64,
    /// The inode there.
    pub ino: u64,
    /// Guests may write it.
    pub coherent: bool,
}

/// One file of one share group. Kept while it is open or has resident pages.
#[derive(Debug)]
pub struct CachedFile {
    /// Its number.
    pub id: FileId,
    pub(crate) key: FileKey,
    pub(crate) node: NodeRef,
    /// Reads through the host's page cache, and writes; carries the lease.
    pub(crate) data: OwnedFd,
    /// What a coherent file has besides.
    pub(crate) coherent: Option<Coherent>,
    pub(crate) inner: Mutex<Inner>,
    /// A job of the pool that looks at its waiters has not begun yet.
    pub(crate) queued: AtomicBool,
}

/// What shows that the content may have changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cookie {
    pub bytes: u64,
    pub mtime: (i64, i64),
    pub ctime: (i64, i64),
}

impl Cookie {
    pub(crate) fn of(stat: &Stat) -> Self {
        Self {
            bytes: u64::try_from(stat.st_size).unwrap_or(0),
            mtime: (stat.st_mtime, stat.st_mtime_nsec as i64),
            ctime: (stat.st_ctime, stat.st_ctime_nsec as i64),
        }
    }
}

/// The kernel's promise to tell of writers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lease {
    /// Held: nobody has the file open for writing.
    Held,
    /// Not held; worth asking for again.
    Wanted,
    /// A host's open waits until we give it up, which we do when the pages are out.
    Breaking,
    /// Never to be had: the file system or our rights forbid it.
    Never,
}

/// One domain's opens of the file through one export.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenEntry {
    pub who: Holder,
    pub export: ExportId,
    pub maps: u32,
    pub reads: u32,
    /// Pinned opens by generation are counted in the homes; these are all of the entry.
    pub pins: u32,
    /// Errors of write-back that it was told of.
    pub errors_seen: u64,
}

impl OpenEntry {
    pub(crate) fn count_mut(&mut self, how: OpenHow) -> &mut u32 {
        match how {
            OpenHow::Map => &mut self.maps,
            OpenHow::Pin => &mut self.pins,
            OpenHow::Read => &mut self.reads,
        }
    }

    fn any(&self) -> bool {
        self.maps > 0 || self.reads > 0 || self.pins > 0
    }
}

/// Pages that a guest said it unmapped. Its kernel may take a little longer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unmapping {
    pub dom: DomId,
    pub generation: u32,
    pub first: PageIndex,
    pub count: u32,
    /// Until when its entries are looked at, in ms.
    pub until_ms: u64,
}

impl Unmapping {
    pub(crate) fn overlaps(&self, first: u64, count: u32) -> bool {
        self.first.0 < first + u64::from(count) && first < self.first.0 + u64::from(self.count)
    }
}

#[derive(Debug)]
pub(crate) struct Inner {
    /// For `O_DIRECT`; `None` where the file system refuses it.
    pub direct: Option<Arc<OwnedFd>>,
    /// The home of the newest generation; `None` while the content settles.
    pub live: Option<Home>,
    /// Homes of older generations that are not ended yet.
    pub old: Vec<Home>,
    pub state: FileState,
    pub cookie: Cookie,
    pub lease: Lease,
    /// Without a live home: when to stop waiting for the lease, in ms.
    pub settle_until_ms: u64,
    /// Changes one after the other, without a fill that stood in between.
    pub churn: u32,
    /// A change was seen and the content served all the same: the generation ends then, in ms.
    pub doubt_ms: Option<u64>,
    /// When the last generation ended, in ms.
    pub retired_ms: u64,
    pub opens: Vec<OpenEntry>,
    /// Domains that closed the file but whose entries still show a mapping.
    pub lingering: Vec<DomId>,
    /// Ranges that guests said they unmapped, whose entries showed a mapping still.
    pub unmapping: Vec<Unmapping>,
    pub flights: Vec<Flight>,
    pub waiters: Vec<Waiter>,
    /// Gone for good: nothing is opened or filled any more.
    pub dead: bool,
    pub watch: Option<i32>,
    /// The end of the last sequential fault and the window then used, in pages.
    pub sequence: (u64, u32),
    /// When it was last closed by the last, as a count of closes; tells entries of the idle list.
    pub idle_seq: u64,
    /// What a coherent file has besides.
    pub strict: Strict,
    /// Kept to spare allocations.
    pub scratch: (Vec<FrameNo>, Vec<Grant>),
}

impl CachedFile {
    pub(crate) fn new(
        id: FileId,
        key: FileKey,
        node: NodeRef,
        data: OwnedFd,
        direct: Option<OwnedFd>,
        coherent: Option<Coherent>,
    ) -> Self {
        let inner = Inner {
            direct: direct.map(Arc::new),
            live: None,
            old: Vec::new(),
            state: FileState {
                generation: 0,
                version: Version(0),
                bytes: 0,
                host_bounded: true,
                coherent: coherent.is_some(),
            },
            cookie: Cookie::default(),
            lease: Lease::Wanted,
            settle_until_ms: 0,
            churn: 0,
            doubt_ms: None,
            retired_ms: 0,
            opens: Vec::new(),
            lingering: Vec::new(),
            unmapping: Vec::new(),
            flights: Vec::new(),
            waiters: Vec::new(),
            dead: false,
            watch: None,
            sequence: (0, 0),
            idle_seq: 0,
            strict: Strict::default(),
            scratch: (Vec::new(), Vec::new()),
        };
        Self {
            id,
            key,
            node,
            data,
            coherent,
            inner: Mutex::new(inner),
            queued: AtomicBool::new(false),
        }
    }

    /// The host's (device, inode).
    pub fn inode(&self) -> (u64, u64) {
        (self.node.dev, self.node.ino)
    }

    /// Where the host has it now; empty when that cannot be told.
    pub fn path(&self) -> std::path::PathBuf {
        use std::os::fd::AsRawFd;
        let link = format!("/proc/self/fd/{}", self.data.as_raw_fd());
        std::fs::read_link(link).unwrap_or_default()
    }

    pub(crate) fn data(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }

    pub(crate) fn read_cookie(&self) -> Result<(Cookie, u64), CacheError> {
        let stat = rustix::fs::fstat(&self.data).map_err(|e| CacheError::io("stat", e))?;
        Ok((Cookie::of(&stat), stat.st_nlink as u64))
    }
}

impl Inner {
    pub(crate) fn entry(&self, dom: DomId) -> Option<&OpenEntry> {
        self.opens.iter().find(|e| e.who.dom == dom)
    }

    /// Counts one more open.
    pub(crate) fn add_open(&mut self, who: Holder, export: ExportId, how: OpenHow) {
        let found = self
            .opens
            .iter()
            .position(|e| e.who == who && e.export == export);
        let errors_seen = self.strict.errors;
        let at = found.unwrap_or_else(|| {
            self.opens.push(OpenEntry {
                who,
                export,
                maps: 0,
                reads: 0,
                pins: 0,
                errors_seen,
            });
            self.opens.len() - 1
        });
        *self.opens[at].count_mut(how) += 1;
    }

    /// Counts one open less; `false` when there was none.
    pub(crate) fn drop_open(&mut self, who: Holder, how: OpenHow) -> bool {
        let Some(at) = (0..self.opens.len())
            .find(|n| self.opens[*n].who == who && *self.opens[*n].count_mut(how) > 0)
        else {
            return false;
        };
        *self.opens[at].count_mut(how) -= 1;
        if !self.opens[at].any() {
            self.opens.swap_remove(at);
        }
        true
    }

    /// Does the domain have it open in a way that maps?
    pub(crate) fn may_hold_grants(&self, dom: DomId) -> bool {
        self.opens
            .iter()
            .any(|e| e.who.dom == dom && (e.maps > 0 || e.pins > 0))
    }

    /// The domain is granted pages: what it said before of unmapping them counts no more.
    pub(crate) fn wants_again(&mut self, dom: DomId, first: u64, count: u32) {
        self.unmapping
            .retain(|range| range.dom != dom || !range.overlaps(first, count));
    }

    /// The live home, if `generation` is the newest.
    pub(crate) fn live_of(&mut self, generation: u32) -> Option<&mut Home> {
        self.live.as_mut().filter(|h| h.generation == generation)
    }

    pub(crate) fn home_of(&mut self, generation: u32) -> Option<&mut Home> {
        self.live
            .iter_mut()
            .chain(&mut self.old)
            .find(|h| h.generation == generation)
    }

    pub(crate) fn home_at(&mut self, slot: u32) -> Option<&mut Home> {
        self.live
            .iter_mut()
            .chain(&mut self.old)
            .find(|h| h.slot == slot)
    }

    /// Nobody has it open and nothing is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.opens.is_empty() && self.waiters.is_empty() && self.flights.is_empty()
    }

    /// Something must be looked at from time to time.
    pub(crate) fn needs_attention(&self) -> bool {
        let unsettled = self.live.is_none() && !self.dead && self.state.generation > 0;
        let unpinned = self
            .live
            .as_ref()
            .is_some_and(|h| h.exposed && !h.is_pinned() || h.recalling > 0);
        unsettled
            || unpinned
            || self.live.is_some() && self.doubt_ms.is_some()
            || !self.old.is_empty()
            || !self.lingering.is_empty()
            || !self.unmapping.is_empty()
            || self.lease == Lease::Breaking
            || self.strict.lease_retry.is_some()
            || self
                .old
                .iter()
                .chain(&self.live)
                .any(|h| !h.unfreed.is_empty())
    }
}
