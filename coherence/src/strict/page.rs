//! The state of one page.

use copage_grants::{Access, Epoch, FrameNo, Version};
use std::collections::{BTreeMap, VecDeque};

/// How a session holds a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Holder {
    pub access: Access,
    /// It was asked for the page.
    pub leaving: Option<Leaving>,
}

/// How far a session is in letting go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Leaving {
    /// When it is fenced, if the table does not show it by then.
    pub until_ms: u64,
    /// It said so; the table is looked at again at this time.
    pub look_ms: Option<u64>,
}

/// What is wanted of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Want {
    Hold {
        epoch: Epoch,
        ticket: u64,
        access: Access,
    },
    Take {
        ticket: u64,
    },
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Page {
    pub frame: Option<FrameNo>,
    pub version: Version,
    pub holders: BTreeMap<Epoch, Holder>,
    /// Who wrote last, and since when that one may.
    pub writer: Option<(Epoch, u64)>,
    /// Somebody could write since the frame was filled.
    pub dirty: bool,
    /// How often the writer changed, each time soon after the last.
    pub bounces: u32,
    /// All writers have one frame.
    pub shared_rw: bool,
    /// Somebody who is gone may still write to the frame: the page must have another.
    pub moving: bool,
    /// A `Fill` or a `Copy` is under way.
    pub busy: bool,
    pub wants: VecDeque<Want>,
}

impl Page {
    pub(super) fn new(version: Version) -> Self {
        Self {
            frame: None,
            version,
            holders: BTreeMap::new(),
            writer: None,
            dirty: false,
            bounces: 0,
            shared_rw: false,
            moving: false,
            busy: false,
            wants: VecDeque::new(),
        }
    }

    /// Nothing is known of it that would be missed.
    pub(super) fn is_blank(&self) -> bool {
        self.frame.is_none() && self.wants.is_empty() && !self.busy
    }

    /// Those whose holding stands against `access` for `epoch`. A writer's own reading does too: its
    /// entry goes before the one for writing is written.
    pub(super) fn against(&self, epoch: Epoch, access: Access) -> Vec<Epoch> {
        let stands = |(who, holder): (&Epoch, &Holder)| {
            let mine = *who == epoch;
            let against = match (access, holder.access) {
                (Access::ReadOnly, Access::ReadOnly) => false,
                (Access::ReadOnly, Access::ReadWrite) => !mine && !self.shared_rw,
                (Access::ReadWrite, Access::ReadOnly) => mine || !self.shared_rw,
                (Access::ReadWrite, Access::ReadWrite) => !mine && !self.shared_rw,
            };
            against.then_some(*who)
        };
        self.holders.iter().filter_map(stands).collect()
    }

    /// How often a session wants it.
    pub(super) fn wants_of(&self, epoch: Epoch) -> usize {
        let of = |want: &&Want| matches!(want, Want::Hold { epoch: who, .. } if *who == epoch);
        self.wants.iter().filter(of).count()
    }

    pub(super) fn end_wants(&mut self, epoch: Epoch) {
        let of = |want: &Want| matches!(want, Want::Hold { epoch: who, .. } if *who == epoch);
        self.wants.retain(|want| !of(want));
    }

    /// Does somebody who holds it alone have it for writing?
    pub(super) fn is_exclusive(&self) -> bool {
        !self.shared_rw
            && self
                .holders
                .values()
                .any(|holder| holder.access == Access::ReadWrite)
    }
}
