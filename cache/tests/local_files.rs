//! Files through the cache over the local backend: contents, budget, pins, guests, host changes.
//!
//! Cannot show: what a mapping sees (descriptors are read instead; `tests/` maps), two machines, real
//! I/O errors of a disk.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::*;
use copage_cache::*;
use copage_grants::*;
use std::time::Duration;

#[test]
fn local_pages_are_those_of_the_file_and_the_tail_is_zero() {
    let mut rig = Rig::new(1024);
    let data = content(1, 10 * PAGE + 77);
    rig.write("f", &data);
    let a = who(1);
    let file = rig.map("f", a);
    let (generation, count) = rig.fault(&file, a, 0, 64).unwrap();
    assert_eq!(count, 11, "cut off at the end of the file");
    for page in 0..11 {
        let seen = rig.page(&file, generation, page).unwrap();
        let start = page as usize * PAGE;
        assert_eq!(seen, data[start..data.len().min(start + PAGE)]);
    }
    let hit = rig
        .fault_of(&file, a, generation, (3, 2), FaultHint::Random)
        .unwrap();
    assert_eq!(
        hit,
        FaultDone::Granted {
            generation,
            first: PageIndex(3),
            count: 2,
            grants: None,
        }
    );
    assert_eq!(rig.cache.stats().fault_hits, 1);
    assert!(matches!(
        rig.fault(&file, a, 11, 1),
        Err(CacheError::BadRange(_))
    ));
    assert!(matches!(
        rig.fault(&file, a, u64::MAX, 1),
        Err(CacheError::BadRange(_))
    ));
    assert!(matches!(
        rig.fault(&file, who(2), 0, 1),
        Err(CacheError::NotOpen(_))
    ));
    assert_eq!(
        rig.read(&file, a, 10, 3 * PAGE as u32).unwrap(),
        data[10..10 + 3 * PAGE]
    );
    assert_eq!(
        rig.read(&file, a, 10 * PAGE as u64, 4096).unwrap(),
        data[10 * PAGE..]
    );
    assert!(
        rig.read(&file, a, u64::from(u32::MAX), 10)
            .unwrap()
            .is_empty()
    );
    rig.audit();
    rig.cache.close(&file, OpenHow::Map, a);
    rig.audit();
    assert_eq!(rig.backend.grant_count(a.dom), 0);
    let report = rig.cache.audit();
    assert_eq!((report.grants, report.tails), (0, 1));
}

#[test]
fn local_a_file_many_times_the_budget_is_read_right() {
    let mut rig = Rig::new(64);
    let data = content(2, 512 * PAGE);
    rig.write("f", &data);
    let a = who(1);
    let file = rig.map("f", a);
    let mut n = 7_u64;
    for _ in 0..1500 {
        n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let page = (n >> 33) % 512;
        rig.check(&file, a, page, &data);
    }
    let stats = rig.cache.stats();
    assert!(stats.frames_resident <= 64, "{stats:?}");
    assert!(stats.reclaimed_granted > 500, "{stats:?}");
    rig.audit();
}

#[test]
fn local_sequential_windows_grow_to_whole_units() {
    let mut rig = Rig::new(8192);
    let data = content(3, 2048 * PAGE);
    rig.write("f", &data);
    let a = who(1);
    let file = rig.map("f", a);
    let generation = rig.cache.current(&file).generation;
    let (mut at, mut faults) = (0, 0);
    while at < 2048 {
        match rig
            .fault_of(&file, a, generation, (at, 8), FaultHint::Sequential)
            .unwrap()
        {
            FaultDone::Granted { first, count, .. } => at = first.0 + u64::from(count),
            stale => panic!("{stale:?}"),
        }
        faults += 1;
    }
    assert!(faults <= 12, "{faults} faults");
    let _ = rig.fault_of(&file, a, generation, (0, 1), FaultHint::Random);
    rig.until("all huge that can be", |s| {
        s.huge_units >= 1 || s.frames_filling == 0
    });
    for page in [0, 511, 512, 2047] {
        let start = page as usize * PAGE;
        assert_eq!(
            rig.page(&file, generation, page).unwrap(),
            data[start..start + PAGE]
        );
    }
    rig.audit();
    rig.cache.reclaim(10);
    rig.audit();
    let cache = rig.cache.clone();
    // A unit that is being backed by a huge frame is left alone until that is done.
    rig.until("all dropped", |s| {
        cache.drop_all();
        s.frames_resident == 0
    });
    rig.audit();
}

