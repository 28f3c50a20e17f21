//! What a hostile guest, a busy host or bad luck could do to others through the cache.
//!
//! Cannot show: what the daemon's loop makes of it (`tools/tests/daemon`), real mappings (`tests/`).
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::*;
use copage_cache::limits;
use copage_cache::*;
use copage_grants::*;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

/// A program may run only from what is pinned: while it runs the kernel lets nobody write the file,
/// and so no page could be taken back.
#[test]
fn local_a_program_run_from_a_mapping_does_not_keep_its_pages() {
    let mut rig = Rig::new(1024);
    std::fs::copy("/bin/sleep", rig.path("sleep")).unwrap();
    let a = who(1);
    let file = rig.map("sleep", a);
    let pages = rig.cache.current(&file).bytes.div_ceil(PAGE as u64);
    let (generation, count) = rig.fault(&file, a, 0, 512).unwrap();
    assert_eq!(u64::from(count), pages, "small enough for one fault");
    let fd = rig.cache.descriptor(&file, generation).unwrap();
    let run = std::process::Command::new(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .arg("30")
        .spawn();
    rig.cache.guest_fenced(a);
    let homes = rig.cache.stats().frames_resident;
    let taken = rig.page(&file, generation, 0).is_none();
    if let Ok(mut child) = run {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!((homes, taken), (0, true), "pages stay with a fenced guest");
}

/// A pinned one runs, before and after the daemon had taken pages of the same home.
#[test]
fn local_a_program_runs_from_a_pinned_file() {
    let mut rig = Rig::new(1024);
    std::fs::copy("/bin/true", rig.path("true")).unwrap();
    let a = who(1);
    let mapped = rig.map("true", a);
    for _ in 0..2 {
        let done = rig.open("true", OpenHow::Pin, a).unwrap();
        let generation = done.state.generation;
        let fd = rig.cache.descriptor(&done.file, generation).unwrap();
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        // A test beside this one that forks has every descriptor for a moment, writable ones too.
        let ran = (0..200).find_map(|_| {
            std::thread::sleep(Duration::from_millis(5));
            std::process::Command::new(&path).status().ok()
        });
        assert!(ran.unwrap().success());
        drop(fd);
        rig.cache.close(&done.file, OpenHow::Pin, a);
        rig.until("unpinned", |s| s.frames_pinned == 0);
        rig.cache.drop_all();
        assert_eq!(rig.cache.stats().frames_resident, 0);
        rig.audit();
    }
    rig.cache.close(&mapped, OpenHow::Map, a);
}

/// The times of a file change when a write begins, its bytes while it goes on.
#[test]
fn local_a_long_write_is_noticed_when_it_ends() {
    const BYTES: usize = 128 << 20;
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut rig = Rig::new(1024);
    rig.export = rig
        .cache
        .add_export(spec("shm", shm.path().into()))
        .unwrap();
    let path = shm.path().join("f");
    std::fs::write(&path, vec![1; BYTES]).unwrap();
    let before = std::fs::metadata(&path).unwrap();
    let times = |m: &std::fs::Metadata| (m.mtime(), m.mtime_nsec());
    let a = who(1);
    let last = (BYTES / PAGE) as u64 - 1;
    let file = std::thread::scope(|scope| {
        let writer = std::fs::File::options().write(true).open(&path).unwrap();
        let new = vec![2; BYTES];
        let writing = scope.spawn(move || {
            writer.write_all_at(&new, 0).unwrap();
            writer
        });
        while times(&std::fs::metadata(&path).unwrap()) == times(&before) {
            std::hint::spin_loop();
        }
        let file = rig.map("f", a);
        rig.fault(&file, a, last, 1).unwrap();
        let writer = writing.join().unwrap();
        drop(writer);
        file
    });
    for _ in 0..10 {
        rig.pump(Duration::from_millis(10));
    }
    let (generation, _) = rig.fault(&file, a, last, 1).unwrap();
    let seen = rig.page(&file, generation, last).unwrap();
    assert_eq!(seen[0], 2, "what the file held before the write");
    rig.audit();
}

/// However often it changes: when it stands still, what is served is what it holds.
#[test]
fn local_a_restless_file_is_served_and_right_in_the_end() {
    let mut rig = Rig::new(1024);
    rig.write("f", &content(1, 8 * PAGE));
    let path = rig.path("f");
    for round in 0..5_u64 {
        let stop = std::sync::atomic::AtomicBool::new(false);
        // Opened before the guest maps it: there is no lease to wait for.
        let mut writer = None;
        rig.host(|| writer = std::fs::File::options().write(true).open(&path).ok());
        let writer = writer.unwrap();
        let (file, last) = std::thread::scope(|scope| {
            let stop = &stop;
            let writing = scope.spawn(move || {
                let mut n = round << 32 | 1;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    n += 1;
                    writer.write_all_at(&n.to_le_bytes(), 0).unwrap();
                }
                n
            });
            let start = Instant::now();
            let file = rig.map("f", who(1));
            while start.elapsed() < Duration::from_millis(150) {
                rig.fault(&file, who(1), 0, 1).unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            (file, writing.join().unwrap())
        });
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            rig.pump(Duration::from_millis(5));
            let (generation, _) = rig.fault(&file, who(1), 0, 1).unwrap();
            let seen = rig.page(&file, generation, 0).unwrap();
            if seen[..8] == last.to_le_bytes() {
                break;
            }
            assert!(Instant::now() < until, "round {round}");
        }
        rig.cache.close(&file, OpenHow::Map, who(1));
        rig.audit();
    }
}

/// The kernel's queue of signals was full: which lease broke nobody says.
#[test]
fn local_a_lost_lease_signal_is_found_by_looking() {
    let mut rig = Rig::new(1024);
    rig.write("f", &content(1, 4 * PAGE));
    let a = who(1);
    let file = rig.map("f", a);
    rig.fault(&file, a, 0, 4).unwrap();
    assert!(!rig.cache.current(&file).host_bounded);
    let new = content(2, 4 * PAGE);
    let path = rig.path("f");
    let start = Instant::now();
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| std::fs::write(&path, &new).unwrap());
        while !writing.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
            rig.cache.check_leases();
            rig.cache.tick(Cache::now_ms());
        }
    });
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(rig.cache.stats().leases_broken, 1);
    for page in 0..4 {
        rig.check(&file, a, page, &new);
    }
}

