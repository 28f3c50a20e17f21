//! Too little of everything: a budget that everybody wants all of, a tmpfs that is full, a machine
//! without userfaultfd, a guest whose kernel faults are not served. Each gets an error in words or
//! waits; nobody gets wrong bytes.
//!
//! Cannot show: a machine that is out of memory altogether.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::{As, Guest};
use copage_tests::orders::{Answer, Order};
use copage_tests::tree::Tree;
use copage_tests::wait;
use std::time::Duration;

#[test]
fn local_a_mapped_file_four_times_the_budget() {
    // 16 MiB through 4 MiB of frames, twice, against the host's own bytes.
    let tree = Tree::new();
    let pages = 4096;
    let host = tree.pattern("large", pages);
    for force in [true, false] {
        let setup = Setup {
            frames_mib: 4,
            force,
            ..Setup::default()
        };
        let mut daemon = Daemon::start(&tree, &setup);
        let mut guest = Guest::connected(tree.root(), &daemon.socket(), "reader");
        let (mapping, bytes) = guest.map("export", "large");
        assert_eq!(bytes, pages * 4096);
        for _ in 0..2 {
            let with = host.to_str().unwrap().to_owned();
            match guest.ask(&Order::Compare { mapping, with }) {
                Answer::Compared {
                    bytes: compared,
                    differs_at: None,
                } => assert_eq!(compared, bytes),
                other => panic!("{other:?}"),
            }
            let stats = daemon.admin().stats();
            assert!(stats.frames_used <= stats.frames_max, "{stats:?}");
        }
        daemon.audit_clean();
        daemon.stop();
    }
}

#[test]
fn local_the_budget_shrinks_under_load_and_is_kept() {
    let tree = Tree::new();
    tree.pattern("f", 2048);
    let mut daemon = Daemon::start(
        &tree,
        &Setup {
            frames_mib: 16,
            ..Setup::default()
        },
    );
    let mut guests: Vec<Guest> = (0..3)
        .map(|i| {
            let mut guest = Guest::connected(tree.root(), &daemon.socket(), &format!("g{i}"));
            guest.map("export", "f");
            guest.ask(&Order::Watch { run_pages: 32 });
            guest
        })
        .collect();
    for mib in [8, 4, 16, 4, 5, 4] {
        daemon.admin().set_budget(mib);
        copage_tests::wait::until(
            std::time::Duration::from_secs(5),
            "the budget to be kept",
            || {
                let stats = daemon.admin().stats();
                stats.frames_max == mib * 256 && stats.frames_used <= stats.frames_max
            },
        );
    }
    for guest in &mut guests {
        let seen = guest.stop_watching();
        assert_eq!(
            (seen.wrong, seen.backwards),
            (0, 0),
            "{}: {seen:?}",
            guest.label
        );
    }
    daemon.audit_clean();
}

#[test]
fn local_without_userfaultfd_files_are_read_not_mapped() {
    let tree = Tree::new();
    let host = tree.pattern("f", 16);
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mut guest = Guest::spawn(
        tree.root(),
        "old",
        &As {
            named: true,
            ..As::default()
        },
    );
    match guest.ask(&guest.connect_order(&daemon.socket(), "none")) {
        Answer::Connected { full: false, .. } => {}
        other => panic!("{other:?}"),
    }
    let order = Order::Map {
        export: "export".into(),
        path: "f".into(),
        private: false,
    };
    let (errno, why) = guest.refused(&order);
    assert_eq!(errno, libc::EOPNOTSUPP, "{why}");
    assert!(why.contains("userfaultfd"), "{why}");
    let order = Order::Read {
        export: "export".into(),
        path: "f".into(),
        offset: 4096,
        len: 8192,
    };
    match guest.ask(&order) {
        Answer::Bytes { bytes } => assert_eq!(bytes, std::fs::read(host).unwrap()[4096..12288]),
        other => panic!("{other:?}"),
    }
    daemon.audit_clean();
}

#[test]
fn local_user_mode_faults_only() {
    let tree = Tree::new();
    tree.pattern("f", 600);
    let mut daemon = Daemon::start(
        &tree,
        &Setup {
            frames_mib: 4,
            ..Setup::default()
        },
    );
    let mut guest = Guest::spawn(
        tree.root(),
        "plain",
        &As {
            named: true,
            ..As::default()
        },
    );
    match guest.ask(&guest.connect_order(&daemon.socket(), "user-mode-only")) {
        Answer::Connected { full: false, .. } => {}
        other => panic!("{other:?}"),
    }
    let (mapping, _) = guest.map("export", "f");
    for page in 0..600 {
        assert_eq!(guest.load(mapping, page), 1);
    }
    // What is read ahead or in somebody's hands just then stays for once.
    wait::until(Duration::from_secs(5), "nothing to be held", || {
        daemon.admin().reclaim(1 << 20);
        daemon.admin().stats().grants == 0
    });
    // A system call on a page that is not there fails and does not hang; populated, it works.
    assert!(guest.probe(mapping, 3).is_err());
    guest.ask(&Order::Populate {
        mapping,
        first: 0,
        count: 64,
    });
    assert_eq!(guest.probe(mapping, 3), Ok(1));
    daemon.audit_clean();
}