#[test]
fn local_two_guests_share_frames_and_each_ends_alone() {
    let mut rig = Rig::new(1024);
    rig.write("f", &content(4, 32 * PAGE));
    let (a, b) = (who(1), who(2));
    let file = rig.map("f", a);
    let again = rig.map("f", b);
    assert_eq!(file.id, again.id);
    rig.fault(&file, a, 0, 32).unwrap();
    rig.fault(&file, b, 0, 32).unwrap();
    assert_eq!(rig.cache.stats().frames_resident, 32);
    assert_eq!(
        (
            rig.backend.grant_count(a.dom),
            rig.backend.grant_count(b.dom)
        ),
        (32, 32)
    );
    let charged = |rig: &Rig, g| {
        rig.cache
            .stats()
            .guests
            .iter()
            .find(|s| s.guest == g)
            .map_or(0, |s| s.frames)
    };
    assert_eq!((charged(&rig, a.guest), charged(&rig, b.guest)), (32, 0));
    rig.cache.guest_ended(a);
    assert_eq!((charged(&rig, a.guest), charged(&rig, b.guest)), (0, 32));
    assert_eq!(rig.backend.grant_count(a.dom), 0);
    assert!(matches!(
        rig.fault(&file, a, 0, 1),
        Err(CacheError::NotOpen(_))
    ));
    rig.audit();
    rig.cache.close(&file, OpenHow::Map, b);
    assert_eq!(charged(&rig, b.guest), 0);
    rig.audit();
    assert_eq!(rig.cache.stats().frames_resident, 32, "idle pages stay");
}

#[test]
fn local_a_fenced_guest_gets_nothing_more_and_others_go_on() {
    let mut rig = Rig::new(1024);
    let data = content(5, 16 * PAGE);
    rig.write("f", &data);
    let (a, b) = (who(1), who(2));
    let file = rig.map("f", a);
    rig.map("f", b);
    let (old, _) = rig.fault(&file, a, 0, 16).unwrap();
    rig.fault(&file, b, 0, 16).unwrap();
    rig.cache.guest_fenced(a);
    assert!(rig.page(&file, old, 0).is_none(), "the old home is gone");
    assert_eq!(rig.backend.grant_count(a.dom), 0);
    assert!(rig.fault(&file, a, 0, 1).is_err());
    let stale = rig
        .fault_of(&file, b, old, (0, 1), FaultHint::Random)
        .unwrap();
    assert!(matches!(stale, FaultDone::Stale(s) if s.generation > old));
    let (new, _) = rig.fault(&file, b, 0, 16).unwrap();
    assert_eq!(rig.page(&file, new, 3).unwrap(), data[3 * PAGE..4 * PAGE]);
    rig.audit();
}

#[test]
fn local_pinned_opens_are_whole_and_outlive_changes() {
    let mut rig = Rig::new(1024);
    let data = content(6, 600 * PAGE + 5);
    rig.write("f", &data);
    let a = who(1);
    let done = rig.open("f", OpenHow::Pin, a).unwrap();
    let fd = rig
        .cache
        .descriptor(&done.file, done.state.generation)
        .unwrap();
    rig.cache.drop_all();
    rig.audit();
    let seen = |fd: &std::os::fd::OwnedFd| {
        use std::io::Read;
        let mut file = std::fs::File::from(fd.try_clone().unwrap());
        let mut all = Vec::new();
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_end(&mut all).unwrap();
        all
    };
    assert!(seen(&fd) == data);
    assert!(matches!(
        rig.cache.set_frames_max(512),
        Err(CacheError::BudgetBelowPinned { .. })
    ));
    let path = rig.path("f");
    let other = content(7, 600 * PAGE + 5);
    rig.host(|| std::fs::write(&path, &other).unwrap());
    assert!(seen(&fd) == data, "what is pinned is not punched");
    rig.until("quarantine", |s| s.frames_quarantined == 601);
    // Half of the budget is quarantined: there is no room to pin the new content too.
    assert!(
        rig.open("f", OpenHow::Pin, who(2))
            .unwrap_err()
            .is_pin_refusal()
    );
    rig.audit();
    rig.cache.close(&done.file, OpenHow::Pin, a);
    rig.pump(Duration::from_millis(5));
    assert!(seen(&fd) == data, "not while it is open");
    assert_eq!(rig.cache.stats().frames_quarantined, 601);
    let charged = |rig: &Rig| {
        let stats = rig.cache.stats();
        stats
            .guests
            .iter()
            .find(|g| g.guest == a.guest)
            .map(|g| (g.pinned_pages, g.quarantined_pages))
    };
    assert_eq!(charged(&rig), Some((0, 601)));
    drop(fd);
    rig.until("drained", |s| s.frames_quarantined == 0);
    assert_eq!(charged(&rig), Some((0, 0)));
    rig.audit();
    assert!(rig.open("f", OpenHow::Pin, who(2)).is_ok());
    rig.audit();
}

