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
