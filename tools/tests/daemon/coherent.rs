//! Coherent exports, spoken by hand: what the loop makes of wants, recalls, writes, syncs and lengths.
//!
//! Guests here load by reading the home's descriptor and store by writing the arena's. Cannot show: what
//! mappings see (`local_coherent` of tests/ does).

use crate::support::*;
use copage::config::{Config, Mode};
use copage::serve::admin_types::{AdminReply, AdminRequest};
use copage_coherence::msg::*;
use copage_grants::{Access, PageIndex};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;

fn coherent(config: &mut Config) {
    config.exports[0].mode = Mode::Coherent;
    config.exports[0].writeback_ms = 60_000;
}

/// A session with one coherent file open.
struct Co {
    guest: Guest,
    file: FileToken,
    generation: Generation,
    home: File,
    lengths: Vec<u64>,
    /// Pages that it was asked for.
    asked: Vec<PageRange>,
    /// It was told of a new home.
    rebased: bool,
}

impl Co {
    fn open(host: &Host, guest: &str, name: &str, write: bool) -> Self {
        let mut guest = host.guest(guest);
        let root = guest.attach("data").unwrap();
        let (node, _) = guest.lookup(root, name.as_bytes()).unwrap();
        let came = guest.call(&Request::Open {
            node,
            how: OpenHow::Map,
            write,
        });
        let Reply::Opened {
            file,
            generation,
            flags,
            ..
        } = came.reply()
        else {
            panic!("{:?}", came.reply())
        };
        assert!(flags.coherent && flags.descriptor);
        Self {
            guest,
            file,
            generation,
            home: File::from(came.fd.unwrap()),
            lengths: Vec::new(),
            asked: Vec::new(),
            rebased: false,
        }
    }

    fn fault(&self, first: u64, count: u32, access: Access) -> Request<'static> {
        Request::Fault {
            file: self.file,
            generation: self.generation,
            range: PageRange {
                first: PageIndex(first),
                count,
            },
            hint: FaultHint::Random,
            access,
        }
    }

    fn post_fault(&mut self, page: u64, access: Access) -> u64 {
        let fault = self.fault(page, 1, access);
        self.guest.post(&fault)
    }

    /// Takes what has come: acks what it is asked, keeps lengths. The reply of this number, if it came.
    fn take(&mut self, number: u64) -> Option<Came> {
        self.guest.channel.set_nonblocking(true).unwrap();
        let mut found = None;
        while let Ok(came) = receive(&self.guest.channel) {
            match came.notice() {
                Some(Notice::Invalidate { recall, range, .. }) => {
                    self.asked.push(range);
                    self.guest.post(&Request::Ack { recall });
                }
                Some(Notice::Rebase {
                    recall, generation, ..
                }) => {
                    self.generation = generation;
                    self.home = File::from(came.fd.unwrap());
                    self.rebased = true;
                    self.guest.post(&Request::Ack { recall });
                }
                Some(Notice::Resized { bytes, .. }) => self.lengths.push(bytes),
                Some(_) => {}
                None if came.request() == number => found = Some(came),
                None => {}
            }
        }
        self.guest.channel.set_nonblocking(false).unwrap();
        found
    }

    fn call(&mut self, request: &Request<'_>) -> Came {
        let number = self.guest.post(request);
        wait_for(&mut [self], number)
    }

    fn arena(&mut self) -> File {
        let came = self.call(&Request::Arena {
            file: self.file,
            common: false,
        });
        assert!(matches!(came.reply(), Reply::Arena { serial: 0 }));
        File::from(came.fd.unwrap())
    }

    fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        let came = self.call(&Request::Read {
            file: self.file,
            offset,
            len,
        });
        match came.reply() {
            Reply::Bytes { data } => data.to_vec(),
            other => panic!("{other:?}"),
        }
    }
}

