//! The mount, used by ordinary calls: what the exported directory holds is what the mount shows, on
//! shared frames where it says so, through changes, limits, deaths and unmounting.
//!
//! Cannot show: an unprivileged user's mount by fusermount3, which not every machine has (the form it
//! gives is tested with passthrough switched off); suspended machines; a kernel without passthrough.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

use copage_grants::PAGE_SIZE;
use copage_grants::sys::PageMap;
use copage_mmap::exec::text::{FileId, mappings};
use copage_mmap::mount::{
    Event, FORM_XATTR, Form, MountError, Mounted, Options, Target, mount, umount,
};
use copage_mmap::native::NativeMapping;
use copage_mmap::{Client, ConnectOptions, MapOptions, OpenHow};
use copage_tests::daemon::{Daemon, Setup};
use copage_tests::needs;
use copage_tests::tree::{Tree, replace};
use copage_tests::wait;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

fn target(daemon: &Daemon) -> Target {
    Target {
        daemon: copage_mmap::DaemonAt::Socket(daemon.socket()),
        connect: ConnectOptions::default(),
        export: "export".into(),
    }
}

fn options(tree: &Tree, daemon: &Daemon, name: &str) -> Options {
    let dir = tree.at(name);
    fs::create_dir_all(&dir).unwrap();
    Options {
        target: target(daemon),
        dir,
        allow_other: true,
        nonempty: false,
        passthrough: true,
    }
}

/// A mount at `name`, which must be on frames.
fn mounted(tree: &Tree, daemon: &Daemon, name: &str) -> Mounted {
    let mounted = mount(&options(tree, daemon, name)).unwrap();
    assert_eq!(
        mounted.form(),
        Form::Frames,
        "{:?}",
        mounted.why_page_cache()
    );
    mounted
}

/// Ends a mount that nothing uses any more.
fn end(mounted: &Mounted) {
    wait::until(
        Duration::from_secs(5),
        "a mount that is not in use",
        || match mounted.unmount(false) {
            Ok(()) => true,
            Err(MountError::Busy { .. }) => false,
            Err(e) => panic!("{e}"),
        },
    );
    match mounted.wait(None).unwrap() {
        Event::Ended(result) => result.unwrap(),
        other => panic!("{other:?}"),
    }
}

fn form(path: &Path) -> String {
    let mut buf = [0; 32];
    let len = rustix::fs::getxattr(path, FORM_XATTR, &mut buf[..]).unwrap();
    String::from_utf8_lossy(&buf[..len]).into_owned()
}

/// Everything below `dir` by path: kind, mode and content, or a link's target.
fn survey(dir: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(at) = todo.pop() {
        for entry in fs::read_dir(dir.join(&at)).unwrap() {
            let path = at.join(entry.unwrap().file_name());
            let full = dir.join(&path);
            let meta = fs::symlink_metadata(&full).unwrap();
            let content = if meta.is_dir() {
                todo.push(path.clone());
                Vec::new()
            } else if meta.is_symlink() {
                fs::read_link(&full)
                    .unwrap()
                    .as_os_str()
                    .as_bytes()
                    .to_vec()
            } else {
                assert_eq!(fs::read(&full).unwrap().len() as u64, meta.len());
                fs::read(&full).unwrap()
            };
            all.insert(path, (meta.mode(), content));
        }
    }
    all
}

/// All bytes of a mapping.
fn bytes(mapping: &NativeMapping) -> Vec<u8> {
    mapping.as_volatile().to_vec()
}

fn mixed_tree() -> Tree {
    let tree = Tree::new();
    for (name, len) in [
        ("empty", 0),
        ("one", 1),
        ("page", 4096),
        ("tail", 4097),
        ("many", 700_001),
    ] {
        let content: Vec<u8> = (0..len)
            .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        fs::write(tree.file(name), content).unwrap();
    }
    fs::create_dir_all(tree.file("a/b/c")).unwrap();
    fs::write(tree.file("a/b/c/deep"), b"deep").unwrap();
    symlink("../many", tree.file("a/link")).unwrap();
    symlink("/nowhere", tree.file("dangling")).unwrap();
    fs::hard_link(tree.file("one"), tree.file("a/one too")).unwrap();
    fs::write(
        tree.file("a").join(OsStr::from_bytes(b"\xff\xfe \n\x01")),
        b"odd",
    )
    .unwrap();
    fs::set_permissions(tree.file("tail"), fs::Permissions::from_mode(0o751)).unwrap();
    for number in 0..500 {
        fs::write(
            tree.file("a/b").join(format!("file {number:03}")),
            format!("{number}"),
        )
        .unwrap();
    }
    tree
}

