//! Guests and daemons that die or stop, at any moment: what they held is drained, the others go on,
//! and nobody ever reads a wrong byte.
//!
//! Cannot show: every moment. The kills are at random times in guests that fault and pin all the
//! time, and are counted.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_tests::beside::Beside;
use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::Guest;
use copage_tests::orders::Order;
use copage_tests::tree::Tree;
use copage_tests::wait;
use copage_tests::watch::Draw;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
/// Of sessions: long enough for honest guests to renew it on a loaded machine.
const TERM_MS: u32 = 2000;
/// Kills in all.
const KILLS: u64 = 60;

#[test]
fn local_guests_are_killed_in_the_middle_of_everything() {
    let beside = Beside::start(
        &Setup {
            frames_mib: 8,
            ..Setup::default()
        },
        |tree| {
            for i in 0..8 {
                tree.pattern(&format!("f{i}"), 512);
            }
        },
    );
    let mut draw = Draw::new(7);
    for kill in 0..KILLS {
        let name = format!("victim{}", kill % 3);
        let mut victim = Guest::connected(beside.tree.root(), &beside.socket(), &name);
        let path = |i: u64| format!("f{i}");
        if kill % 2 == 0 {
            victim.map("export", &path(draw.below(8)));
            victim.ask(&Order::Watch {
                run_pages: 1 + draw.below(64),
            });
        } else {
            // Not waited for: the kill comes while the daemon fills and pins.
            for i in 0..8 {
                victim.tell(&Order::Pin {
                    export: "export".into(),
                    path: path(i),
                });
            }
        }
        std::thread::sleep(Duration::from_micros(draw.below(30_000)));
        assert_eq!(victim.kill().signal(), Some(libc::SIGKILL));
    }
    wait::until(10 * SECOND, "the dead to be drained", || {
        let stats = beside.daemon.admin().stats();
        stats.sessions == 1 && stats.frames_pinned == 0 && stats.frames_quarantined == 0
    });
    beside.finish(&format!("{KILLS} guests killed"));
}

fn stopped_past_its_term(force: bool) {
    let setup = Setup {
        force,
        lease_ttl_ms: TERM_MS,
        invalidate_deadline_ms: TERM_MS,
        ..Setup::default()
    };
    let beside = Beside::start(&setup, |tree| {
        tree.pattern("f", 64);
    });
    let mut sleeper = Guest::connected(beside.tree.root(), &beside.socket(), "sleeper");
    let (mapping, _) = sleeper.map("export", "f");
    for page in 0..64 {
        assert_eq!(sleeper.load(mapping, page), 1);
    }
    sleeper.stop();
    let took = wait::until(10 * SECOND, "the sleeper to be fenced", || {
        beside
            .daemon
            .admin()
            .guests()
            .iter()
            .all(|g| g.name != "sleeper" || g.lease_left_ms == 0)
    });
    assert!(
        took > Duration::from_millis(u64::from(TERM_MS) / 6),
        "fenced too early: {took:?}"
    );
    sleeper.resume();
    // The library notices; what it had mapped is SIGBUS from then on, never old bytes for long.
    wait::until(5 * SECOND, "the sleeper to notice", || {
        sleeper.lost().is_some()
    });
    // Calls fail at once; the mapping as soon as the library's worker has come to it, and then for good.
    wait::until(5 * SECOND, "its mapping to be SIGBUS", || {
        sleeper.probe(mapping, 0).is_err()
    });
    for page in 0..64 {
        assert!(
            sleeper.probe(mapping, page).is_err(),
            "page {page} of a lost session can be read"
        );
    }
    // It may connect again.
    sleeper.ask(&Order::Disconnect);
    sleeper.connect(&beside.socket());
    let (mapping, _) = sleeper.map("export", "f");
    assert_eq!(sleeper.load(mapping, 63), 1);
    drop(sleeper);
    beside.finish(&format!(
        "stopped past its term, force {force}, fenced after {took:?}"
    ));
}

