//! Histories that nobody made, to see that the checker accepts what is right and rejects what is not.

use copage_tests::history::check::{Trouble, check};
use copage_tests::history::{Call, Op, Outcome};

fn op(guest: u32, call: Call, (begin_ns, end_ns): (u64, u64), outcome: Outcome) -> Op {
    let end = Some((end_ns, outcome));
    Op {
        guest,
        call,
        begin_ns,
        end,
    }
}

fn store(guest: u32, value: u64, when: (u64, u64)) -> Op {
    let (page, word) = (0, 0);
    op(
        guest,
        Call::Store { page, word, value },
        when,
        Outcome::Done,
    )
}

fn load(guest: u32, value: u64, when: (u64, u64)) -> Op {
    let (page, word) = (0, 0);
    let outcome = Outcome::Value(Some(value));
    op(guest, Call::Load { page, word }, when, outcome)
}

fn sync(guest: u32, when: (u64, u64)) -> Op {
    op(guest, Call::Sync, when, Outcome::Done)
}

fn resize(pages: u64, when: (u64, u64)) -> Op {
    op(9, Call::Resize { pages }, when, Outcome::Done)
}

fn without_end(op: Op) -> Op {
    Op { end: None, ..op }
}

fn killed(guest: u32, at_ns: u64, anew_ns: u64) -> Trouble {
    Trouble::Killed {
        guest,
        at_ns,
        anew_ns,
    }
}

fn accepts(ops: &[Op], troubles: &[Trouble]) {
    let summary = check(ops, troubles, true).expect("right");
    assert_eq!(summary.skipped, 0);
}

fn rejects(ops: &[Op], troubles: &[Trouble]) {
    assert!(check(ops, troubles, true).is_err(), "wrong, and accepted");
}

#[test]
fn local_one_after_the_other() {
    let ops = [load(1, 0, (0, 1)), store(0, 7, (2, 3)), load(1, 7, (4, 5))];
    accepts(&ops, &[]);
    let summary = check(&ops, &[], true).expect("right");
    assert_eq!((summary.words, summary.ops, summary.of_others), (1, 3, 1));
}

#[test]
fn local_old_content_after_a_store_is_rejected() {
    rejects(&[store(0, 7, (2, 3)), load(1, 0, (4, 5))], &[]);
}

#[test]
fn local_at_the_same_time_either_will_do() {
    for seen in [0, 7] {
        accepts(&[store(0, 7, (2, 9)), load(1, seen, (4, 5))], &[]);
    }
}

#[test]
fn local_content_that_goes_back_is_rejected() {
    let ops = [store(0, 7, (0, 9)), load(1, 7, (1, 2)), load(2, 0, (3, 4))];
    rejects(&ops, &[]);
}

#[test]
fn local_content_that_nobody_stored_is_rejected() {
    rejects(&[load(1, 3, (3, 4))], &[]);
}

#[test]
fn local_two_readers_see_one_order() {
    let stores = [store(0, 7, (0, 9)), store(1, 8, (0, 9))];
    let seen = [
        load(2, 7, (1, 2)),
        load(2, 8, (3, 4)),
        load(3, 8, (1, 2)),
        load(3, 7, (5, 6)),
    ];
    rejects(&[&stores[..], &seen].concat(), &[]);
}

#[test]
fn local_a_store_without_an_end_happened_or_not() {
    let store = without_end(store(0, 7, (2, 3)));
    accepts(&[store, load(1, 0, (4, 5)), load(1, 7, (6, 7))], &[]);
    rejects(&[store, load(1, 7, (4, 5)), load(1, 0, (6, 7))], &[]);
}

#[test]
fn local_only_what_was_synced_outlives_the_daemon() {
    let (stored, late) = (store(0, 7, (0, 1)), store(0, 8, (5, 6)));
    let crash = [killed(0, 10, 20)];
    // Seen by who stored it, and gone.
    accepts(&[stored, load(0, 7, (2, 3)), load(1, 0, (30, 31))], &crash);
    // Synced, and gone.
    let synced = [stored, sync(1, (2, 3))];
    rejects(&[&synced[..], &[load(1, 0, (30, 31))]].concat(), &crash);
    // The sync came before the store, or never ended.
    let synced = [stored, sync(1, (2, 3)), late, load(1, 7, (30, 31))];
    accepts(&synced, &crash);
    let cut = [stored, without_end(sync(1, (2, 3))), load(1, 0, (30, 31))];
    accepts(&cut, &crash);
    // Gone, and there again.
    let back = [stored, load(1, 0, (30, 31)), load(1, 7, (32, 33))];
    rejects(&back, &crash);
}

#[test]
fn local_what_another_saw_outlives_the_daemon() {
    let ops = [
        store(0, 7, (0, 1)),
        load(1, 7, (2, 3)),
        load(1, 0, (30, 31)),
    ];
    let crash = [killed(0, 10, 20)];
    rejects(&ops, &crash);
    check(&ops, &crash, false).expect("shared for writing, that is allowed");
}

#[test]
fn local_a_fenced_guest_is_not_asked() {
    let fenced = [Trouble::Fenced {
        guest: 0,
        from_ns: 10,
    }];
    let before = [store(0, 7, (0, 1)), store(1, 8, (11, 12))];
    accepts(&[&before[..], &[load(0, 7, (20, 21))]].concat(), &fenced);
    let late = [store(0, 7, (20, 21)), load(1, 0, (30, 31))];
    accepts(&late, &fenced);
    // What it stored before is not lost.
    rejects(&[store(0, 7, (0, 1)), load(1, 0, (30, 31))], &fenced);
}

#[test]
fn local_what_is_cut_off_does_not_come_back() {
    let cut = [store(0, 7, (0, 1)), resize(0, (2, 3)), resize(1, (4, 5))];
    accepts(&[&cut[..], &[load(1, 0, (6, 7))]].concat(), &[]);
    rejects(&[&cut[..], &[load(1, 7, (6, 7))]].concat(), &[]);
    let meanwhile = op(
        1,
        Call::Read { page: 0, word: 0 },
        (3, 4),
        Outcome::Value(None),
    );
    accepts(&[&cut[..], &[meanwhile]].concat(), &[]);
}
