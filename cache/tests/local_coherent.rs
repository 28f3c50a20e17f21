//! Coherent files on the local backend: pages move between guests and the host's file, and nothing is lost.
//!
//! Cannot show: what a disk does that says it has written and has not.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
#[path = "common/strict.rs"]
mod strict;

use common::*;
use copage_cache::*;
use copage_grants::*;
use std::time::Duration;
use strict::*;

#[test]
fn local_what_one_stores_another_loads_and_the_host_has() {
    let data = content(1, 5 * PAGE + 100);
    let mut driver = Driver::new(256, &data, 3);
    assert_eq!(driver.load(2, 1).unwrap(), data[PAGE..2 * PAGE]);
    assert_eq!(driver.load(3, 5).unwrap(), data[5 * PAGE..]);
    driver.store(1, 1, 10, b"hello").unwrap();
    driver.rig.audit();
    // Nobody reads meanwhile, and the host does not have it yet.
    assert_eq!(driver.host(), data);
    let seen = driver.load(2, 1).unwrap();
    assert_eq!(&seen[10..15], b"hello");
    let mut wanted = data.clone();
    wanted[PAGE + 10..PAGE + 15].copy_from_slice(b"hello");
    assert_eq!(driver.host(), wanted, "saved before another saw it");
    driver.store(2, 5, 0, b"tail").unwrap();
    driver.sync(Some(2), true).unwrap();
    wanted[5 * PAGE..5 * PAGE + 4].copy_from_slice(b"tail");
    assert_eq!(driver.host(), wanted, "synced while it is held");
    driver.rig.audit();
    driver.take_from(0);
    driver.rig.audit();
    assert_eq!(driver.rig.cache.stats().frames_free, 256);
    assert_eq!(driver.host_changed, 0, "its own writes are its own");
}

#[test]
fn local_a_page_that_is_granted_for_writing_is_out_of_readers_sight() {
    let mut driver = Driver::new(256, &content(2, 2 * PAGE), 2);
    driver.load(1, 0).unwrap();
    let home = driver
        .rig
        .cache
        .descriptor(
            &driver.file,
            driver.cache().current(&driver.file).generation,
        )
        .unwrap();
    let granted = driver.grant(2, 0, Access::ReadWrite, false).unwrap();
    assert_eq!(granted.at, Where::Arena(DomId(2)));
    let mut seen = vec![7; PAGE];
    std::os::unix::fs::FileExt::read_at(&std::fs::File::from(home), &mut seen, 0).unwrap();
    assert_eq!(seen, vec![0; PAGE], "a hole");
    // Its own reading is where it has the page.
    let granted = driver.grant(2, 0, Access::ReadOnly, false).unwrap();
    assert_eq!(granted.at, Where::Arena(DomId(2)));
}

#[test]
fn local_a_writer_keeps_its_page_until_it_says_that_it_let_go() {
    let mut driver = Driver::new(256, &content(3, PAGE), 2);
    driver.store(1, 0, 0, b"x").unwrap();
    let frame = driver.frames[&0];
    let cache = driver.cache();
    let page = PageIndex(0);
    assert!(!cache.strict_revoke(DomId(1), &driver.file, page, frame));
    assert!(
        cache.strict_revoke(DomId(2), &driver.file, page, frame),
        "has none"
    );
    // Gone, it is unmapped by force, and what it stored is the page.
    assert!(cache.strict_seize(DomId(1), &driver.file, page, frame));
    driver.held.clear();
    // Whoever has the home does not see it before it is saved.
    let generation = cache.current(&driver.file).generation;
    assert_eq!(driver.rig.page(&driver.file, generation, 0).unwrap()[0], 0);
    driver.save(0).unwrap();
    assert_eq!(driver.load(2, 0).unwrap()[0], b'x');
    driver.rig.audit();
}