#[test]
fn local_pins_are_limited() {
    let mut rig = Rig::new(1024);
    rig.write("f", &content(8, 100 * PAGE));
    let limits = GuestLimits {
        pinned_pages_max: 99,
        ..GuestLimits::default()
    };
    rig.cache.set_limits(who(1).guest, limits);
    let refused = rig.open("f", OpenHow::Pin, who(1)).unwrap_err();
    assert!(
        matches!(
            refused,
            CacheError::PinOverLimit {
                wanted: 100,
                pages_max: 99
            }
        ),
        "{refused}"
    );
    assert!(refused.is_pin_refusal());
    rig.write("big", &content(9, 1000 * PAGE));
    assert!(matches!(
        rig.open("big", OpenHow::Pin, who(2)),
        Err(CacheError::PinNoRoom { .. })
    ));
    rig.write("empty", b"");
    assert!(rig.open("empty", OpenHow::Pin, who(2)).is_ok());
    rig.audit();
    assert_eq!(rig.cache.stats().frames_pinned, 0);
}

#[test]
fn local_host_changes_under_a_lease_make_a_new_version() {
    let mut rig = Rig::new(1024);
    let old = content(10, 8 * PAGE);
    rig.write("f", &old);
    let a = who(1);
    let file = rig.map("f", a);
    let (generation, _) = rig.fault(&file, a, 0, 8).unwrap();
    let before = rig.cache.current(&file);
    assert!(
        !before.host_bounded,
        "a lease is to be had in a temporary directory"
    );
    let new = content(11, 5 * PAGE + 9);
    let path = rig.path("f");
    rig.host(|| std::fs::write(&path, &new).unwrap());
    assert_eq!(rig.cache.stats().leases_broken, 1);
    let stale = rig
        .fault_of(&file, a, generation, (0, 1), FaultHint::Random)
        .unwrap();
    let FaultDone::Stale(state) = stale else {
        panic!("{stale:?}")
    };
    assert!(state.version > before.version);
    assert_eq!(state.bytes, new.len() as u64);
    let (generation, count) = rig.fault(&file, a, 0, 8).unwrap();
    assert_eq!(count, 6);
    for page in 0..6_usize {
        let seen = rig.page(&file, generation, page as u64).unwrap();
        assert!(seen == new[page * PAGE..new.len().min((page + 1) * PAGE)]);
    }
    assert!(
        !rig.cache.current(&file).host_bounded,
        "the lease is had again"
    );
    assert!(rig.retired >= 1);
    rig.audit();
}

#[test]
fn local_a_file_with_a_host_writer_is_host_bounded_and_noticed() {
    let mut rig = Rig::new(1024);
    rig.write("f", &content(12, 8 * PAGE));
    let writer = std::fs::File::options()
        .write(true)
        .open(rig.path("f"))
        .unwrap();
    let a = who(1);
    let file = rig.map("f", a);
    assert!(rig.cache.current(&file).host_bounded);
    let (first, _) = rig.fault(&file, a, 0, 8).unwrap();
    let new = content(13, PAGE);
    std::os::unix::fs::FileExt::write_all_at(&writer, &new, PAGE as u64).unwrap();
    rig.pump(Duration::from_millis(50));
    let (second, _) = rig.fault(&file, a, 0, 8).unwrap();
    assert!(second > first);
    assert!(rig.page(&file, second, 1).unwrap() == new);
    drop(writer);
    rig.pump(Duration::from_millis(5));
    assert!(!rig.cache.current(&file).host_bounded);
    rig.audit();
}