#[test]
fn local_a_mount_shows_what_the_directory_holds() {
    if !needs::fuse() {
        return;
    }
    let tree = mixed_tree();
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mounted = mounted(&tree, &daemon, "mnt");
    let dir = mounted.dir();
    assert_eq!(survey(dir), survey(&tree.at("export")));
    assert_eq!(
        fs::read(dir.join("a/link")).unwrap(),
        fs::read(tree.file("many")).unwrap()
    );
    let (one, too) = (
        dir.join("one").metadata().unwrap(),
        dir.join("a/one too").metadata().unwrap(),
    );
    assert_eq!((one.ino(), one.nlink()), (too.ino(), 2));
    for name in ["one", "page", "tail", "many"] {
        let file = File::open(dir.join(name)).unwrap();
        let mapping = NativeMapping::new(&file, false).unwrap();
        assert_eq!(
            bytes(&mapping),
            fs::read(tree.file(name)).unwrap(),
            "{name}"
        );
        assert_eq!(form(&dir.join(name)), "frames");
    }
    // Nobody writes.
    let refused = File::options()
        .write(true)
        .open(dir.join("one"))
        .unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    assert_eq!(
        fs::create_dir(dir.join("new")).unwrap_err().raw_os_error(),
        Some(libc::EROFS)
    );
    assert_eq!(
        File::open(dir.join("none")).unwrap_err().raw_os_error(),
        Some(libc::ENOENT)
    );
    let statfs = rustix::fs::statvfs(dir).unwrap();
    assert!(statfs.f_blocks > 0 && statfs.f_namemax == 255);
    end(&mounted);
    assert!(fs::read_dir(tree.at("mnt")).unwrap().next().is_none());
    daemon.audit_clean();
}

#[test]
fn local_extended_attributes_are_shown() {
    if !needs::fuse() {
        return;
    }
    let tree = mixed_tree();
    let set = rustix::fs::XattrFlags::empty();
    if rustix::fs::setxattr(tree.file("one"), "user.colour", b"green", set).is_err() {
        eprintln!("left out: the directory for tests takes no extended attributes");
        return;
    }
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mounted = mounted(&tree, &daemon, "mnt");
    let path = mounted.dir().join("one");
    let mut buf = [0; 64];
    let len = rustix::fs::getxattr(&path, "user.colour", &mut buf[..]).unwrap();
    assert_eq!(&buf[..len], b"green");
    let len = rustix::fs::listxattr(&path, &mut buf[..]).unwrap();
    let list: Vec<_> = buf[..len].split(|&b| b == 0).collect();
    // The form is answered and not listed: copying tools read what is listed.
    assert!(list.contains(&&b"user.colour"[..]) && !list.contains(&FORM_XATTR.as_bytes()));
    let none = rustix::fs::getxattr(&path, "user.none", &mut buf[..]).unwrap_err();
    assert_eq!(none, rustix::io::Errno::NODATA);
    let small = rustix::fs::getxattr(&path, "user.colour", &mut buf[..2]).unwrap_err();
    assert_eq!(small, rustix::io::Errno::RANGE);
    end(&mounted);
    daemon.audit_clean();
}

/// The physical frame behind `address` of this process.
fn frame(address: usize) -> u64 {
    PageMap::own()
        .unwrap()
        .entry(address)
        .unwrap()
        .frame_number()
        .expect("present, and root")
}

#[test]
fn local_two_mounts_and_a_library_mapping_are_the_same_frames() {
    if !needs::fuse() {
        return;
    }
    let tree = Tree::new();
    tree.pattern("f", 600);
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let (first, second) = (mounted(&tree, &daemon, "m1"), mounted(&tree, &daemon, "m2"));
    let maps = [&first, &second].map(|mounted| {
        let file = File::open(mounted.dir().join("f")).unwrap();
        NativeMapping::new(&file, true).unwrap()
    });
    let client = Client::connect(&daemon.socket(), &ConnectOptions::default()).unwrap();
    let file = client
        .attach("export")
        .unwrap()
        .open("f", OpenHow::Map)
        .unwrap();
    let mapping = file.map(&MapOptions::shared()).unwrap();
    mapping.populate(0..mapping.len()).unwrap();
    assert_eq!(bytes(&maps[0]), fs::read(tree.file("f")).unwrap());
    for page in [0, 1, 311, 599] {
        let library = frame(mapping.as_ptr().addr() + page * PAGE_SIZE);
        for map in &maps {
            assert!(map.as_volatile().read_u8(page * PAGE_SIZE).is_some());
            assert_eq!(
                frame(map.address() + page * PAGE_SIZE),
                library,
                "page {page}"
            );
        }
    }
    drop((maps, mapping, file, client));
    end(&first);
    // The other is not touched by the end of the one.
    assert_eq!(
        fs::read(second.dir().join("f")).unwrap(),
        fs::read(tree.file("f")).unwrap()
    );
    end(&second);
    daemon.audit_clean();
}

