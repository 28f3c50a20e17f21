//! The daemon is killed or stopped and started again under guests that go on: nobody sees a wrong byte, an
//! older version or a SIGBUS, and what was open is open.
//!
//! Cannot show: every moment (the kills are at random times, and are counted), nor daemons of different
//! versions.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::Guest;
use copage_tests::orders::{Answer, Order};
use copage_tests::tree::{Tree, replace, rewrite_in_place};
use copage_tests::wait;
use copage_tests::watch::Draw;
use std::fs;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
const PAGES: u64 = 4096;
const KILLS: u64 = 10;

/// A budget of a quarter of the file: frames are used again all the time.
fn small() -> Setup {
    Setup {
        frames_mib: 4,
        ..Setup::default()
    }
}

/// Four readers, whose `run_pages` differ: some run into pages that were never there.
fn readers(tree: &Tree, daemon: &Daemon) -> Vec<Guest> {
    let start = |n: u64| {
        let mut guest = Guest::connected(tree.root(), &daemon.socket(), &format!("g{n}"));
        guest.map("export", "f");
        if n == 3 {
            guest.ask(&Order::Map {
                export: "export".into(),
                path: "f".into(),
                private: true,
            });
        }
        guest.ask(&Order::Watch {
            run_pages: 1 + 21 * n,
        });
        guest
    };
    (0..4).map(start).collect()
}

/// Waits until every reader has read with the daemon that is there.
fn all_go_on(readers: &mut [Guest], reconnects: u64) {
    for guest in readers {
        wait::until(20 * SECOND, "a guest to find the daemon", || {
            guest.reconnects() >= reconnects
        });
        let before = guest.look().pages;
        wait::until(20 * SECOND, "a guest to read on", || {
            guest.look().pages > before + 64
        });
    }
}

fn finish(mut readers: Vec<Guest>) -> u64 {
    let mut pages = 0;
    for guest in &mut readers {
        let seen = guest.stop_watching();
        assert_eq!((seen.wrong, seen.backwards), (0, 0), "{seen:?}");
        assert_eq!(guest.lost(), None);
        pages += seen.pages;
    }
    pages
}

#[test]
fn local_readers_go_on_through_ten_kills() {
    let tree = Tree::new();
    let path = tree.pattern("f", PAGES);
    let mut daemon = Daemon::start(&tree, &small());
    let mut guests = readers(&tree, &daemon);
    let (mut draw, mut version) = (Draw::new(3), 1);
    for kill in 1..=KILLS {
        std::thread::sleep(Duration::from_millis(draw.below(300)));
        daemon.kill();
        if kill % 3 == 0 {
            version += 1;
            rewrite_in_place(&path, PAGES, version);
        }
        std::thread::sleep(Duration::from_millis(draw.below(300)));
        daemon = Daemon::start(&tree, &small());
        all_go_on(&mut guests, kill);
        daemon.audit_clean();
    }
    // What changed while nobody was there is seen by all.
    for guest in &mut guests {
        wait::until(10 * SECOND, "the newest version", || {
            guest.look().newest == version
        });
    }
    let pages = finish(guests);
    println!("{KILLS} kills, {pages} pages read");
    daemon.audit_clean();
}

#[test]
fn local_readers_wait_for_a_daemon_that_is_away_for_longer_than_their_lease() {
    let setup = Setup {
        lease_ttl_ms: 1500,
        ..small()
    };
    let tree = Tree::new();
    tree.pattern("f", PAGES);
    let mut daemon = Daemon::start(&tree, &setup);
    let mut guests = readers(&tree, &daemon);
    for round in 1..=3 {
        all_go_on(&mut guests, round - 1);
        // Killed, then stopped with a word, then killed.
        if round == 2 {
            daemon.stop();
        } else {
            daemon.kill();
        }
        std::thread::sleep(2 * SECOND);
        let stuck: Vec<u64> = guests.iter_mut().map(|g| g.look().pages).collect();
        std::thread::sleep(SECOND / 4);
        let later: Vec<u64> = guests.iter_mut().map(|g| g.look().pages).collect();
        assert_eq!(stuck, later, "pages are read that nobody vouches for");
        daemon = Daemon::start(&tree, &setup);
    }
    all_go_on(&mut guests, 3);
    finish(guests);
    daemon.audit_clean();
}

#[test]
fn local_a_file_that_was_replaced_meanwhile_is_stale_and_others_go_on() {
    let tree = Tree::new();
    let path = tree.pattern("f", 64);
    tree.pattern("g", 64);
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mut guest = Guest::connected(tree.root(), &daemon.socket(), "guest");
    let (gone, _) = guest.map("export", "f");
    let (kept, _) = guest.map("export", "g");
    assert_eq!((guest.load(gone, 3), guest.load(kept, 3)), (1, 1));
    daemon.kill();
    // The old file's number must not be given to the new one.
    let _held = fs::File::open(&path).unwrap();
    replace(&path, 64, 2);
    daemon = Daemon::start(&tree, &Setup::default());
    wait::until(10 * SECOND, "the guest to find the daemon", || {
        guest.reconnects() == 1
    });
    assert_eq!(guest.load(kept, 5), 1);
    wait::until(10 * SECOND, "the end of the mapping", || {
        guest.probe(gone, 3).is_err()
    });
    match guest.ask(&Order::LastError { mapping: gone }) {
        Answer::Lost { why: Some(why) } => {
            assert!(why.contains("export/f is not the file"), "{why}")
        }
        other => panic!("{other:?}"),
    }
    let (anew, _) = guest.map("export", "f");
    assert_eq!(guest.load(anew, 3), 2);
    daemon.audit_clean();
}
