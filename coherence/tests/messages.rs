//! Every message survives the wire, and no bytes whatever make a decoder panic.
//!
//! Cannot show: that the two ends mean the same by a message. That is for the tests with a daemon.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use copage_coherence::msg::*;
use copage_grants::{Access, DomId, Epoch, PageIndex, Version};
use proptest::prelude::*;

fn handle() -> impl Strategy<Value = Handle> {
    any::<(u32, u32, u64)>().prop_map(|(slot, tag, epoch)| Handle { slot, tag, epoch })
}

fn range() -> impl Strategy<Value = PageRange> {
    // Up to the last page whose end is a file offset.
    (0u64..=(1 << 51) - 513, 1u32..=512).prop_map(|(first, count)| PageRange {
        first: PageIndex(first),
        count,
    })
}

fn file() -> impl Strategy<Value = FileToken> {
    any::<u64>().prop_map(FileToken)
}

fn generation() -> impl Strategy<Value = Generation> {
    any::<u32>().prop_map(Generation)
}

fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..=max)
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(
        any::<u8>().prop_map(|b| if b == 0 || b == b'/' { b'x' } else { b }),
        1..=NAME_BYTES_MAX,
    )
}

fn kind() -> impl Strategy<Value = FileKind> {
    prop_oneof![
        Just(FileKind::Regular),
        Just(FileKind::Directory),
        Just(FileKind::Symlink),
        Just(FileKind::Other)
    ]
}

fn attr() -> impl Strategy<Value = Attr> {
    let time = || (any::<i64>(), 0u32..1_000_000_000);
    (
        (kind(), 0u16..=0o7777, any::<[u32; 3]>(), any::<[u64; 5]>()),
        (time(), time(), time()),
    )
        .prop_map(|((kind, perm, a, b), (atime, mtime, ctime))| Attr {
            kind,
            perm,
            nlink: a[0],
            uid: a[1],
            gid: a[2],
            ino: b[0],
            dev: b[1],
            rdev: b[2],
            bytes: b[3],
            blocks: b[4],
            atime,
            mtime,
            ctime,
        })
}

/// A request with its tail owned, so that it can be a test's input.
#[derive(Clone, Debug)]
struct Owned {
    shape: Request<'static>,
    tail: Vec<u8>,
}

impl Owned {
    fn request(&self) -> Request<'_> {
        let tail = &self.tail[..];
        match self.shape.clone() {
            Request::Hello {
                version,
                flags,
                uuid,
                ..
            } => Request::Hello {
                version,
                flags,
                uuid,
                name: tail,
            },
            Request::Attach { .. } => Request::Attach { export: tail },
            Request::Write { file, offset, data } => Request::Write {
                file,
                offset,
                // Never without data.
                data: if tail.is_empty() { data } else { tail },
            },
            Request::Lookup { parent, .. } => Request::Lookup { parent, name: tail },
            Request::Getxattr { node, .. } => Request::Getxattr { node, name: tail },
            other => other,
        }
    }
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![Just(Access::ReadOnly), Just(Access::ReadWrite)]
}

fn request() -> impl Strategy<Value = Owned> {
    let shape = prop_oneof![
        any::<(u16, bool, [u8; 16])>().prop_map(|(version, wants_userfaultfd, uuid)| {
            Request::Hello {
                version,
                flags: HelloFlags { wants_userfaultfd },
                uuid,
                name: b"",
            }
        }),
        Just(Request::Exports),
        Just(Request::Attach { export: b"" }),
        handle().prop_map(|parent| Request::Lookup { parent, name: b"" }),
        handle().prop_map(|node| Request::Getattr { node }),
        handle().prop_map(|node| Request::Readlink { node }),
        (handle(), any::<(u64, u32, bool)>()).prop_map(|(node, (cookie, bytes_max, handles))| {
            Request::Readdir {
                node,
                cookie,
                bytes_max,
                handles,
            }
        }),
        handle().prop_map(|node| Request::Getxattr { node, name: b"" }),
        handle().prop_map(|node| Request::Listxattr { node }),
        (handle(), any::<u64>()).prop_map(|(node, count)| Request::Forget { node, count }),
        (
            handle(),
            prop_oneof![Just(OpenHow::Map), Just(OpenHow::Pin), Just(OpenHow::Read)],
            any::<bool>()
        )
            .prop_map(|(node, how, write)| Request::Open { node, how, write }),
        (file(), any::<u64>()).prop_map(|(file, offset)| Request::Write {
            file,
            offset,
            data: b"?"
        }),
        (file(), any::<u64>()).prop_map(|(file, bytes)| Request::Truncate { file, bytes }),
        file().prop_map(|file| Request::Sync { file }),
        (file(), any::<bool>()).prop_map(|(file, common)| Request::Arena { file, common }),
        file().prop_map(|file| Request::Close { file }),
        (
            file(),
            generation(),
            range(),
            prop_oneof![
                Just(FaultHint::Random),
                Just(FaultHint::Sequential),
                Just(FaultHint::Populate)
            ],
            access()
        )
            .prop_map(|(file, generation, range, hint, access)| Request::Fault {
                file,
                generation,
                range,
                hint,
                access,
            }),
        (file(), any::<(u64, u32)>()).prop_map(|(file, (offset, len))| Request::Read {
            file,
            offset,
            len
        }),
        any::<u64>().prop_map(|recall| Request::Ack { recall }),
        (file(), generation(), range()).prop_map(|(file, generation, range)| Request::Unmapped {
            file,
            generation,
            range
        }),
        Just(Request::Renew),
        handle().prop_map(|node| Request::Statfs { node }),
        Just(Request::Bye),
    ];
    (shape, bytes(300)).prop_map(|(shape, tail)| Owned { shape, tail })
}

