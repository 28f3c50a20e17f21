//! Replies on the wire.

use super::ERROR_TEXT_BYTES_MAX;
use super::codec::{DecodeError, EncodeError, Frame, FrameKind, Parts, put};
use super::reply::{GrantedPlace, OpenedFlags, Reply, WelcomeFlags};
use super::wire::{
    WArenaReply, WAttached, WAttr, WDir, WEntry, WError, WGranted, WOpened, WRange, WRenewed,
    WStale, WStatFs, WWelcome, WWrote, access, access_code, bits, empty, generation, take, token,
    whole, zero,
};
use copage_grants::{DomId, Epoch, Version};
use zerocopy::IntoBytes;

mod code {
    pub(super) const WELCOME: u8 = 1;
    pub(super) const EXPORTS: u8 = 2;
    pub(super) const ATTACHED: u8 = 3;
    pub(super) const ENTRY: u8 = 4;
    pub(super) const ATTR: u8 = 5;
    pub(super) const BYTES: u8 = 6;
    pub(super) const DIR: u8 = 7;
    pub(super) const OPENED: u8 = 8;
    pub(super) const GRANTED: u8 = 9;
    pub(super) const STALE: u8 = 10;
    pub(super) const STATFS: u8 = 11;
    pub(super) const RENEWED: u8 = 12;
    pub(super) const DONE: u8 = 13;
    pub(super) const ERROR: u8 = 14;
    pub(super) const WROTE: u8 = 15;
    pub(super) const ARENA: u8 = 16;
}

const WELCOME_FORCED_REVOKE: u32 = 1;
const WELCOME_READ_ONLY_ENFORCED: u32 = 2;
const WELCOME_USERFAULTFD: u32 = 4;
const OPENED_DESCRIPTOR: u32 = 1;
const OPENED_PINNED: u32 = 2;
const OPENED_HOST_BOUNDED: u32 = 4;
const OPENED_COHERENT: u32 = 8;
const PLACE_HOME: u8 = 0;
const PLACE_ARENA: u8 = 1;
const PLACE_COMMON: u8 = 2;
const DIR_END: u32 = 1;
/// shm, the last of the export modes.
const MODE_MAX: u8 = 3;
/// The largest errno that Linux gives a program (`MAX_ERRNO`, linux/err.h).
const ERRNO_MAX: i32 = 4095;

const fn flag(set: bool, bit: u32) -> u32 {
    if set { bit } else { 0 }
}

