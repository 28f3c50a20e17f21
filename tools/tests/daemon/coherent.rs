//! Coherent exports, spoken by hand: what the loop makes of wants, recalls, writes, syncs and lengths.
//!
//! Cannot show: what mappings see (`local_coherent` of tests/ does).
use crate::strict_guest::*;
use crate::support::*;
use copage_coherence::msg::*;
use copage_grants::Access;
use std::fs::File;
use std::os::unix::fs::FileExt;

#[test]
fn local_coherent_stores_reach_readers_and_the_disk() {
    let host = Host::with(coherent);
    let mut a = Co::open(&host, "a", "big", true);
    let mut b = Co::open(&host, "b", "big", false);
    // Both read.
    for co in [&mut a, &mut b] {
        let fault = co.fault(3, 4, Access::ReadOnly);
        let came = co.call(&fault);
        assert_eq!(granted(&came), (3, 4, Access::ReadOnly, GrantedPlace::Home));
        assert_eq!(page_of(&co.home, 3)[7], pattern(3 * 4096 + 7));
    }
    // One stores.
    let arena = a.arena();
    let fault = a.fault(3, 1, Access::ReadWrite);
    let came = a.call(&fault);
    assert_eq!(
        granted(&came),
        (3, 1, Access::ReadWrite, GrantedPlace::Arena)
    );
    assert_eq!(page_of(&arena, 3)[7], pattern(3 * 4096 + 7));
    arena.write_all_at(&[0xaa; 4096], 3 * PAGE).unwrap();
    // The other does not see the old content: the page is away from the home.
    assert_eq!(page_of(&b.home, 3), vec![0; 4096]);
    // It asks, the writer lets go, and what it stored is there, also on the disk.
    let number = b.post_fault(3, Access::ReadOnly);
    let came = wait_for(&mut [&mut b, &mut a], number);
    assert_eq!(granted(&came).2, Access::ReadOnly);
    assert_eq!(page_of(&b.home, 3), vec![0xaa; 4096]);
    assert_eq!(a.asked.len(), 1);
    let disk = File::open(host.data().join("big")).unwrap();
    assert_eq!(page_of(&disk, 3), vec![0xaa; 4096]);
    // Nothing of a page that a guest has not is taken from its arena.
    host.stop();
}

#[test]
fn local_coherent_sync_writes_what_is_not_released() {
    let host = Host::with(coherent);
    let mut a = Co::open(&host, "a", "big", true);
    let mut b = Co::open(&host, "b", "big", false);
    let arena = a.arena();
    let fault = a.fault(5, 2, Access::ReadWrite);
    assert_eq!(granted(&a.call(&fault)).1, 2);
    arena.write_all_at(&[0xbb; 8192], 5 * PAGE).unwrap();
    let came = b.call(&Request::Sync { file: b.file });
    assert!(matches!(came.reply(), Reply::Done), "{:?}", came.reply());
    let disk = File::open(host.data().join("big")).unwrap();
    assert_eq!(page_of(&disk, 5), vec![0xbb; 4096]);
    assert_eq!(page_of(&disk, 6), vec![0xbb; 4096]);
    assert!(a.asked.is_empty(), "a sync asks nobody");
    host.stop();
}

#[test]
fn local_coherent_write_and_read_are_one_file_with_mappings() {
    let host = Host::with(coherent);
    let mut a = Co::open(&host, "a", "big", true);
    let mut b = Co::open(&host, "b", "big", true);
    let fault = b.fault(0, 1, Access::ReadOnly);
    b.call(&fault);
    let came = a.call(&Request::Write {
        file: a.file,
        offset: 4090,
        data: &[7; 12],
    });
    assert!(
        matches!(came.reply(), Reply::Wrote { count: 12, bytes } if bytes == BIG_BYTES as u64),
        "{:?}",
        came.reply()
    );
    let disk = File::open(host.data().join("big")).unwrap();
    let mut found = [0; 12];
    disk.read_exact_at(&mut found, 4090).unwrap();
    assert_eq!(found, [7; 12]);
    // The reader's page is away, and comes back with the bytes.
    let came = b.call(&fault);
    granted(&came);
    assert_eq!(&page_of(&b.home, 0)[4090..], [7; 6]);
    assert_eq!(b.read(4088, 16)[..2], [pattern(4088), pattern(4089)]);
    // A writer's page is read by message after it let go.
    let arena = b.arena();
    let fault = b.fault(9, 1, Access::ReadWrite);
    b.call(&fault);
    arena.write_all_at(&[9; 4096], 9 * PAGE).unwrap();
    let number = a.guest.post(&Request::Read {
        file: a.file,
        offset: 9 * PAGE,
        len: 4096,
    });
    let came = wait_for(&mut [&mut a, &mut b], number);
    assert!(matches!(came.reply(), Reply::Bytes { data } if data == [9; 4096]));
    host.stop();
}

