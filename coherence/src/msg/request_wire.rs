//! Requests on the wire.

use super::codec::{DecodeError, EncodeError, Frame, FrameKind, Parts, put};
use super::request::{FaultHint, HelloFlags, OpenHow, Request};
use super::wire::{
    WArena, WFault, WForget, WHandle, WHello, WOpen, WRange, WRead, WReaddir, WTruncate, WUnmapped,
    WWrite, access, access_code, bits, empty, generation, take, token, whole, zero,
};
use super::{DATA_BYTES_MAX, Handle};
use copage_grants::Epoch;
use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

mod code {
    pub(super) const HELLO: u8 = 1;
    pub(super) const EXPORTS: u8 = 2;
    pub(super) const ATTACH: u8 = 3;
    pub(super) const LOOKUP: u8 = 4;
    pub(super) const GETATTR: u8 = 5;
    pub(super) const READLINK: u8 = 6;
    pub(super) const READDIR: u8 = 7;
    pub(super) const GETXATTR: u8 = 8;
    pub(super) const LISTXATTR: u8 = 9;
    pub(super) const FORGET: u8 = 10;
    pub(super) const OPEN: u8 = 11;
    pub(super) const CLOSE: u8 = 12;
    pub(super) const FAULT: u8 = 13;
    pub(super) const READ: u8 = 14;
    pub(super) const ACK: u8 = 15;
    pub(super) const UNMAPPED: u8 = 16;
    pub(super) const RENEW: u8 = 17;
    pub(super) const STATFS: u8 = 18;
    pub(super) const BYE: u8 = 19;
    pub(super) const WRITE: u8 = 20;
    pub(super) const TRUNCATE: u8 = 21;
    pub(super) const SYNC: u8 = 22;
    pub(super) const ARENA: u8 = 23;
}

const HELLO_WANTS_USERFAULTFD: u32 = 1;
const READDIR_HANDLES: u32 = 1;
const OPEN_WRITE: u32 = 1;
const ARENA_COMMON: u32 = 1;

impl<'a> Request<'a> {
    /// Is there a reply to this request?
    pub const fn is_answered(&self) -> bool {
        !matches!(
            self,
            Self::Forget { .. } | Self::Ack { .. } | Self::Unmapped { .. } | Self::Bye
        )
    }

