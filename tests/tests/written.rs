//! Files that guests write, as programs meet them: several guests in one page, several opens in one guest, the
//! mount beside them, and a daemon that is killed in the middle.
//!
//! Cannot show: every order of accesses (the histories), guests that lie, Xen.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

use copage_mmap::mount::{FORM_XATTR, Form, Options, Target, mount};
use copage_mmap::native::NativeMapping;
use copage_mmap::{ConnectOptions, DaemonAt};
use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::Guest;
use copage_tests::needs;
use copage_tests::orders::{Answer, Order};
use copage_tests::tree::Tree;
use copage_tests::wait;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

const PAGE: u64 = 4096;

fn setup(force: bool) -> Setup {
    Setup {
        coherent: true,
        force,
        ..Setup::default()
    }
}

fn zeros(tree: &Tree, pages: u64) -> File {
    let path = tree.file("f");
    fs::write(&path, vec![0; (pages * PAGE) as usize]).unwrap();
    File::open(path).unwrap()
}

fn word(disk: &File, offset: u64) -> u64 {
    let mut word = [0; 8];
    disk.read_exact_at(&mut word, offset).unwrap();
    u64::from_le_bytes(word)
}

fn count(guest: &mut Guest, mapping: usize, offset: u64) {
    guest.ask(&Order::Count {
        mapping,
        offset,
        times: 0,
    });
}

fn counted(guest: &mut Guest) -> u64 {
    match guest.ask(&Order::StopCounting) {
        Answer::Word { value } => value,
        other => panic!("{other:?}"),
    }
}

/// Each counts in words of its own, in pages that are everybody's, by two mappings of two opens.
#[test]
fn local_guests_that_count_in_the_same_pages_lose_nothing() {
    for force in [true, false] {
        let tree = Tree::new();
        let disk = zeros(&tree, 4);
        let mut daemon = Daemon::start(&tree, &setup(force));
        let mut guests: Vec<(Guest, [usize; 2], usize)> = (0..3)
            .map(|n| {
                let name = format!("g{n}");
                let mut guest = Guest::connected(tree.root(), &daemon.socket(), &name);
                let files = [(); 2].map(|()| guest.open_written("export", "f"));
                let maps = files.map(|file| guest.map_file(file, true));
                (guest, maps, files[0])
            })
            .collect();
        let offset = |guest: usize, map: usize| map as u64 * PAGE + 64 * guest as u64;
        for (n, (guest, maps, _)) in guests.iter_mut().enumerate() {
            for (m, mapping) in maps.iter().enumerate() {
                count(guest, *mapping, offset(n, m));
            }
        }
        std::thread::sleep(Duration::from_secs(2));
        let mut last = Vec::new();
        for (n, (guest, _, file)) in guests.iter_mut().enumerate() {
            // The last that began ends first.
            for m in [1, 0] {
                last.push((offset(n, m), counted(guest)));
            }
            guest.sync(*file);
        }
        for (offset, value) in last {
            assert!(value > 0, "nobody got on at {offset}");
            assert_eq!(word(&disk, offset), value, "on the disk at {offset}");
            for (guest, maps, _) in &mut guests {
                for mapping in maps {
                    assert_eq!(guest.load_word(*mapping, offset), value, "at {offset}");
                }
            }
        }
        drop(guests);
        daemon.audit_clean();
    }
}

/// Eight that never stop storing to one page, each in a word of its own: no store of anybody is lost, and
/// each gets on, in each of several rounds.
fn all_store_to_one_page(share: bool) {
    const GUESTS: u64 = 8;
    let tree = Tree::new();
    let disk = zeros(&tree, 1);
    let setup = Setup {
        more: format!("share_bounced = {share}"),
        ..setup(true)
    };
    let mut daemon = Daemon::start(&tree, &setup);
    let mut guests: Vec<(Guest, usize, usize)> = (0..GUESTS)
        .map(|n| {
            let name = format!("g{n}");
            let mut guest = Guest::connected(tree.root(), &daemon.socket(), &name);
            let file = guest.open_written("export", "f");
            let mapping = guest.map_file(file, true);
            (guest, file, mapping)
        })
        .collect();
    let mut last = [0; GUESTS as usize];
    for round in 0..3 {
        for ((guest, _, mapping), n) in guests.iter_mut().zip(0..) {
            count(guest, *mapping, 64 * n);
        }
        std::thread::sleep(Duration::from_secs(1));
        for ((guest, ..), last) in guests.iter_mut().zip(&mut last) {
            let value = counted(guest);
            assert!(value > *last, "somebody got nowhere in round {round}");
            *last = value;
        }
    }
    println!("share {share}: {last:?}");
    for (guest, file, _) in &mut guests {
        guest.sync(*file);
    }
    let offsets = || (0..).step_by(64).zip(last);
    for (offset, value) in offsets() {
        assert_eq!(word(&disk, offset), value, "on the disk at {offset}");
        for (guest, _, mapping) in &mut guests {
            assert_eq!(guest.load_word(*mapping, offset), value, "at {offset}");
        }
    }
    let shared = daemon.admin().stats().strict.granted_shared;
    assert_eq!(shared > 0, share, "shared {shared} times");
    drop(guests);
    daemon.audit_clean();
}

