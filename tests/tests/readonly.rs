//! Read-only cannot be undone: what a guest gets of the daemon's frames it cannot write to, by any
//! way through the descriptor, its mappings or the daemon's process; as the daemon's own user where
//! the frame files' mount stands against it, and as another.
//!
//! Cannot show: that there is no other way. mprotect is tried by the backend's own tests (it takes
//! unsafe code). Guests of root's own uid could unload the whole machine: of them only what goes
//! through the descriptor is asked.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_coherence::msg::OpenHow;
use copage_tests::attack::{self, Tried};
use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::{As, Guest, OTHER_UID, program_for_everybody};
use copage_tests::needs;
use copage_tests::orders::{Answer, Order};
use copage_tests::raw::Raw;
use copage_tests::tree::Tree;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

fn all_refused(who: &str, tried: &[Tried]) {
    assert!(tried.len() >= 5, "{who}: {tried:?}");
    for one in tried {
        assert!(one.refused.is_some(), "{who}: {} was not refused", one.what);
    }
}

/// Attacks a descriptor in a process of user `uid` that got it as its standard input.
fn attack_as(uid: u32, dir: &Path, fd: OwnedFd) -> Vec<Tried> {
    let output = Command::new(program_for_everybody("copage-test-guest", dir))
        .arg("attack")
        .stdin(Stdio::from(fd))
        .uid(uid)
        .gid(uid)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn local_descriptors_cannot_be_made_to_write() {
    if !needs::root() {
        return;
    }
    let tree = Tree::new();
    tree.pattern("f", 64);
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mut reader = Guest::connected(tree.root(), &daemon.socket(), "reader");
    let (mapping, _) = reader.map("export", "f");
    for how in [OpenHow::Map, OpenHow::Pin] {
        let mut raw = Raw::try_hello(&daemon.socket(), "evil").unwrap();
        let file = raw.open("export", "f", how);
        if how == OpenHow::Map {
            raw.fault(&file, 0, 64).unwrap();
        }
        let fd = file.fd.unwrap();
        all_refused("the daemon's own user", &attack::descriptor(&fd));
        all_refused("another user", &attack_as(OTHER_UID, tree.root(), fd));
        for page in 0..64 {
            assert_eq!(reader.load(mapping, page), 1);
        }
    }
    daemon.audit_clean();
}

#[test]
fn local_pokes_into_a_mapping_stay_with_who_poked() {
    let tree = Tree::new();
    let host = tree.pattern("f", 16);
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mut reader = Guest::connected(tree.root(), &daemon.socket(), "reader");
    let mut evil = Guest::connected(tree.root(), &daemon.socket(), "evil");
    let (mapping, _) = reader.map("export", "f");
    let (own, _) = evil.map("export", "f");
    for page in 0..16 {
        assert_eq!(evil.load(own, page), 1);
    }
    // The kernel lets a process write to its own private mappings through /proc/self/mem, read-only
    // ones too: it gets copies.
    for page in 0..8 {
        let _ = evil.try_ask(&Order::Poke { mapping: own, page }).unwrap();
    }
    for page in 0..16 {
        assert_eq!(reader.load(mapping, page), 1, "page {page}");
    }
    let with = host.to_str().unwrap().to_owned();
    match reader.ask(&Order::Compare { mapping, with }) {
        Answer::Compared {
            differs_at: None, ..
        } => {}
        other => panic!("{other:?}"),
    }
    daemon.audit_clean();
}

#[test]
fn local_the_daemon_cannot_be_opened_by_guests() {
    if !needs::root() {
        return;
    }
    let tree = Tree::new();
    tree.pattern("f", 16);
    let daemon = Daemon::start(&tree, &Setup::default());
    // This process is root and may open what it likes: another user tries.
    let output = Command::new(program_for_everybody("copage-test-guest", tree.root()))
        .args(["attack-process", &daemon.pid().to_string()])
        .uid(OTHER_UID)
        .gid(OTHER_UID)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let tried: Vec<Tried> = serde_json::from_slice(&output.stdout).unwrap();
    all_refused("another user", &tried);
}

#[test]
fn local_a_guest_of_another_user_reads_and_is_told_that_it_is_contained() {
    if !needs::root() {
        return;
    }
    let tree = Tree::new();
    tree.pattern("f", 64);
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mut guest = Guest::spawn(
        tree.root(),
        "other",
        &As {
            uid: Some(OTHER_UID),
            ..As::default()
        },
    );
    match guest.ask(&guest.connect_order(&daemon.socket(), "best")) {
        Answer::Connected {
            read_only_enforced,
            name,
            ..
        } => {
            assert!(read_only_enforced);
            assert_eq!(name, format!("uid-{OTHER_UID}"));
        }
        other => panic!("{other:?}"),
    }
    let (mapping, _) = guest.map("export", "f");
    for page in 0..64 {
        assert_eq!(guest.load(mapping, page), 1);
    }
    let (errno, why) = {
        let mut liar = Guest::spawn(
            tree.root(),
            "liar",
            &As {
                uid: Some(OTHER_UID),
                named: true,
            },
        );
        // Without [[guest]] in the configuration a stranger is its uid whatever it says.
        match liar
            .try_ask(&liar.connect_order(&daemon.socket(), "best"))
            .unwrap()
        {
            Answer::Connected { name, .. } => (0, name),
            Answer::Failed { errno, why } => (errno, why),
            other => panic!("{other:?}"),
        }
    };
    assert!(
        errno == libc::EACCES || why == format!("uid-{OTHER_UID}"),
        "{errno}: {why}"
    );
    daemon.audit_clean();
}