#[test]
fn local_several_write_one_page() {
    let mut driver = Driver::new(256, &content(4, PAGE), 3);
    let granted = driver.grant(1, 0, Access::ReadWrite, true).unwrap();
    assert_eq!(granted.at, Where::Common);
    driver.grant(2, 0, Access::ReadWrite, true).unwrap();
    driver.store_at(1, Where::Common, 0, 0, b"ab");
    driver.store_at(2, Where::Common, 0, 2, b"cd");
    driver.rig.audit();
    let frame = driver.frames[&0];
    let cache = driver.cache();
    // One of them is gone: it cannot be taken from it alone.
    assert!(!cache.strict_seize(DomId(1), &driver.file, PageIndex(0), frame));
    assert!(!cache.strict_drained(DomId(1), frame, false));
    driver.sync(None, false).unwrap();
    assert_eq!(&driver.host()[..4], b"abcd");
    assert_eq!(&driver.load(3, 0).unwrap()[..4], b"abcd");
    driver.rig.audit();
}

/// The bytes of a page in a file that a guest has a descriptor of.
fn seen_in(file: &std::fs::File, page: u64) -> [u8; 4] {
    let mut seen = [0; 4];
    std::os::unix::fs::FileExt::read_at(file, &mut seen, page * PAGE as u64).unwrap();
    seen
}

#[test]
fn local_a_page_that_is_copied_stays_nowhere_where_others_see_it() {
    let without_force = coherent_rig(local(false), config(256));
    let mut driver = Driver::with(without_force, &content(4, PAGE), 3);
    let cache = driver.cache();
    let file = driver.file.clone();
    let generation = cache.current(&file).generation;
    let home = std::fs::File::from(cache.descriptor(&file, generation).unwrap());
    driver.load(1, 0).unwrap();
    let frame = driver.frames[&0];
    assert_ne!(seen_in(&home, 0), [0; 4]);
    // A reader is gone, and the table does not show that it let go: before somebody writes, the page moves.
    assert!(!cache.strict_seize(DomId(1), &file, PageIndex(0), frame));
    cache.strict_copy(&file, PageIndex(0), frame);
    assert_eq!(driver.placed(0).unwrap(), frame);
    assert_eq!(seen_in(&home, 0), [0; 4], "others would go on reading it");
    driver.held.clear();
    driver.rig.audit();
    driver.store(2, 0, 0, b"next").unwrap();
    driver.let_go(0);
    assert_eq!(&driver.load(3, 0).unwrap()[..4], b"next");
    driver.rig.audit();
}

#[test]
fn local_what_the_gone_have_in_common_is_used_no_more() {
    let mut driver = Driver::new(256, &content(4, 2 * PAGE), 3);
    let cache = driver.cache();
    let file = driver.file.clone();
    let (zero, one) = (PageIndex(0), PageIndex(1));
    for page in [0, 1] {
        driver
            .grant(1 + page as u16, page, Access::ReadWrite, true)
            .unwrap();
        driver.grant(3, page, Access::ReadWrite, true).unwrap();
    }
    assert!(cache.strict_can_share(&file));
    let (serial, fd) = cache.common(&file).unwrap();
    let common = std::fs::File::from(fd);
    driver.store_at(1, Where::Common, 0, 0, b"last");
    let frame = driver.frames[&0];
    assert!(!cache.strict_seize(DomId(1), &file, zero, frame));
    let pages = driver.wait_for("WantBack", |event| match event {
        CacheEvent::WantBack { pages, .. } => Some(pages.clone()),
        _ => None,
    });
    assert_eq!(pages, [zero, one], "all that is there is wanted back");
    assert!(!cache.strict_can_share(&file));
    // The one that lives lets go, and the page moves.
    cache.strict_unmapped(DomId(3), &file, zero, frame);
    assert!(cache.strict_revoke(DomId(3), &file, zero, frame));
    cache.strict_copy(&file, zero, frame);
    assert_eq!(driver.placed(0).unwrap(), frame);
    driver.held.remove(&0);
    driver.rig.audit();
    // Of one page others write there still, so it is not replaced.
    assert!(!cache.strict_can_share(&file));
    driver.let_go(1);
    assert!(cache.strict_can_share(&file));
    let granted = driver.grant(3, 0, Access::ReadWrite, true).unwrap();
    assert_eq!((granted.at, granted.serial), (Where::Common, serial + 1));
    std::os::unix::fs::FileExt::write_at(&common, b"gone", 0).unwrap();
    driver.let_go(0);
    assert_eq!(&driver.load(2, 0).unwrap()[..4], b"last");
    driver.rig.audit();
}