/// Opening and closing one file over and over does not drive the idle ones out.
#[test]
fn local_one_file_opened_often_leaves_the_idle_ones() {
    let mut rig = Rig::new(1024);
    let data = content(1, 4 * PAGE);
    for name in ["idle", "busy"] {
        rig.write(name, &data);
    }
    let a = who(1);
    let idle = rig.map("idle", a);
    rig.fault(&idle, a, 0, 4).unwrap();
    rig.cache.close(&idle, OpenHow::Map, a);
    for _ in 0..copage_cache::limits::FILES_IDLE_MAX + 10 {
        let busy = rig.map("busy", a);
        rig.fault(&busy, a, 0, 1).unwrap();
        rig.cache.close(&busy, OpenHow::Map, a);
    }
    assert_eq!(rig.map("idle", a).id, idle.id);
    assert_eq!(rig.cache.stats().frames_resident, 5);
    rig.audit();
}

/// A message about a range costs what is resident of it, however long the file is.
#[test]
fn local_ranges_of_a_huge_sparse_file_cost_nothing() {
    let mut rig = Rig::new(1024);
    let path = rig.path("f");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(8 << 40)
        .unwrap();
    let a = who(1);
    let file = rig.map("f", a);
    let (generation, _) = rig.fault(&file, a, 1 << 30, 3).unwrap();
    let start = Instant::now();
    rig.cache
        .unmapped(&file, a, generation, PageIndex(0), u32::MAX);
    let took = start.elapsed();
    assert!(took < Duration::from_millis(500), "{took:?}");
    assert_eq!(rig.backend.grant_count(a.dom), 0);
    rig.audit();
}

