//! The fixed parts of messages as they stand on the wire: little-endian, unaligned, no padding.
//!
//! docs/protocol.md draws them. Conversions check what has only some valid values; the sizes are
//! asserted so that no field can be added unseen.

use super::codec::{DecodeError, EncodeError};
use super::reply::{Attr, FileKind, StatFs};
use super::{FileToken, Generation, Handle, PageRange};
use copage_grants::{Access, PageIndex};
use zerocopy::little_endian::{I32, I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Splits a fixed part off the front.
pub(super) fn take<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    bytes: &[u8],
) -> Result<(&T, &[u8]), DecodeError> {
    T::ref_from_prefix(bytes).map_err(|_| DecodeError::TooShort {
        bytes: bytes.len(),
        needed: size_of::<T>(),
    })
}

/// A body that is a fixed part and nothing else.
pub(super) fn whole<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    bytes: &[u8],
) -> Result<&T, DecodeError> {
    let (fixed, rest) = take(bytes)?;
    empty(rest)?;
    Ok(fixed)
}

/// A body that must be empty, or the end of one.
pub(super) const fn empty(rest: &[u8]) -> Result<(), DecodeError> {
    if rest.is_empty() {
        Ok(())
    } else {
        Err(DecodeError::Trailing { bytes: rest.len() })
    }
}

/// A reserved field.
pub(super) const fn zero(value: u64) -> Result<(), DecodeError> {
    if value == 0 {
        Ok(())
    } else {
        Err(DecodeError::Reserved)
    }
}

/// A word of which only the bits of `known` may be set.
pub(super) const fn bits(value: u32, known: u32) -> Result<u32, DecodeError> {
    if value & !known == 0 {
        Ok(value)
    } else {
        Err(DecodeError::Reserved)
    }
}

/// Declares wire structs with the derives they all need and their size on the wire.
macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident[$bytes:literal] { $($field:ident: $ty:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub(super) struct $name { $(pub $field: $ty),* }
        const _: () = assert!(size_of::<$name>() == $bytes);
    )*};
}

wire! {
    Header[32] { magic: [u8; 4], version: U16, kind: U16, len: U32, reserved: U32, request: U64, epoch: U64 }
    WHandle[16] { slot: U32, tag: U32, epoch: U64 }
    WRange[16] { first: U64, count: U32, reserved: U32 }
    WAttr[96] {
        kind: u8, reserved0: u8, perm: U16, nlink: U32, uid: U32, gid: U32, ino: U64, dev: U64,
        rdev: U64, bytes: U64, blocks: U64, atime_s: I64, mtime_s: I64, ctime_s: I64,
        atime_ns: U32, mtime_ns: U32, ctime_ns: U32, reserved1: U32,
    }
    WDirEntry[24] { cookie: U64, ino: U64, kind: u8, has_node: u8, name_bytes: U16, reserved: U32 }

    /// Requests.
    WHello[24] { version: U16, reserved: U16, flags: U32, uuid: [u8; 16] }
    WReaddir[32] { node: WHandle, cookie: U64, bytes_max: U32, flags: U32 }
    WForget[24] { node: WHandle, count: U64 }
    WOpen[24] { node: WHandle, how: U32, flags: U32 }
    WFault[40] { file: U64, generation: U32, hint: U32, range: WRange, access: U32, reserved: U32 }
    WWrite[16] { file: U64, offset: U64 }
    WTruncate[16] { file: U64, bytes: U64 }
    WArena[16] { file: U64, flags: U32, reserved: U32 }
    WRead[24] { file: U64, offset: U64, len: U32, reserved: U32 }
    WUnmapped[32] { file: U64, generation: U32, reserved: U32, range: WRange }

    /// Replies.
    WWelcome[32] {
        dom: U16, reserved: U16, flags: U32, epoch: U64, lease_ttl_ms: U32,
        invalidate_deadline_ms: U32, handles_max: U32, files_max: U32,
    }
    WAttached[120] { root: WHandle, attr: WAttr, mode: u8, reserved: [u8; 7] }
    WEntry[112] { node: WHandle, attr: WAttr }
    WDir[8] { flags: U32, reserved: U32 }
    WOpened[32] { file: U64, version: U64, bytes: U64, generation: U32, flags: U32 }
    WGranted[40] {
        generation: U32, granter: U16, access: u8, place: u8, range: WRange, version: U64,
        serial: U32, reserved: U32,
    }
    WWrote[16] { count: U32, reserved: U32, bytes: U64 }
    WArenaReply[8] { serial: U32, reserved: U32 }
    WStale[24] { generation: U32, reserved: U32, version: U64, bytes: U64 }
    WStatFs[48] {
        bytes: U64, bytes_free: U64, bytes_available: U64, inodes: U64, inodes_free: U64,
        name_bytes_max: U32, reserved: U32,
    }
    WRenewed[8] { lease_ttl_ms: U32, reserved: U32 }
    WError[8] { errno: I32, reserved: U32 }

    /// Notices.
    WInvalidate[48] {
        recall: U64, file: U64, generation: U32, reason: U32, range: WRange, deadline_ms: U32,
        reserved: U32,
    }
    WRebase[40] { recall: U64, file: U64, version: U64, bytes: U64, generation: U32, deadline_ms: U32 }
    WFenced[8] { reason: U32, reserved: U32 }
    WResized[16] { file: U64, bytes: U64 }
}

impl From<Handle> for WHandle {
    fn from(h: Handle) -> Self {
        Self {
            slot: h.slot.into(),
            tag: h.tag.into(),
            epoch: h.epoch.into(),
        }
    }
}

