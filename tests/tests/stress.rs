//! A million pages taken back under guests that read at random, and no wrong byte.
//!
//! Guests are processes (1, 2, 16 and 64 of them) that map pattern files, of which every word tells
//! what page and version it belongs to. Meanwhile pages are taken back in a tight loop, the budget
//! moves, and the host rewrites files: in place and by renaming.
//!
//! Cannot show: that no order of events gives wrong bytes, only that these millions did not; nor
//! anything of a machine with more cores than this one. Taking back is counted by the daemon, in
//! grants that ended; reading by the guests.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::Guest;
use copage_tests::orders::{Order, Watched};
use copage_tests::tree::{Tree, replace, rewrite_in_place};
use copage_tests::watch::Draw;
use std::time::{Duration, Instant};

/// Files, and pages of each: 16 MiB, twice the budget.
const FILES: u64 = 4;
const PAGES: u64 = 1024;
/// Recalled pages that all runs together must reach.
const RECALLS: u64 = 1_000_000;

/// One run.
struct Run {
    guests: u64,
    force: bool,
    /// Every use that the daemon makes of its backend is checked.
    watched: bool,
    /// It goes on until so many pages were taken back...
    recalls: u64,
    /// ...but no longer than this, in seconds.
    seconds_max: u64,
}

#[derive(Default)]
struct Sum {
    recalls: u64,
    pages: u64,
}

fn run(run: &Run, sum: &mut Sum) {
    let tree = Tree::new();
    for file in 0..FILES {
        tree.pattern(&format!("f{file}"), PAGES);
    }
    let setup = Setup {
        frames_mib: 16,
        force: run.force,
        fail: run.watched.then(String::new),
        ..Setup::default()
    };
    let mut daemon = Daemon::start(&tree, &setup);
    let mut admin = daemon.admin();
    admin.set_budget(8);
    let mut guests: Vec<Guest> = (0..run.guests)
        .map(|i| Guest::connected(tree.root(), &daemon.socket(), &format!("g{i}")))
        .collect();
    for (i, guest) in (0..).zip(&mut guests) {
        for file in 0..FILES {
            guest.map("export", &format!("f{file}"));
        }
        // Some read page by page, some in runs.
        guest.ask(&Order::Watch {
            run_pages: [1, 64, 8, 256][i % 4],
        });
    }
    let begin = Instant::now();
    let mut draw = Draw::new(run.guests);
    let (mut rounds, mut version) = (0_u64, 1);
    let recalled = loop {
        admin.reclaim(FILES * PAGES);
        rounds += 1;
        if rounds.is_multiple_of(64) {
            admin.set_budget([8, 4, 16, 6][draw.below(4) as usize]);
        }
        if rounds.is_multiple_of(256) {
            version += 1;
            let file = tree.file(&format!("f{}", draw.below(FILES)));
            if draw.below(2) == 0 {
                rewrite_in_place(&file, PAGES, version);
            } else {
                replace(&file, PAGES, version);
            }
        }
        if rounds.is_multiple_of(16) {
            let recalled = admin.stats().counters["reclaimed_granted_pages"];
            let over = begin.elapsed() >= Duration::from_secs(run.seconds_max);
            if recalled >= run.recalls || over {
                break recalled;
            }
        }
    };
    let mut seen = Watched {
        oldest: u32::MAX,
        ..Watched::default()
    };
    for guest in &mut guests {
        let one = guest.stop_watching();
        assert_eq!(
            (one.wrong, one.backwards),
            (0, 0),
            "{}: {one:?}",
            guest.label
        );
        assert!(one.pages > 0, "{} read nothing", guest.label);
        seen = seen.and(one);
    }
    println!(
        "{} guests, {} force: {recalled} pages recalled in {:.1} s ({rounds} rounds, {} host \
         versions), {} pages read, none wrong, slowest run {} ms",
        run.guests,
        if run.force { "with" } else { "without" },
        begin.elapsed().as_secs_f64(),
        version - 1,
        seen.pages,
        seen.slowest_ms
    );
    daemon.audit_clean();
    // A watched daemon ends badly if it ever used its backend against the rules.
    daemon.stop();
    sum.recalls += recalled;
    sum.pages += seen.pages;
}

#[test]
fn local_a_million_recalls() {
    let mut sum = Sum::default();
    for (guests, force, watched, recalls, seconds_max) in [
        (1, true, false, 20_000, 12),
        (2, true, true, 100_000, 20),
        (64, true, false, 200_000, 30),
        (2, false, true, 50_000, 15),
        (16, false, false, 200_000, 30),
    ] {
        run(
            &Run {
                guests,
                force,
                watched,
                recalls,
                seconds_max,
            },
            &mut sum,
        );
    }
    let recalls = RECALLS.saturating_sub(sum.recalls).max(200_000);
    run(
        &Run {
            guests: 16,
            watched: false,
            force: true,
            recalls,
            seconds_max: 120,
        },
        &mut sum,
    );
    println!(
        "in all {} pages recalled, {} pages read and checked",
        sum.recalls, sum.pages
    );
    assert!(
        sum.recalls >= RECALLS,
        "only {} of {RECALLS} recalls",
        sum.recalls
    );
}
