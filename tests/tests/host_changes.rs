//! The host changes files below an export while guests have them mapped: in place, by renaming,
//! shorter, longer, deleted; many times under readers. Readers never see a torn page or an older
//! version than before, and see the new one within a bound.
//!
//! Cannot show: coherence with stores that a host program makes through a mapping of its own: the
//! kernel tells nobody, and the last test holds that to what is documented (the file is marked
//! host-bounded). Nor file systems other than that of the temporary directory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage::demo::pattern;
use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::Guest;
use copage_tests::orders::{Answer, Order};
use copage_tests::tree::{Tree, replace, rewrite_in_place};
use copage_tests::wait;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const PAGES: u64 = 64;
/// Within this the guests see what the host wrote. The host's writer is let go at once with force;
/// without, when the guests have let go; then faults wait at most host_settle_ms.
const SEEN_WITHIN: Duration = Duration::from_secs(3);

fn start(force: bool) -> (Tree, Daemon, Guest) {
    let tree = Tree::new();
    tree.pattern("f", PAGES);
    let daemon = Daemon::start(
        &tree,
        &Setup {
            force,
            ..Setup::default()
        },
    );
    let guest = Guest::connected(tree.root(), &daemon.socket(), "reader");
    (tree, daemon, guest)
}

fn generation(guest: &mut Guest, mapping: usize) -> (u32, u64, bool) {
    match guest.ask(&Order::Generation { mapping }) {
        Answer::Generation {
            generation,
            bytes,
            host_bounded,
        } => (generation, bytes, host_bounded),
        other => panic!("{other:?}"),
    }
}

fn rewritten_in_place(force: bool) {
    let (tree, mut daemon, mut guest) = start(force);
    let (mapping, _) = guest.map("export", "f");
    for page in 0..PAGES {
        assert_eq!(guest.load(mapping, page), 1);
    }
    rewrite_in_place(&tree.file("f"), PAGES, 2);
    let mut seen = 1;
    let took = wait::until(SEEN_WITHIN, "the new version", || {
        let version = guest.load(mapping, 5);
        assert!(version >= seen, "backwards: {version} after {seen}");
        seen = version;
        version == 2
    });
    for page in 0..PAGES {
        wait::until(SEEN_WITHIN, "the new version of every page", || {
            guest.load(mapping, page) == 2
        });
    }
    println!("rewritten in place, force {force}: seen after {took:?}");
    daemon.audit_clean();
}

#[test]
fn local_a_file_is_rewritten_in_place() {
    rewritten_in_place(true);
    rewritten_in_place(false);
}

#[test]
fn local_a_file_is_replaced_by_another_of_its_name() {
    let (tree, mut daemon, mut guest) = start(true);
    let (old, _) = guest.map("export", "f");
    assert_eq!(guest.load(old, 0), 1);
    replace(&tree.file("f"), PAGES, 2);
    // As everywhere: what is open stays the old file, its pages never seen before too; the name is
    // the new one.
    for page in 0..PAGES {
        assert_eq!(guest.load(old, page), 1);
    }
    let (new, _) = guest.map("export", "f");
    for page in 0..PAGES {
        assert_eq!(guest.load(new, page), 2);
    }
    daemon.admin().reclaim(PAGES * 2);
    assert_eq!((guest.load(old, 3), guest.load(new, 3)), (1, 2));
    daemon.audit_clean();
}

#[test]
fn local_a_deleted_file_lives_on_for_who_has_it_mapped() {
    let (tree, mut daemon, mut guest) = start(true);
    let (mapping, _) = guest.map("export", "f");
    assert_eq!(guest.load(mapping, 0), 1);
    std::fs::remove_file(tree.file("f")).unwrap();
    daemon.admin().reclaim(PAGES);
    for page in 0..PAGES {
        assert_eq!(guest.load(mapping, page), 1);
    }
    let order = Order::Map {
        export: "export".into(),
        path: "f".into(),
        private: false,
    };
    assert_eq!(guest.refused(&order).0, libc::ENOENT);
    daemon.audit_clean();
}

fn shrunk(force: bool) {
    let (tree, mut daemon, mut guest) = start(force);
    let (mapping, _) = guest.map("export", "f");
    for page in 0..PAGES {
        assert_eq!(guest.load(mapping, page), 1);
    }
    let host = std::fs::File::options()
        .write(true)
        .open(tree.file("f"))
        .unwrap();
    let half = PAGES / 2;
    host.set_len(half * 4096 + 100).unwrap();
    drop(host);
    wait::until(SEEN_WITHIN, "the end to be where it is now", || {
        guest.probe(mapping, PAGES - 1).is_err()
    });
    for page in 0..half {
        assert_eq!(guest.load(mapping, page), 1);
    }
    // The page that holds the end: the old bytes, then zeros.
    match guest.ask(&Order::Load {
        mapping,
        page: half,
    }) {
        Answer::Page {
            version: None,
            zero: false,
        } => {}
        other => panic!("{other:?}"),
    }
    let (_, bytes, _) = generation(&mut guest, mapping);
    assert_eq!(bytes, half * 4096 + 100);
    // A load past the end is SIGBUS, as with any file.
    guest.tell(&Order::Load {
        mapping,
        page: half + 1,
    });
    guest.died_of_sigbus();
    daemon.audit_clean();
}