#[test]
fn local_a_program_runs_from_a_mount_on_frames() {
    if !needs::fuse() {
        return;
    }
    let tree = Tree::new();
    fs::copy("/bin/sleep", tree.file("sleep")).unwrap();
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mounted = mounted(&tree, &daemon, "mnt");
    let program = mounted.dir().join("sleep");
    let mut child = Command::new(&program).arg("30").spawn().unwrap();
    let native = FileId::of(File::open(tree.file("sleep")).unwrap()).unwrap();
    wait::until(Duration::from_secs(5), "text of the program", || {
        let entries = mappings(child.id()).unwrap();
        assert!(entries.iter().all(|e| e.file != Some(native)));
        entries
            .iter()
            .any(|e| e.executable && e.name.ends_with(b"/sleep") && e.rss_bytes > 0)
    });
    assert!(matches!(
        mounted.unmount(false),
        Err(MountError::Busy { .. })
    ));
    child.kill().unwrap();
    child.wait().unwrap();
    end(&mounted);
    daemon.audit_clean();
}

#[test]
fn local_what_is_too_large_to_pin_is_in_page_cache_form_and_right() {
    if !needs::fuse() {
        return;
    }
    let tree = Tree::new();
    tree.pattern("small", 64);
    // Four times the budget of 16 MiB.
    tree.pattern("large", 16 * 1024);
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mounted = mounted(&tree, &daemon, "mnt");
    let (small, large) = (mounted.dir().join("small"), mounted.dir().join("large"));
    assert_eq!(
        (form(&small).as_str(), form(&large).as_str()),
        ("frames", "page-cache")
    );
    let expected = fs::read(tree.file("large")).unwrap();
    assert!(fs::read(&large).unwrap() == expected, "read");
    let mapping = NativeMapping::new(&File::open(&large).unwrap(), false).unwrap();
    assert!(bytes(&mapping) == expected, "mapped");
    drop(mapping);
    end(&mounted);
    daemon.audit_clean();
}

#[test]
fn local_a_guest_over_its_pinned_limit_gets_page_cache_form() {
    if !needs::fuse() {
        return;
    }
    let tree = Tree::new();
    for name in ["a", "b"] {
        tree.pattern(name, 200);
    }
    let setup = Setup {
        limits: "pinned_mib = 1".into(),
        ..Setup::default()
    };
    let mut daemon = Daemon::start(&tree, &setup);
    let mounted = mounted(&tree, &daemon, "mnt");
    let (a, b) = (mounted.dir().join("a"), mounted.dir().join("b"));
    let open = File::open(&a).unwrap();
    assert_eq!(
        (form(&a).as_str(), form(&b).as_str()),
        ("frames", "page-cache")
    );
    assert_eq!(fs::read(&b).unwrap(), fs::read(tree.file("b")).unwrap());
    drop(open);
    wait::until(Duration::from_secs(5), "the pin's end", || {
        form(&b) == "frames"
    });
    end(&mounted);
    daemon.audit_clean();
}

#[test]
fn local_without_passthrough_everything_is_in_page_cache_form_and_right() {
    if !needs::fuse() {
        return;
    }
    let tree = mixed_tree();
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let options = Options {
        passthrough: false,
        ..options(&tree, &daemon, "mnt")
    };
    let mounted = mount(&options).unwrap();
    assert_eq!(mounted.form(), Form::PageCache);
    assert!(mounted.why_page_cache().is_some());
    assert_eq!(form(&mounted.dir().join("many")), "page-cache");
    assert_eq!(survey(mounted.dir()), survey(&tree.at("export")));
    // A change in place is seen at the next open at the latest, also by who holds the file open.
    let path = mounted.dir().join("many");
    let held = File::open(&path).unwrap();
    let mut page = [0; PAGE_SIZE];
    held.read_exact_at(&mut page, 0).unwrap();
    let host = File::options().write(true).open(tree.file("many")).unwrap();
    host.write_all_at(&[7; 2 * PAGE_SIZE], 0).unwrap();
    drop(host);
    assert!(fs::read(&path).unwrap() == fs::read(tree.file("many")).unwrap());
    wait::until(Duration::from_secs(5), "the change in an open file", || {
        held.read_exact_at(&mut page, 0).unwrap();
        page == [7; PAGE_SIZE]
    });
    drop(held);
    end(&mounted);
    daemon.audit_clean();
}

