//! The words of the design as types: identifiers that refuse silent arithmetic.
//!
//! Every crate uses these; `coherence` uses nothing else of `grants`.

use core::fmt;

/// Bytes in a page and in a frame: the unit of granting on every x86 and Arm Xen.
pub const PAGE_SIZE: usize = 4096;
/// `PAGE_SIZE` as the type that file offsets use.
pub const PAGE_SIZE_U64: u64 = 4096;

/// A guest as the hypervisor knows it (`domid_t`, xen/include/public/xen.h). In `local`, a number
/// the daemon gives to a connected process. Domids are used again: nothing that outlives a session
/// is keyed by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomId(pub u16);

impl DomId {
    /// The first reserved value (`DOMID_FIRST_RESERVED`, xen.h): guests are below it.
    pub const FIRST_RESERVED: u16 = 0x7FF0;
}

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "d{}", self.0)
    }
}

/// 4 KiB of a file, counted from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// The page that holds byte `offset`.
    pub const fn containing(offset: u64) -> Self {
        Self(offset / PAGE_SIZE_U64)
    }

    /// Offset in bytes of the page's first byte; `None` past the end of what a file can be.
    pub const fn byte_offset(self) -> Option<u64> {
        self.0.checked_mul(PAGE_SIZE_U64)
    }

    /// The page `count` further on; `None` on overflow.
    pub const fn checked_add(self, count: u64) -> Option<Self> {
        match self.0.checked_add(count) {
            Some(v) => Some(Self(v)),
            None => None,
        }
    }
}

/// Pages that hold `bytes` bytes of a file.
pub const fn pages_for(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_SIZE_U64)
}

/// One frame slot of the budget, 0 up to `frames_max`. Xen: stands for (cache domain, gfn).
/// local: stands for the (frame file, index) where the page was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameNo(pub u32);

/// Where the pages of one content generation of one cached file live. local: one frame file.
/// Xen: a list of frames in cache domains. Never used again in the life of a daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HomeId(pub u64);

/// A class of guests that could read each other's memory anyway (local: processes of one user).
/// A home's descriptor that covers pages which are not there yet never leaves its class: whoever
/// has it can make such a page read as zeros for all others that have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustClass(pub u32);

impl TrustClass {
    /// The daemon's own, and the only one where a hypervisor keeps guests apart.
    pub const OWN: Self = Self(0);
    /// Homes that guests of several users are given, each time when no page is missing. Nobody maps
    /// them with a fault handler, since who has had a descriptor may have kept a way back to the
    /// file. (local: no user has the number -1.)
    pub const PINNED: Self = Self(u32::MAX);
}

/// One grant table. Xen: one for each cache domain. local: one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(pub u16);

/// The number of one entry in a grant table (`grant_ref_t`, xen/include/public/grant_table.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrantRef(pub u32);

/// One entry of one table: what a guest needs to map a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Grant {
    /// The table that holds the entry.
    pub table: TableId,
    /// Its number there.
    pub gref: GrantRef,
}

/// Content generation of a page: the daemon's epoch in the upper 32 bits, a counter below, so that
/// versions rise across restarts too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

impl Version {
    /// The version numbered `counter` of a daemon whose epoch is `epoch`.
    pub const fn new(epoch: u32, counter: u32) -> Self {
        Self(((epoch as u64) << 32) | counter as u64)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

/// One life of a session. Each connect gets a new one; what carries an old one counts for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);