#[test]
fn local_all_store_to_one_page_by_turns() {
    all_store_to_one_page(false);
}

#[test]
fn local_all_store_to_one_page_at_once() {
    all_store_to_one_page(true);
}

#[test]
fn local_a_daemon_that_is_killed_keeps_what_was_synced_and_says_what_may_be_lost() {
    let tree = Tree::new();
    let disk = zeros(&tree, 4);
    let setup = Setup {
        lease_ttl_ms: 2000,
        ..setup(true)
    };
    let mut daemon = Daemon::start(&tree, &setup);
    let mut guest = Guest::connected(tree.root(), &daemon.socket(), "g");
    let file = guest.open_written("export", "f");
    let mapping = guest.map_file(file, true);
    for round in 1..4 {
        guest.store_word(mapping, 0, round);
        guest.sync(file);
        assert_eq!(word(&disk, 0), round);
        daemon.kill();
        daemon = Daemon::start(&tree, &setup);
        wait::until(Duration::from_secs(30), "the guest to return", || {
            guest.reconnects() == round
        });
        // It might have been stored to since.
        let (errno, why) = guest.refused(&Order::Sync { file });
        assert_eq!(errno, libc::EIO, "{why}");
        guest.sync(file);
        assert_eq!(guest.load_word(mapping, 0), round);
    }
    drop(guest);
    daemon.audit_clean();
}

#[test]
fn local_a_coherent_export_is_mounted_for_reading_and_writing() {
    if !needs::fuse() {
        return;
    }
    let tree = Tree::new();
    let disk = zeros(&tree, 4);
    let mut daemon = Daemon::start(&tree, &setup(true));
    let dir = tree.at("mnt");
    fs::create_dir_all(&dir).unwrap();
    let options = Options {
        target: Target {
            daemon: DaemonAt::Socket(daemon.socket()),
            connect: ConnectOptions::default(),
            export: "export".into(),
        },
        dir: dir.clone(),
        allow_other: true,
        nonempty: false,
        passthrough: true,
    };
    let mounted = mount(&options).unwrap();
    assert_eq!(mounted.form(), Form::Direct);
    let path = dir.join("f");
    let mut form = [0; 16];
    let len = rustix::fs::getxattr(&path, FORM_XATTR, &mut form[..]).unwrap();
    assert_eq!(&form[..len], b"direct");

    let mut guest = Guest::connected(tree.root(), &daemon.socket(), "g");
    let file = guest.open_written("export", "f");
    let mapping = guest.map_file(file, true);
    let held = File::options().read(true).write(true).open(&path).unwrap();
    for value in 1..20 {
        guest.store_word(mapping, 8, value);
        assert_eq!(word(&held, 8), value);
        held.write_all_at(&(value + 100).to_le_bytes(), 16).unwrap();
        assert_eq!(guest.load_word(mapping, 16), value + 100);
        assert_eq!(word(&disk, 16), value + 100);
    }
    held.sync_all().unwrap();
    assert_eq!(word(&disk, 8), 19);
    // Its length is everybody's.
    held.set_len(PAGE + 8).unwrap();
    let refused = guest.refused(&Order::LoadWord {
        mapping,
        offset: 2 * PAGE,
        probe: true,
    });
    assert_eq!(refused.0, libc::EFAULT);
    guest.ask(&Order::SetLen {
        file,
        bytes: 3 * PAGE,
    });
    assert_eq!(held.metadata().unwrap().len(), 3 * PAGE);
    let mut appended = File::options().append(true).open(&path).unwrap();
    std::io::Write::write_all(&mut appended, b"end").unwrap();
    assert_eq!(fs::metadata(tree.file("f")).unwrap().len(), 3 * PAGE + 3);
    assert_eq!(fs::read(&path).unwrap(), fs::read(tree.file("f")).unwrap());
    // What would be a lie is refused.
    let shared = NativeMapping::new(&held, false).unwrap_err();
    assert_eq!(shared.raw_os_error(), Some(libc::ENODEV));
    for error in [
        File::create(dir.join("new")).unwrap_err(),
        fs::remove_file(&path).unwrap_err(),
    ] {
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    }
    drop((held, appended, guest));
    mounted.unmount(false).unwrap();
    daemon.audit_clean();
}
