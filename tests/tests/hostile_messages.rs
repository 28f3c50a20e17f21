//! Guests that say what no guest should: garbage, cut and changed messages, floods, forged handles.
//! Beside each an honest guest reads, whose pages are taken back all the time.
//!
//! Cannot show: that no message exists that does harm; the fuzz targets look for those that break a
//! decoder, this sends those that people think of. What a guest does with its time is in
//! hostile_terms.rs, with its limits in hostile_limits.rs.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_coherence::msg::{
    DATA_BYTES_MAX, FAULT_PAGES_MAX, FaultHint, FileToken, Generation, Handle, HelloFlags,
    MESSAGE_BYTES_MAX, OpenHow, PROTOCOL_VERSION, PageRange, Reply, Request,
};
use copage_grants::{Epoch, PageIndex};
use copage_tests::beside::Beside;
use copage_tests::daemon::Setup;
use copage_tests::raw::{Raw, RawFile};
use copage_tests::wait;
use copage_tests::watch::Draw;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);
/// To a handle that was never given, and to one of another session.
const NO_HANDLE: [i32; 2] = [libc::EBADF, libc::ESTALE];

/// One of each request, about things this session really has.
fn every_request(root: Handle, file: &RawFile) -> Vec<Request<'static>> {
    let range = PageRange {
        first: PageIndex(0),
        count: 1,
    };
    let (token, generation) = (file.token, file.generation);
    let flags = HelloFlags::default();
    vec![
        Request::Hello {
            version: PROTOCOL_VERSION,
            flags,
            name: b"evil",
            uuid: [0; 16],
        },
        Request::Exports,
        Request::Attach { export: b"export" },
        Request::Lookup {
            parent: root,
            name: b"honest",
        },
        Request::Getattr { node: root },
        Request::Readlink { node: root },
        Request::Readdir {
            node: root,
            cookie: 0,
            bytes_max: 4096,
            handles: true,
        },
        Request::Getxattr {
            node: root,
            name: b"user.x",
        },
        Request::Listxattr { node: root },
        Request::Forget {
            node: root,
            count: 1,
        },
        Request::Open {
            node: root,
            how: OpenHow::Map,
            write: false,
        },
        Request::Close {
            file: FileToken(token.0 + 1000),
        },
        Request::Fault {
            file: token,
            generation,
            range,
            hint: FaultHint::Random,
            access: copage_grants::Access::ReadOnly,
        },
        Request::Read {
            file: token,
            offset: 0,
            len: 64,
        },
        Request::Ack { recall: 1 },
        Request::Unmapped {
            file: token,
            generation,
            range,
        },
        Request::Statfs { node: root },
        Request::Renew,
    ]
}

/// A session with a root and an open file.
fn session(beside: &Beside) -> (Raw, Handle, RawFile) {
    let mut raw = Raw::try_hello(&beside.socket(), "evil").unwrap();
    let root = raw.attach("export");
    let file = raw.open("export", "honest", OpenHow::Map);
    (raw, root, file)
}

#[test]
fn local_garbage_before_and_after_hello() {
    let beside = Beside::start(&Setup::default(), |_| {});
    let mut draw = Draw::new(1);
    let mut sent = 0;
    for round in 0..60 {
        let raw = if round % 2 == 0 {
            Raw::silent(&beside.socket())
        } else {
            session(&beside).0
        };
        for _ in 0..40 {
            let len = match draw.below(4) {
                0 => 1 + draw.below(31),
                1 => 32 + draw.below(64),
                2 => 1 + draw.below(4096),
                // Longer than any message may be.
                _ => MESSAGE_BYTES_MAX as u64 - 16 + draw.below(32),
            };
            let mut bytes: Vec<u8> = (0..len).map(|_| draw.below(256) as u8).collect();
            if draw.below(2) == 0 && bytes.len() >= 16 {
                // A good beginning: magic, version, then a kind.
                bytes[..6].copy_from_slice(&[b'c', b'p', b'g', b'1', 1, 0]);
                bytes[7] = 1;
                let len = (bytes.len() as u32).to_le_bytes();
                bytes[8..12].copy_from_slice(&len);
                bytes[12..16].fill(0);
            }
            if !raw.send(&bytes) {
                break;
            }
            sent += 1;
        }
    }
    beside.finish(&format!("{sent} messages of garbage"));
}

