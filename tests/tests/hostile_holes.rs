//! A guest that maps its descriptor plainly and touches pages that nobody filled: the kernel then
//! puts pages of zeros into the frame file.
//!
//! Cannot show: that no zeros are ever seen by others while the attack goes on (see the ignored test);
//! shows that the daemon, its budget and its audit survive it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use copage_coherence::msg::OpenHow;
use copage_mmap::native::NativeMapping;
use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::Guest;
use copage_tests::raw::Raw;
use copage_tests::tree::Tree;

const PAGES: u64 = 512;

/// A hostile guest fills the holes of `f` with zeros.
fn attack(daemon: &Daemon) -> (Raw, NativeMapping) {
    let mut raw = Raw::try_hello(&daemon.socket(), "evil").unwrap();
    let file = raw.open("export", "f", OpenHow::Map);
    let home = std::fs::File::from(file.fd.unwrap());
    let mapping = NativeMapping::new(&home, true).unwrap();
    assert_eq!(mapping.as_volatile().to_vec().len() as u64, PAGES * 4096);
    (raw, mapping)
}

#[test]
fn local_holes_touched_plainly_do_not_harm_the_daemon() {
    let tree = Tree::new();
    tree.pattern("f", PAGES);
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let held = attack(&daemon);
    let mut other = Guest::connected(tree.root(), &daemon.socket(), "other");
    // By messages the bytes are right whatever is in the frame file.
    let order = copage_tests::orders::Order::Read {
        export: "export".into(),
        path: "f".into(),
        offset: 0,
        len: 65536,
    };
    match other.ask(&order) {
        copage_tests::orders::Answer::Bytes { bytes } => {
            assert_eq!(bytes, std::fs::read(tree.file("f")).unwrap()[..65536]);
        }
        other => panic!("{other:?}"),
    }
    drop(held);
    let audit = daemon.admin().audit();
    println!("the audit sees: {:?}", audit.checks);
    daemon.stop();
}

#[test]
#[ignore = "local cannot keep a hostile guest of the same share group from putting zeros into holes"]
fn local_others_see_right_bytes_though_holes_were_touched() {
    let tree = Tree::new();
    tree.pattern("f", PAGES);
    let daemon = Daemon::start(&tree, &Setup::default());
    let _held = attack(&daemon);
    let mut other = Guest::connected(tree.root(), &daemon.socket(), "other");
    let (mapping, _) = other.map("export", "f");
    for page in 0..PAGES {
        assert_eq!(other.load(mapping, page), 1, "page {page}");
    }
}