impl From<WHandle> for Handle {
    fn from(w: WHandle) -> Self {
        Self {
            slot: w.slot.get(),
            tag: w.tag.get(),
            epoch: w.epoch.get(),
        }
    }
}

impl WHandle {
    /// A body that is a handle and nothing else.
    pub(super) fn only(body: &[u8]) -> Result<Handle, DecodeError> {
        whole::<Self>(body).map(|w| Handle::from(*w))
    }
}

impl WRange {
    /// Refuses what decoding would refuse at the other end.
    pub(super) fn new(range: PageRange) -> Result<Self, EncodeError> {
        if !valid(range) {
            return Err(EncodeError::Value("page range"));
        }
        Ok(Self {
            first: range.first.0.into(),
            count: range.count.into(),
            reserved: 0.into(),
        })
    }

    /// Refuses an empty range and one that passes what any file offset can name.
    pub(super) fn get(&self) -> Result<PageRange, DecodeError> {
        zero(self.reserved.get().into())?;
        let range = PageRange {
            first: PageIndex(self.first.get()),
            count: self.count.get(),
        };
        if valid(range) {
            Ok(range)
        } else {
            Err(DecodeError::Value("page range"))
        }
    }
}

/// Holds a page, and its end can be said in bytes.
fn valid(range: PageRange) -> bool {
    range.count > 0
        && range
            .first
            .checked_add(u64::from(range.count))
            .and_then(PageIndex::byte_offset)
            .is_some_and(|end| i64::try_from(end).is_ok())
}

pub(super) const fn token(value: U64) -> FileToken {
    FileToken(value.get())
}

pub(super) const fn generation(value: U32) -> Generation {
    Generation(value.get())
}

pub(super) const fn access_code(access: Access) -> u32 {
    match access {
        Access::ReadOnly => 1,
        Access::ReadWrite => 2,
    }
}

pub(super) const fn access(code: u32) -> Result<Access, DecodeError> {
    Ok(match code {
        1 => Access::ReadOnly,
        2 => Access::ReadWrite,
        _ => return Err(DecodeError::Value("access")),
    })
}

pub(super) const fn file_kind_code(kind: FileKind) -> u8 {
    match kind {
        FileKind::Regular => 1,
        FileKind::Directory => 2,
        FileKind::Symlink => 3,
        FileKind::Other => 4,
    }
}

pub(super) const fn file_kind(code: u8) -> Result<FileKind, DecodeError> {
    Ok(match code {
        1 => FileKind::Regular,
        2 => FileKind::Directory,
        3 => FileKind::Symlink,
        4 => FileKind::Other,
        _ => return Err(DecodeError::Value("file kind")),
    })
}

const NANOSECONDS: u32 = 1_000_000_000;
const PERM_BITS: u16 = 0o7777;

impl WAttr {
    pub(super) fn new(a: &Attr) -> Result<Self, EncodeError> {
        let ns = [a.atime.1, a.mtime.1, a.ctime.1];
        if a.perm & !PERM_BITS != 0 || ns.iter().any(|&ns| ns >= NANOSECONDS) {
            return Err(EncodeError::Value("attributes"));
        }
        Ok(Self {
            kind: file_kind_code(a.kind),
            reserved0: 0,
            perm: a.perm.into(),
            nlink: a.nlink.into(),
            uid: a.uid.into(),
            gid: a.gid.into(),
            ino: a.ino.into(),
            dev: a.dev.into(),
            rdev: a.rdev.into(),
            bytes: a.bytes.into(),
            blocks: a.blocks.into(),
            atime_s: a.atime.0.into(),
            mtime_s: a.mtime.0.into(),
            ctime_s: a.ctime.0.into(),
            atime_ns: a.atime.1.into(),
            mtime_ns: a.mtime.1.into(),
            ctime_ns: a.ctime.1.into(),
            reserved1: 0.into(),
        })
    }

    pub(super) fn get(&self) -> Result<Attr, DecodeError> {
        zero(u64::from(self.reserved0) | u64::from(self.reserved1.get()))?;
        let ns = [
            self.atime_ns.get(),
            self.mtime_ns.get(),
            self.ctime_ns.get(),
        ];
        if self.perm.get() & !PERM_BITS != 0 || ns.iter().any(|&ns| ns >= NANOSECONDS) {
            return Err(DecodeError::Value("attributes"));
        }
        Ok(Attr {
            kind: file_kind(self.kind)?,
            perm: self.perm.get(),
            nlink: self.nlink.get(),
            uid: self.uid.get(),
            gid: self.gid.get(),
            ino: self.ino.get(),
            dev: self.dev.get(),
            rdev: self.rdev.get(),
            bytes: self.bytes.get(),
            blocks: self.blocks.get(),
            atime: (self.atime_s.get(), ns[0]),
            mtime: (self.mtime_s.get(), ns[1]),
            ctime: (self.ctime_s.get(), ns[2]),
        })
    }
}

impl From<&StatFs> for WStatFs {
    fn from(s: &StatFs) -> Self {
        Self {
            bytes: s.bytes.0.into(),
            bytes_free: s.bytes.1.into(),
            bytes_available: s.bytes.2.into(),
            inodes: s.inodes.0.into(),
            inodes_free: s.inodes.1.into(),
            name_bytes_max: s.name_bytes_max.into(),
            reserved: 0.into(),
        }
    }
}

impl WStatFs {
    pub(super) fn get(&self) -> Result<StatFs, DecodeError> {
        zero(self.reserved.get().into())?;
        Ok(StatFs {
            bytes: (
                self.bytes.get(),
                self.bytes_free.get(),
                self.bytes_available.get(),
            ),
            inodes: (self.inodes.get(), self.inodes_free.get()),
            name_bytes_max: self.name_bytes_max.get(),
        })
    }
}