#[test]
fn local_a_change_is_a_new_file_to_new_opens_and_none_to_old_ones() {
    if !needs::fuse() {
        return;
    }
    let tree = Tree::new();
    let path = tree.pattern("f", 300);
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mounted = mounted(&tree, &daemon, "mnt");
    let there = mounted.dir().join("f");
    let old_bytes = fs::read(&path).unwrap();
    let old = File::open(&there).unwrap();
    let old_map = NativeMapping::new(&old, true).unwrap();
    let old_ino = old.metadata().unwrap().ino();
    // In place, shorter.
    fs::write(&path, b"shorter").unwrap();
    let mut text = String::new();
    wait::until(Duration::from_secs(5), "the new content", || {
        text.clear();
        let new = File::open(&there).map(|mut file| file.read_to_string(&mut text));
        matches!(new, Ok(Ok(_))) && text == "shorter"
    });
    let now = there.metadata().unwrap();
    assert!(now.len() == 7 && now.ino() != old_ino);
    assert!(bytes(&old_map) == old_bytes, "a mapping keeps what it had");
    assert_eq!(old.metadata().unwrap().len(), old_bytes.len() as u64);
    let mut again = vec![0; old_bytes.len()];
    old.read_exact_at(&mut again, 0).unwrap();
    assert!(again == old_bytes, "an open file keeps what it had");
    // By another file of the name, and deleted.
    replace(&path, 10, 2);
    wait::until(Duration::from_secs(5), "the replacing file", || {
        fs::read(&there).is_ok_and(|bytes| bytes == fs::read(&path).unwrap())
    });
    fs::remove_file(&path).unwrap();
    wait::until(Duration::from_secs(5), "no file", || !there.exists());
    assert!(bytes(&old_map) == old_bytes);
    drop((old, old_map));
    end(&mounted);
    daemon.audit_clean();
}

#[test]
fn local_open_files_outlive_the_daemon_and_the_mount_finds_the_next_one() {
    if !needs::fuse() {
        return;
    }
    let tree = Tree::new();
    let path = tree.pattern("f", 300);
    fs::create_dir(tree.file("dir")).unwrap();
    tree.pattern("dir/g", 5);
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mut impatient = options(&tree, &daemon, "mnt");
    impatient.target.connect.reconnect_ms = 0;
    let mounted = mount(&impatient).unwrap();
    let expected = fs::read(&path).unwrap();
    let held = File::open(mounted.dir().join("f")).unwrap();
    let map = NativeMapping::new(&held, false).unwrap();
    let dir = File::open(mounted.dir().join("dir")).unwrap();
    daemon.kill();
    assert!(bytes(&map) == expected, "what is mapped goes on");
    let mut again = vec![0; expected.len()];
    held.read_exact_at(&mut again, 0).unwrap();
    assert!(again == expected, "what is open goes on");
    assert_eq!(held.metadata().unwrap().len(), expected.len() as u64);
    wait::until(Duration::from_secs(5), "an error without a daemon", || {
        fs::read_dir(mounted.dir()).is_err_and(|e| e.raw_os_error() == Some(libc::EIO))
    });
    let mut daemon = Daemon::start(&tree, &Setup::default());
    wait::until(
        Duration::from_secs(10),
        "the mount with the next daemon",
        || fs::read(mounted.dir().join("dir/g")).is_ok(),
    );
    assert_eq!(
        fs::read(mounted.dir().join("dir/g")).unwrap(),
        fs::read(tree.file("dir/g")).unwrap()
    );
    assert_eq!(fs::read(mounted.dir().join("f")).unwrap(), expected);
    assert!(dir.metadata().unwrap().is_dir());
    assert!(bytes(&map) == expected);
    drop((held, map, dir));
    end(&mounted);
    daemon.audit_clean();
}

