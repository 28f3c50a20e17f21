//! What the daemon says unasked.

use super::{FileToken, Generation, PageRange};
use copage_grants::Version;

/// Why pages are taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidateReason {
    /// Memory is short.
    Reclaim,
    /// The content changed.
    Changed,
    /// The right to the file ended.
    Withdrawn,
}

/// Why a session was fenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceReason {
    /// It did not renew its lease in time.
    LeaseExpired,
    /// It did not answer an invalidate in time.
    DeadlineMissed,
    /// It broke the protocol or a limit.
    Protocol,
    /// The administrator took its access away.
    Removed,
}

/// A notice: carries request number 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Unmap these pages, say Unmapped, then Ack. They fault again by themselves.
    Invalidate {
        /// For the Ack.
        recall: u64,
        /// Of what.
        file: FileToken,
        /// Of which generation; another is nothing to do but Ack.
        generation: Generation,
        /// Which pages.
        range: PageRange,
        /// Why.
        reason: InvalidateReason,
        /// How long the guest has, in ms.
        deadline_ms: u32,
    },
    /// The file has a newer content: map the new home (its descriptor is beside the message) in
    /// place of the old, close the old, then Ack.
    Rebase {
        /// For the Ack.
        recall: u64,
        /// Of what.
        file: FileToken,
        /// The newest generation.
        generation: Generation,
        /// Its version.
        version: Version,
        /// Its length in bytes.
        bytes: u64,
        /// How long the guest has, in ms.
        deadline_ms: u32,
    },
    /// The session counts for nothing any more; the channel closes.
    Fenced {
        /// Why.
        reason: FenceReason,
    },
    /// The daemon stops; the channel closes.
    Goodbye,
}
