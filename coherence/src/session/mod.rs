//! Sessions: who counts, until when, and what it still owes an answer to.
//!
//! A pure state machine. Time and events come in, actions come out; nothing here reads a clock,
//! sends, or waits. The daemon calls [`Sessions::step`] for every event and does what comes out, in
//! order; it asks [`Sessions::next_due_ms`] when to call again though nothing happens.
//!
//! The rules:
//! - Each connect gets an epoch never used before. What carries another counts for nothing.
//! - A session's lease ends unless it is renewed; every recall has a deadline of its own, and missing
//!   it fences the session although it renews.
//! - After its fence or its end a session gets no action but that one.
//! - A domid is given again only after [`Event::Drained`]: no entry names it any more.

mod machine;

pub use machine::Sessions;

use crate::msg::{FenceReason, FileToken, Generation, InvalidateReason, PageRange};
use crate::strict::Place;
use copage_grants::{DomId, Epoch, Version};

/// A guest as the daemon knows it by name; what it may have is counted across reconnects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Guest(pub u32);

/// Terms and limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionConfig {
    /// The session lease, in ms, as guests are told it; the daemon waits 1 % longer.
    pub lease_ttl_ms: u32,
    /// How long a guest may take over a recall, in ms; the daemon waits 1 % longer.
    pub invalidate_deadline_ms: u32,
    /// Sessions in all.
    pub sessions_max: usize,
    /// Sessions of one guest; one that is gone counts until its domid is drained.
    pub guest_sessions_max: usize,
    /// Recalls that one session may leave unacknowledged.
    pub recalls_max: usize,
}

/// What is asked back, as the guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// Pages.
    Pages {
        /// Of what.
        file: FileToken,
        /// Of which generation.
        generation: Generation,
        /// Which.
        range: PageRange,
        /// Why.
        reason: InvalidateReason,
    },
    /// A page of a coherent file. How the guest is told is the caller's: its tokens and generations are.
    Place(Place),
    /// A whole generation, for a newer one.
    Rebase {
        /// Of what.
        file: FileToken,
        /// The newer one.
        generation: Generation,
        /// Its version.
        version: Version,
        /// Its length in bytes.
        bytes: u64,
    },
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A guest said Hello and is who it says.
    Connect {
        /// The caller's number for the channel; comes back in the action.
        conn: u64,
        /// Who.
        guest: Guest,
    },
    /// A session renews.
    Renew {
        /// The epoch that the message carries.
        epoch: Epoch,
    },
    /// A session answers a recall.
    Ack {
        /// The epoch that the message carries.
        epoch: Epoch,
        /// Which.
        recall: u64,
    },
    /// Something is to be asked back from a session.
    Recall {
        /// Whose.
        epoch: Epoch,
        /// What.
        subject: Subject,
    },
    /// What was asked back needs no answer any more (the file was closed).
    Settle {
        /// Whose.
        epoch: Epoch,
        /// Which.
        recall: u64,
    },
    /// A session broke a rule, or is to go.
    Fence {
        /// Whose.
        epoch: Epoch,
        /// Why.
        reason: FenceReason,
    },
    /// A session's process is gone, or said Bye: nothing of it is mapped.
    End {
        /// Whose.
        epoch: Epoch,
    },
    /// No grant entry names this domid any more.
    Drained {
        /// Which.
        dom: DomId,
    },
    /// Time has passed.
    Tick,
}

/// Why a guest gets no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// Sessions in all.
    #[error("the daemon has {0} sessions and may have no more")]
    Sessions(usize),
    /// Sessions of this guest.
    #[error(
        "this guest has {0} sessions, ended ones whose pages may still be mapped included, and may have no more"
    )]
    GuestSessions(usize),
}

/// How a recall ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecallOutcome {
    /// The guest said that it is done.
    Acked,
    /// The session was fenced before it answered.
    Fenced,
    /// The session ended before it answered.
    Ended,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Begin the session: answer Hello.
    Welcome {
        /// The caller's.
        conn: u64,
        /// The domid.
        dom: DomId,
        /// The epoch.
        epoch: Epoch,
    },
    /// Answer Hello by an error.
    Refuse {
        /// The caller's.
        conn: u64,
        /// Why.
        why: Refusal,
    },
    /// Answer Renew.
    Renewed {
        /// Whose.
        epoch: Epoch,
    },
    /// Send the notice.
    Ask {
        /// To whom.
        epoch: Epoch,
        /// The number for the Ack.
        recall: u64,
        /// What.
        subject: Subject,
    },
    /// A recall has ended. Comes once for every `Ask`.
    Settled {
        /// Whose.
        epoch: Epoch,
        /// Which.
        recall: u64,
        /// How.
        outcome: RecallOutcome,
    },
    /// The session counts for nothing any more: tell it if it listens, close the channel, take its
    /// grants.
    Fenced {
        /// Which.
        epoch: Epoch,
        /// Its domid, which stays taken until drained.
        dom: DomId,
        /// Whose.
        guest: Guest,
        /// Why.
        reason: FenceReason,
    },
    /// The session is over and nothing of it is mapped.
    Ended {
        /// Which.
        epoch: Epoch,
        /// Its domid, which stays taken until drained.
        dom: DomId,
        /// Whose.
        guest: Guest,
    },
}