#[test]
fn local_a_file_that_never_stands_still_is_served() {
    let mut rig = Rig::new(1024);
    rig.write("f", &content(14, 64 * PAGE));
    let path = rig.path("f");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop = &stop;
        scope.spawn(move || {
            let writer = std::fs::File::options().write(true).open(path).unwrap();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                std::os::unix::fs::FileExt::write_all_at(&writer, b"again", 0).unwrap();
            }
        });
        std::thread::sleep(Duration::from_millis(20));
        let file = rig.map("f", who(1));
        for page in 0..8 {
            rig.fault(&file, who(1), page, 1).unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    rig.pump(Duration::from_millis(5));
    rig.audit();
}

#[test]
fn local_truncated_and_unlinked_files() {
    let mut rig = Rig::new(1024);
    let data = content(15, 20 * PAGE);
    rig.write("f", &data);
    let a = who(1);
    let file = rig.map("f", a);
    rig.fault(&file, a, 0, 20).unwrap();
    let path = rig.path("f");
    rig.host(|| {
        std::fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(5000)
            .unwrap()
    });
    assert!(matches!(
        rig.fault(&file, a, 10, 1),
        Err(CacheError::BadRange(_))
    ));
    let (generation, count) = rig.fault(&file, a, 0, 20).unwrap();
    assert_eq!(count, 2);
    assert!(rig.page(&file, generation, 1).unwrap() == data[PAGE..5000]);
    std::fs::remove_file(&path).unwrap();
    rig.pump(Duration::from_millis(5));
    rig.fault(&file, a, 0, 2).unwrap();
    rig.audit();
    rig.cache.close(&file, OpenHow::Map, a);
    rig.cache.host_events();
    rig.audit();
}

#[test]
fn local_a_removed_export_is_withdrawn_under_its_users() {
    let mut rig = Rig::new(1024);
    rig.write("f", &content(16, 16 * PAGE));
    let a = who(1);
    let file = rig.map("f", a);
    let (generation, _) = rig.fault(&file, a, 0, 16).unwrap();
    let node = rig.node("f");
    rig.cache.remove_export(rig.export).unwrap();
    assert!(matches!(
        rig.fault(&file, a, 0, 1),
        Err(CacheError::Withdrawn)
    ));
    assert!(rig.page(&file, generation, 0).is_none());
    assert!(matches!(rig.cache.attr(&node), Err(CacheError::Withdrawn)));
    rig.pump(Duration::from_millis(5));
    assert_eq!(rig.withdrawn, 1);
    assert_eq!(rig.backend.grant_count(a.dom), 0);
    rig.audit();
    assert_eq!(rig.cache.stats().frames_resident, 0);
}

#[test]
fn local_limits_take_a_guests_own_oldest_first() {
    let mut rig = Rig::new(1024);
    rig.write("f", &content(17, 300 * PAGE));
    rig.write("g", &content(18, 50 * PAGE));
    let (a, b) = (who(1), who(2));
    let g = rig.map("g", b);
    rig.fault(&g, b, 0, 50).unwrap();
    let limits = GuestLimits {
        grants_max: 100,
        frames_max: 90,
        ..GuestLimits::default()
    };
    rig.cache.set_limits(a.guest, limits);
    let file = rig.map("f", a);
    for page in 0..300 {
        rig.fault(&file, a, page, 1).unwrap();
        assert!(rig.backend.grant_count(a.dom) <= 100);
    }
    assert_eq!(rig.backend.grant_count(b.dom), 50, "others lose nothing");
    rig.audit();
}

#[test]
fn local_the_budget_halves_under_load_and_grows_again() {
    let mut rig = Rig::new(512);
    let data = content(19, 512 * PAGE);
    rig.write("f", &data);
    let a = who(1);
    let file = rig.map("f", a);
    for round in 0..6_u32 {
        rig.cache
            .set_frames_max([512, 256, 64][(round % 3) as usize])
            .unwrap();
        for n in 0..64_u64 {
            let page = (n * 37 + u64::from(round)) % 512;
            rig.check(&file, a, page, &data);
        }
        rig.until("the budget is kept", |s| s.frames_resident <= s.frames_max);
        rig.audit();
    }
    // Beyond what it was started with: everything stays.
    rig.cache.set_frames_max(1000).unwrap();
    for page in 0..512 {
        rig.check(&file, a, page, &data);
    }
    rig.until("all pages", |s| s.frames_resident == 512);
    rig.audit();
    assert!(matches!(
        rig.cache.set_frames_max(10),
        Err(CacheError::BudgetOutOfBounds { .. })
    ));
}