/// Old homes of a file that changes all the time, with a guest that never lets go of any.
#[test]
fn local_old_homes_of_a_file_do_not_pile_up() {
    let patient = CacheConfig {
        recall_deadline_ms: 60_000,
        ..config(1024)
    };
    let mut rig = Rig::with(local(true), patient);
    rig.write("f", &content(1, 2 * PAGE));
    let a = who(1);
    let file = rig.map("f", a);
    let path = rig.path("f");
    let mut kept = Vec::new();
    let start = Instant::now();
    for round in 0..60 {
        let (generation, _) = rig.fault(&file, a, 0, 2).unwrap();
        kept.push(rig.cache.descriptor(&file, generation).unwrap());
        let new = content(round, 2 * PAGE);
        rig.host(|| std::fs::write(&path, &new).unwrap());
        let paused = start.elapsed().as_millis() as u64 / limits::OLD_HOMES_PAUSE_MS;
        let old = rig.cache.stats().homes_retired;
        let most = limits::OLD_HOMES_MAX as u64 + paused + 1;
        assert!(old <= most, "{old} old homes after {round} changes");
    }
    assert!(start.elapsed() > Duration::from_secs(2));
    rig.audit();
    drop(kept);
    rig.until("all end", |s| s.homes_retired == 0);
}

/// Who had a descriptor of a pinned file may have kept a path to it, which the kernel does not count
/// as a use. It leads to no home that has holes and that others map.
#[test]
fn local_a_path_kept_from_a_pin_leads_to_nobodys_home() {
    let mut rig = Rig::new(1024);
    rig.write("f", &content(1, 4 * PAGE));
    let own = who(1);
    let foreign = Holder {
        class: TrustClass(61_001),
        ..who(2)
    };
    let inode = |fd: &std::os::fd::OwnedFd| {
        let stat = rustix::fs::fstat(fd).unwrap();
        (stat.st_dev, stat.st_ino)
    };
    let pinned = rig.open("f", OpenHow::Pin, foreign).unwrap();
    let fd = rig
        .cache
        .descriptor(&pinned.file, pinned.state.generation)
        .unwrap();
    let kept = inode(&fd);
    drop(fd);
    rig.cache.close(&pinned.file, OpenHow::Pin, foreign);
    let mapped = rig.map("f", own);
    rig.until("unpinned", |s| s.frames_pinned == 0);
    rig.cache.drop_all();
    let generation = rig.cache.current(&mapped).generation;
    let fd = rig.cache.descriptor(&mapped, generation).unwrap();
    assert_ne!(inode(&fd), kept);
}

/// Without force, a guest that touched every other page is asked once for all when they change.
#[test]
fn local_scattered_pages_are_recalled_by_one_question() {
    let mut rig = Rig::with(local(false), config(1024));
    rig.write("f", &content(1, 512 * PAGE));
    let a = who(1);
    let file = rig.map("f", a);
    for page in 0..256 {
        rig.fault(&file, a, page * 2, 1).unwrap();
    }
    let generation = rig.cache.current(&file).generation;
    let _fd = rig.cache.descriptor(&file, generation).unwrap();
    let new = content(2, 512 * PAGE);
    let path = rig.path("f");
    rig.host(|| std::fs::write(&path, &new).unwrap());
    assert_eq!(rig.recalls, 1);
    assert_eq!(rig.backend.grant_count(a.dom), 0);
    rig.check(&file, a, 17, &new);
    rig.audit();
}

/// A guest that waits for its open while the export goes away has nothing of it afterwards.
#[test]
fn local_an_open_that_waited_ends_with_its_export() {
    let mut rig = Rig::with(
        local(true),
        CacheConfig {
            host_settle_ms: 300,
            ..config(1024)
        },
    );
    rig.write("f", &content(1, 4 * PAGE));
    // The same inode through two exports of one group.
    let other = tempfile::tempdir_in(rig.dir.path().parent().unwrap()).unwrap();
    std::fs::hard_link(rig.path("f"), other.path().join("f")).unwrap();
    let first = rig.export;
    let second = rig
        .cache
        .add_export(spec("o", other.path().into()))
        .unwrap();
    let writer = std::fs::File::options()
        .write(true)
        .open(rig.path("f"))
        .unwrap();
    rig.map("f", who(1));
    // Now its content settles, for 300 ms.
    writer.write_all_at(b"new", 0).unwrap();
    rig.pump(Duration::from_millis(1));
    rig.export = second;
    let node = rig.node("f");
    let ticket = rig.ticket();
    rig.cache.open(ticket, node, OpenHow::Map, who(2), false);
    std::thread::sleep(Duration::from_millis(20));
    rig.cache.remove_export(second).unwrap();
    rig.export = first;
    let ended = match rig.wait(ticket) {
        CacheEvent::Opened { result, .. } => result,
        other => panic!("{other:?}"),
    };
    assert!(matches!(ended, Err(CacheError::Withdrawn)), "{ended:?}");
}
