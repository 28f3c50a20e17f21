//! What guests see of one file that all of them write, against what one file would have shown: each
//! operation at one moment between its begin and its end.
//!
//! Cannot show: more than what happened in the runs, which are short and at random; order between words
//! (each is checked by itself, which is enough for each operation being at one moment); stores torn within
//! a word.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "histories/made_up.rs"]
mod made_up;
#[path = "histories/runs.rs"]
mod runs;

use copage_tests::daemon::Setup;
use copage_tests::history::Plan;
use runs::{HALF_A_TERM, PLAN, Run, short_terms};
use std::time::Duration;

fn plain(force: bool) {
    let setup = Setup {
        force,
        ..Setup::default()
    };
    let mut run = Run::start(setup, PLAN);
    run.guests(3);
    run.finish(&format!("of three guests, force {force}"), true);
}

#[test]
fn local_three_guests() {
    plain(true);
}

#[test]
fn local_three_guests_without_force() {
    plain(false);
}

#[test]
fn local_two_pages_that_all_want() {
    let plan = Plan {
        pages: 2,
        slots: 120,
        slot_ns: 20_000_000,
        store_permille: 700,
        ..PLAN
    };
    let mut run = Run::start(Setup::default(), plan);
    run.guests(4);
    run.finish("of two pages that bounce", true);
}

#[test]
fn local_guests_are_killed() {
    let plan = Plan { slots: 100, ..PLAN };
    let mut run = Run::start(Setup::default(), plan);
    run.guests(3);
    for kill in 0..6 {
        std::thread::sleep(Duration::from_millis(537));
        run.kill(kill % 3);
    }
    run.finish("of guests that are killed", true);
}

#[test]
fn local_guests_are_stopped() {
    let plan = Plan { slots: 150, ..PLAN };
    let mut run = Run::start(short_terms(), plan);
    run.guests(4);
    std::thread::sleep(2 * HALF_A_TERM);
    run.stop(0);
    std::thread::sleep(HALF_A_TERM);
    run.resume(0);
    run.will_be_fenced(1);
    run.stop(1);
    std::thread::sleep(5 * HALF_A_TERM);
    run.resume(1);
    // One that the machine was too slow to let go on in time may have been fenced too.
    run.will_be_fenced(0);
    run.finish(
        "of guests that are stopped, for half a term and for longer",
        true,
    );
}

#[test]
fn local_the_daemon_is_killed() {
    let plan = Plan {
        slots: 150,
        sync_permille: 60,
        ..PLAN
    };
    let mut run = Run::start(short_terms(), plan);
    run.guests(3);
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(1700));
        run.kill_daemon();
    }
    let summary = run.finish("of a daemon that is killed", true);
    assert!(summary.doubtful > 0, "nothing was under way when it died");
}

#[test]
fn local_frames_are_scarce() {
    let plan = Plan { slots: 80, ..PLAN };
    let mut run = Run::start(Setup::default(), plan);
    run.guests(3);
    let mut admin = run.daemon.admin();
    while !run.is_over() {
        admin.reclaim(4);
        std::thread::sleep(Duration::from_millis(20));
    }
    run.finish("of pages that are taken back", true);
}

#[test]
fn local_the_file_gets_shorter_and_longer() {
    let plan = Plan {
        pages: 4,
        tail_pages: 4,
        slots: 80,
        ..PLAN
    };
    let mut run = Run::start(Setup::default(), plan);
    run.guests(2);
    run.guest(|plan| plan.resize_permille = 100);
    run.finish("of a file that gets shorter and longer", true);
}

/// Of few pages, which all store to nearly all the time, so that they bounce and are shared.
fn bouncing(slots: u64) -> Plan {
    Plan {
        pages: 2,
        slots,
        slot_ns: 20_000_000,
        store_permille: 850,
        message_permille: 50,
        ..PLAN
    }
}

fn sharing(setup: Setup) -> Setup {
    Setup {
        more: "share_bounced = true".into(),
        ..setup
    }
}

/// One that only reads, so that what is shared is taken from those who share it, now and then.
fn reader(run: &mut Run) {
    run.guest(|plan| {
        plan.store_permille = 0;
        plan.ops = 2;
    });
}

/// How often a page was granted to one that has it for writing with others.
fn shared(run: &Run) -> u64 {
    run.daemon.admin().stats().strict.granted_shared
}

/// On a machine that is slow for the moment pages hardly bounce, and a run says nothing of sharing: there is
/// another one then.
fn sharing_runs(run: impl Fn() -> u64) {
    let mut times = 0;
    for _ in 0..5 {
        times += run();
        println!("granted for writing with others: {times} times");
        if times >= 20 {
            return;
        }
    }
    panic!("pages were shared {times} times only");
}

fn shared_by(guests: u32, force: bool) -> u64 {
    let setup = Setup {
        force,
        ..Setup::default()
    };
    let mut run = Run::start(sharing(setup), bouncing(120));
    run.guests(guests);
    reader(&mut run);
    run.wait();
    let shared = shared(&run);
    run.finish(
        &format!("of pages that {guests} share, force {force}"),
        true,
    );
    shared
}

#[test]
fn local_three_guests_share() {
    sharing_runs(|| shared_by(3, true));
}

#[test]
fn local_three_guests_share_without_force() {
    sharing_runs(|| shared_by(3, false));
}

#[test]
fn local_two_pages_that_all_want_are_shared() {
    sharing_runs(|| shared_by(5, true));
}

fn guests_that_share_are_killed(force: bool) -> u64 {
    let setup = Setup {
        force,
        ..Setup::default()
    };
    let mut run = Run::start(sharing(setup), bouncing(170));
    run.guests(4);
    reader(&mut run);
    for kill in 0..8 {
        std::thread::sleep(Duration::from_millis(337));
        run.kill(kill % 2);
    }
    run.wait();
    let shared = shared(&run);
    run.finish(
        &format!("of guests that share and are killed, force {force}"),
        true,
    );
    shared
}

#[test]
fn local_guests_that_share_are_killed() {
    sharing_runs(|| guests_that_share_are_killed(true));
}

#[test]
fn local_guests_that_share_are_killed_without_force() {
    sharing_runs(|| guests_that_share_are_killed(false));
}

#[test]
fn local_guests_that_share_are_stopped() {
    sharing_runs(|| {
        let mut run = Run::start(sharing(short_terms()), bouncing(300));
        run.guests(4);
        reader(&mut run);
        std::thread::sleep(2 * HALF_A_TERM);
        run.stop(0);
        std::thread::sleep(HALF_A_TERM);
        run.resume(0);
        run.will_be_fenced(1);
        run.stop(1);
        std::thread::sleep(5 * HALF_A_TERM);
        run.resume(1);
        // One that the machine was too slow to let go on in time may have been fenced too.
        run.will_be_fenced(0);
        run.wait();
        let shared = shared(&run);
        run.finish("of guests that share and are stopped", true);
        shared
    });
}

#[test]
fn local_the_daemon_of_guests_that_share_is_killed() {
    sharing_runs(|| {
        let plan = Plan {
            sync_permille: 60,
            ..bouncing(300)
        };
        let mut run = Run::start(sharing(short_terms()), plan);
        run.guests(3);
        reader(&mut run);
        let mut times = 0;
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(1700));
            times += shared(&run);
            run.kill_daemon();
        }
        // What others have seen of a page that several write is not kept.
        let summary = run.finish("of guests that share and a daemon that is killed", false);
        assert!(summary.doubtful > 0, "nothing was under way when it died");
        times
    });
}
