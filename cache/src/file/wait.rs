//! What waits on a file.

use crate::config::Holder;
use crate::events::OpenHow;
use crate::tree::NodeRef;

/// Pages being filled. They are in no index; only the thread that fills them touches them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flight {
    pub generation: u32,
    pub first: u32,
    pub count: u32,
}

impl Flight {
    pub(crate) fn end(&self) -> u32 {
        self.first + self.count
    }

    pub(crate) fn overlaps(&self, generation: u32, first: u32, end: u32) -> bool {
        self.generation == generation && self.first < end && first < self.end()
    }
}

/// A request that waits.
#[derive(Clone, Debug)]
pub(crate) struct Waiter {
    pub ticket: u64,
    pub who: Holder,
    pub kind: WaitKind,
    /// Since when, in ms.
    pub since_ms: u64,
    /// Fills were asked for on its behalf.
    pub issued: bool,
}

#[derive(Clone, Debug)]
pub(crate) enum WaitKind {
    Open {
        how: OpenHow,
        node: NodeRef,
    },
    /// `window` at least `count`: what is filled.
    Fault {
        generation: u32,
        first: u32,
        count: u32,
        window: u32,
    },
    Read {
        offset: u64,
        len: u32,
    },
    /// The open is counted; pages before `cursor` are there.
    Pin {
        generation: u32,
        cursor: u32,
        tries: u32,
    },
}

impl WaitKind {
    /// Does the waiter want a page that could not be read?
    pub(crate) fn wants(&self, generation: u32, page: u32) -> bool {
        match self {
            Self::Open { .. } => false,
            Self::Fault {
                generation: g,
                first,
                ..
            } => *g == generation && *first == page,
            Self::Read { offset, len } => {
                let at = u64::from(page) * 4096;
                at < offset + u64::from(*len) && *offset < at + 4096
            }
            Self::Pin { generation: g, .. } => *g == generation,
        }
    }
}
