//! Strict coherence of the pages of `coherent` files: who may hold which page how, and what must be
//! done before that changes.
//!
//! A pure state machine, as the sessions' is: time and events come in, actions come out. Only the grant
//! tables are asked and written at once, through [`Table`]: the answer of a compare-exchange is true
//! for that instant only, and an entry that is written later could be written behind its own end.
//!
//! | a page is | when its holders are |
//! |---|---|
//! | shared | any number that read |
//! | exclusive | one that writes |
//! | shared for writing | any number, because it bounced between writers: all map one frame, and the processors keep it coherent |
//!
//! The rules:
//! - What is wanted of a page is done in the order in which it was asked, one after the other, so nobody
//!   starves. Whoever gets a page keeps it for `hold_ms` from others, so that each gets something done.
//! - Before a page is written by one, all others let go. The table is tried first; whom it shows with the
//!   page mapped is asked, says so, and then the *table* must show it. Who does not in time is fenced,
//!   renewing or not.
//! - When the last that could write let go, the page is saved before anything else is done with it: what
//!   was written and released, and what a second session has seen, survives the daemon. Not so while
//!   several write one frame.
//! - A frame that a fenced session may have mapped is *lost*: it is neither written in place nor used
//!   again until the table shows that the session let go. If the session could write it, one copy of it
//!   is the page's next version, and what it stores later is in nobody's page.
//! - A session has so many pages for writing at most; for one more it gives back its oldest.
//! - A page's version rises whenever somebody may write it anew, and never goes back.
//! - After a restart nobody writes before the sessions of the earlier life must have ended.

mod page;
mod pages;
mod sessions;

pub use pages::{DirtyPage, HolderState, PageState, Pages, State, WantState};
pub use sessions::{Input, Output, Strict};

use copage_grants::{Access, Epoch, FrameNo, PageIndex, Version};

/// One page of one cached file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The caller's number for the file.
    pub file: u64,
    /// Which page.
    pub page: PageIndex,
}

/// Terms and limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StrictConfig {
    /// How long a session keeps a page that others want, in ms, at least: from when the table shows that it
    /// has mapped it.
    pub hold_ms: u32,
    /// How long a session may take to map what it was given before others can have it, in ms.
    pub map_ms: u32,
    /// How long a session may take from being asked to the table's showing that it let go, in ms; 1 % is
    /// added.
    pub unmap_deadline_ms: u32,
    /// How often the table is looked at while it does not show that, in ms.
    pub look_again_ms: u32,
    /// Changes of the writer, each wanted within `bounce_ms` of when the last one got the page, from which on
    /// all writers get one frame. `u32::MAX`: never.
    pub bounces_max: u32,
    /// See `bounces_max`.
    pub bounce_ms: u32,
    /// Pages that one session may wait for.
    pub wants_max: usize,
    /// Pages that one session may have for writing, or wait for to write. At least twice the pages that it
    /// asks for at once, or it is asked for what it has just been given.
    pub writable_max: usize,
    /// A page becomes shared for writing while somebody has it, and may be read by others then. Without,
    /// that happens only when nobody has it, and those who read and those who write exclude each other
    /// then too.
    pub share_in_place: bool,
}

impl Default for StrictConfig {
    fn default() -> Self {
        Self {
            hold_ms: 1,
            map_ms: 200,
            unmap_deadline_ms: 5000,
            look_again_ms: 5,
            bounces_max: 16,
            bounce_ms: 100,
            wants_max: 256,
            writable_max: 65_536,
            share_in_place: false,
        }
    }
}

/// The daemon itself, which reads and writes a page between two steps, and then says that it released it.
/// It has no entries, is never asked, and is bound by no limit.
pub const DAEMON: Epoch = Epoch(u64::MAX);

/// The grant tables.
pub trait Table {
    /// Lets the session have the page, which is in the frame. `shared`: for writing, as all others that
    /// write it. The error, as an errno, leaves no entry. For [`DAEMON`] too: nobody else may see the page
    /// while it writes.
    fn grant(
        &mut self,
        epoch: Epoch,
        place: Place,
        frame: FrameNo,
        access: Access,
        shared: bool,
    ) -> Result<(), i32>;

    /// Ends the session's grant of the frame unless it is in use. `false`: the table shows it mapped,
    /// and it stays. Without such a grant there is nothing to end: `true`. Where the daemon can unmap by
    /// force it does so to one that reads, and this is always `true`; one that writes must have let go by
    /// itself. Never for [`DAEMON`].
    fn revoke(&mut self, epoch: Epoch, place: Place, frame: FrameNo) -> bool;