#[test]
fn local_a_mount_waits_for_the_daemon_and_open_files_do_not() {
    if !needs::fuse() {
        return;
    }
    let tree = Tree::new();
    let path = tree.pattern("f", 300);
    fs::create_dir(tree.file("dir")).unwrap();
    tree.pattern("dir/g", 5);
    let mut daemon = Daemon::start(&tree, &Setup::default());
    let mounted = mounted(&tree, &daemon, "mnt");
    let dir = mounted.dir().to_owned();
    let expected = fs::read(&path).unwrap();
    let held = File::open(dir.join("f")).unwrap();
    for _ in 0..3 {
        daemon.kill();
        let mut again = vec![0; expected.len()];
        held.read_exact_at(&mut again, 0).unwrap();
        assert!(again == expected, "what is open goes on");
        assert_eq!(held.metadata().unwrap().len(), expected.len() as u64);
        std::thread::scope(|scope| {
            let list = scope.spawn(|| fs::read_dir(&dir).unwrap().count());
            let read = scope.spawn(|| fs::read(dir.join("dir/g")).unwrap());
            std::thread::sleep(Duration::from_millis(500));
            assert!(!list.is_finished(), "answered by nobody");
            daemon = Daemon::start(&tree, &Setup::default());
            assert_eq!(list.join().unwrap(), 2);
            assert_eq!(read.join().unwrap(), fs::read(tree.file("dir/g")).unwrap());
        });
        assert_eq!(fs::read(dir.join("f")).unwrap(), expected);
    }
    drop(held);
    end(&mounted);
    daemon.audit_clean();
}

#[test]
fn local_more_files_than_handles_can_be_walked() {
    if !needs::fuse() {
        return;
    }
    let tree = mixed_tree();
    let setup = Setup {
        limits: "handles_max = 160".into(),
        ..Setup::default()
    };
    let mut daemon = Daemon::start(&tree, &setup);
    let mounted = mounted(&tree, &daemon, "mnt");
    for _ in 0..2 {
        assert_eq!(survey(mounted.dir()), survey(&tree.at("export")));
    }
    end(&mounted);
    daemon.audit_clean();
}

#[test]
fn local_mounts_are_refused_where_they_cannot_be_and_taken_away_once() {
    if !needs::fuse() {
        return;
    }
    let tree = mixed_tree();
    let daemon = Daemon::start(&tree, &Setup::default());
    let at = |dir: PathBuf| {
        mount(&Options {
            dir,
            ..options(&tree, &daemon, "mnt")
        })
    };
    assert!(matches!(
        at(tree.at("none")).unwrap_err(),
        MountError::Dir { .. }
    ));
    assert!(matches!(
        at(tree.file("one")).unwrap_err(),
        MountError::NotDirectory { .. }
    ));
    assert!(matches!(
        at(tree.file("a")).unwrap_err(),
        MountError::NotEmpty { .. }
    ));
    let mut unknown = options(&tree, &daemon, "mnt");
    unknown.target.export = "unknown".into();
    assert!(matches!(mount(&unknown).unwrap_err(), MountError::Share(_)));
    assert!(matches!(
        umount(&tree.at("mnt"), false),
        Err(MountError::NotMounted { .. })
    ));
    let mounted = mounted(&tree, &daemon, "mnt");
    assert!(matches!(
        at(tree.at("mnt")).unwrap_err(),
        MountError::Mounted { .. }
    ));
    // As umount(8) would, from outside.
    umount(&tree.at("mnt"), false).unwrap();
    assert!(matches!(mounted.wait(None).unwrap(), Event::Ended(Ok(()))));
    assert!(matches!(
        umount(&tree.at("mnt"), false),
        Err(MountError::NotMounted { .. })
    ));
}

#[test]
fn local_a_detached_mount_serves_what_is_open() {
    if !needs::fuse() {
        return;
    }
    let tree = Tree::new();
    tree.pattern("large", 16 * 1024);
    tree.pattern("f", 10);
    let daemon = Daemon::start(&tree, &Setup::default());
    let mounted = mounted(&tree, &daemon, "mnt");
    let large = File::open(mounted.dir().join("large")).unwrap();
    let small = File::open(mounted.dir().join("f")).unwrap();
    mounted.unmount(true).unwrap();
    assert!(fs::read_dir(tree.at("mnt")).unwrap().next().is_none());
    let mut page = [0; PAGE_SIZE];
    for (file, name) in [(&large, "large"), (&small, "f")] {
        file.read_exact_at(&mut page, 9 * PAGE_SIZE as u64).unwrap();
        assert_eq!(
            page[..],
            fs::read(tree.file(name)).unwrap()[9 * PAGE_SIZE..10 * PAGE_SIZE]
        );
    }
    drop((large, small));
    assert!(matches!(mounted.wait(None).unwrap(), Event::Ended(Ok(()))));
}