    /// Replaces what `out` holds by this request as one message. `request` must not be 0 where a
    /// reply is expected.
    pub fn encode(&self, request: u64, epoch: Epoch, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        if request == 0 && self.is_answered() {
            return Err(EncodeError::Value("request number"));
        }
        let mut send = |code: u8, fixed: &[u8], tail: &[u8]| {
            let kind = FrameKind::Request;
            put(
                out,
                &Parts {
                    kind,
                    code,
                    request,
                    epoch,
                    fixed,
                    tail,
                },
            )
        };
        let handle = |h: Handle| WHandle::from(h);
        match *self {
            Self::Hello {
                version,
                flags,
                name,
                uuid,
            } => {
                let flags = if flags.wants_userfaultfd {
                    HELLO_WANTS_USERFAULTFD
                } else {
                    0
                };
                let fixed = WHello {
                    version: version.into(),
                    reserved: 0.into(),
                    flags: flags.into(),
                    uuid,
                };
                send(code::HELLO, fixed.as_bytes(), name)
            }
            Self::Exports => send(code::EXPORTS, &[], &[]),
            Self::Attach { export } => send(code::ATTACH, &[], export),
            Self::Lookup { parent, name } => send(code::LOOKUP, handle(parent).as_bytes(), name),
            Self::Getattr { node } => send(code::GETATTR, handle(node).as_bytes(), &[]),
            Self::Readlink { node } => send(code::READLINK, handle(node).as_bytes(), &[]),
            Self::Readdir {
                node,
                cookie,
                bytes_max,
                handles,
            } => {
                let flags = if handles { READDIR_HANDLES } else { 0 };
                let fixed = WReaddir {
                    node: handle(node),
                    cookie: cookie.into(),
                    bytes_max: bytes_max.into(),
                    flags: flags.into(),
                };
                send(code::READDIR, fixed.as_bytes(), &[])
            }
            Self::Getxattr { node, name } => send(code::GETXATTR, handle(node).as_bytes(), name),
            Self::Listxattr { node } => send(code::LISTXATTR, handle(node).as_bytes(), &[]),
            Self::Forget { node, count } => {
                let fixed = WForget {
                    node: handle(node),
                    count: count.into(),
                };
                send(code::FORGET, fixed.as_bytes(), &[])
            }
            Self::Open { node, how, write } => {
                let how: u32 = match how {
                    OpenHow::Map => 1,
                    OpenHow::Pin => 2,
                    OpenHow::Read => 3,
                };
                let fixed = WOpen {
                    node: handle(node),
                    how: how.into(),
                    flags: if write { OPEN_WRITE } else { 0 }.into(),
                };
                send(code::OPEN, fixed.as_bytes(), &[])
            }
            Self::Close { file } => send(code::CLOSE, U64::new(file.0).as_bytes(), &[]),
            Self::Fault {
                file,
                generation,
                range,
                hint,
                access,
            } => {
                let hint: u32 = match hint {
                    FaultHint::Random => 1,
                    FaultHint::Sequential => 2,
                    FaultHint::Populate => 3,
                };
                let fixed = WFault {
                    file: file.0.into(),
                    generation: generation.0.into(),
                    hint: hint.into(),
                    range: WRange::new(range)?,
                    access: access_code(access).into(),
                    reserved: 0.into(),
                };
                send(code::FAULT, fixed.as_bytes(), &[])
            }
            Self::Read { file, offset, len } => {
                let fixed = WRead {
                    file: file.0.into(),
                    offset: offset.into(),
                    len: len.into(),
                    reserved: 0.into(),
                };
                send(code::READ, fixed.as_bytes(), &[])
            }
            Self::Write { file, offset, data } => {
                if data.is_empty() || data.len() > DATA_BYTES_MAX as usize {
                    return Err(EncodeError::Value("data"));
                }
                let fixed = WWrite {
                    file: file.0.into(),
                    offset: offset.into(),
                };
                send(code::WRITE, fixed.as_bytes(), data)
            }
            Self::Truncate { file, bytes } => {
                let fixed = WTruncate {
                    file: file.0.into(),
                    bytes: bytes.into(),
                };
                send(code::TRUNCATE, fixed.as_bytes(), &[])
            }
            Self::Sync { file } => send(code::SYNC, U64::new(file.0).as_bytes(), &[]),
            Self::Arena { file, common } => {
                let fixed = WArena {
                    file: file.0.into(),
                    flags: if common { ARENA_COMMON } else { 0 }.into(),
                    reserved: 0.into(),
                };
                send(code::ARENA, fixed.as_bytes(), &[])
            }
            Self::Ack { recall } => send(code::ACK, U64::new(recall).as_bytes(), &[]),
            Self::Unmapped {
                file,
                generation,
                range,
            } => {
                let fixed = WUnmapped {
                    file: file.0.into(),
                    generation: generation.0.into(),
                    reserved: 0.into(),
                    range: WRange::new(range)?,
                };
                send(code::UNMAPPED, fixed.as_bytes(), &[])
            }
            Self::Renew => send(code::RENEW, &[], &[]),
            Self::Statfs { node } => send(code::STATFS, handle(node).as_bytes(), &[]),
            Self::Bye => send(code::BYE, &[], &[]),
        }
    }

