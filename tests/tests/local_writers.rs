//! Guests that write one file and have bad luck: they want the same page all the time, are stopped, killed, or find
//! the disk full. What the others see, and what is on the disk.
//!
//! Cannot show: all orders of accesses (`local_histories`), guests that lie (`hostile_writers`), power failures.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::Guest;
use copage_tests::needs;
use copage_tests::orders::{Answer, Order};
use copage_tests::stamp;
use copage_tests::tree::Tree;
use copage_tests::wait;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const PAGE: u64 = 4096;
const SECOND: Duration = Duration::from_secs(1);

fn setup(force: bool) -> Setup {
    Setup {
        coherent: true,
        force,
        ..Setup::default()
    }
}

fn zeros(tree: &Tree, name: &str, pages: u64) -> PathBuf {
    let path = tree.file(name);
    std::fs::write(&path, vec![0; (pages * PAGE) as usize]).unwrap();
    path
}

fn on_disk(path: &Path, offset: u64) -> u64 {
    let mut word = [0; 8];
    let file = std::fs::File::open(path).unwrap();
    file.read_exact_at(&mut word, offset).unwrap();
    u64::from_ne_bytes(word)
}

fn guest(tree: &Tree, daemon: &Daemon, name: &str, path: &str) -> (Guest, usize, usize) {
    let mut guest = Guest::connected(tree.root(), &daemon.socket(), name);
    let file = guest.open_written("export", path);
    let mapping = guest.map_file(file, true);
    (guest, file, mapping)
}

fn count(guest: &mut Guest, mapping: usize, offset: u64) {
    guest.ask(&Order::Count {
        mapping,
        offset,
        times: 0,
    });
}

fn stopped(guest: &mut Guest) -> u64 {
    match guest.ask(&Order::StopCounting) {
        Answer::Word { value } => value,
        other => panic!("{other:?}"),
    }
}

#[test]
fn local_two_writers_and_a_reader_of_one_page_get_on() {
    for force in [true, false] {
        let tree = Tree::new();
        let path = zeros(&tree, "f", 2);
        let mut daemon = Daemon::start(&tree, &setup(force));
        let offsets = [8, 2048];
        let mut writers = ["a", "b"].map(|name| guest(&tree, &daemon, name, "f"));
        let mut reader = Guest::connected(tree.root(), &daemon.socket(), "reader");
        let (followed, _) = reader.map("export", "f");
        for ((writer, _, mapping), offset) in writers.iter_mut().zip(offsets) {
            count(writer, *mapping, offset);
        }
        reader.ask(&Order::Follow {
            mapping: followed,
            offsets: offsets.to_vec(),
        });
        // Nobody is left behind: in each part of the time each of them gets on.
        let mut before = [0; 2];
        for part in 0..4 {
            std::thread::sleep(SECOND);
            let seen = offsets.map(|offset| reader.load_word(followed, offset));
            let on = seen.iter().zip(before).all(|(now, before)| *now > before);
            assert!(on, "force {force}, part {part}: {before:?}, then {seen:?}");
            before = seen;
        }
        let risen = stopped(&mut reader);
        let ends = writers.each_mut().map(|(writer, ..)| stopped(writer));
        println!("force {force}: {ends:?} stores of two writers, a third saw {risen} of them");
        assert!(risen > 100, "the reader saw {risen}");
        for (offset, end) in offsets.into_iter().zip(ends) {
            assert_eq!(reader.load_word(followed, offset), end, "at {offset}");
            for (writer, _, mapping) in &mut writers {
                assert_eq!(writer.load_word(*mapping, offset), end, "at {offset}");
            }
        }
        let (writer, file, _) = &mut writers[0];
        writer.sync(*file);
        for (offset, end) in offsets.into_iter().zip(ends) {
            assert_eq!(on_disk(&path, offset), end, "on the disk at {offset}");
        }
        drop((writers, reader));
        daemon.audit_clean();
    }
}

