//! Coherent files with little memory, many jobs at a time, and exports that go: nothing that was stored is lost.
//!
//! Cannot show: which of several guests is asked for memory first is right; only that all of them get on.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
#[path = "common/hypervisor.rs"]
mod hypervisor;
#[path = "common/strict.rs"]
mod strict;

use common::*;
use copage_cache::*;
use copage_grants::*;
use hypervisor::Hypervisor;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;
use strict::*;

#[test]
fn local_a_file_of_eight_budgets_is_written_and_read() {
    let pages = 8 * 64;
    let mut bytes = content(1, pages * PAGE);
    let mut driver = Driver::new(64, &bytes, 2);
    for round in 0..2_u8 {
        for page in 0..pages {
            let guest = 1 + (page % 2) as u16;
            let at = page * PAGE + 7;
            driver.store(guest, page as u64, 7, &[round; 50]).unwrap();
            bytes[at..at + 50].fill(round);
            driver.serve();
        }
        for page in (0..pages).rev() {
            let seen = driver.load(1, page as u64).unwrap();
            assert!(seen == bytes[page * PAGE..][..PAGE], "page {page}");
        }
        driver.rig.audit();
    }
    assert!(driver.taken >= 64, "{} pages were taken", driver.taken);
    driver.take_from(0);
    assert!(driver.host() == bytes);
    driver.rig.audit();
}

#[test]
fn local_read_only_files_and_coherent_ones_share_a_budget() {
    let data = content(2, 100 * PAGE);
    let mut driver = Driver::new(64, &data, 1);
    let more = tempfile::tempdir().unwrap();
    std::fs::write(more.path().join("r"), &data).unwrap();
    let export = driver
        .cache()
        .add_export(spec("r", more.path().into()))
        .unwrap();
    let root = driver.cache().root(export).unwrap();
    let node = driver.cache().lookup(&root, b"r").unwrap().0;
    let ticket = driver.rig.ticket();
    driver
        .cache()
        .open(ticket, node, OpenHow::Map, who(2), false);
    let CacheEvent::Opened { result, .. } = driver.rig.wait(ticket) else {
        panic!("no open");
    };
    let read_only = result.unwrap().file;
    for page in 0..100 {
        driver.store(1, page, 0, b"stored").unwrap();
        // What it needs may have to come from the coherent file.
        let generation = driver.cache().current(&read_only).generation;
        let ticket = driver.rig.ticket();
        let outcome = driver.cache().fault(
            ticket,
            &read_only,
            who(2),
            generation,
            PageIndex(page),
            1,
            FaultHint::Random,
        );
        if let FaultOutcome::Pending = outcome {
            while driver.cache().stats().waiting > 0 {
                driver.rig.pump(Duration::from_millis(1));
                driver.serve();
            }
        }
        driver.serve();
    }
    driver.rig.audit();
    driver.take_from(0);
    let host = driver.host();
    assert!((0..100).all(|page| host[page * PAGE..][..6] == *b"stored"));
}

#[test]
fn local_a_guest_at_its_limit_gives_its_oldest_pages_back() {
    let mut driver = Driver::new(256, &content(3, 100 * PAGE), 2);
    let limits = GuestLimits {
        frames_max: 70,
        ..GuestLimits::default()
    };
    driver.cache().set_limits(who(1).guest, limits);
    let mut refused = 0;
    for page in 0..100 {
        while let Err(error) = driver.store(1, page, 0, b"mine") {
            assert_eq!(error.errno(), libc::EDQUOT, "{error}");
            refused += 1;
            assert!(refused < 100);
            driver.rig.pump(Duration::from_millis(1));
            driver.serve();
        }
    }
    let stats = driver.cache().stats();
    let guest = stats.guests.iter().find(|g| g.guest == who(1).guest);
    assert!(guest.unwrap().frames <= 70);
    assert!(refused > 0 && driver.taken > 0);
    driver.take_from(0);
    let host = driver.host();
    assert!((0..100).all(|page| host[page * PAGE..][..4] == *b"mine"));
    driver.rig.audit();
}

#[test]
fn local_an_older_look_is_never_written_over_a_newer() {
    const PAGES: u64 = 500;
    let mut driver = Driver::new(1024, &vec![0; PAGES as usize * PAGE], 1);
    let path = driver.rig.path("f");
    let pages: Vec<_> = (0..PAGES)
        .map(|page| (PageIndex(page), driver.frame(page).unwrap()))
        .collect();
    let host = std::fs::File::open(&path).unwrap();
    for n in 1..1500_u64 {
        driver.store(1, 0, 8, &n.to_le_bytes()).unwrap();
        // Looks at the page, and at many behind it, are on their way when it is let go and saved.
        for _ in 0..n % 2 {
            driver
                .cache()
                .strict_sync(n, &driver.file, None, pages.clone(), false);
        }
        std::thread::sleep(Duration::from_micros(n % 16 * 20));
        driver.store(1, 0, 16, &n.to_le_bytes()).unwrap();
        driver.let_go(0);
        for _ in 0..n % 2 {
            driver.synced(n).unwrap();
        }
        let mut seen = [0; 16];
        host.read_exact_at(&mut seen, 8).unwrap();
        assert_eq!(seen[..8], n.to_le_bytes());
        assert_eq!(seen[8..], n.to_le_bytes());
    }
    driver.rig.audit();
}