    /// Reads a request. Names are not judged here (a name that is too long or holds a NUL has an
    /// errno of its own), nor are counts held against limits.
    pub fn decode(frame: &Frame<'a>) -> Result<Self, DecodeError> {
        frame.expect(FrameKind::Request)?;
        let body = frame.body;
        let request = match frame.code {
            code::HELLO => {
                let (w, name): (&WHello, _) = take(body)?;
                zero(w.reserved.get().into())?;
                let flags = bits(w.flags.get(), HELLO_WANTS_USERFAULTFD)?;
                Self::Hello {
                    version: w.version.get(),
                    flags: HelloFlags {
                        wants_userfaultfd: flags & HELLO_WANTS_USERFAULTFD != 0,
                    },
                    name,
                    uuid: w.uuid,
                }
            }
            code::EXPORTS => bare(body, Self::Exports)?,
            code::ATTACH => Self::Attach { export: body },
            code::LOOKUP => {
                let (w, name): (&WHandle, _) = take(body)?;
                Self::Lookup {
                    parent: (*w).into(),
                    name,
                }
            }
            code::GETATTR => Self::Getattr {
                node: WHandle::only(body)?,
            },
            code::READLINK => Self::Readlink {
                node: WHandle::only(body)?,
            },
            code::READDIR => {
                let w: &WReaddir = whole(body)?;
                let flags = bits(w.flags.get(), READDIR_HANDLES)?;
                Self::Readdir {
                    node: w.node.into(),
                    cookie: w.cookie.get(),
                    bytes_max: w.bytes_max.get(),
                    handles: flags & READDIR_HANDLES != 0,
                }
            }
            code::GETXATTR => {
                let (w, name): (&WHandle, _) = take(body)?;
                Self::Getxattr {
                    node: (*w).into(),
                    name,
                }
            }
            code::LISTXATTR => Self::Listxattr {
                node: WHandle::only(body)?,
            },
            code::FORGET => {
                let w: &WForget = whole(body)?;
                Self::Forget {
                    node: w.node.into(),
                    count: w.count.get(),
                }
            }
            code::OPEN => {
                let w: &WOpen = whole(body)?;
                let flags = bits(w.flags.get(), OPEN_WRITE)?;
                let how = match w.how.get() {
                    1 => OpenHow::Map,
                    2 => OpenHow::Pin,
                    3 => OpenHow::Read,
                    _ => return Err(DecodeError::Value("open how")),
                };
                Self::Open {
                    node: w.node.into(),
                    how,
                    write: flags & OPEN_WRITE != 0,
                }
            }
            code::CLOSE => Self::Close {
                file: token(*whole(body)?),
            },
            code::FAULT => {
                let w: &WFault = whole(body)?;
                zero(w.reserved.get().into())?;
                let hint = match w.hint.get() {
                    1 => FaultHint::Random,
                    2 => FaultHint::Sequential,
                    3 => FaultHint::Populate,
                    _ => return Err(DecodeError::Value("fault hint")),
                };
                Self::Fault {
                    file: token(w.file),
                    generation: generation(w.generation),
                    range: w.range.get()?,
                    hint,
                    access: access(w.access.get())?,
                }
            }
            code::READ => {
                let w: &WRead = whole(body)?;
                zero(w.reserved.get().into())?;
                Self::Read {
                    file: token(w.file),
                    offset: w.offset.get(),
                    len: w.len.get(),
                }
            }
            code::WRITE => {
                let (w, data): (&WWrite, _) = take(body)?;
                if data.is_empty() || data.len() > DATA_BYTES_MAX as usize {
                    return Err(DecodeError::Value("data"));
                }
                Self::Write {
                    file: token(w.file),
                    offset: w.offset.get(),
                    data,
                }
            }
            code::TRUNCATE => {
                let w: &WTruncate = whole(body)?;
                Self::Truncate {
                    file: token(w.file),
                    bytes: w.bytes.get(),
                }
            }
            code::SYNC => Self::Sync {
                file: token(*whole(body)?),
            },
            code::ARENA => {
                let w: &WArena = whole(body)?;
                zero(w.reserved.get().into())?;
                Self::Arena {
                    file: token(w.file),
                    common: bits(w.flags.get(), ARENA_COMMON)? & ARENA_COMMON != 0,
                }
            }
            code::ACK => Self::Ack {
                recall: whole::<U64>(body)?.get(),
            },
            code::UNMAPPED => {
                let w: &WUnmapped = whole(body)?;
                zero(w.reserved.get().into())?;
                Self::Unmapped {
                    file: token(w.file),
                    generation: generation(w.generation),
                    range: w.range.get()?,
                }
            }
            code::RENEW => bare(body, Self::Renew)?,
            code::STATFS => Self::Statfs {
                node: WHandle::only(body)?,
            },
            code::BYE => bare(body, Self::Bye)?,
            _ => return Err(frame.unknown()),
        };
        if frame.request == 0 && request.is_answered() {
            return Err(DecodeError::Value("request number"));
        }
        Ok(request)
    }
}

/// A request without a body.
fn bare<'a>(body: &[u8], request: Request<'a>) -> Result<Request<'a>, DecodeError> {
    empty(body)?;
    Ok(request)
}
