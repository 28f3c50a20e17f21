//! A guest that maps its descriptor plainly and touches pages that nobody filled: the kernel then
//! puts pages of zeros into that frame file. Guests of other users have frame files of their own,
//! and see right bytes all along.
//!
//! Cannot show: anything for guests of the same user, who share the frame file: they can write to
//! each other's memory anyway.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::{Guest, OTHER_UID};
use copage_tests::mute::Mute;
use copage_tests::needs;
use copage_tests::tree::Tree;

const PAGES: u64 = 512;

#[test]
fn local_others_see_right_bytes_though_holes_were_touched() {
    if !needs::root() {
        return;
    }
    let tree = Tree::new();
    tree.pattern("f", PAGES);
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mut before = Guest::connected(tree.root(), &daemon.socket(), "before");
    let (mapping, _) = before.map("export", "f");
    assert_eq!(before.load(mapping, 3), 1);
    let mut evil = Mute::start_as(OTHER_UID, tree.root(), &daemon.socket(), "f", "holes");
    for page in 0..PAGES {
        assert_eq!(before.load(mapping, page), 1, "page {page}");
    }
    let mut after = Guest::connected(tree.root(), &daemon.socket(), "after");
    let (mapping, _) = after.map("export", "f");
    for page in 0..PAGES {
        assert_eq!(after.load(mapping, page), 1, "page {page}");
    }
    // Not more than its file was long, and gone with it.
    let audit = daemon.admin().audit();
    println!("while zeros are there the audit says: {:?}", audit.checks);
    evil.kill();
    drop((before, after));
    daemon.admin().reclaim(1 << 20);
    let mut last = Guest::connected(tree.root(), &daemon.socket(), "last");
    let (mapping, _) = last.map("export", "f");
    assert_eq!(last.load(mapping, 100), 1);
    daemon.stop();
}