#[test]
fn local_an_export_that_goes_loses_nothing() {
    let mut driver = Driver::new(256, &content(4, 3 * PAGE), 2);
    driver.store(1, 0, 0, b"one").unwrap();
    driver.load(2, 1).unwrap();
    let export = driver.rig.export;
    driver.cache().remove_export(export).unwrap();
    driver.rig.pump(Duration::from_millis(20));
    assert_eq!(driver.rig.withdrawn, 2);
    driver.serve();
    assert_eq!(&driver.host()[..3], b"one");
    driver.rig.audit();
    let stats = driver.cache().stats();
    assert_eq!((stats.files, stats.frames_resident), (0, 0));
}

#[test]
fn local_pages_leave_when_the_budget_is_cut() {
    let mut driver = Driver::new(400, &content(5, 300 * PAGE), 1);
    for page in 0..300 {
        driver.store(1, page, 0, b"cut").unwrap();
    }
    driver.cache().set_frames_max(100).unwrap();
    let start = std::time::Instant::now();
    while driver.cache().stats().frames_resident > 100 {
        assert!(start.elapsed() < Duration::from_secs(20));
        driver.rig.pump(Duration::from_millis(1));
        driver.serve();
        // Asked for as frames are wanted.
        driver.cache().reclaim(64);
    }
    driver.take_from(0);
    let host = driver.host();
    assert!((0..300).all(|page| host[page * PAGE..][..3] == *b"cut"));
    driver.rig.audit();
}

fn on_entries(frames_max: u32, data: &[u8]) -> (Driver, Arc<Hypervisor>) {
    let xen = Hypervisor::new();
    let config = CacheConfig {
        lease_signal: None,
        ..config(frames_max)
    };
    let driver = Driver::with(coherent_rig(xen.clone(), config), data, 3);
    (driver, xen)
}

#[test]
fn local_entries_grant_the_frame_that_holds_the_page() {
    let data = content(6, PAGE + 100);
    let (mut driver, xen) = on_entries(128, &data);
    let read = driver.grant(2, 1, Access::ReadOnly, false).unwrap();
    let (granter, gref) = (read.granter.unwrap(), read.gref.unwrap());
    let seen = xen.map(DomId(2), granter, gref).unwrap();
    assert_eq!(seen[..100], data[PAGE..]);
    // Mapped, it is nobody else's to write.
    let frame = driver.frames[&1];
    let (cache, page) = (driver.cache(), PageIndex(1));
    assert!(!cache.strict_revoke(DomId(2), &driver.file, page, frame));
    xen.unmap(granter, gref);
    driver.let_go(1);
    let write = driver.grant(1, 1, Access::ReadWrite, false).unwrap();
    assert_eq!(
        (write.at, driver.frames[&1]),
        (Where::Home, frame),
        "in place"
    );
    let (granter, gref) = (write.granter.unwrap(), write.gref.unwrap());
    xen.write(DomId(1), granter, gref, 98, b"over");
    driver.rig.audit();
    // Synced while it is mapped, and never past the file's end.
    driver.sync(Some(1), true).unwrap();
    assert_eq!(driver.host()[PAGE + 98..], *b"ov");
    xen.unmap(granter, gref);
    driver.let_go(1);
    let read = driver.grant(2, 1, Access::ReadOnly, false).unwrap();
    let seen = xen.map(DomId(2), read.granter.unwrap(), read.gref.unwrap());
    assert_eq!(
        seen.unwrap()[98..104],
        *b"ov\0\0\0\0",
        "what is past the end is nobody's"
    );
    xen.unmap(read.granter.unwrap(), read.gref.unwrap());
    driver.take_from(0);
    driver.rig.audit();
}

#[test]
fn local_a_frame_that_a_dead_writer_has_mapped_rests() {
    let (mut driver, xen) = on_entries(128, &content(7, 2 * PAGE));
    let write = driver.grant(1, 0, Access::ReadWrite, false).unwrap();
    let (granter, gref) = (write.granter.unwrap(), write.gref.unwrap());
    xen.write(DomId(1), granter, gref, 0, b"last words");
    let old = driver.frames[&0];
    let (cache, page) = (driver.cache(), PageIndex(0));
    assert!(!cache.strict_seize(DomId(1), &driver.file, page, old));
    cache.strict_copy(&driver.file, page, old);
    let copy = driver.placed(0).unwrap();
    assert_ne!(copy, old);
    driver.frames.insert(0, copy);
    driver.held.remove(&0);
    cache.guest_fenced(who(1));
    xen.write(DomId(1), granter, gref, 0, b"from beyond");
    driver.rig.audit();
    assert_eq!(cache.stats().frames_quarantined, 1);
    driver.save(0).unwrap();
    assert_eq!(&driver.host()[..10], b"last words");
    let read = driver.grant(2, 0, Access::ReadOnly, false).unwrap();
    let (granter2, gref2) = (read.granter.unwrap(), read.gref.unwrap());
    let seen = xen.map(DomId(2), granter2, gref2).unwrap();
    assert_eq!(&seen[..10], b"last words");
    assert!(!cache.strict_drained(DomId(1), old, false));
    xen.unmap(granter, gref);
    assert!(cache.strict_drained(DomId(1), old, false));
    cache.strict_free(old);
    assert_eq!(cache.stats().frames_quarantined, 0);
    xen.unmap(granter2, gref2);
    driver.take_from(0);
    driver.rig.audit();
    assert_eq!(cache.stats().frames_free, 128);
}