#[test]
fn local_every_message_cut_and_changed() {
    let beside = Beside::start(&Setup::default(), |_| {});
    let mut draw = Draw::new(2);
    let (mut sent, mut sessions) = (0, 1);
    let (mut raw, mut root, mut file) = session(&beside);
    let kinds = every_request(root, &file).len();
    for kind in 0..kinds {
        let mut variant = 0;
        loop {
            let request = every_request(root, &file).swap_remove(kind);
            let (_, good) = raw.encode(&request);
            // Each length shorter, one longer, then each byte changed.
            let bytes = if variant < good.len() {
                let mut cut = good[..variant.max(1)].to_vec();
                if draw.below(2) == 0 && cut.len() >= 12 {
                    let len = (cut.len() as u32).to_le_bytes();
                    cut[8..12].copy_from_slice(&len);
                }
                cut
            } else if variant == good.len() {
                [&good[..], b"x"].concat()
            } else if variant - good.len() <= good.len() {
                let mut changed = good.clone();
                changed[variant - good.len() - 1] ^= 1 + draw.below(255) as u8;
                changed
            } else {
                break;
            };
            variant += 1;
            sent += 1;
            if !raw.send(&bytes) {
                (raw, root, file) = session(&beside);
                sessions += 1;
            }
            // What comes is read, so that this is not a flood.
            while raw.hear_within(Duration::ZERO).is_some() {}
        }
    }
    assert!(
        sessions > 1,
        "nobody was ever fenced for {sent} bad messages"
    );
    beside.finish(&format!(
        "{sent} messages cut or changed, over {sessions} sessions"
    ));
}

