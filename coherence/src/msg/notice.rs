//! What the daemon says unasked.

use super::codec::{DecodeError, EncodeError, Frame, FrameKind, Parts, put};
use super::wire::{
    WFenced, WInvalidate, WRange, WRebase, WResized, empty, generation, token, whole, zero,
};
use super::{FileToken, Generation, PageRange};
use copage_grants::{Epoch, Version};
use zerocopy::IntoBytes;

/// Why pages are taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InvalidateReason {
    /// Memory is short.
    Reclaim,
    /// The content changed.
    Changed,
    /// The right to the file ended.
    Withdrawn,
}

/// Why a session was fenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// A `coherent` file has another length. What was behind its end may be there now. No Ack.
    Resized {
        /// Which.
        file: FileToken,
        /// Its length now, in bytes.
        bytes: u64,
    },
    /// The session counts for nothing any more; the channel closes.
    Fenced {
        /// Why.
        reason: FenceReason,
    },
    /// The daemon stops; the channel closes.
    Goodbye,
}

mod code {
    pub(super) const INVALIDATE: u8 = 1;
    pub(super) const REBASE: u8 = 2;
    pub(super) const FENCED: u8 = 3;
    pub(super) const GOODBYE: u8 = 4;
    pub(super) const RESIZED: u8 = 5;
}

impl Notice {
    /// Replaces what `out` holds by this notice as one message.
    pub fn encode(&self, epoch: Epoch, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let mut send = |code: u8, fixed: &[u8]| {
            let kind = FrameKind::Notice;
            put(
                out,
                &Parts {
                    kind,
                    code,
                    request: 0,
                    epoch,
                    fixed,
                    tail: &[],
                },
            )
        };
        match self {
            Self::Invalidate {
                recall,
                file,
                generation,
                range,
                reason,
                deadline_ms,
            } => {
                let reason: u32 = match reason {
                    InvalidateReason::Reclaim => 1,
                    InvalidateReason::Changed => 2,
                    InvalidateReason::Withdrawn => 3,
                };
                let fixed = WInvalidate {
                    recall: (*recall).into(),
                    file: file.0.into(),
                    generation: generation.0.into(),
                    reason: reason.into(),
                    range: WRange::new(*range)?,
                    deadline_ms: (*deadline_ms).into(),
                    reserved: 0.into(),
                };
                send(code::INVALIDATE, fixed.as_bytes())
            }
            Self::Rebase {
                recall,
                file,
                generation,
                version,
                bytes,
                deadline_ms,
            } => {
                let fixed = WRebase {
                    recall: (*recall).into(),
                    file: file.0.into(),
                    version: version.0.into(),
                    bytes: (*bytes).into(),
                    generation: generation.0.into(),
                    deadline_ms: (*deadline_ms).into(),
                };
                send(code::REBASE, fixed.as_bytes())
            }
            Self::Fenced { reason } => {
                let reason: u32 = match reason {
                    FenceReason::LeaseExpired => 1,
                    FenceReason::DeadlineMissed => 2,
                    FenceReason::Protocol => 3,
                    FenceReason::Removed => 4,
                };
                let fixed = WFenced {
                    reason: reason.into(),
                    reserved: 0.into(),
                };
                send(code::FENCED, fixed.as_bytes())
            }
            Self::Resized { file, bytes } => {
                let fixed = WResized {
                    file: file.0.into(),
                    bytes: (*bytes).into(),
                };
                send(code::RESIZED, fixed.as_bytes())
            }
            Self::Goodbye => send(code::GOODBYE, &[]),
        }
    }

    /// Reads a notice.
    pub fn decode(frame: &Frame<'_>) -> Result<Self, DecodeError> {
        frame.expect(FrameKind::Notice)?;
        if frame.request != 0 {
            return Err(DecodeError::Value("request number"));
        }
        Ok(match frame.code {
            code::INVALIDATE => {
                let w: &WInvalidate = whole(frame.body)?;
                zero(w.reserved.get().into())?;
                let reason = match w.reason.get() {
                    1 => InvalidateReason::Reclaim,
                    2 => InvalidateReason::Changed,
                    3 => InvalidateReason::Withdrawn,
                    _ => return Err(DecodeError::Value("invalidate reason")),
                };
                Self::Invalidate {
                    recall: w.recall.get(),
                    file: token(w.file),
                    generation: generation(w.generation),
                    range: w.range.get()?,
                    reason,
                    deadline_ms: w.deadline_ms.get(),
                }
            }
            code::REBASE => {
                let w: &WRebase = whole(frame.body)?;
                Self::Rebase {
                    recall: w.recall.get(),
                    file: token(w.file),
                    generation: generation(w.generation),
                    version: Version(w.version.get()),
                    bytes: w.bytes.get(),
                    deadline_ms: w.deadline_ms.get(),
                }
            }
            code::FENCED => {
                let w: &WFenced = whole(frame.body)?;
                zero(w.reserved.get().into())?;
                let reason = match w.reason.get() {
                    1 => FenceReason::LeaseExpired,
                    2 => FenceReason::DeadlineMissed,
                    3 => FenceReason::Protocol,
                    4 => FenceReason::Removed,
                    _ => return Err(DecodeError::Value("fence reason")),
                };
                Self::Fenced { reason }
            }
            code::RESIZED => {
                let w: &WResized = whole(frame.body)?;
                Self::Resized {
                    file: token(w.file),
                    bytes: w.bytes.get(),
                }
            }
            code::GOODBYE => {
                empty(frame.body)?;
                Self::Goodbye
            }
            _ => return Err(frame.unknown()),
        })
    }
}