    /// The same for a session that is gone: what force there is, is used. `false` too where others have
    /// the page for writing with it and it cannot be taken from the one alone.
    fn seize(&mut self, epoch: Epoch, place: Place, frame: FrameNo) -> bool {
        self.revoke(epoch, place, frame)
    }

    /// May several have the page for writing at once from now on? Nobody has it.
    fn can_share(&mut self, _place: Place) -> bool {
        true
    }

    /// Does the table show that the session has mapped the page? `true` where it cannot be told.
    fn is_mapped(&mut self, _epoch: Epoch, _place: Place, _frame: FrameNo) -> bool {
        true
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A session wants a page, because of a fault, or the daemon does.
    Want {
        /// Whose; it counts. Or [`DAEMON`].
        epoch: Epoch,
        /// The caller's; comes back in the answer.
        ticket: u64,
        /// Which page.
        place: Place,
        /// How.
        access: Access,
    },
    /// The daemon wants a page that nobody holds: to reclaim, truncate, or replace it.
    Take {
        /// The caller's; comes back in the answer.
        ticket: u64,
        /// Which page.
        place: Place,
    },
    /// A session says that it unmapped a page which it was asked for.
    Acked {
        /// Whose.
        epoch: Epoch,
        /// Which page.
        place: Place,
    },
    /// A session says that it unmapped a page of its own will. The daemon says so before the next step.
    Released {
        /// Whose, or [`DAEMON`].
        epoch: Epoch,
        /// Which page.
        place: Place,
    },
    /// A session was fenced or has ended: nothing more comes from it.
    Gone {
        /// Which.
        epoch: Epoch,
    },
    /// [`Action::Fill`] or [`Action::Copy`] is done: the content is in `frame`; after a copy in the same, where
    /// nobody who is gone can reach it there: it is not lost any more.
    Placed {
        /// Which page.
        place: Place,
        /// Where.
        frame: FrameNo,
    },
    /// [`Action::Fill`] or [`Action::Copy`] could not be done; nothing changed.
    NotPlaced {
        /// Which page.
        place: Place,
        /// Why, as an errno.
        errno: i32,
    },
    /// [`Action::Save`] is done.
    Saved {
        /// Which page.
        place: Place,
        /// As it was asked.
        version: Version,
    },
    /// [`Action::Save`] could not be done. It is tried again with the next want.
    NotSaved {
        /// Which page.
        place: Place,
        /// Why, as an errno.
        errno: i32,
    },
    /// The table shows that a session which is gone let go of a lost frame.
    Drained {
        /// Whose.
        epoch: Epoch,
        /// What.
        frame: FrameNo,
    },
    /// Time has passed.
    Tick,
}

/// What is to be done, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Put the page's content into a frame; answered by `Placed` or `NotPlaced`.
    Fill {
        /// Which page.
        place: Place,
    },
    /// Put what `from` holds into another frame, once; answered by `Placed` or `NotPlaced`.
    Copy {
        /// Which page.
        place: Place,
        /// Its frame now.
        from: FrameNo,
    },
    /// Put what the frame holds on the disk's file; answered by `Saved` or `NotSaved`. Nobody writes it
    /// meanwhile.
    Save {
        /// Which page.
        place: Place,
        /// Where it is.
        frame: FrameNo,
        /// Which content.
        version: Version,
    },
    /// Ask for a page; answered by `Acked`, or the session ends.
    Recall {
        /// Whom.
        epoch: Epoch,
        /// Which page.
        place: Place,
    },
    /// Answer a `Want`: the entry is written.
    Grant {
        /// The caller's.
        ticket: u64,
        /// Whose.
        epoch: Epoch,
        /// Which page.
        place: Place,
        /// Where it is.
        frame: FrameNo,
        /// How the session may map it.
        access: Access,
        /// Which content.
        version: Version,
    },
    /// Answer a `Want` or a `Take` by an error.
    Refuse {
        /// The caller's.
        ticket: u64,
        /// Why, as an errno.
        errno: i32,
    },
    /// Answer a `Take`: nobody holds the page, and the file has what was in it.
    Taken {
        /// The caller's.
        ticket: u64,
        /// Which page.
        place: Place,
        /// Where it was; `None`: in no frame.
        frame: Option<FrameNo>,
        /// Which content.
        version: Version,
    },
    /// Fence the session: it said that it let go of a page, and the table shows for too long that it
    /// did not.
    Fence {
        /// Which.
        epoch: Epoch,
    },
    /// No page is in this frame and no entry of it is left: it may be used again.
    Free {
        /// Which.
        frame: FrameNo,
    },
}