fn notice() -> impl Strategy<Value = Notice> {
    prop_oneof![
        (
            any::<(u64, u32)>(),
            file(),
            generation(),
            range(),
            prop_oneof![
                Just(InvalidateReason::Reclaim),
                Just(InvalidateReason::Changed),
                Just(InvalidateReason::Withdrawn)
            ]
        )
            .prop_map(|((recall, deadline_ms), file, generation, range, reason)| {
                Notice::Invalidate {
                    recall,
                    file,
                    generation,
                    range,
                    reason,
                    deadline_ms,
                }
            }),
        (any::<(u64, u64, u64, u32)>(), file(), generation()).prop_map(
            |((recall, version, bytes, deadline_ms), file, generation)| Notice::Rebase {
                recall,
                file,
                generation,
                version: Version(version),
                bytes,
                deadline_ms
            }
        ),
        prop_oneof![
            Just(FenceReason::LeaseExpired),
            Just(FenceReason::DeadlineMissed),
            Just(FenceReason::Protocol),
            Just(FenceReason::Removed)
        ]
        .prop_map(|reason| Notice::Fenced { reason }),
        (file(), any::<u64>()).prop_map(|(file, bytes)| Notice::Resized { file, bytes }),
        Just(Notice::Goodbye),
    ]
}

/// Sends a reply over the wire and compares.
fn reply_survives(reply: &Reply<'_>, request: u64, epoch: u64) -> Result<(), TestCaseError> {
    let mut wire = vec![0xa5; 7];
    reply.encode(request, Epoch(epoch), &mut wire).unwrap();
    let frame = decode_header(&wire).unwrap();
    prop_assert_eq!(
        (frame.kind, frame.request, frame.epoch),
        (FrameKind::Reply, request, Epoch(epoch))
    );
    prop_assert_eq!(&Reply::decode(&frame).unwrap(), reply);
    prop_assert!(Request::decode(&frame).is_err() && Notice::decode(&frame).is_err());
    Ok(())
}