#[test]
fn local_who_is_resumed_after_its_term_stores_to_nobodys_page() {
    for force in [true, false] {
        let tree = Tree::new();
        let path = zeros(&tree, "f", 4);
        let setup = Setup {
            lease_ttl_ms: 1000,
            invalidate_deadline_ms: 1000,
            ..setup(force)
        };
        let mut daemon = Daemon::start(&tree, &setup);
        let [mut busy, mut idle, mut other] =
            ["busy", "idle", "other"].map(|name| guest(&tree, &daemon, name, "f"));
        // One is stopped in the middle of storing, and goes on with that when it is resumed; the other when it is
        // told to.
        idle.0.store_word(idle.2, PAGE, 5);
        count(&mut busy.0, busy.2, 0);
        wait::until(5 * SECOND, "stores", || {
            other.0.sync(other.1);
            on_disk(&path, 0) > 0
        });
        busy.0.stop();
        idle.0.stop();
        std::thread::sleep(3 * SECOND);
        let snapshot = other.0.load_word(other.2, 0);
        assert!(snapshot > 0, "what it had stored by then is there");
        assert_eq!(other.0.load_word(other.2, PAGE), 5);
        busy.0.resume();
        idle.0.resume();
        wait::until(5 * SECOND, "it to say that it is lost", || {
            idle.0.lost().is_some()
        });
        println!("force {force}: {}", idle.0.lost().unwrap());
        idle.0.tell(&Order::StoreWord {
            mapping: idle.2,
            offset: PAGE,
            value: 6,
        });
        assert!(idle.0.hear().is_none(), "its store was let through");
        idle.0.died_of_sigbus();
        busy.0.died_of_sigbus();
        for _ in 0..20 {
            assert_eq!(other.0.load_word(other.2, 0), snapshot);
            assert_eq!(other.0.load_word(other.2, PAGE), 5);
            std::thread::sleep(Duration::from_millis(10));
        }
        other.0.sync(other.1);
        assert_eq!((on_disk(&path, 0), on_disk(&path, PAGE)), (snapshot, 5));
        drop((busy, idle, other));
        daemon.audit_clean();
    }
}

#[test]
fn local_of_a_killed_writer_each_page_is_as_it_was_at_one_moment_after_the_sync() {
    const PAGES: u64 = 8;
    for force in [true, false] {
        let tree = Tree::new();
        let mut daemon = Daemon::start(&tree, &setup(force));
        let mut later = 0;
        for round in 0..8_u64 {
            let name = format!("f{round}");
            let path = zeros(&tree, &name, PAGES);
            let (mut writer, file, mapping) = guest(&tree, &daemon, "w", &name);
            writer.ask(&Order::Stamp {
                mapping,
                pages: PAGES,
            });
            std::thread::sleep(Duration::from_millis(30));
            // What was there before the sync; the thread goes on.
            let synced: Vec<u64> = (0..PAGES)
                .map(|page| writer.load_word(mapping, page * PAGE + stamp::WORDS[1] as u64))
                .map(|word| stamp::read(word).unwrap())
                .collect();
            writer.sync(file);
            std::thread::sleep(Duration::from_micros(round * 3731));
            writer.kill();
            let check = |words: &dyn Fn(u64) -> u64, whose: &str, looked: bool| -> Vec<u64> {
                (0..PAGES)
                    .map(|page| {
                        let [first, last] = stamp::WORDS.map(|at| {
                            let word = words(page * PAGE + at as u64);
                            let number = stamp::read(word);
                            number.unwrap_or_else(|| panic!("{whose}: a torn word {word:#x}"))
                        });
                        assert!(
                            !looked || first == last || first == last + PAGES || last == 0,
                            "{whose}: page {page} has {first} and {last}: never so at one moment"
                        );
                        assert!(
                            first % PAGES == page || first == 0,
                            "{whose}: page {page} has {first}"
                        );
                        let before = synced[page as usize];
                        assert!(last >= before, "{whose}: {last}, but {before} was synced");
                        last
                    })
                    .collect()
            };
            // What a sync saved while the writer went on need not be of one moment; what is taken from it is.
            check(
                &|offset| on_disk(&path, offset),
                "the disk after the kill",
                false,
            );
            let (mut other, of_other, mapping) = guest(&tree, &daemon, "o", &name);
            let words = std::cell::RefCell::new(&mut other);
            let seen = check(
                &|offset| words.borrow_mut().load_word(mapping, offset),
                "another guest",
                true,
            );
            later += seen.iter().zip(&synced).filter(|(s, b)| s > b).count();
            other.sync(of_other);
            let kept = check(&|offset| on_disk(&path, offset), "the disk at last", true);
            assert_eq!(kept, seen, "what was seen is what is kept");
        }
        println!(
            "force {force}: of {} pages {later} were newer than the sync",
            8 * PAGES
        );
        daemon.audit_clean();
    }
}