#[test]
fn local_a_file_is_shrunk_under_a_mapping() {
    shrunk(true);
    shrunk(false);
}

#[test]
fn local_a_file_grows_under_a_mapping() {
    let (tree, mut daemon, mut guest) = start(true);
    std::fs::write(tree.file("f"), &pattern::file(PAGES, 1)[..10 * 4096 + 5]).unwrap();
    let (short, bytes) = guest.map("export", "f");
    assert_eq!(bytes, 10 * 4096 + 5);
    assert_eq!(guest.load(short, 9), 1);
    let whole = pattern::file(PAGES, 1);
    let mut host = std::fs::File::options()
        .append(true)
        .open(tree.file("f"))
        .unwrap();
    host.write_all(&whole[10 * 4096 + 5..]).unwrap();
    drop(host);
    // The last page's tail becomes bytes. The mapping ends within the page, and so do its plain
    // loads; the page is there as a whole all the same.
    wait::until(SEEN_WITHIN, "the appended bytes", || {
        // Only a full userfaultfd brings a page for a probe.
        let (first, count) = (10, 1);
        guest.ask(&Order::Populate {
            mapping: short,
            first,
            count,
        });
        let order = Order::Probe {
            mapping: short,
            page: 10,
        };
        matches!(
            guest.try_ask(&order),
            Some(Answer::Page {
                version: Some(1),
                ..
            })
        )
    });
    let (long, bytes) = guest.map("export", "f");
    assert_eq!(bytes, PAGES * 4096);
    for page in 0..PAGES {
        assert_eq!(guest.load(long, page), 1);
    }
    daemon.audit_clean();
}

#[test]
fn local_many_rewrites_under_readers() {
    for force in [true, false] {
        let (tree, mut daemon, first) = start(force);
        let mut guests = vec![first];
        for i in 0..3 {
            guests.push(Guest::connected(
                tree.root(),
                &daemon.socket(),
                &format!("g{i}"),
            ));
        }
        for guest in &mut guests {
            guest.map("export", "f");
            guest.ask(&Order::Watch { run_pages: 4 });
        }
        let rewrites = if force { 60 } else { 25 };
        let begin = Instant::now();
        for version in 2..rewrites + 2 {
            rewrite_in_place(&tree.file("f"), PAGES, version);
            std::thread::sleep(Duration::from_millis(20));
        }
        let took = begin.elapsed();
        for guest in &mut guests {
            wait::until(SEEN_WITHIN, "the last version", || {
                guest.look().newest == rewrites + 1
            });
            let seen = guest.stop_watching();
            assert_eq!(
                (seen.wrong, seen.backwards),
                (0, 0),
                "{}: {seen:?}",
                guest.label
            );
        }
        println!("{rewrites} rewrites under 4 readers, force {force}: {took:?}");
        daemon.audit_clean();
    }
}

#[test]
fn local_a_host_writer_that_stays_is_host_bounded() {
    let (tree, mut daemon, mut guest) = start(true);
    let writer = std::fs::File::options()
        .write(true)
        .open(tree.file("f"))
        .unwrap();
    let begin = Instant::now();
    let (mapping, _) = guest.map("export", "f");
    assert_eq!(guest.load(mapping, 0), 1);
    assert!(
        begin.elapsed() < SEEN_WITHIN,
        "a writer must not keep readers out"
    );
    assert!(
        generation(&mut guest, mapping).2,
        "the open says that the file is host-bounded"
    );
    let mut page = [0; 4096];
    for version in 2..6 {
        for index in 0..PAGES {
            pattern::fill(&mut page, index, version);
            writer.write_all_at(&page, index * 4096).unwrap();
        }
        wait::until(
            SEEN_WITHIN,
            "what the writer wrote, by notification",
            || (0..PAGES).all(|page| guest.load(mapping, page) == version),
        );
    }
    drop(writer);
    // Without the writer a new open is under a lease again.
    wait::until(SEEN_WITHIN, "the lease to come back", || {
        let (again, _) = guest.map("export", "f");
        guest.load(again, 0);
        !generation(&mut guest, again).2
    });
    daemon.audit_clean();
}

#[test]
fn local_stores_through_a_host_mapping_are_not_promised() {
    let (tree, mut daemon, mut guest) = start(true);
    // Mapped for writing by the host: no lease is to be had, and stores tell nobody.
    let host = std::fs::File::options()
        .read(true)
        .write(true)
        .open(tree.file("f"))
        .unwrap();
    let map = memmap2::MmapOptions::new().map_raw(&host).unwrap();
    drop(host);
    let (mapping, _) = guest.map("export", "f");
    assert_eq!(guest.load(mapping, 0), 1);
    assert!(
        generation(&mut guest, mapping).2,
        "the guest is told: host-bounded"
    );
    drop(map);
    daemon.audit_clean();
}
