//! Coherent exports with real guests: processes that load and store through mappings, read and write by
//! messages, change lengths; and the host's file after it.
//!
//! Cannot show: that every order of operations is linearizable (histories do that), Xen, power failures.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::Guest;
use copage_tests::orders::{Answer, Order};
use copage_tests::tree::Tree;
use copage_tests::wait;
use std::os::unix::fs::FileExt;
use std::time::Duration;

const PAGE: u64 = 4096;

fn setup() -> Setup {
    Setup {
        coherent: true,
        ..Setup::default()
    }
}

fn zeros(tree: &Tree, name: &str, pages: u64) -> std::fs::File {
    let path = tree.file(name);
    std::fs::write(&path, vec![0; (pages * PAGE) as usize]).unwrap();
    std::fs::File::open(path).unwrap()
}

fn on_disk(file: &std::fs::File, offset: u64) -> u64 {
    let mut word = [0; 8];
    file.read_exact_at(&mut word, offset).unwrap();
    u64::from_ne_bytes(word)
}

fn guest(tree: &Tree, daemon: &Daemon, name: &str) -> Guest {
    Guest::connected(tree.root(), &daemon.socket(), name)
}

#[test]
fn local_coherent_one_stores_the_other_loads() {
    let tree = Tree::new();
    let disk = zeros(&tree, "f", 16);
    let mut daemon = Daemon::start(&tree, &setup());
    let mut a = guest(&tree, &daemon, "a");
    let mut b = guest(&tree, &daemon, "b");
    let file_a = a.open_written("export", "f");
    let file_b = b.open_written("export", "f");
    let map_a = a.map_file(file_a, true);
    let map_b = b.map_file(file_b, true);
    for round in 1..20 {
        for page in 0..4 {
            let offset = page * PAGE + 8 * round;
            assert_eq!(b.load_word(map_b, offset), 0);
            a.store_word(map_a, offset, round);
            assert_eq!(b.load_word(map_b, offset), round);
            // Whoever loads what another stored finds it on the disk.
            assert_eq!(on_disk(&disk, offset), round);
            b.store_word(map_b, offset, round + 1000);
            assert_eq!(a.load_word(map_a, offset), round + 1000);
        }
    }
    // Not released, not loaded by anybody: on the disk after a sync of whomever.
    a.store_word(map_a, 9 * PAGE, 77);
    b.sync(file_b);
    assert_eq!(on_disk(&disk, 9 * PAGE), 77);
    daemon.audit_clean();
}

#[test]
fn local_coherent_stores_reach_the_host_by_themselves() {
    let tree = Tree::new();
    let disk = zeros(&tree, "f", 4);
    let mut daemon = Daemon::start(&tree, &setup());
    let mut a = guest(&tree, &daemon, "a");
    let file = a.open_written("export", "f");
    let mapping = a.map_file(file, true);
    a.store_word(mapping, 0, 5);
    wait::until(Duration::from_secs(10), "write-back", || {
        on_disk(&disk, 0) == 5
    });
    // Once it is there it goes on.
    a.store_word(mapping, 8, 6);
    wait::until(Duration::from_secs(10), "write-back", || {
        on_disk(&disk, 8) == 6
    });
    daemon.audit_clean();
}

#[test]
fn local_coherent_messages_and_mappings_are_one_file() {
    let tree = Tree::new();
    let disk = zeros(&tree, "f", 8);
    let mut daemon = Daemon::start(&tree, &setup());
    let mut a = guest(&tree, &daemon, "a");
    let mut b = guest(&tree, &daemon, "b");
    let file_a = a.open_written("export", "f");
    let file_b = b.open_written("export", "f");
    let map_a = a.map_file(file_a, true);
    for word in 1..50 {
        b.ask(&Order::WriteAt {
            file: file_b,
            offset: 4096 - 16,
            bytes: [word, word, word, word].map(u64::to_ne_bytes).concat(),
        });
        assert_eq!(on_disk(&disk, 4096), word);
        assert_eq!(a.load_word(map_a, 4096 - 16), word);
        assert_eq!(a.load_word(map_a, 4096 + 8), word);
        a.store_word(map_a, 4096, word + 1);
        let order = Order::ReadAt {
            file: file_b,
            offset: 4096,
            len: 8,
        };
        match b.ask(&order) {
            Answer::Bytes { bytes } => assert_eq!(bytes, (word + 1).to_ne_bytes()),
            other => panic!("{other:?}"),
        }
    }
    daemon.audit_clean();
}

#[test]
fn local_coherent_lengths_are_everybodys() {
    let tree = Tree::new();
    zeros(&tree, "f", 4);
    let mut daemon = Daemon::start(&tree, &setup());
    let mut a = guest(&tree, &daemon, "a");
    let mut b = guest(&tree, &daemon, "b");
    let file_a = a.open_written("export", "f");
    let file_b = b.open_written("export", "f");
    let map_b = b.map_file(file_b, true);
    for page in 0..4 {
        b.store_word(map_b, page * PAGE, 9);
    }
    a.ask(&Order::SetLen {
        file: file_a,
        bytes: PAGE + 8,
    });
    assert_eq!(b.load_word(map_b, 0), 9);
    assert_eq!(b.load_word(map_b, PAGE), 9);
    assert_eq!(std::fs::metadata(tree.file("f")).unwrap().len(), PAGE + 8);
    a.ask(&Order::SetLen {
        file: file_a,
        bytes: 4 * PAGE,
    });
    assert_eq!(b.load_word(map_b, 3 * PAGE), 0);
    b.store_word(map_b, 3 * PAGE, 4);
    let map_a = a.map_file(file_a, false);
    assert_eq!(a.load_word(map_a, 3 * PAGE), 4);
    daemon.audit_clean();
}

#[test]
fn local_coherent_a_stopped_writer_is_fenced_and_its_stores_are_there() {
    let tree = Tree::new();
    let disk = zeros(&tree, "f", 4);
    let mut daemon = Daemon::start(
        &tree,
        &Setup {
            lease_ttl_ms: 2000,
            invalidate_deadline_ms: 2000,
            ..setup()
        },
    );
    let mut a = guest(&tree, &daemon, "a");
    let mut b = guest(&tree, &daemon, "b");
    let file_a = a.open_written("export", "f");
    let file_b = b.open_written("export", "f");
    let map_a = a.map_file(file_a, true);
    let map_b = b.map_file(file_b, true);
    a.store_word(map_a, 0, 1);
    assert_eq!(b.load_word(map_b, PAGE), 0);
    a.stop();
    assert_eq!(b.load_word(map_b, 0), 1);
    b.store_word(map_b, 0, 2);
    b.sync(file_b);
    assert_eq!(on_disk(&disk, 0), 2);
    let stats = daemon.admin().stats();
    assert!(stats.strict.rehomes >= 1, "{:?}", stats.strict);
    drop(a);
    daemon.audit_clean();
}