#[test]
fn local_the_daemon_stores_out_of_sight_and_loads() {
    let data = content(5, PAGE + 10);
    let mut driver = Driver::new(256, &data, 1);
    driver.load(1, 1).unwrap();
    driver.let_go(1);
    let frame = driver.frames[&1];
    let cache = driver.cache();
    let page = PageIndex(1);
    let home = cache
        .descriptor(&driver.file, cache.current(&driver.file).generation)
        .unwrap();
    cache
        .strict_write(&driver.file, page, frame, 4, b"daemon")
        .unwrap();
    let past = cache.strict_write(&driver.file, page, frame, 8, b"daemon");
    assert_eq!(past.unwrap_err().errno(), libc::ERANGE);
    let mut seen = vec![7; 10];
    std::os::unix::fs::FileExt::read_at(&std::fs::File::from(home), &mut seen, 4096).unwrap();
    assert_eq!(seen, vec![0; 10], "not saved, so not seen");
    let mut read = [0; 6];
    cache
        .strict_read(&driver.file, page, frame, 4, &mut read)
        .unwrap();
    assert_eq!(&read, b"daemon");
    driver.save(1).unwrap();
    assert_eq!(&driver.load(1, 1).unwrap()[4..], b"daemon");
    assert_eq!(&driver.host()[PAGE + 4..], b"daemon");
    driver.rig.audit();
}

#[test]
fn local_an_open_for_writing_is_refused_where_nobody_writes() {
    let mut rig = Rig::new(256);
    rig.write("f", b"x");
    let refused = rig.open_to("f", OpenHow::Map, who(1), true).unwrap_err();
    assert_eq!(refused.errno(), libc::EROFS);
    let mut rig = coherent_rig(local(true), config(256));
    rig.write("f", b"x");
    std::fs::create_dir(rig.path("d")).unwrap();
    let refused = rig.open_to("d", OpenHow::Map, who(1), true).unwrap_err();
    assert_eq!(refused.errno(), libc::EISDIR);
    let refused = rig.open_to("f", OpenHow::Pin, who(1), true).unwrap_err();
    assert!(refused.is_pin_refusal());
    assert!(rig.open_to("f", OpenHow::Read, who(1), true).is_ok());
}

#[test]
fn local_a_file_is_mapped_by_guests_of_one_class_at_a_time() {
    let mut driver = Driver::new(256, &content(6, 3 * PAGE), 1);
    let other = Holder {
        class: TrustClass(7),
        ..who(9)
    };
    let refused = driver.rig.open_to("f", OpenHow::Map, other, true);
    assert_eq!(refused.unwrap_err().errno(), libc::EACCES);
    driver.store(1, 2, 0, b"mine").unwrap();
    driver.let_go(2);
    driver.cache().close(&driver.file, OpenHow::Map, who(1));
    // Its pages are asked for, and then it is the other's.
    let node = driver.rig.node("f");
    let ticket = driver.rig.ticket();
    driver.cache().open(ticket, node, OpenHow::Map, other, true);
    driver.rig.pump(Duration::from_millis(50));
    driver.serve();
    match driver.rig.wait(ticket) {
        CacheEvent::Opened { result, .. } => assert_eq!(result.unwrap().state.generation, 2),
        other => panic!("{other:?}"),
    }
    assert_eq!(&driver.host()[2 * PAGE..2 * PAGE + 4], b"mine");
    driver.rig.audit();
}
