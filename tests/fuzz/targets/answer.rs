//! What a daemon sends, replies, notices and packed directory entries: no bytes make a guest's
//! decoder panic, and what is understood has only one way to stand on the wire.
//!
//! Cannot show: what a guest does with a well-formed lie of its daemon, which it has to trust.
#![no_main]

use copage_coherence::msg::{
    Attr, DATA_BYTES_MAX, DirEntry, DirReader, DirWriter, FenceReason, FileKind, FileToken,
    FrameKind, Generation, Handle, InvalidateReason, Notice, OpenedFlags, PageRange, Reply, StatFs,
    WelcomeFlags, decode_header,
};
use copage_grants::{DomId, Epoch, PageIndex, Version};
use libfuzzer_sys::fuzz_target;

mod seeds;

/// One of each kind, and packed entries by themselves.
fn good() -> Vec<Vec<u8>> {
    let node = Handle {
        slot: 1,
        tag: 2,
        epoch: 3,
    };
    let time = (4, 5);
    let (epoch, version, generation) = (Epoch(3), Version::new(1, 2), Generation(1));
    let attr = Attr {
        kind: FileKind::Regular,
        perm: 0o644,
        nlink: 1,
        uid: 6,
        gid: 7,
        ino: 8,
        dev: 9,
        rdev: 0,
        bytes: 10,
        blocks: 11,
        atime: time,
        mtime: time,
        ctime: time,
    };
    let mut entries = DirWriter::new(DATA_BYTES_MAX);
    for (name, node) in [(&b"a"[..], None), (b"bc", Some((node, attr)))] {
        let entry = DirEntry {
            cookie: 12,
            kind: FileKind::Regular,
            ino: 13,
            node,
            name,
        };
        entries.push(&entry).expect("a good entry");
    }
    let entries = entries.finish();
    let file = FileToken(14);
    let range = PageRange {
        first: PageIndex(15),
        count: 16,
    };
    let replies = [
        Reply::Welcome {
            dom: DomId(1),
            epoch,
            lease_ttl_ms: 5000,
            invalidate_deadline_ms: 5000,
            handles_max: 100,
            files_max: 10,
            flags: WelcomeFlags {
                forced_revoke: true,
                read_only_enforced: true,
                userfaultfd: true,
            },
            name: b"guest",
        },
        Reply::Exports {
            names: b"libs\0bin\0",
        },
        Reply::Attached {
            root: node,
            attr,
            mode: 0,
        },
        Reply::Entry { node, attr },
        Reply::Attr { attr },
        Reply::Bytes { data: b"bytes" },
        Reply::Dir {
            end: true,
            entries: &entries,
        },
        Reply::Opened {
            file,
            generation,
            version,
            bytes: 17,
            flags: OpenedFlags {
                descriptor: true,
                pinned: true,
                host_bounded: true, coherent: false, },
        },
        Reply::Granted {
            generation,
            range,
            granter: DomId(0),
            refs: b"", access: copage_grants::Access::ReadOnly, place: copage_coherence::msg::GrantedPlace::Home, version: copage_grants::Version(0), },
        Reply::Stale {
            generation,
            version,
            bytes: 18,
        },
        Reply::StatFs(StatFs {
            bytes: (3, 2, 1),
            inodes: (2, 1),
            name_bytes_max: 255,
        }),
        Reply::Renewed { lease_ttl_ms: 5000 },
        Reply::Done,
        Reply::Error {
            errno: 2,
            text: b"no such file",
        },
    ];
    let deadline_ms = 19;
    let notices = [
        Notice::Invalidate {
            recall: 20,
            file,
            generation,
            range,
            reason: InvalidateReason::Reclaim,
            deadline_ms,
        },
        Notice::Rebase {
            recall: 21,
            file,
            generation,
            version,
            bytes: 22,
            deadline_ms,
        },
        Notice::Fenced {
            reason: FenceReason::LeaseExpired,
        },
        Notice::Goodbye,
    ];
    let mut good = Vec::new();
    for reply in &replies {
        let mut bytes = Vec::new();
        reply.encode(1, epoch, &mut bytes).expect("a good reply");
        good.push(bytes);
    }
    for notice in &notices {
        let mut bytes = Vec::new();
        notice.encode(epoch, &mut bytes).expect("a good notice");
        good.push(bytes);
    }
    good.push(entries);
    good
}

/// Entries up to the first that is refused are packed again as they stood.
fn directory(entries: &[u8]) {
    let mut writer = DirWriter::new(DATA_BYTES_MAX);
    let mut whole = true;
    for entry in DirReader::new(entries) {
        match entry {
            Ok(entry) => {
                let one_name = !entry.name.iter().any(|&b| b == b'/' || b == 0);
                assert!(one_name, "a name that leads elsewhere");
                let fits = writer
                    .push(&entry)
                    .expect("what was understood can be said");
                assert!(fits, "the input was no longer than a reply may be");
            }
            Err(_) => whole = false,
        }
    }
    let again = writer.finish();
    assert_eq!(again, entries[..again.len()]);
    assert!(
        !whole || again.len() == entries.len(),
        "bytes were passed over"
    );
}

fuzz_target!(init: seeds::write(good()), |data: &[u8]| {
    directory(data);
    let Ok(frame) = decode_header(data) else {
        return;
    };
    let mut again = Vec::new();
    match frame.kind {
        FrameKind::Request => return,
        FrameKind::Reply => {
            let Ok(reply) = Reply::decode(&frame) else {
                return;
            };
            if let Reply::Dir { entries, .. } = reply {
                directory(entries);
            }
            reply
                .encode(frame.request, frame.epoch, &mut again)
                .expect("what was understood can be said");
        }
        FrameKind::Notice => {
            let Ok(notice) = Notice::decode(&frame) else {
                return;
            };
            notice
                .encode(frame.epoch, &mut again)
                .expect("what was understood can be said");
        }
    }
    assert_eq!(again, data);
});