/// Waits for the first one's reply; all of them ack meanwhile.
fn wait_for(all: &mut [&mut Co], number: u64) -> Came {
    let start = Instant::now();
    loop {
        for (nth, co) in all.iter_mut().enumerate() {
            let wanted = if nth == 0 { number } else { 0 };
            if let Some(came) = co.take(wanted) {
                return came;
            }
        }
        assert!(start.elapsed() < Duration::from_secs(10), "no answer");
        all[0].guest.post(&Request::Renew);
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn granted(came: &Came) -> (u64, u32, Access, GrantedPlace) {
    match came.reply() {
        Reply::Granted {
            range,
            access,
            place,
            ..
        } => (range.first.0, range.count, access, place),
        other => panic!("{other:?}"),
    }
}

fn page_of(file: &File, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE as usize];
    file.read_exact_at(&mut bytes, page * PAGE).unwrap();
    bytes
}

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

#[test]
fn local_coherent_anothers_ack_and_an_old_epoch_count_for_nothing() {
    let host = Host::with(coherent);
    let mut a = Co::open(&host, "a", "big", true);
    let mut b = Co::open(&host, "b", "big", true);
    let arena = a.arena();
    let fault = a.fault(1, 1, Access::ReadWrite);
    granted(&a.call(&fault));
    arena.write_all_at(&[1; 4096], PAGE).unwrap();
    let number = b.post_fault(1, Access::ReadWrite);
    // The writer is asked and does not answer; others answer for it, in every way.
    let recall = loop {
        let came = receive(&a.guest.channel).unwrap();
        if let Some(Notice::Invalidate { recall, .. }) = came.notice() {
            break recall;
        }
    };
    b.guest.post(&Request::Ack { recall });
    b.guest.post(&Request::Ack { recall: 1 << 63 });
    b.guest.post(&Request::Ack { recall: u64::MAX });
    let range = PageRange {
        first: PageIndex(1),
        count: u32::MAX,
    };
    let unmapped = Request::Unmapped {
        file: b.file,
        generation: b.generation,
        range,
    };
    b.guest.post(&unmapped);
    let epoch = std::mem::replace(&mut a.guest.epoch, copage_grants::Epoch(1));
    a.guest.post(&Request::Ack { recall });
    a.guest.epoch = epoch;
    for _ in 0..50 {
        assert!(b.take(number).is_none(), "granted while another has it");
        std::thread::sleep(Duration::from_millis(2));
    }
    // It stores on, and then lets go: all of it is there.
    arena.write_all_at(&[2; 4096], PAGE).unwrap();
    a.guest.post(&Request::Ack { recall });
    let came = wait_for(&mut [&mut b], number);
    assert_eq!(granted(&came).2, Access::ReadWrite);
    let arena_b = b.arena();
    assert_eq!(page_of(&arena_b, 1), vec![2; 4096]);
    host.stop();
}

#[test]
fn local_coherent_who_does_not_let_go_is_fenced_and_reads_nothing_more() {
    let host = Host::with(|config| {
        coherent(config);
        config.invalidate_deadline_ms = 300;
    });
    let mut a = Co::open(&host, "a", "big", true);
    let mut b = Co::open(&host, "b", "big", true);
    let arena = a.arena();
    let fault = a.fault(2, 1, Access::ReadWrite);
    granted(&a.call(&fault));
    arena.write_all_at(&[1; 4096], 2 * PAGE).unwrap();
    let number = b.post_fault(2, Access::ReadWrite);
    let reason = a.guest.end(Duration::from_secs(10));
    assert_eq!(reason, Some(FenceReason::DeadlineMissed));
    // The file has a new home, where what it had stored is; its old descriptors show nothing.
    let came = wait_for(&mut [&mut b], number);
    match came.reply() {
        Reply::Granted { .. } | Reply::Stale { .. } => {}
        other => panic!("{other:?}"),
    }
    arena.write_all_at(&[3; 4096], 2 * PAGE).unwrap();
    eventually("a new home", || {
        let came = b.call(&Request::Sync { file: b.file });
        assert!(matches!(came.reply(), Reply::Done), "{:?}", came.reply());
        b.read(2 * PAGE, 4096) == [1; 4096] && b.rebased
    });
    assert_eq!(page_of(&a.home, 2), vec![0; 4096]);
    host.stop();
}

#[test]
fn local_coherent_a_bounced_page_is_shared_by_its_writers() {
    let host = Host::with(|config| {
        coherent(config);
        config.share_bounced = Some(true);
    });
    let mut a = Co::open(&host, "a", "big", true);
    let mut b = Co::open(&host, "b", "big", true);
    let mut shared = None;
    for _ in 0..200 {
        let number = a.post_fault(4, Access::ReadWrite);
        let came = wait_for(&mut [&mut a, &mut b], number);
        let number = b.post_fault(4, Access::ReadWrite);
        let other = wait_for(&mut [&mut b, &mut a], number);
        if let (GrantedPlace::Common { serial }, GrantedPlace::Common { .. }) =
            (granted(&came).3, granted(&other).3)
        {
            shared = Some(serial);
            break;
        }
    }
    let serial = shared.expect("writers that bounce a page share it");
    let common = |co: &mut Co| {
        let came = co.call(&Request::Arena {
            file: co.file,
            common: true,
        });
        assert!(matches!(came.reply(), Reply::Arena { serial: s } if s == serial));
        File::from(came.fd.unwrap())
    };
    let (common_a, common_b) = (common(&mut a), common(&mut b));
    common_a.write_all_at(&[5; 4096], 4 * PAGE).unwrap();
    assert_eq!(page_of(&common_b, 4), vec![5; 4096]);
    let came = a.call(&Request::Sync { file: a.file });
    assert!(matches!(came.reply(), Reply::Done), "{:?}", came.reply());
    let disk = File::open(host.data().join("big")).unwrap();
    assert_eq!(page_of(&disk, 4), vec![5; 4096]);
    // A reader takes it from both.
    let mut c = Co::open(&host, "c", "big", false);
    let number = c.post_fault(4, Access::ReadOnly);
    let came = wait_for(&mut [&mut c, &mut a, &mut b], number);
    assert_eq!(granted(&came).3, GrantedPlace::Home);
    assert_eq!(page_of(&c.home, 4), vec![5; 4096]);
    host.stop();
}

#[test]
fn local_coherent_nobody_writes_before_the_earlier_sessions_are_over() {
    let mut config = None;
    let host = Host::with(|c| {
        coherent(c);
        c.lease_ttl_ms = 500;
        config = Some(c.clone());
    });
    let a = Co::open(&host, "a", "big", true);
    // It stops with a session: as far as the next daemon knows, that one goes on.
    let Host { daemon, dir } = host;
    daemon.unwrap().stop().unwrap();
    drop(a);
    let start = Instant::now();
    let daemon = copage::serve::Daemon::start(&config.unwrap()).unwrap();
    let host = Host {
        daemon: Some(daemon),
        dir,
    };
    let mut b = Co::open(&host, "b", "big", true);
    let fault = b.fault(0, 1, Access::ReadOnly);
    granted(&b.call(&fault));
    assert!(
        start.elapsed() < Duration::from_millis(500),
        "reading waits for nobody"
    );
    let fault = b.fault(0, 1, Access::ReadWrite);
    granted(&b.call(&fault));
    assert!(start.elapsed() >= Duration::from_millis(500));
    host.stop();
}

#[test]
fn local_coherent_leases_are_shown() {
    let host = Host::with(coherent);
    let mut a = Co::open(&host, "a", "big", true);
    let mut b = Co::open(&host, "b", "big", false);
    for (page, access) in [(0, Access::ReadOnly), (1, Access::ReadWrite)] {
        let fault = a.fault(page, 1, access);
        granted(&a.call(&fault));
    }
    b.post_fault(1, Access::ReadOnly);
    let leases = |path: &str| {
        let path = (!path.is_empty()).then(|| path.into());
        match host.admin(&AdminRequest::Leases {
            path,
            pages_max: None,
        }) {
            AdminReply::Leases(leases) => leases,
            other => panic!("{other:?}"),
        }
    };
    eventually("somebody waits", || {
        let found = leases("data/big");
        let page = found.pages.iter().find(|p| p.page == 1).unwrap();
        assert_eq!(page.state, "exclusive");
        assert!(page.dirty && page.holders[0].writable && page.holders[0].guest == "a");
        page.waiting == ["b:ro"] && page.holders[0].leaving
    });
    let all = leases("");
    assert_eq!((all.pages[0].page, &*all.pages[0].state), (0, "shared"));
    assert!(leases("data/hello").pages.is_empty());
    let AdminReply::Stats(stats) = host.admin(&AdminRequest::Stats) else {
        panic!()
    };
    assert_eq!(stats.strict.granted_write, 1);
    assert_eq!(stats.strict.recalls, 1);
    host.stop();
}