#[test]
fn local_without_force_pages_come_back_by_recalls() {
    let mut rig = Rig::with(local(false), config(64));
    let data = content(20, 256 * PAGE);
    rig.write("f", &data);
    let a = who(1);
    let file = rig.map("f", a);
    for n in 0..400_u64 {
        let page = (n * 53) % 256;
        rig.check(&file, a, page, &data);
    }
    assert!(rig.recalls > 0);
    rig.audit();
    let path = rig.path("f");
    let new = content(21, 256 * PAGE);
    let fd = rig
        .cache
        .descriptor(&file, rig.cache.current(&file).generation)
        .unwrap();
    rig.host(|| std::fs::write(&path, &new).unwrap());
    rig.check(&file, a, 9, &new);
    drop(fd);
    rig.until("the old home ends", |s| s.homes_retired == 0);
    rig.audit();
}

#[test]
fn local_without_force_a_silent_holder_is_quarantined_not_robbed() {
    let mut rig = Rig::with(local(false), config(64));
    rig.acks = false;
    rig.write("f", &content(22, 64 * PAGE));
    let a = who(1);
    let file = rig.map("f", a);
    let (generation, _) = rig.fault(&file, a, 0, 20).unwrap();
    let fd = rig.cache.descriptor(&file, generation).unwrap();
    rig.cache.guest_fenced(a);
    std::thread::sleep(Duration::from_millis(310));
    rig.until("quarantine", |s| s.frames_quarantined == 20);
    rig.audit();
    drop(fd);
    rig.until("drained", |s| {
        s.frames_quarantined == 0 && s.homes_retired == 0
    });
    rig.audit();
}

#[test]
fn local_opens_under_way_at_the_end_of_a_session_end_with_it() {
    let mut rig = Rig::new(1024);
    for n in 0..8 {
        rig.write(&format!("f{n}"), &content(n, 8 * PAGE));
    }
    // Many opens in the queue, so that some are begun before the end and some behind it.
    for dom in 1..40 {
        let guest = who(dom);
        let tickets: Vec<u64> = (0..24)
            .map(|n| {
                let how = if n % 2 == 0 {
                    OpenHow::Pin
                } else {
                    OpenHow::Map
                };
                let (node, ticket) = (rig.node(&format!("f{}", n % 8)), rig.ticket());
                rig.cache.open(ticket, node, how, guest, false);
                ticket
            })
            .collect();
        if dom % 2 == 0 {
            rig.cache.guest_fenced(guest);
        }
        rig.cache.guest_ended(guest);
        for ticket in tickets {
            rig.wait(ticket);
        }
        assert_eq!(
            rig.backend.grant_count(guest.dom),
            0,
            "granted after its end"
        );
        let stats = rig.cache.stats();
        assert_eq!(stats.files_open, 0, "opened after its end: {stats:?}");
    }
    rig.audit();
}

/// Pins, and then a budget cut down to them and one frame more: each page still stays until the next
/// one is wanted, and what cannot fit is refused rather than tried for ever.
#[test]
fn local_beside_pins_every_page_comes_once() {
    let mut rig = Rig::new(128);
    rig.write("pinned", &content(4, 90 * PAGE));
    let pinned = rig.open("pinned", OpenHow::Pin, who(1)).unwrap();
    let data = content(5, 20 * PAGE);
    rig.write("f", &data);
    rig.cache.set_frames_max(91).unwrap();
    let file = rig.map("f", who(2));
    let before = rig.cache.stats().fills;
    for page in 0..20 {
        rig.check(&file, who(2), page, &data);
    }
    let read = rig.read(&file, who(2), 0, 3 * PAGE as u32);
    assert!(matches!(read, Err(CacheError::NoFrames)), "{read:?}");
    let fills = rig.cache.stats().fills - before;
    assert!(fills <= 40, "{fills} fills for 20 pages");
    rig.cache.close(&pinned.file, OpenHow::Pin, who(1));
    rig.audit();
}
