//! The cache over a backend that behaves as Xen's: entries instead of descriptors, mappings that end
//! when the hypervisor says so. What these tests cannot show: that Xen is as the stand-in is; the
//! laboratory's checks do.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
#[path = "common/hypervisor.rs"]
mod hypervisor;

use common::*;
use copage_cache::*;
use copage_grants::*;
use hypervisor::{Hypervisor, TABLE_FRAMES};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn rig(frames_max: u32) -> (Rig, Arc<Hypervisor>) {
    let xen = Hypervisor::new();
    (Rig::with(xen.clone(), config(frames_max)), xen)
}

/// One where a test that this machine starves for a while still keeps the deadline.
fn slow_rig(frames_max: u32) -> (Rig, Arc<Hypervisor>, Duration) {
    let xen = Hypervisor::new();
    let config = CacheConfig {
        recall_deadline_ms: 1000,
        ..config(frames_max)
    };
    let deadline = Duration::from_millis(config.recall_deadline_ms.into());
    (Rig::with(xen.clone(), config), xen, deadline)
}

/// Faults a range as a guest does; what it was told.
fn told(rig: &mut Rig, file: &Arc<CachedFile>, dom: Holder, range: (u64, u32)) -> GrantedRefs {
    let generation = rig.cache.current(file).generation;
    match rig.fault_of(file, dom, generation, range, FaultHint::Random) {
        Ok(FaultDone::Granted {
            first,
            count,
            grants: Some(grants),
            ..
        }) => {
            assert_eq!((first.0, count as usize), (range.0, grants.refs.len()));
            grants
        }
        other => panic!("{other:?}"),
    }
}

fn map(xen: &Hypervisor, who: Holder, told: &GrantedRefs) -> Vec<Option<Vec<u8>>> {
    let refs = told.refs.iter();
    refs.map(|gref| xen.map(who.dom, told.granter, *gref))
        .collect()
}

fn unmap(xen: &Hypervisor, told: &GrantedRefs) {
    told.refs
        .iter()
        .for_each(|gref| xen.unmap(told.granter, *gref));
}

/// The refs lead to the pages, one granter an answer, whatever users share one class.
#[test]
fn local_answers_carry_the_entries_of_one_table() {
    let (mut rig, xen) = rig(128);
    let pages = 100;
    let data = content(1, pages * PAGE);
    rig.write("f", &data);
    let other_user = Holder {
        class: TrustClass(1000),
        ..who(2)
    };
    let mut granters = Vec::new();
    for guest in [who(1), other_user] {
        let file = rig.map("f", guest);
        let (mut at, mut answers) = (0, 0);
        while at < pages {
            let got = told(&mut rig, &file, guest, (at as u64, (pages - at) as u32));
            for (n, page) in map(&xen, guest, &got).into_iter().enumerate() {
                assert_eq!(page.unwrap(), data[(at + n) * PAGE..][..PAGE]);
            }
            at += got.refs.len();
            answers += 1;
            granters.push(got.granter);
        }
        assert!(answers >= pages.div_ceil(TABLE_FRAMES as usize));
    }
    granters.sort_unstable();
    granters.dedup();
    assert_eq!(granters.len(), 3);
    assert_eq!(rig.cache.stats().files, 1, "one class");
    rig.audit();
}

#[test]
fn local_pinning_is_refused_so_that_a_mount_falls_back() {
    let (mut rig, _) = rig(128);
    rig.write("f", &content(1, PAGE));
    let refused = rig.open("f", OpenHow::Pin, who(1)).unwrap_err();
    assert!(matches!(refused, CacheError::PinNoDescriptor), "{refused}");
    assert!(refused.is_pin_refusal());
    assert_eq!(refused.errno(), libc::EOPNOTSUPP);
    let file = rig.map("f", who(1));
    let generation = rig.cache.current(&file).generation;
    assert!(rig.cache.descriptor(&file, generation).is_err());
    let read = rig.open("f", OpenHow::Read, who(1)).unwrap().file;
    assert_eq!(
        rig.read(&read, who(1), 0, 10).unwrap(),
        content(1, PAGE)[..10]
    );
}

/// The guest says that it unmapped; its kernel does so a little later.
#[test]
fn local_a_late_unmap_is_looked_at_again() {
    let (mut rig, xen) = rig(128);
    rig.write("f", &content(1, 8 * PAGE));
    let a = who(1);
    let file = rig.map("f", a);
    let generation = rig.cache.current(&file).generation;
    let got = told(&mut rig, &file, a, (0, 8));
    map(&xen, a, &got);
    rig.cache.unmapped(&file, a, generation, PageIndex(0), 8);
    assert_eq!(xen.grant_count(a.dom), 8, "the table is the truth");
    rig.pump(Duration::from_millis(60));
    assert_eq!(xen.grant_count(a.dom), 8);
    unmap(&xen, &got);
    rig.until("free entries", |_| xen.grant_count(a.dom) == 0);
    rig.audit();
}