#[test]
fn local_a_guest_stopped_past_its_term_is_fenced() {
    stopped_past_its_term(true);
    stopped_past_its_term(false);
}

#[test]
fn local_a_stopped_guest_cannot_read_what_was_taken_by_force() {
    // As it wakes up, before its library has run: the pages are gone from its page tables.
    let setup = Setup {
        lease_ttl_ms: TERM_MS,
        ..Setup::default()
    };
    let tree = Tree::new();
    tree.pattern("f", 64);
    let mut daemon = Daemon::start(&tree, &setup);
    let mut sleeper = Guest::connected(tree.root(), &daemon.socket(), "sleeper");
    let (mapping, _) = sleeper.map("export", "f");
    for page in 0..64 {
        assert_eq!(sleeper.load(mapping, page), 1);
    }
    sleeper.stop();
    wait::until(10 * SECOND, "the fence", || {
        daemon.admin().guests().is_empty()
    });
    wait::until(5 * SECOND, "its frames to be taken", || {
        daemon.admin().stats().grants == 0
    });
    // A load is the first thing it does: SIGBUS, or the library is quicker and it is SIGBUS too.
    sleeper.tell(&Order::Load { mapping, page: 3 });
    sleeper.resume();
    sleeper.died_of_sigbus();
    daemon.audit_clean();
}

#[test]
fn local_the_daemon_dies_and_guests_that_do_not_wait_get_sigbus_never_wrong_bytes() {
    let tree = Tree::new();
    tree.pattern("f", 512);
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mut readers: Vec<Guest> = (0..4)
        .map(|i| {
            let mut guest = Guest::named(tree.root(), &format!("g{i}"));
            guest.reconnect_ms = 0;
            guest.connect(&daemon.socket());
            guest.map("export", "f");
            guest
        })
        .collect();
    // One that reads all the time, three that look afterwards.
    let (mut busy, mut idle) = (readers.remove(0), readers);
    busy.ask(&Order::Watch { run_pages: 1 });
    for guest in &mut idle {
        assert_eq!(guest.load(0, 7), 1);
    }
    std::thread::sleep(Duration::from_millis(200));
    daemon.kill();
    busy.died_of_sigbus();
    for guest in &mut idle {
        wait::until(5 * SECOND, "the loss to be noticed", || {
            guest.lost().is_some()
        });
        // The worker takes the mapping out after that.
        wait::until(5 * SECOND, "a page that was there to be SIGBUS", || {
            guest.probe(0, 7).is_err()
        });
        assert!(guest.probe(0, 300).is_err(), "a page that was not");
        let order = Order::Map {
            export: "export".into(),
            path: "f".into(),
            private: false,
        };
        let (errno, why) = guest.refused(&order);
        assert_eq!(errno, libc::ENOTCONN, "{why}");
    }
    // Another daemon in the same place; the same guests connect again.
    let mut again = Daemon::start(&tree, &Setup::default());
    for guest in &mut idle {
        guest.ask(&Order::Disconnect);
        guest.connect(&again.socket());
        let (mapping, _) = guest.map("export", "f");
        for page in [0, 7, 300, 511] {
            assert_eq!(guest.load(mapping, page), 1);
        }
    }
    again.audit_clean();
    let before = again.admin().stats().epoch;
    again.stop();
    let mut third = Daemon::start(&tree, &Setup::default());
    assert!(
        third.admin().stats().epoch > before,
        "epochs rise across daemons"
    );
    third.audit_clean();
}

#[test]
fn local_two_daemons_in_one_place_are_refused() {
    let tree = Tree::new();
    let mut first = Daemon::start(&tree, &Setup::default());
    let status = std::process::Command::new(copage_tests::guest::program("copage-test-daemon"))
        .arg(tree.at("copage.toml"))
        .status()
        .unwrap();
    assert!(!status.success());
    first.audit_clean();
}
