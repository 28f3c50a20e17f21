//! The n-th call of the backend fails, or the host's file does: who asked is told, nothing is lost,
//! and what was refused works later. The watching backend also reports calls no backend allows.
//!
//! Cannot show: failures inside the kernel that leave a call half done.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::*;
use copage_cache::*;
use copage_grants::failing::{Call, FailWith, FailingBackend};
use std::sync::Arc;
use std::time::Duration;

fn rig(frames: u32) -> (Rig, Arc<FailingBackend>) {
    let failing = Arc::new(FailingBackend::new(local(true)));
    (Rig::with(failing.clone(), config(frames)), failing)
}

fn clean(rig: &mut Rig, failing: &FailingBackend) {
    rig.audit();
    assert!(
        failing.violations().is_empty(),
        "{:#?}",
        failing.violations()
    );
}

#[test]
fn local_a_failed_store_is_told_and_tried_again() {
    let (mut rig, failing) = rig(256);
    let data = content(1, 40 * PAGE);
    rig.write("f", &data);
    let a = who(1);
    let file = rig.map("f", a);
    failing.fail_nth(Call::Store, 1, FailWith::NoMemory);
    let refused = rig.fault(&file, a, 0, 8).unwrap_err();
    assert_eq!(refused.errno(), libc::ENOMEM, "{refused}");
    clean(&mut rig, &failing);
    assert_eq!(rig.cache.stats().frames_free, 256);
    for page in 0..40 {
        rig.check(&file, a, page, &data);
    }
    clean(&mut rig, &failing);
}

#[test]
fn local_a_failed_grant_leaves_pages_and_no_grant() {
    let (mut rig, failing) = rig(256);
    let data = content(2, 40 * PAGE);
    rig.write("f", &data);
    let a = who(1);
    let file = rig.map("f", a);
    failing.fail_nth(Call::Grant, 1, FailWith::Errno(libc::EIO));
    assert_eq!(rig.fault(&file, a, 0, 8).unwrap_err().errno(), libc::EIO);
    assert_eq!(rig.backend.grant_count(a.dom), 0);
    clean(&mut rig, &failing);
    rig.check(&file, a, 3, &data);
    clean(&mut rig, &failing);
}

#[test]
fn local_failed_reclaim_loses_no_page_and_comes_later() {
    let (mut rig, failing) = rig(64);
    let data = content(3, 200 * PAGE);
    rig.write("f", &data);
    let a = who(1);
    let file = rig.map("f", a);
    for n in 1..6 {
        failing.fail_nth(Call::ForceOut, n, FailWith::Errno(libc::EIO));
        failing.fail_nth(Call::Discard, n, FailWith::Errno(libc::EIO));
        for page in 0..100 {
            rig.check(&file, a, page * 2, &data);
        }
        clean(&mut rig, &failing);
    }
    failing.fail_from(Call::ForceOut, 1, FailWith::Errno(libc::EIO));
    failing.fail_from(Call::Discard, 1, FailWith::Errno(libc::EIO));
    rig.cache.reclaim(10);
    rig.cache.guest_fenced(a);
    clean(&mut rig, &failing);
    failing.fail_none(Call::ForceOut);
    failing.fail_none(Call::Discard);
    rig.until("old homes end", |s| s.homes_retired == 0);
    clean(&mut rig, &failing);
    assert_eq!(rig.backend.grant_count(a.dom), 0);
}

#[test]
fn local_a_home_that_cannot_be_made_refuses_the_open_only() {
    let (mut rig, failing) = rig(64);
    let data = content(4, 5 * PAGE);
    rig.write("f", &data);
    failing.fail_nth(Call::OpenHome, 1, FailWith::NoMemory);
    assert_eq!(
        rig.open("f", OpenHow::Map, who(1)).unwrap_err().errno(),
        libc::ENOMEM
    );
    rig.pump(Duration::from_millis(1));
    let file = rig.map("f", who(1));
    rig.check(&file, who(1), 0, &data);
    // The next generation's home fails once: who waits is told, who asks again is served.
    let path = rig.path("f");
    failing.fail_nth(Call::OpenHome, 1, FailWith::NoMemory);
    let new = content(5, 5 * PAGE);
    rig.host(|| std::fs::write(&path, &new).unwrap());
    let mut served = false;
    for _ in 0..5 {
        served |= rig.fault(&file, who(1), 0, 1).is_ok();
    }
    assert!(served);
    rig.check(&file, who(1), 0, &new);
    clean(&mut rig, &failing);
}

#[test]
fn local_pins_that_fail_are_undone() {
    let (mut rig, failing) = rig(256);
    rig.write("f", &content(6, 100 * PAGE));
    for (call, with) in [
        (Call::Store, FailWith::NoMemory),
        (Call::Grant, FailWith::TableFull),
        (Call::Grant, FailWith::Errno(libc::EIO)),
    ] {
        failing.fail_from(call, 1, with);
        assert!(rig.open("f", OpenHow::Pin, who(1)).is_err());
        failing.fail_none(call);
        clean(&mut rig, &failing);
        let stats = rig.cache.stats();
        assert_eq!(stats.frames_pinned, 0);
        assert!(
            stats.guests.iter().all(|g| g.pinned_pages == 0),
            "{stats:?}"
        );
    }
    let done = rig.open("f", OpenHow::Pin, who(1)).unwrap();
    rig.cache.close(&done.file, OpenHow::Pin, who(1));
    clean(&mut rig, &failing);
}

#[test]
fn local_a_file_cut_short_under_a_writer_never_shows_old_bytes() {
    let (mut rig, failing) = rig(256);
    let data = content(7, 64 * PAGE);
    rig.write("f", &data);
    let a = who(1);
    let file = rig.map("f", a);
    rig.check(&file, a, 0, &data);
    let mut host = std::fs::File::options();
    host.write(true);
    for pages in (1..64).rev().step_by(9) {
        let path = rig.path("f");
        let host = host.clone();
        rig.host(move || {
            host.open(path)
                .unwrap()
                .set_len(pages * PAGE as u64 + 7)
                .unwrap()
        });
        let generation = rig.cache.current(&file).generation;
        // Asked with what the guest knew: refused, stale, or right, never bytes past the end.
        let _ = rig.fault_of(&file, a, generation, (pages + 1, 1), FaultHint::Random);
        rig.check(&file, a, pages - 1, &data);
        clean(&mut rig, &failing);
    }
}