/// A page that is mapped anew after it was said to be unmapped keeps its entry.
#[test]
fn local_a_page_that_is_wanted_again_keeps_its_entry() {
    let (mut rig, xen) = rig(128);
    rig.write("f", &content(1, 4 * PAGE));
    let a = who(1);
    let file = rig.map("f", a);
    let generation = rig.cache.current(&file).generation;
    let got = told(&mut rig, &file, a, (0, 4));
    map(&xen, a, &got);
    rig.cache.unmapped(&file, a, generation, PageIndex(0), 4);
    let again = told(&mut rig, &file, a, (2, 1));
    assert_eq!(again.refs, got.refs[2..3]);
    unmap(&xen, &got);
    for _ in 0..10 {
        rig.pump(Duration::from_millis(20));
    }
    assert!(map(&xen, a, &again)[0].is_some());
    rig.audit();
}

/// Memory is short; guests ack at once, their kernels unmap later: frames come, and no page is lost.
#[test]
fn local_recalled_frames_come_when_the_hypervisor_says_so() {
    let (mut rig, xen) = rig(64);
    let data = content(1, 200 * PAGE);
    rig.write("f", &data);
    let a = who(1);
    let file = rig.map("f", a);
    let mut mapped: Vec<GrantedRefs> = Vec::new();
    for page in 0..200 {
        if mapped.len() >= 40 {
            // The kernel catches up with what was acked, all but the newest few.
            mapped.drain(..36).for_each(|old| unmap(&xen, &old));
        }
        let got = told(&mut rig, &file, a, (page, 1));
        let seen = map(&xen, a, &got).remove(0);
        // Revoked before it was mapped: it faults again.
        let Some(seen) = seen else { continue };
        assert_eq!(seen, data[page as usize * PAGE..][..PAGE]);
        mapped.push(got);
    }
    assert!(rig.recalls > 0);
    rig.audit();
}

/// Acks and keeps the pages mapped: others get frames all the same, and its own come back when it ends.
#[test]
fn local_who_acks_and_keeps_pages_starves_nobody() {
    let (mut rig, xen) = rig(64);
    let (mine, yours) = (content(1, 40 * PAGE), content(2, 100 * PAGE));
    rig.write("mine", &mine);
    rig.write("yours", &yours);
    let (liar, other) = (who(1), who(2));
    let file = rig.map("mine", liar);
    let mut kept = Vec::new();
    for page in 0..40 {
        let got = told(&mut rig, &file, liar, (page, 1));
        assert!(map(&xen, liar, &got)[0].is_some());
        kept.push(got);
    }
    rig.cache.reclaim(40);
    rig.until("quarantine", |s| s.frames_quarantined >= 30);
    let theirs = rig.map("yours", other);
    for page in 0..100 {
        let got = told(&mut rig, &theirs, other, (page, 1));
        if let Some(seen) = map(&xen, other, &got).remove(0) {
            assert_eq!(seen, yours[page as usize * PAGE..][..PAGE]);
        }
        unmap(&xen, &got);
    }
    rig.audit();
    // What it kept never changed, nor was it granted to anybody.
    for (page, got) in kept.iter().enumerate() {
        let seen = xen.map(liar.dom, got.granter, got.refs[0]);
        assert!(seen.is_none_or(|seen| seen == mine[page * PAGE..][..PAGE]));
    }
    kept.iter().for_each(|got| unmap(&xen, got));
    rig.cache.guest_ended(liar);
    rig.until("no quarantine", |s| s.frames_quarantined == 0);
    assert_eq!(xen.grant_count(liar.dom), 0);
    rig.audit();
}

/// The budget is cut to a small part of what a guest maps, which lets go of what it is asked for in time, but
/// late and without a word, so that it takes several rounds: whoever waits for a page meanwhile gets it in the
/// end.
#[test]
fn local_a_cut_of_the_budget_fails_no_fault() {
    let (mut rig, xen, deadline) = slow_rig(1500);
    let data = content(1, 1400 * PAGE);
    rig.write("f", &data);
    rig.write("g", &content(2, 10 * PAGE));
    let (a, b) = (who(1), who(2));
    let file = rig.map("f", a);
    let wanted = rig.map("g", b);
    let mut mapped = Vec::new();
    while mapped.len() < 1400 {
        let told = told(&mut rig, &file, a, (mapped.len() as u64, 20));
        map(&xen, a, &told);
        mapped.extend(told.refs.iter().map(|gref| (told.granter, *gref)));
    }
    rig.acks = false;
    rig.cache.set_frames_max(64).unwrap();
    let ticket = rig.ticket();
    let generation = rig.cache.current(&wanted).generation;
    let first = PageIndex(0);
    let asked = (generation, first, 1, FaultHint::Random);
    let outcome = rig
        .cache
        .fault(ticket, &wanted, b, asked.0, asked.1, asked.2, asked.3);
    assert!(matches!(outcome, FaultOutcome::Pending), "{outcome:?}");
    // What is kept is given up at the third deadline, and a fault waits for two.
    let (begin, lets_go) = (Instant::now(), deadline + deadline / 10);
    while rig.cache.stats().frames_resident >= 64 {
        rig.pump(Duration::from_millis(5));
        let late = |(_, _, at): &&(PageIndex, u32, Instant)| at.elapsed() >= lets_go;
        let due = rig.asked.iter().take_while(late).count();
        for (first, count, _) in rig.asked.drain(..due) {
            let pages = first.0 as usize..first.0 as usize + count as usize;
            for (granter, gref) in &mapped[pages] {
                xen.unmap(*granter, *gref);
            }
        }
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "the budget is never kept"
        );
    }
    assert!(begin.elapsed() > 2 * deadline, "one round did");
    match rig.wait(ticket) {
        CacheEvent::Faulted { result, .. } => assert!(result.is_ok(), "{result:?}"),
        other => panic!("{other:?}"),
    }
    rig.audit();
}