#[test]
fn local_floods_without_reading() {
    let beside = Beside::start(&Setup::default(), |_| {});
    let mut floods = Vec::new();
    for flood in 0..4 {
        let (mut raw, root, file) = session(&beside);
        let request = match flood {
            0 => Request::Read {
                file: file.token,
                offset: 0,
                len: DATA_BYTES_MAX,
            },
            1 => Request::Readdir {
                node: root,
                cookie: 0,
                bytes_max: DATA_BYTES_MAX,
                handles: true,
            },
            2 => Request::Lookup {
                parent: root,
                name: b"honest",
            },
            _ => Request::Ack { recall: u64::MAX },
        };
        let (_, bytes) = raw.encode(&request);
        floods.push((raw, bytes, 0_u64, false));
    }
    let begin = Instant::now();
    while begin.elapsed() < 3 * SECOND {
        for (raw, bytes, sent, over) in &mut floods {
            for _ in 0..256 {
                match raw.channel.try_send(bytes, None) {
                    Ok(()) => *sent += 1,
                    Err(copage_grants::channel::ChannelError::WouldBlock) => break,
                    Err(_) => {
                        *over = true;
                        break;
                    }
                }
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let sent: Vec<u64> = floods.iter().map(|f| f.2).collect();
    let hung_up = floods.iter().filter(|f| f.3).count();
    // What was never read must be gone with its sessions.
    drop(floods);
    beside.finish(&format!(
        "floods of {sent:?} requests, {hung_up} hung up on"
    ));
}

#[test]
fn local_forged_and_stolen_handles_name_nothing() {
    let beside = Beside::start(&Setup::default(), |_| {});
    let (mut owner, root, file) = session(&beside);
    let mut thief = Raw::try_hello(&beside.socket(), "thief").unwrap();
    let own_root = thief.attach("export");
    let mut draw = Draw::new(3);
    let mut handles = vec![
        root,
        Handle {
            epoch: thief.epoch.0,
            ..root
        },
        Handle {
            epoch: owner.epoch.0,
            ..own_root
        },
        Handle {
            tag: own_root.tag ^ 1,
            ..own_root
        },
        Handle {
            slot: own_root.slot + 1,
            ..own_root
        },
        Handle {
            slot: u32::MAX,
            tag: u32::MAX,
            epoch: u64::MAX,
        },
        Handle {
            slot: 0,
            tag: 0,
            epoch: 0,
        },
    ];
    for _ in 0..1000 {
        handles.push(Handle {
            slot: draw.below(8) as u32,
            tag: draw.below(1 << 32) as u32,
            epoch: thief.epoch.0,
        });
    }
    let mut tried = 0;
    for node in handles {
        // A handle drawn at random that happens to be the thief's own is no forgery.
        if node == own_root {
            continue;
        }
        let requests = [
            Request::Getattr { node },
            Request::Lookup {
                parent: node,
                name: b"honest",
            },
            Request::Open {
                node,
                how: OpenHow::Map,
                write: false,
            },
            Request::Readdir {
                node,
                cookie: 0,
                bytes_max: 4096,
                handles: true,
            },
        ];
        for request in requests {
            let errno = thief.refused(&request);
            assert!(NO_HANDLE.contains(&errno), "{errno} to {request:?}");
            tried += 1;
        }
    }
    let range = PageRange {
        first: PageIndex(0),
        count: 1,
    };
    for token in [
        file.token,
        FileToken(0),
        FileToken(u64::MAX),
        FileToken(file.token.0 + 1),
    ] {
        let (generation, hint) = (file.generation, FaultHint::Random);
        for request in [
            Request::Read {
                file: token,
                offset: 0,
                len: 1,
            },
            Request::Fault {
                file: token,
                generation,
                range,
                hint,
                access: copage_grants::Access::ReadOnly,
            },
            Request::Close { file: token },
        ] {
            assert_eq!(thief.refused(&request), libc::EBADF, "{request:?}");
            tried += 1;
        }
        // Not answered; must do nothing.
        thief.tell(&Request::Unmapped {
            file: token,
            generation,
            range,
        });
        thief.tell(&Request::Ack { recall: token.0 });
    }
    assert_eq!(
        owner.read(file.token, 0, 16).unwrap().len(),
        16,
        "the owner's token is its own"
    );
    beside.finish(&format!("{tried} forged or stolen names"));
}

#[test]
fn local_an_old_epoch_counts_for_nothing() {
    let beside = Beside::start(&Setup::default(), |_| {});
    let (mut old, root, file) = session(&beside);
    let epoch = old.epoch;
    old.tell(&Request::Bye);
    old.wait_hung_up(5 * SECOND);
    let mut new = Raw::try_hello(&beside.socket(), "evil").unwrap();
    assert!(new.epoch > epoch, "epochs rise");
    let own = new.attach("export");
    for node in [
        root,
        Handle {
            epoch: new.epoch.0,
            ..root
        },
    ] {
        if node != own {
            assert!(NO_HANDLE.contains(&new.refused(&Request::Getattr { node })));
        }
    }
    assert_eq!(
        new.refused(&Request::Close { file: file.token }),
        libc::EBADF
    );
    // The header's epoch: what carries the old one is refused or the session is over; never obeyed.
    let now = new.epoch;
    for bad in [epoch, Epoch(0), Epoch(now.0 + 1)] {
        let mut liar = Raw::try_hello(&beside.socket(), "evil").unwrap();
        let root = liar.attach("export");
        liar.epoch = bad;
        if let Some(came) = liar.ask(&Request::Lookup {
            parent: root,
            name: b"honest",
        }) {
            assert!(
                matches!(came.reply(), Reply::Error { .. }),
                "{bad:?}: {:?}",
                came.reply()
            );
        }
    }
    beside.finish("old epochs");
}

#[test]
fn local_names_that_are_no_names() {
    let long = vec![b'n'; 255];
    let strange: &[u8] = b"\xff\xfe not utf-8 \n";
    let beside = Beside::start(&Setup::default(), |tree| {
        use std::os::unix::ffi::OsStrExt;
        for name in [strange, &long] {
            std::fs::write(
                tree.at("export").join(std::ffi::OsStr::from_bytes(name)),
                b"x",
            )
            .unwrap();
        }
        std::fs::write(tree.at("other/secret"), b"secret").unwrap();
        std::fs::create_dir(tree.file("dir")).unwrap();
        std::os::unix::fs::symlink(tree.at("other"), tree.file("out")).unwrap();
        std::os::unix::fs::symlink("../other/secret", tree.file("dir/up")).unwrap();
    });
    let (mut raw, root, _) = session(&beside);
    assert!(raw.lookup(root, strange).is_ok(), "any bytes are a name");
    assert!(raw.lookup(root, &long).is_ok(), "255 bytes are a name");
    let too_long = vec![b'n'; 300];
    let refused: [(&[u8], i32); 9] = [
        (b"..", libc::EINVAL),
        (b".", libc::EINVAL),
        (b"", libc::EINVAL),
        (b"dir/up", libc::EINVAL),
        (b"/etc/passwd", libc::EINVAL),
        (b"../other/secret", libc::EINVAL),
        (b"honest\0", libc::EINVAL),
        (&too_long, libc::ENAMETOOLONG),
        (b"nobody", libc::ENOENT),
    ];
    for (name, errno) in refused {
        let got = raw.lookup(root, name).map(|_| ());
        assert_eq!(got, Err(errno), "{}", String::from_utf8_lossy(name));
    }
    // Links are shown, never followed by the daemon.
    let link = raw.lookup(root, b"out").unwrap();
    assert_eq!(raw.lookup(link, b"secret"), Err(libc::ENOTDIR));
    let dir = raw.lookup(root, b"dir").unwrap();
    let up = raw.lookup(dir, b"up").unwrap();
    for how in [OpenHow::Map, OpenHow::Pin, OpenHow::Read] {
        assert!(raw.try_open(up, how).is_err(), "a link cannot be opened");
        assert!(raw.try_open(root, how).is_err(), "nor a directory");
    }
    beside.finish("names that are no names");
}

#[test]
fn local_ranges_that_are_no_ranges() {
    let beside = Beside::start(&Setup::default(), |tree| {
        std::fs::write(tree.file("odd"), vec![7; 5000]).unwrap();
        std::fs::write(tree.file("empty"), b"").unwrap();
    });
    let (mut raw, _, _) = session(&beside);
    let odd = raw.open("export", "odd", OpenHow::Map);
    let empty = raw.open("export", "empty", OpenHow::Map);
    assert_eq!(raw.fault(&odd, 0, 2).map(|(first, _)| first), Ok(0));
    let last = (i64::MAX as u64) / 4096 - u64::from(FAULT_PAGES_MAX);
    for (file, first, count) in [
        (&odd, 2, 1),
        (&odd, 100, 1),
        (&odd, last, 1),
        (&empty, 0, 1),
        (&odd, 0, FAULT_PAGES_MAX + 1),
    ] {
        let got = raw.fault(file, first, count);
        assert!(got.is_err(), "{first}+{count} was granted: {got:?}");
    }
    // What the encoder refuses to say, said all the same: the range is the last part of the message.
    let good = Request::Fault {
        file: odd.token,
        generation: odd.generation,
        range: PageRange {
            first: PageIndex(0),
            count: 1,
        },
        hint: FaultHint::Random,
        access: copage_grants::Access::ReadOnly,
    };
    for (first, count) in [
        (0, 0),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (1 << 52, 1),
        (0, u32::MAX),
    ] {
        let (number, mut bytes) = raw.encode(&good);
        let at = bytes.len() - 16;
        bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(first));
        bytes[at + 8..at + 12].copy_from_slice(&u32::to_le_bytes(count));
        assert!(raw.send(&bytes), "hung up at once");
        let came = raw.reply_to(number).unwrap();
        assert!(
            came.errno().is_some(),
            "{first}+{count}: {:?}",
            came.reply()
        );
    }
    assert_eq!(
        raw.read(odd.token, 4990, 100).unwrap(),
        [7; 10],
        "a short read at the end"
    );
    assert!(raw.read(odd.token, 5000, 100).unwrap().is_empty());
    assert_eq!(
        raw.read(odd.token, u64::MAX, 100)
            .map(|b| b.len())
            .unwrap_or(0),
        0
    );
    let (number, mut bytes) = raw.encode(&Request::Read {
        file: odd.token,
        offset: 0,
        len: 1,
    });
    let at = bytes.len() - 8;
    bytes[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(raw.send(&bytes));
    match raw.reply_to(number).unwrap().reply() {
        Reply::Error { .. } => {}
        Reply::Bytes { data } => assert_eq!(data.len(), 5000),
        other => panic!("{other:?}"),
    };
    let wrong = RawFile {
        generation: Generation(odd.generation.0 + 7),
        fd: None,
        ..odd
    };
    assert!(
        raw.fault(&wrong, 0, 1).is_err(),
        "a generation that never was"
    );
    beside.finish("ranges that are no ranges");
}

#[test]
fn local_exports_that_are_not_for_this_guest() {
    let setup = Setup {
        allow: vec!["honest".into()],
        tables: "[[export]]\nname = \"free\"\npath = \"/usr/share\"\nmode = \"ro\"\n".into(),
        ..Setup::default()
    };
    let beside = Beside::start(&setup, |_| {});
    let mut raw = Raw::try_hello(&beside.socket(), "evil").unwrap();
    let came = raw.ask(&Request::Exports).unwrap();
    match came.reply() {
        Reply::Exports { names } => assert_eq!(names, b"free\0", "only what it may use is shown"),
        other => panic!("{other:?}"),
    }
    let not_mine = raw.refused(&Request::Attach { export: b"export" });
    let not_there = raw.refused(&Request::Attach { export: b"nothing" });
    assert!(
        [libc::EACCES, libc::ENOENT].contains(&not_mine),
        "{not_mine}"
    );
    assert!(
        [libc::EACCES, libc::ENOENT].contains(&not_there),
        "{not_there}"
    );
    let names: [&[u8]; 5] = [b"", b"..", b"/", b"export\0", &[0xff; 4096]];
    for export in names {
        raw.refused(&Request::Attach { export });
    }
    beside.finish("exports that are not for this guest");
}

#[test]
fn local_beginnings_that_are_none() {
    let beside = Beside::start(&Setup::default(), |_| {});
    let flags = HelloFlags::default();
    for version in [0, PROTOCOL_VERSION + 1, u16::MAX] {
        let mut raw = Raw::silent(&beside.socket());
        if let Some(came) = raw.ask(&Request::Hello {
            version,
            flags,
            name: b"",
            uuid: [0; 16],
        }) {
            assert!(
                came.errno().is_some(),
                "version {version}: {:?}",
                came.reply()
            );
        }
    }
    // Anything before Hello, and a second Hello.
    let mut raw = Raw::silent(&beside.socket());
    if let Some(came) = raw.ask(&Request::Attach { export: b"export" }) {
        assert!(came.errno().is_some(), "{:?}", came.reply());
    }
    let (mut raw, ..) = session(&beside);
    let again = Request::Hello {
        version: PROTOCOL_VERSION,
        flags,
        name: b"honest",
        uuid: [0; 16],
    };
    if let Some(came) = raw.ask(&again) {
        assert!(came.errno().is_some(), "{:?}", came.reply());
    }
    let long = "n".repeat(200);
    for name in ["a/b", "a b", "*", "new\nline", &long] {
        assert!(Raw::try_hello(&beside.socket(), name).is_err(), "{name:?}");
    }
    // Descriptors that nobody asked for never arrive.
    let before = beside.daemon.descriptors();
    let (raw, ..) = session(&beside);
    let null = std::fs::File::open("/dev/null").unwrap();
    for _ in 0..200 {
        if raw
            .channel
            .send(b"cpg1 with a present", Some(null.as_fd()))
            .is_err()
        {
            break;
        }
    }
    drop(raw);
    beside
        .daemon
        .descriptors_back_to(before.map(|count| count + 8));
    beside.finish("beginnings that are none");
}

#[test]
fn local_connections_that_say_nothing() {
    let beside = Beside::start(&Setup::default(), |_| {});
    let mut silent = Vec::new();
    let begin = Instant::now();
    while silent.len() < 400 && begin.elapsed() < 2 * SECOND {
        match copage_grants::channel::Channel::connect(&beside.socket()) {
            Ok(channel) => silent.push(channel),
            Err(_) => break,
        }
    }
    // Somebody honest gets in though the silent ones stay.
    let begin = Instant::now();
    let newcomer = std::thread::spawn({
        let socket = beside.socket();
        move || Raw::hello(&socket)
    });
    wait::until(15 * SECOND, "a newcomer's session", || {
        newcomer.is_finished()
    });
    let took = begin.elapsed();
    newcomer.join().unwrap();
    let count = silent.len();
    drop(silent);
    beside.finish(&format!(
        "{count} silent connections, a newcomer got in after {took:?}"
    ));
}
