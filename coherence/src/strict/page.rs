//! The state of one page.

use super::DAEMON;
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

impl Want {
    pub(super) const fn ticket(self) -> u64 {
        match self {
            Self::Hold { ticket, .. } | Self::Take { ticket } => ticket,
        }
    }

    /// Does a session other than `who` want to write?
    pub(super) fn is_to_write_beside(self, who: Epoch) -> bool {
        let Self::Hold { epoch, access, .. } = self else {
            return false;
        };
        access == Access::ReadWrite && epoch != who && epoch != DAEMON
    }

    fn is_of(self, who: Epoch) -> bool {
        matches!(self, Self::Hold { epoch, .. } if epoch == who)
    }
}

/// What is being done with a page outside of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Work {
    /// A `Fill` or a `Copy`.
    Placing,
    Saving,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Page {
    pub frame: Option<FrameNo>,
    pub version: Version,
    pub holders: BTreeMap<Epoch, Holder>,
    /// When a session last got it, or was last seen to have mapped what it got.
    pub since_ms: u64,
    /// Who got it last and was not looked at since; was it seen without a mapping?
    pub settling: Option<(Epoch, bool)>,
    /// Who wrote last, and since when that one may.
    pub writer: Option<(Epoch, u64)>,
    /// Somebody could write since it was last filled or saved.
    pub dirty: bool,
    /// Another wanted to write it soon after its writer had got it, or waited by then.
    pub wanted_soon: bool,
    /// How often the writer changed, each time because another wanted it so soon.
    pub bounces: u32,
    /// All writers have one frame.
    pub shared_rw: bool,
    /// Somebody who is gone may still write to the frame: the page must have another.
    pub moving: bool,
    pub work: Option<Work>,
    /// What had to be done of itself (a save, a move) could not be: it is tried again for the next want.
    pub failed: bool,
    pub wants: VecDeque<Want>,
}

impl Page {
    pub(super) fn new(version: Version) -> Self {
        Self {
            frame: None,
            version,
            holders: BTreeMap::new(),
            since_ms: 0,
            settling: None,
            writer: None,
            dirty: false,
            wanted_soon: false,
            bounces: 0,
            shared_rw: false,
            moving: false,
            work: None,
            failed: false,
            wants: VecDeque::new(),
        }
    }

    /// Nothing is known of it that would be missed.
    pub(super) fn is_blank(&self) -> bool {
        self.frame.is_none() && self.wants.is_empty() && self.work.is_none()
    }

    /// Those whose holding stands against `access` for `epoch`. A writer's own reading does too: its
    /// entry goes before the one for writing is written. `together`: who reads and who writes a page
    /// that is shared for writing do not exclude each other.
    pub(super) fn against(&self, epoch: Epoch, access: Access, together: bool) -> Vec<Epoch> {
        let mixed = self.shared_rw && together;
        // The daemon reads what others write without a mapping of its own.
        let looks = self.shared_rw && epoch == DAEMON;
        let stands = |(who, holder): (&Epoch, &Holder)| {
            let mine = *who == epoch;
            let against = match (access, holder.access) {
                (Access::ReadOnly, Access::ReadOnly) => false,
                (Access::ReadOnly, Access::ReadWrite) => !mine && !mixed && !looks,
                (Access::ReadWrite, Access::ReadOnly) => mine || !mixed,
                (Access::ReadWrite, Access::ReadWrite) => !mine && !self.shared_rw,
            };
            against.then_some(*who)
        };
        self.holders.iter().filter_map(stands).collect()
    }

    /// How often a session wants it.
    pub(super) fn wants_of(&self, epoch: Epoch) -> usize {
        self.wants.iter().filter(|want| want.is_of(epoch)).count()
    }

    pub(super) fn end_wants(&mut self, epoch: Epoch) {
        self.wants.retain(|want| !want.is_of(epoch));
    }

    /// Does anybody have it for writing?
    pub(super) fn has_writers(&self) -> bool {
        let writes = |holder: &Holder| holder.access == Access::ReadWrite;
        self.holders.values().any(writes)
    }

    /// Does somebody who holds it alone have it for writing?
    pub(super) fn is_exclusive(&self) -> bool {
        !self.shared_rw && self.has_writers()
    }

    /// Must it be saved before anything else?
    pub(super) fn unsaved(&self) -> bool {
        self.dirty && !self.has_writers()
    }

    /// The sessions that hold it.
    pub(super) fn all(&self) -> Vec<Epoch> {
        self.holders.keys().copied().collect()
    }
}