/// The budget is cut below what a guest maps that acks and keeps it all; `others` pages of one that lets go are
/// younger. What a third is answered that wants a page meanwhile.
fn answer_beside_a_liar(others: u64) -> Result<FaultDone, CacheError> {
    let (mut rig, xen, _) = slow_rig(140);
    let (liar, other, third) = (who(1), who(2), who(3));
    rig.write("f", &content(1, 130 * PAGE));
    rig.write("g", &content(2, PAGE));
    let file = rig.map("f", liar);
    rig.map("f", other);
    let wanted = rig.map("g", third);
    for page in 0..130 {
        let of = if page < 130 - others { liar } else { other };
        let told = told(&mut rig, &file, of, (page, 1));
        assert!(map(&xen, of, &told)[0].is_some());
        if of == other {
            unmap(&xen, &told);
        }
    }
    // No bank is to go: that has a way of its own.
    rig.cache.set_frames_max(97).unwrap();
    let generation = rig.cache.current(&wanted).generation;
    let answer = rig.fault_of(&wanted, third, generation, (0, 1), FaultHint::Random);
    rig.audit();
    answer
}

#[test]
fn local_a_cut_that_a_liar_stops_is_not_waited_for() {
    let answer = answer_beside_a_liar(0);
    assert!(matches!(answer, Err(CacheError::NoFrames)), "{answer:?}");
}

#[test]
fn local_a_cut_that_a_liar_slows_down_is_waited_for() {
    let answer = answer_beside_a_liar(90);
    assert!(
        matches!(answer, Ok(FaultDone::Granted { .. })),
        "{answer:?}"
    );
}

/// What a fenced guest has mapped counts as quarantined in that moment, and what it has not does not.
#[test]
fn local_what_a_fenced_guest_maps_is_quarantined_at_once() {
    let (mut rig, xen) = rig(128);
    rig.write("f", &content(1, 40 * PAGE));
    let (a, b) = (who(1), who(2));
    let file = rig.map("f", a);
    let other = rig.map("f", b);
    let kept = told(&mut rig, &file, a, (0, 10));
    map(&xen, a, &kept);
    told(&mut rig, &file, a, (10, 10));
    let others = told(&mut rig, &other, b, (30, 10));
    map(&xen, b, &others);
    rig.acks = false;
    rig.cache.guest_fenced(a);
    assert_eq!(rig.cache.stats().frames_quarantined, 10);
    rig.audit();
    unmap(&xen, &kept);
    rig.until("its frames", |s| s.frames_quarantined == 0);
    unmap(&xen, &others);
    rig.until("all frames", |s| s.homes_retired == 0);
    rig.audit();
}

/// A daemon that was killed left entries in use: their frames wait.
#[test]
fn local_frames_of_an_earlier_life_are_used_when_nobody_maps_them() {
    let (mut rig, xen) = rig(128);
    rig.write("f", &content(1, 20 * PAGE));
    let a = who(1);
    let file = rig.map("f", a);
    let got = told(&mut rig, &file, a, (0, 20));
    let kept: Vec<_> = map(&xen, a, &got).into_iter().take(20).collect();
    assert!(kept.iter().all(Option::is_some));
    let memory = xen.memory();
    drop(rig);

    let xen = Hypervisor::over(memory);
    let mut rig = Rig::with(xen.clone(), config(128));
    assert_eq!(rig.cache.stats().frames_quarantined, 20);
    let data = content(3, 300 * PAGE);
    rig.write("g", &data);
    let b = who(2);
    let file = rig.map("g", b);
    for page in 0..300 {
        // The stand-in asserts that nothing is stored where somebody maps.
        let told = told(&mut rig, &file, b, (page, 1));
        assert_eq!(
            map(&xen, b, &told)[0].as_ref().unwrap()[..],
            data[page as usize * PAGE..][..PAGE]
        );
        unmap(&xen, &told);
    }
    rig.audit();
    got.refs[..15]
        .iter()
        .for_each(|gref| xen.unmap(got.granter, *gref));
    rig.until("fifteen frames", |s| s.frames_quarantined == 5);
    rig.audit();
    unmap(&xen, &got);
    rig.until("all frames", |s| s.frames_quarantined == 0);
    rig.audit();
}
