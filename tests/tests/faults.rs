//! A backend whose n-th call fails, under a real daemon: the error reaches whoever caused it,
//! everybody else goes on, and afterwards ledger, tables and cache agree. In all of it the daemon's
//! use of the backend is watched: no page into a granted frame, no tail that is not zero.
//!
//! Cannot show: failures in the middle of a call (a backend's own tests have those), and a send that
//! fails: guests that do not read or hang up cause those in hostile_messages.rs and deaths.rs.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::Guest;
use copage_tests::orders::{Answer, Order};
use copage_tests::tree::{Tree, rewrite_in_place};
use std::os::unix::process::ExitStatusExt;

const PAGES: u64 = 256;

/// What one guest saw of a daemon that fails.
#[derive(Debug, Default)]
struct Seen {
    refused: u64,
    sigbus: u64,
}

/// Uses everything that the plan may hit; errors are allowed, wrong bytes are not.
fn exercise(tree: &Tree, daemon: &Daemon, seen: &mut Seen) {
    let map = Order::Map {
        export: "export".into(),
        path: "f".into(),
        private: false,
    };
    let pin = Order::Pin {
        export: "export".into(),
        path: "g".into(),
    };
    for round in 0..3 {
        let mut guest = Guest::connected(tree.root(), &daemon.socket(), "unlucky");
        for order in [&map, &pin] {
            let Some(answer) = guest.try_ask(order) else {
                panic!("{order:?} ended the guest")
            };
            let mapping = match answer {
                Answer::Mapped { mapping, .. } => mapping,
                Answer::Failed { errno, why } => {
                    assert!(errno != 0 && !why.is_empty(), "{errno}: {why:?}");
                    seen.refused += 1;
                    continue;
                }
                other => panic!("{other:?}"),
            };
            for page in (0..PAGES).step_by(37) {
                match guest.try_ask(&Order::Load { mapping, page }) {
                    Some(Answer::Page {
                        version: Some(_), ..
                    }) => {}
                    Some(other) => panic!("page {page}: {other:?}"),
                    // A refused page is SIGBUS for a plain load.
                    None => {
                        assert_eq!(guest.wait().signal(), Some(libc::SIGBUS));
                        seen.sigbus += 1;
                        guest = Guest::connected(tree.root(), &daemon.socket(), "unlucky");
                        break;
                    }
                }
            }
        }
        let read = Order::Read {
            export: "export".into(),
            path: "f".into(),
            offset: 0,
            len: 9000,
        };
        match guest.try_ask(&read).unwrap() {
            Answer::Bytes { bytes } => {
                assert_eq!(bytes, std::fs::read(tree.file("f")).unwrap()[..9000]);
            }
            Answer::Failed { errno, .. } if errno != 0 => seen.refused += 1,
            other => panic!("{other:?}"),
        }
        daemon.admin().reclaim(PAGES / 2);
        rewrite_in_place(&tree.file("f"), PAGES, round + 2);
    }
}

#[test]
fn local_every_call_fails_once() {
    let mut failed = 0;
    for call in [
        "open-home",
        "home-descriptor",
        "store",
        "load",
        "discard",
        "grant",
        "force-out",
    ] {
        let mut seen = Seen::default();
        for (nth, errno) in [("1", libc::EIO), ("3", libc::ENOSPC), ("4", 0)] {
            let tree = Tree::new();
            tree.pattern("f", PAGES);
            tree.pattern("g", PAGES);
            let fail = Some(format!("{call}:{nth}:{errno}"));
            let mut daemon = Daemon::start(
                &tree,
                &Setup {
                    fail,
                    ..Setup::default()
                },
            );
            exercise(&tree, &daemon, &mut seen);
            // The call has failed once; from here on everything is well.
            let mut lucky = Guest::connected(tree.root(), &daemon.socket(), "lucky");
            for path in ["f", "g"] {
                let (mapping, _) = lucky.map("export", path);
                for page in 0..PAGES {
                    let version = lucky.load(mapping, page);
                    assert_eq!(version, if path == "f" { 4 } else { 1 }, "{call}:{nth}");
                }
            }
            daemon.audit_clean();
            daemon.stop();
            failed += 1;
        }
        println!(
            "{call}: {} refused, {} by SIGBUS",
            seen.refused, seen.sigbus
        );
    }
    println!("{failed} plans");
}

#[test]
fn local_memory_for_frames_ends_and_comes_back() {
    // Every store fails from the fourth on: a full tmpfs.
    let tree = Tree::new();
    tree.pattern("f", PAGES);
    tree.pattern("g", PAGES);
    let fail = Some(format!("store:4+:{}", libc::ENOSPC));
    let mut daemon = Daemon::start(
        &tree,
        &Setup {
            fail,
            ..Setup::default()
        },
    );
    let mut seen = Seen::default();
    exercise(&tree, &daemon, &mut seen);
    assert!(seen.refused + seen.sigbus > 0, "nobody was told: {seen:?}");
    // Metadata, listing and attributes need no frames.
    let mut guest = Guest::connected(tree.root(), &daemon.socket(), "late");
    assert_eq!(guest.lost(), None);
    let order = Order::Pin {
        export: "export".into(),
        path: "g".into(),
    };
    let (errno, why) = guest.refused(&order);
    assert!(
        [libc::ENOMEM, libc::ENOSPC].contains(&errno),
        "{errno}: {why}"
    );
    daemon.audit_clean();
    daemon.stop();
}

#[test]
fn local_a_file_that_cannot_be_read_concerns_its_reader_only() {
    // A directory entry that is there and cannot be read is made by a size that lies: the file is
    // cut while the daemon holds pages of it, again and again, and short reads are no zeros.
    let tree = Tree::new();
    tree.pattern("f", PAGES);
    tree.pattern("g", PAGES);
    let setup = Setup {
        fail: Some(String::new()),
        ..Setup::default()
    };
    let mut daemon = Daemon::start(&tree, &setup);
    let mut beside = Guest::connected(tree.root(), &daemon.socket(), "beside");
    beside.map("export", "g");
    beside.ask(&Order::Watch { run_pages: 3 });
    for round in 0..20 {
        let mut guest = Guest::connected(tree.root(), &daemon.socket(), "reader");
        let (mapping, _) = guest.map("export", "f");
        let host = std::fs::File::options()
            .write(true)
            .open(tree.file("f"))
            .unwrap();
        host.set_len((PAGES / 2) * 4096).unwrap();
        drop(host);
        for page in (0..PAGES).step_by(16) {
            match guest.try_ask(&Order::Probe { mapping, page }).unwrap() {
                Answer::Page {
                    version: Some(_), ..
                }
                | Answer::Failed { .. } => {}
                other => panic!("round {round}, page {page}: {other:?}"),
            }
        }
        rewrite_in_place(&tree.file("f"), PAGES, round + 2);
    }
    let seen = beside.stop_watching();
    assert_eq!((seen.wrong, seen.backwards), (0, 0), "{seen:?}");
    daemon.audit_clean();
    daemon.stop();
}
