//! The header of every message, and what decoding and encoding can refuse.

use super::wire::{Header, take};
use super::{MESSAGE_BYTES_MAX, PROTOCOL_VERSION};
use copage_grants::Epoch;
use zerocopy::IntoBytes;

/// The first four bytes of every message: "cpg1" as it stands on the wire.
pub(super) const MAGIC: [u8; 4] = *b"cpg1";
/// Length of the header, in bytes.
pub(super) const HEADER_BYTES: usize = size_of::<Header>();
const _: () = assert!(HEADER_BYTES == 32);
const _: () = assert!(MESSAGE_BYTES_MAX <= u32::MAX as usize);

/// Why a message cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Shorter than its fixed part.
    #[error("a message of {bytes} bytes is shorter than the {needed} its kind needs")]
    TooShort {
        /// What came, in bytes.
        bytes: usize,
        /// What its fixed part needs, in bytes.
        needed: usize,
    },
    /// Longer than any message may be.
    #[error("a message of {bytes} bytes is longer than {MESSAGE_BYTES_MAX}")]
    TooLong {
        /// What came, in bytes.
        bytes: usize,
    },
    /// Does not begin as a message of copage does.
    #[error("not a message of copage")]
    Magic,
    /// Another version of the protocol.
    #[error("protocol version {found}; this end speaks {PROTOCOL_VERSION}")]
    Version {
        /// The message's version.
        found: u16,
    },
    /// A kind that this version does not know, or that does not belong here.
    #[error("message kind {kind:#06x} is not known here")]
    Kind {
        /// The kind.
        kind: u16,
    },
    /// The header's length is not what came.
    #[error("the header says {said} bytes, {bytes} came")]
    Length {
        /// What the header says.
        said: u32,
        /// What came.
        bytes: usize,
    },
    /// Bytes behind a message that has no tail.
    #[error("{bytes} bytes too many")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// A reserved field is not zero.
    #[error("reserved bytes are not zero")]
    Reserved,
    /// A field holds what it never may.
    #[error("{0} holds a value it never may")]
    Value(&'static str),
}

/// Why a message cannot be sent: it would not be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The tail is longer than fits one message.
    #[error("a message of {bytes} bytes is longer than {MESSAGE_BYTES_MAX}")]
    TooLong {
        /// What it would be, in bytes.
        bytes: usize,
    },
    /// A field holds what it never may.
    #[error("{0} holds a value it never may")]
    Value(&'static str),
}

/// The three kinds of messages: the upper byte of the header's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrameKind {
    /// Guest to daemon: [`super::Request`].
    Request,
    /// Daemon to guest, to one request: [`super::Reply`].
    Reply,
    /// Daemon to guest, unasked: [`super::Notice`].
    Notice,
}

impl FrameKind {
    const fn class(self) -> u16 {
        match self {
            Self::Request => 0x0100,
            Self::Reply => 0x0200,
            Self::Notice => 0x0300,
        }
    }
}

/// One message with a good header; the body is not looked at yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Which of the three kinds.
    pub kind: FrameKind,
    /// Which message of that kind: the lower byte of the header's kind.
    pub code: u8,
    /// The request's number, chosen by the guest; repeated in the reply; 0 in a notice.
    pub request: u64,
    /// The session's epoch; 0 in Hello.
    pub epoch: Epoch,
    /// All behind the header.
    pub body: &'a [u8],
}

/// Checks a message's header against the message. `bytes` is exactly one message.
///
/// Of a message that this refuses nothing can be believed, its request number neither. A message
/// whose header is good but whose body is refused later can still be answered by number.
pub fn decode_header(bytes: &[u8]) -> Result<Frame<'_>, DecodeError> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(DecodeError::TooLong { bytes: bytes.len() });
    }
    let (header, body): (&Header, _) = take(bytes)?;
    if header.magic != MAGIC {
        return Err(DecodeError::Magic);
    }
    if header.version.get() != PROTOCOL_VERSION {
        return Err(DecodeError::Version {
            found: header.version.get(),
        });
    }
    if usize::try_from(header.len.get()) != Ok(bytes.len()) {
        return Err(DecodeError::Length {
            said: header.len.get(),
            bytes: bytes.len(),
        });
    }
    if header.reserved.get() != 0 {
        return Err(DecodeError::Reserved);
    }
    let [code, class] = header.kind.get().to_le_bytes();
    let kind = match class {
        1 => FrameKind::Request,
        2 => FrameKind::Reply,
        3 => FrameKind::Notice,
        _ => {
            return Err(DecodeError::Kind {
                kind: header.kind.get(),
            });
        }
    };
    Ok(Frame {
        kind,
        code,
        request: header.request.get(),
        epoch: Epoch(header.epoch.get()),
        body,
    })
}

impl Frame<'_> {
    /// The error for a code that `decode` of this kind does not know.
    pub(super) const fn unknown(&self) -> DecodeError {
        DecodeError::Kind {
            kind: self.kind.class() | self.code as u16,
        }
    }

    /// Checks that this frame is of the kind that the caller decodes.
    pub(super) fn expect(&self, kind: FrameKind) -> Result<(), DecodeError> {
        if self.kind == kind {
            Ok(())
        } else {
            Err(self.unknown())
        }
    }
}

/// What a message is made of: code, fixed part, tail.
pub(super) struct Parts<'a> {
    pub kind: FrameKind,
    pub code: u8,
    pub request: u64,
    pub epoch: Epoch,
    pub fixed: &'a [u8],
    pub tail: &'a [u8],
}

/// Replaces what `out` holds by one whole message; its capacity is used again.
pub(super) fn put(out: &mut Vec<u8>, parts: &Parts<'_>) -> Result<(), EncodeError> {
    out.clear();
    let bytes = HEADER_BYTES
        .saturating_add(parts.fixed.len())
        .saturating_add(parts.tail.len());
    let len = match u32::try_from(bytes) {
        Ok(len) if bytes <= MESSAGE_BYTES_MAX => len,
        _ => return Err(EncodeError::TooLong { bytes }),
    };
    let header = Header {
        magic: MAGIC,
        version: PROTOCOL_VERSION.into(),
        kind: (parts.kind.class() | u16::from(parts.code)).into(),
        len: len.into(),
        reserved: 0.into(),
        request: parts.request.into(),
        epoch: parts.epoch.0.into(),
    };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(parts.fixed);
    out.extend_from_slice(parts.tail);
    Ok(())
}