#[test]
fn local_coherent_lengths_change_for_all() {
    let host = Host::with(coherent);
    let mut a = Co::open(&host, "a", "hello", true);
    let mut b = Co::open(&host, "b", "hello", true);
    let bytes = 3 * PAGE + 10;
    let came = a.call(&Request::Truncate {
        file: a.file,
        bytes,
    });
    assert!(matches!(came.reply(), Reply::Done), "{:?}", came.reply());
    assert_eq!(b.read(0, 4096)[..HELLO.len()], *HELLO);
    assert_eq!(b.lengths, [bytes]);
    assert_eq!(b.read(2 * PAGE, 65536).len(), 4096 + 10);
    // A write past the end makes it longer.
    let came = b.call(&Request::Write {
        file: b.file,
        offset: bytes + 100,
        data: b"end",
    });
    let wrote = matches!(came.reply(), Reply::Wrote { count: 3, bytes: now } if now == bytes + 103);
    assert!(wrote, "{:?}", came.reply());
    let disk = std::fs::read(host.data().join("hello")).unwrap();
    assert_eq!(disk.len() as u64, bytes + 103);
    assert_eq!(&disk[disk.len() - 3..], b"end");
    assert!(disk[HELLO.len()..disk.len() - 3].iter().all(|b| *b == 0));
    // Pages that somebody writes are taken from it before they are cut off.
    let arena = b.arena();
    let fault = b.fault(2, 1, Access::ReadWrite);
    b.call(&fault);
    arena.write_all_at(&[1; 4096], 2 * PAGE).unwrap();
    let number = a.guest.post(&Request::Truncate {
        file: a.file,
        bytes: 5,
    });
    let came = wait_for(&mut [&mut a, &mut b], number);
    assert!(matches!(came.reply(), Reply::Done), "{:?}", came.reply());
    assert_eq!(
        std::fs::read(host.data().join("hello")).unwrap(),
        &HELLO[..5]
    );
    let fault = b.fault(2, 1, Access::ReadWrite);
    assert_ne!(b.call(&fault).errno(), 0);
    // What was cut off does not come back.
    let came = b.call(&Request::Truncate {
        file: b.file,
        bytes: 3 * PAGE,
    });
    assert!(matches!(came.reply(), Reply::Done), "{:?}", came.reply());
    assert_eq!(a.read(2 * PAGE, 4096), vec![0; 4096]);
    host.stop();
}

#[test]
fn local_coherent_hostile_requests_are_refused() {
    let host = Host::with(coherent);
    let mut a = Co::open(&host, "a", "big", true);
    let mut b = Co::open(&host, "b", "big", false);
    let (token, theirs) = (b.file, a.file);
    // Open for reading, or another's token.
    let write = |file, offset| Request::Write {
        file,
        offset,
        data: b"x",
    };
    let fault = b.fault(0, 1, Access::ReadWrite);
    assert_eq!(b.call(&fault).errno(), libc::EACCES);
    for (request, errno) in [
        (write(token, 0), libc::EBADF),
        (write(theirs, 0), libc::EBADF),
        (
            Request::Truncate {
                file: token,
                bytes: 0,
            },
            libc::EBADF,
        ),
        (
            Request::Truncate {
                file: theirs,
                bytes: 0,
            },
            libc::EBADF,
        ),
        (Request::Sync { file: theirs }, libc::EBADF),
        (
            Request::Arena {
                file: token,
                common: false,
            },
            libc::EBADF,
        ),
        (
            Request::Arena {
                file: theirs,
                common: true,
            },
            libc::EBADF,
        ),
    ] {
        assert_eq!(b.call(&request).errno(), errno, "{request:?}");
    }
    // Past every length.
    for (request, errno) in [
        (write(theirs, u64::MAX), libc::EFBIG),
        (write(theirs, i64::MAX as u64), libc::EFBIG),
        (write(theirs, 1 << 50), libc::EFBIG),
        (
            Request::Truncate {
                file: theirs,
                bytes: u64::MAX,
            },
            libc::EFBIG,
        ),
        (
            Request::Truncate {
                file: theirs,
                bytes: 1 << 60,
            },
            libc::EFBIG,
        ),
    ] {
        assert_eq!(a.call(&request).errno(), errno, "{request:?}");
    }
    for first in [256, 1 << 40] {
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let fault = a.fault(first, 1, access);
            assert_ne!(a.call(&fault).errno(), 0, "{first}");
        }
    }
    // A generation that never was.
    let mut fault = a.fault(0, 1, Access::ReadWrite);
    if let Request::Fault { generation, .. } = &mut fault {
        *generation = Generation(99);
    }
    assert!(matches!(a.call(&fault).reply(), Reply::Stale { .. }));
    assert_eq!(
        std::fs::metadata(host.data().join("big")).unwrap().len(),
        BIG_BYTES as u64
    );
    host.stop();
}