/// A small file system of its own at a directory.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, kib: u64) -> Self {
        let size = format!("size={kib}k");
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(&at)
            .status();
        assert!(done.unwrap().success(), "a tmpfs at {at:?}");
        Self(at)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn local_a_full_disk_is_told_to_who_stores_and_harms_nobody_else() {
    if !needs::root() {
        return;
    }
    const ROOM: u64 = 64;
    const OLD: u64 = 16;
    let tree = Tree::new();
    let small = Small::mount(tree.at("export"), ROOM * 4);
    let old = zeros(&tree, "old", OLD);
    for page in 0..OLD {
        let file = std::fs::File::options().write(true).open(&old).unwrap();
        file.write_all_at(&(page + 1).to_ne_bytes(), page * PAGE)
            .unwrap();
    }
    let sparse = tree.file("sparse");
    std::fs::File::create(&sparse)
        .unwrap()
        .set_len(1000 * PAGE)
        .unwrap();
    let mut daemon = Daemon::start(&tree, &setup(true));
    let (mut other, others_file, of_other) = guest(&tree, &daemon, "other", "old");
    let (mut reader, _, of_reader) = guest(&tree, &daemon, "reader", "sparse");
    let (mut greedy, file, mapping) = guest(&tree, &daemon, "greedy", "sparse");
    other.store_word(of_other, 8, 1);
    // It stores to hole after hole, and syncs, until a store is refused: SIGBUS.
    let mut stored = 0;
    loop {
        assert!(stored < 1000, "more than the disk has");
        greedy.tell(&Order::StoreWord {
            mapping,
            offset: stored * PAGE,
            value: stored + 100,
        });
        match greedy.hear() {
            Some(_) => greedy.sync(file),
            None => break,
        }
        stored += 1;
    }
    greedy.died_of_sigbus();
    println!("{stored} pages of {ROOM} were stored to before the disk was full");
    assert!((8..ROOM).contains(&stored), "{stored}");
    // By message it is an error in words; what has room already can be written.
    let (mut next, next_file, of_next) = guest(&tree, &daemon, "next", "sparse");
    let write = |offset| Order::WriteAt {
        file: next_file,
        offset,
        bytes: 7_u64.to_ne_bytes().to_vec(),
    };
    let (errno, why) = next.refused(&write(999 * PAGE));
    assert_eq!(errno, libc::ENOSPC, "{why}");
    next.ask(&write(8));
    // All that was there is there, for everybody, and can be changed and synced.
    for page in 0..OLD {
        other.store_word(of_other, page * PAGE + 16, page);
        assert_eq!(other.load_word(of_other, page * PAGE), page + 1);
    }
    other.sync(others_file);
    for page in 0..stored {
        assert_eq!(reader.load_word(of_reader, page * PAGE), page + 100);
        assert_eq!(on_disk(&sparse, page * PAGE), page + 100);
    }
    assert_eq!(reader.load_word(of_reader, 999 * PAGE), 0, "a hole");
    for page in 0..OLD {
        assert_eq!(on_disk(&old, page * PAGE), page + 1);
        assert_eq!(on_disk(&old, page * PAGE + 16), page);
    }
    // With room again, the same store is let through.
    next.ask(&Order::SetLen {
        file: next_file,
        bytes: 4 * PAGE,
    });
    next.ask(&Order::SetLen {
        file: next_file,
        bytes: 1000 * PAGE,
    });
    next.ask(&write(999 * PAGE));
    next.store_word(of_next, 500 * PAGE, 3);
    next.sync(next_file);
    assert_eq!(
        (on_disk(&sparse, 999 * PAGE), on_disk(&sparse, 500 * PAGE)),
        (7, 3)
    );
    drop((other, reader, next));
    daemon.audit_clean();
    daemon.stop();
    drop(small);
}