proptest! {
    #[test]
    fn requests_survive_the_wire(owned in request(), number in 1u64.., epoch: u64) {
        let request = owned.request();
        let mut wire = vec![1, 2, 3];
        request.encode(number, Epoch(epoch), &mut wire).unwrap();
        let frame = decode_header(&wire).unwrap();
        prop_assert_eq!((frame.kind, frame.request, frame.epoch), (FrameKind::Request, number, Epoch(epoch)));
        prop_assert_eq!(Request::decode(&frame).unwrap(), request.clone());
        prop_assert!(Reply::decode(&frame).is_err() && Notice::decode(&frame).is_err());
        // One byte more or less is another message, or none.
        prop_assert!(decode_header(&wire[..wire.len() - 1]).is_err());
        wire.push(0);
        prop_assert!(decode_header(&wire).is_err());
    }

    #[test]
    fn notices_survive_the_wire(notice in notice(), epoch: u64) {
        let mut wire = Vec::new();
        notice.encode(Epoch(epoch), &mut wire).unwrap();
        let frame = decode_header(&wire).unwrap();
        prop_assert_eq!((frame.kind, frame.request), (FrameKind::Notice, 0));
        prop_assert_eq!(Notice::decode(&frame).unwrap(), notice);
    }

    #[test]
    fn replies_survive_the_wire(
        number in 1u64.., epoch: u64, a in attr(), h in handle(), f in file(), g in generation(),
        r in range(), data in bytes(600), n: (u64, u64, u64, u32, u32), flags: [bool; 4], mode in 0u8..=3,
        errno in 1i32..=4095, text in "\\PC{0,100}",
    ) {
        let welcome = WelcomeFlags { forced_revoke: flags[0], read_only_enforced: flags[1], userfaultfd: flags[2] };
        let opened = OpenedFlags { descriptor: flags[0], pinned: flags[1], host_bounded: flags[2], coherent: flags[3] };
        let refs = vec![7u8; r.count as usize * 4];
        let replies = [
            Reply::Welcome {
                dom: DomId(n.3 as u16), epoch: Epoch(n.0), lease_ttl_ms: n.3, invalidate_deadline_ms: n.4,
                handles_max: 3, files_max: 4, flags: welcome, name: &data,
            },
            Reply::Exports { names: &data },
            Reply::Attached { root: h, attr: a, mode },
            Reply::Entry { node: h, attr: a },
            Reply::Attr { attr: a },
            Reply::Bytes { data: &data },
            Reply::Dir { end: flags[0], entries: &data },
            Reply::Opened { file: f, generation: g, version: Version(n.0), bytes: n.1, flags: opened },
            Reply::Granted { generation: g, range: r, granter: DomId(n.3 as u16), refs: &[], access: Access::ReadOnly, place: GrantedPlace::Home, version: Version(n.0) },
            Reply::Granted { generation: g, range: r, granter: DomId(n.3 as u16), refs: &refs, access: Access::ReadWrite, place: GrantedPlace::Common { serial: n.3 }, version: Version(n.0) },
            Reply::Granted { generation: g, range: r, granter: DomId(0), refs: &[], access: Access::ReadWrite, place: GrantedPlace::Arena, version: Version(n.0) },
            Reply::Wrote { count: n.3, bytes: n.1 },
            Reply::Arena { serial: n.3 },
            Reply::Stale { generation: g, version: Version(n.0), bytes: n.1 },
            Reply::StatFs(StatFs { bytes: (n.0, n.1, n.2), inodes: (n.2, n.0), name_bytes_max: n.3 }),
            Reply::Renewed { lease_ttl_ms: n.3 },
            Reply::Done,
            Reply::Error { errno, text: text.as_bytes() },
        ];
        for reply in &replies {
            reply_survives(reply, number, epoch)?;
        }
    }

    #[test]
    fn directories_survive_the_wire(
        entries in proptest::collection::vec(
            (any::<(u64, u64)>(), kind(), proptest::option::of((handle(), attr())), name()), 0..40),
        bytes_max in 0u32..6000,
    ) {
        let mut writer = DirWriter::new(bytes_max);
        let mut written = Vec::new();
        for ((cookie, ino), kind, node, name) in &entries {
            let entry = DirEntry { cookie: *cookie, kind: *kind, ino: *ino, node: *node, name };
            if !writer.push(&entry).unwrap() {
                break;
            }
            written.push(entry);
        }
        let packed = writer.finish();
        prop_assert!(packed.len() <= bytes_max as usize);
        let read: Vec<_> = DirReader::new(&packed).collect::<Result<_, _>>().unwrap();
        prop_assert_eq!(read, written);
    }

    #[test]
    fn no_bytes_panic(bytes in bytes(400)) {
        let _ = decode_header(&bytes);
        let _ = DirReader::new(&bytes).count();
    }

    /// A good header before any body gets past the first check.
    #[test]
    fn no_body_panics(class in 0u16..5, code in 0u16..32, request: u64, body in bytes(200)) {
        let mut wire = Vec::new();
        wire.extend_from_slice(b"cpg1");
        wire.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        wire.extend_from_slice(&(class << 8 | code).to_le_bytes());
        wire.extend_from_slice(&(32 + body.len() as u32).to_le_bytes());
        wire.extend_from_slice(&[0; 4]);
        wire.extend_from_slice(&request.to_le_bytes());
        wire.extend_from_slice(&[9; 8]);
        wire.extend_from_slice(&body);
        if let Ok(frame) = decode_header(&wire) {
            // What is understood says the same bytes again.
            let mut again = Vec::new();
            if let Ok(r) = Request::decode(&frame) {
                r.encode(frame.request, frame.epoch, &mut again).unwrap();
                prop_assert_eq!(&again, &wire);
            }
            if let Ok(r) = Reply::decode(&frame) {
                r.encode(frame.request, frame.epoch, &mut again).unwrap();
                prop_assert_eq!(&again, &wire);
            }
            if let Ok(n) = Notice::decode(&frame) {
                n.encode(frame.epoch, &mut again).unwrap();
                prop_assert_eq!(&again, &wire);
            }
        }
    }

    /// One flipped bit of a good request: understood as what it says, or refused; never a panic.
    #[test]
    fn no_flipped_bit_panics(owned in request(), at: proptest::sample::Index, bit in 0u8..8) {
        let mut wire = Vec::new();
        owned.request().encode(1, Epoch(1), &mut wire).unwrap();
        let at = at.index(wire.len());
        wire[at] ^= 1 << bit;
        if let Ok(frame) = decode_header(&wire) {
            let _ = Request::decode(&frame);
        }
    }
}

