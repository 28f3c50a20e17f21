//! What daemon and guests say to each other.
//!
//! One message is one datagram of the control channel (local: a `SOCK_SEQPACKET` message, with at
//! most one descriptor beside it; Xen: one record of the ring). Every message begins with the same
//! 32-byte header; numbers are little-endian; names and data are the tail of the message. The
//! byte maps are in docs/protocol.md.
//!
//! Either side may be lying. Decoding copies nothing but checks everything: a length that does not
//! fit, a kind nobody knows, a reserved byte that is not zero is a [`DecodeError`].

mod codec;
mod dir;
mod notice;
mod reply;
mod reply_wire;
mod request;
mod request_wire;
mod wire;

pub use codec::{DecodeError, EncodeError, Frame, FrameKind, decode_header};
pub use dir::{DirReader, DirWriter};
pub use notice::{FenceReason, InvalidateReason, Notice};
pub use reply::{Attr, DirEntry, FileKind, GrantedPlace, OpenedFlags, Reply, StatFs, WelcomeFlags};
pub use request::{FaultHint, HelloFlags, OpenHow, Request};

/// The protocol's version. A daemon speaks exactly one; Hello carries the guest's.
pub const PROTOCOL_VERSION: u16 = 2;
/// The longest message, header and data included, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 128 * 1024 + 512;
/// The most data in one Read reply, in bytes.
pub const DATA_BYTES_MAX: u32 = 128 * 1024;
/// The longest name of one directory entry, in bytes (`NAME_MAX`, linux/limits.h).
pub const NAME_BYTES_MAX: usize = 255;
/// The longest name of an export or guest, in bytes.
pub const LABEL_BYTES_MAX: usize = 64;
/// The longest text of an Error reply, in bytes.
pub const ERROR_TEXT_BYTES_MAX: usize = 512;
/// The most pages one Fault asks for: 2 MiB.
pub const FAULT_PAGES_MAX: u32 = 512;

/// Names a file or directory that this session was given; means nothing in any other session.
///
/// `slot` and `tag` come from the daemon's table for the session, `epoch` is the session's: a
/// forged, old or stolen handle names nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handle {
    /// Place in the session's table.
    pub slot: u32,
    /// Drawn anew each time the slot is used.
    pub tag: u32,
    /// The session's epoch.
    pub epoch: u64,
}

/// Names an open file of this session (one Open, one token). Tokens are not used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileToken(pub u64);

/// Counts the contents a file has had in its daemon's life: all of a file's pages that a guest maps
/// at one time are of one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u32);

/// A run of pages of one generation of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// The first page.
    pub first: copage_grants::PageIndex,
    /// How many; 0 is never valid.
    pub count: u32,
}