impl<'a> Reply<'a> {
    /// Replaces what `out` holds by this reply to `request` as one message.
    pub fn encode(&self, request: u64, epoch: Epoch, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        if request == 0 {
            return Err(EncodeError::Value("request number"));
        }
        let mut send = |code: u8, fixed: &[u8], tail: &[u8]| {
            let kind = FrameKind::Reply;
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
        match self {
            Self::Welcome {
                dom,
                epoch,
                lease_ttl_ms,
                invalidate_deadline_ms,
                handles_max,
                files_max,
                flags,
                name,
            } => {
                let flags = flag(flags.forced_revoke, WELCOME_FORCED_REVOKE)
                    | flag(flags.read_only_enforced, WELCOME_READ_ONLY_ENFORCED)
                    | flag(flags.userfaultfd, WELCOME_USERFAULTFD);
                let fixed = WWelcome {
                    dom: dom.0.into(),
                    reserved: 0.into(),
                    flags: flags.into(),
                    epoch: epoch.0.into(),
                    lease_ttl_ms: (*lease_ttl_ms).into(),
                    invalidate_deadline_ms: (*invalidate_deadline_ms).into(),
                    handles_max: (*handles_max).into(),
                    files_max: (*files_max).into(),
                };
                send(code::WELCOME, fixed.as_bytes(), name)
            }
            Self::Exports { names } => send(code::EXPORTS, &[], names),
            Self::Attached { root, attr, mode } => {
                if *mode > MODE_MAX {
                    return Err(EncodeError::Value("export mode"));
                }
                let fixed = WAttached {
                    root: (*root).into(),
                    attr: WAttr::new(attr)?,
                    mode: *mode,
                    reserved: [0; 7],
                };
                send(code::ATTACHED, fixed.as_bytes(), &[])
            }
            Self::Entry { node, attr } => {
                let fixed = WEntry {
                    node: (*node).into(),
                    attr: WAttr::new(attr)?,
                };
                send(code::ENTRY, fixed.as_bytes(), &[])
            }
            Self::Attr { attr } => send(code::ATTR, WAttr::new(attr)?.as_bytes(), &[]),
            Self::Bytes { data } => send(code::BYTES, &[], data),
            Self::Dir { end, entries } => {
                let fixed = WDir {
                    flags: flag(*end, DIR_END).into(),
                    reserved: 0.into(),
                };
                send(code::DIR, fixed.as_bytes(), entries)
            }
            Self::Opened {
                file,
                generation,
                version,
                bytes,
                flags,
            } => {
                let flags = flag(flags.descriptor, OPENED_DESCRIPTOR)
                    | flag(flags.pinned, OPENED_PINNED)
                    | flag(flags.host_bounded, OPENED_HOST_BOUNDED)
                    | flag(flags.coherent, OPENED_COHERENT);
                let fixed = WOpened {
                    file: file.0.into(),
                    version: version.0.into(),
                    bytes: (*bytes).into(),
                    generation: generation.0.into(),
                    flags: flags.into(),
                };
                send(code::OPENED, fixed.as_bytes(), &[])
            }
            Self::Granted {
                generation,
                range,
                granter,
                refs,
                access,
                place,
                version,
            } => {
                if !refs_fit(refs, range.count) {
                    return Err(EncodeError::Value("grant references"));
                }
                let (place, serial) = place_code(*place);
                let fixed = WGranted {
                    generation: generation.0.into(),
                    granter: granter.0.into(),
                    // 1 or 2.
                    access: access_code(*access) as u8,
                    place,
                    range: WRange::new(*range)?,
                    version: version.0.into(),
                    serial: serial.into(),
                    reserved: 0.into(),
                };
                send(code::GRANTED, fixed.as_bytes(), refs)
            }
            Self::Stale {
                generation,
                version,
                bytes,
            } => {
                let fixed = WStale {
                    generation: generation.0.into(),
                    reserved: 0.into(),
                    version: version.0.into(),
                    bytes: (*bytes).into(),
                };
                send(code::STALE, fixed.as_bytes(), &[])
            }
            Self::StatFs(stat) => send(code::STATFS, WStatFs::from(stat).as_bytes(), &[]),
            Self::Renewed { lease_ttl_ms } => {
                let fixed = WRenewed {
                    lease_ttl_ms: (*lease_ttl_ms).into(),
                    reserved: 0.into(),
                };
                send(code::RENEWED, fixed.as_bytes(), &[])
            }
            Self::Wrote { count, bytes } => {
                let fixed = WWrote {
                    count: (*count).into(),
                    reserved: 0.into(),
                    bytes: (*bytes).into(),
                };
                send(code::WROTE, fixed.as_bytes(), &[])
            }
            Self::Arena { serial } => {
                let fixed = WArenaReply {
                    serial: (*serial).into(),
                    reserved: 0.into(),
                };
                send(code::ARENA, fixed.as_bytes(), &[])
            }
            Self::Done => send(code::DONE, &[], &[]),
            Self::Error { errno, text } => {
                if !error_fits(*errno, text) {
                    return Err(EncodeError::Value("error"));
                }
                let fixed = WError {
                    errno: (*errno).into(),
                    reserved: 0.into(),
                };
                send(code::ERROR, fixed.as_bytes(), text)
            }
        }
    }

    /// Reads a reply. The entries of a Dir are read by [`super::DirReader`].
    pub fn decode(frame: &Frame<'a>) -> Result<Self, DecodeError> {
        frame.expect(FrameKind::Reply)?;
        if frame.request == 0 {
            return Err(DecodeError::Value("request number"));
        }
        let body = frame.body;
        Ok(match frame.code {
            code::WELCOME => {
                let (w, name): (&WWelcome, _) = take(body)?;
                zero(w.reserved.get().into())?;
                let known =
                    WELCOME_FORCED_REVOKE | WELCOME_READ_ONLY_ENFORCED | WELCOME_USERFAULTFD;
                let flags = bits(w.flags.get(), known)?;
                Self::Welcome {
                    dom: DomId(w.dom.get()),
                    epoch: Epoch(w.epoch.get()),
                    lease_ttl_ms: w.lease_ttl_ms.get(),
                    invalidate_deadline_ms: w.invalidate_deadline_ms.get(),
                    handles_max: w.handles_max.get(),
                    files_max: w.files_max.get(),
                    flags: WelcomeFlags {
                        forced_revoke: flags & WELCOME_FORCED_REVOKE != 0,
                        read_only_enforced: flags & WELCOME_READ_ONLY_ENFORCED != 0,
                        userfaultfd: flags & WELCOME_USERFAULTFD != 0,
                    },
                    name,
                }
            }
            code::EXPORTS => Self::Exports { names: body },
            code::ATTACHED => {
                let w: &WAttached = whole(body)?;
                if w.reserved != [0; 7] {
                    return Err(DecodeError::Reserved);
                }
                if w.mode > MODE_MAX {
                    return Err(DecodeError::Value("export mode"));
                }
                Self::Attached {
                    root: w.root.into(),
                    attr: w.attr.get()?,
                    mode: w.mode,
                }
            }
            code::ENTRY => {
                let w: &WEntry = whole(body)?;
                Self::Entry {
                    node: w.node.into(),
                    attr: w.attr.get()?,
                }
            }
            code::ATTR => Self::Attr {
                attr: whole::<WAttr>(body)?.get()?,
            },
            code::BYTES => Self::Bytes { data: body },
            code::DIR => {
                let (w, entries): (&WDir, _) = take(body)?;
                zero(w.reserved.get().into())?;
                Self::Dir {
                    end: bits(w.flags.get(), DIR_END)? & DIR_END != 0,
                    entries,
                }
            }
            code::OPENED => {
                let w: &WOpened = whole(body)?;
                let known =
                    OPENED_DESCRIPTOR | OPENED_PINNED | OPENED_HOST_BOUNDED | OPENED_COHERENT;
                let flags = bits(w.flags.get(), known)?;
                Self::Opened {
                    file: token(w.file),
                    generation: generation(w.generation),
                    version: Version(w.version.get()),
                    bytes: w.bytes.get(),
                    flags: OpenedFlags {
                        descriptor: flags & OPENED_DESCRIPTOR != 0,
                        pinned: flags & OPENED_PINNED != 0,
                        host_bounded: flags & OPENED_HOST_BOUNDED != 0,
                        coherent: flags & OPENED_COHERENT != 0,
                    },
                }
            }
            code::GRANTED => {
                let (w, refs): (&WGranted, _) = take(body)?;
                zero(w.reserved.get().into())?;
                let range = w.range.get()?;
                if !refs_fit(refs, range.count) {
                    return Err(DecodeError::Value("grant references"));
                }
                Self::Granted {
                    generation: generation(w.generation),
                    range,
                    granter: DomId(w.granter.get()),
                    refs,
                    access: access(w.access.into())?,
                    place: granted_place(w.place, w.serial.get())?,
                    version: Version(w.version.get()),
                }
            }
            code::STALE => {
                let w: &WStale = whole(body)?;
                zero(w.reserved.get().into())?;
                Self::Stale {
                    generation: generation(w.generation),
                    version: Version(w.version.get()),
                    bytes: w.bytes.get(),
                }
            }
            code::STATFS => Self::StatFs(whole::<WStatFs>(body)?.get()?),
            code::RENEWED => {
                let w: &WRenewed = whole(body)?;
                zero(w.reserved.get().into())?;
                Self::Renewed {
                    lease_ttl_ms: w.lease_ttl_ms.get(),
                }
            }
            code::WROTE => {
                let w: &WWrote = whole(body)?;
                zero(w.reserved.get().into())?;
                Self::Wrote {
                    count: w.count.get(),
                    bytes: w.bytes.get(),
                }
            }
            code::ARENA => {
                let w: &WArenaReply = whole(body)?;
                zero(w.reserved.get().into())?;
                Self::Arena {
                    serial: w.serial.get(),
                }
            }
            code::DONE => {
                empty(body)?;
                Self::Done
            }
            code::ERROR => {
                let (w, text): (&WError, _) = take(body)?;
                zero(w.reserved.get().into())?;
                if !error_fits(w.errno.get(), text) {
                    return Err(DecodeError::Value("error"));
                }
                Self::Error {
                    errno: w.errno.get(),
                    text,
                }
            }
            _ => return Err(frame.unknown()),
        })
    }
}

const fn place_code(place: GrantedPlace) -> (u8, u32) {
    match place {
        GrantedPlace::Home => (PLACE_HOME, 0),
        GrantedPlace::Arena => (PLACE_ARENA, 0),
        GrantedPlace::Common { serial } => (PLACE_COMMON, serial),
    }
}

fn granted_place(code: u8, serial: u32) -> Result<GrantedPlace, DecodeError> {
    match (code, serial) {
        (PLACE_HOME, 0) => Ok(GrantedPlace::Home),
        (PLACE_ARENA, 0) => Ok(GrantedPlace::Arena),
        (PLACE_COMMON, serial) => Ok(GrantedPlace::Common { serial }),
        (PLACE_HOME | PLACE_ARENA, _) => Err(DecodeError::Reserved),
        _ => Err(DecodeError::Value("place")),
    }
}

/// None at all (local), or one of four bytes for each page (Xen).
fn refs_fit(refs: &[u8], count: u32) -> bool {
    refs.is_empty() || u64::try_from(refs.len()) == Ok(u64::from(count) * 4)
}

fn error_fits(errno: i32, text: &[u8]) -> bool {
    (1..=ERRNO_MAX).contains(&errno)
        && text.len() <= ERROR_TEXT_BYTES_MAX
        && core::str::from_utf8(text).is_ok()
}