fn ping() -> Vec<u8> {
    let mut wire = Vec::new();
    Request::Renew.encode(5, Epoch(1), &mut wire).unwrap();
    wire
}

#[test]
fn header_is_checked_field_by_field() {
    let good = ping();
    assert_eq!(good.len(), 32);
    assert!(decode_header(&good).is_ok());
    let broken = |at: usize, value: u8| {
        let mut wire = good.clone();
        wire[at] = value;
        decode_header(&wire).unwrap_err()
    };
    assert_eq!(broken(0, b'x'), DecodeError::Magic);
    assert_eq!(broken(4, 9), DecodeError::Version { found: 9 });
    assert_eq!(broken(7, 9), DecodeError::Kind { kind: 0x0911 });
    assert_eq!(
        broken(8, 33),
        DecodeError::Length {
            said: 33,
            bytes: 32
        }
    );
    assert_eq!(broken(12, 1), DecodeError::Reserved);
    assert_eq!(
        decode_header(&good[..31]),
        Err(DecodeError::TooShort {
            bytes: 31,
            needed: 32
        })
    );
    let long = vec![0; MESSAGE_BYTES_MAX + 1];
    assert_eq!(
        decode_header(&long),
        Err(DecodeError::TooLong { bytes: long.len() })
    );
}

#[test]
fn what_would_be_refused_is_not_sent() {
    let mut out = Vec::new();
    let empty = PageRange {
        first: PageIndex(0),
        count: 0,
    };
    let far = PageRange {
        first: PageIndex(u64::MAX),
        count: 1,
    };
    for range in [empty, far] {
        let fault = Request::Fault {
            file: FileToken(1),
            generation: Generation(0),
            range,
            hint: FaultHint::Random,
            access: Access::ReadOnly,
        };
        assert_eq!(
            fault.encode(1, Epoch(1), &mut out),
            Err(EncodeError::Value("page range"))
        );
    }
    let long = vec![0; MESSAGE_BYTES_MAX];
    let reply = Reply::Bytes { data: &long };
    assert!(matches!(
        reply.encode(1, Epoch(1), &mut out),
        Err(EncodeError::TooLong { .. })
    ));
    assert!(Request::Renew.encode(0, Epoch(1), &mut out).is_err());
    assert!(Request::Bye.encode(0, Epoch(1), &mut out).is_ok());
    let largest = vec![0; DATA_BYTES_MAX as usize];
    assert!(
        Reply::Bytes { data: &largest }
            .encode(1, Epoch(1), &mut out)
            .is_ok()
    );
    let text = vec![b'x'; ERROR_TEXT_BYTES_MAX + 1];
    assert!(
        Reply::Error {
            errno: 5,
            text: &text
        }
        .encode(1, Epoch(1), &mut out)
        .is_err()
    );
    assert!(
        Reply::Error {
            errno: 0,
            text: b""
        }
        .encode(1, Epoch(1), &mut out)
        .is_err()
    );
}

#[test]
fn the_buffer_is_used_again() {
    let mut out = Vec::with_capacity(4096);
    let capacity = out.capacity();
    for i in 1..100 {
        Request::Attach { export: b"libs" }
            .encode(i, Epoch(1), &mut out)
            .unwrap();
    }
    assert_eq!(out.capacity(), capacity);
}
