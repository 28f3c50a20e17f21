//! Guests that do not answer in time, or answer what is not so: never renewing, never acking, acking
//! without unmapping, handing their descriptors on. What they hold is fenced, quarantined, charged
//! to them by name and given back when their process has gone; the table is the truth, not their word.
//!
//! Cannot show: what a domain of a hypervisor may still read; without force `local` plays that part.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage::demo::pattern::{self, PageContent};
use copage_coherence::msg::{Notice, OpenHow, PageRange, Request};
use copage_grants::PageIndex;
use copage_tests::beside::Beside;
use copage_tests::daemon::Setup;
use copage_tests::guest::Guest;
use copage_tests::mute::Mute;
use copage_tests::raw::Raw;
use copage_tests::tree::replace;
use copage_tests::wait;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);
/// Long enough for honest guests to renew it on a loaded machine.
const TERM_MS: u32 = 1500;
const TERM: Duration = Duration::from_millis(TERM_MS as u64);
/// Beyond the term: drift, and a machine with other work. Who is not fenced for it goes on for ever.
const SLACK: Duration = Duration::from_secs(5);

fn setup(force: bool) -> Setup {
    Setup {
        force,
        lease_ttl_ms: TERM_MS,
        invalidate_deadline_ms: TERM_MS,
        limits: "pinned_mib = 1".into(),
        ..Setup::default()
    }
}

#[test]
fn local_who_never_renews_is_fenced_at_the_term() {
    let beside = Beside::start(&setup(true), |_| {});
    let begin = Instant::now();
    let mut raw = Raw::try_hello(&beside.socket(), "mute").unwrap();
    let file = raw.open("export", "honest", OpenHow::Map);
    raw.fault(&file, 0, 16).unwrap();
    assert_eq!(raw.lease_ttl, TERM);
    raw.wait_hung_up(TERM + SLACK);
    let took = begin.elapsed();
    assert!(took >= TERM, "fenced before its term: {took:?}");
    assert!(took < TERM + SLACK, "fenced late: {took:?}");
    // What asks without renewing is no renewal either.
    let mut chatty = Raw::try_hello(&beside.socket(), "mute").unwrap();
    let root = chatty.attach("export");
    let begin = Instant::now();
    while chatty.ask(&Request::Getattr { node: root }).is_some() {
        assert!(begin.elapsed() < TERM + SLACK, "asking counts as renewing");
        std::thread::sleep(Duration::from_millis(5));
    }
    beside.finish(&format!(
        "never renewing: fenced after {took:?} of {TERM:?}"
    ));
}

#[test]
fn local_who_never_acks_is_fenced_at_the_deadline_and_its_frames_are_quarantined() {
    let beside = Beside::start(&setup(false), |tree| {
        tree.pattern("f", 64);
    });
    let mut mute = Mute::start(beside.tree.root(), &beside.socket(), "mute", "f", "map");
    let begin = Instant::now();
    // A new version: without force everybody has to be asked.
    replace_in_place(&beside, 2);
    let took = mute.wait_fenced(TERM + SLACK);
    let since = begin.elapsed();
    assert!(
        since >= TERM / 2 && since < TERM + SLACK,
        "fenced after {since:?} ({took:?})"
    );
    // It has its pages mapped still and reads the old content: nothing else may come there.
    wait::until(10 * SECOND, "its frames to be in quarantine", || {
        beside.daemon.admin().stats().frames_quarantined >= 64
    });
    assert_eq!(
        mute.versions(),
        vec![1],
        "the fenced guest sees the old pages or none"
    );
    // An honest one has the new version meanwhile.
    let mut other = Guest::connected(beside.tree.root(), &beside.socket(), "other");
    let (mapping, _) = other.map("export", "f");
    wait::until(10 * SECOND, "the new version", || {
        other.load(mapping, 9) == 2
    });
    assert_eq!(mute.versions(), vec![1]);
    mute.kill();
    wait::until(10 * SECOND, "quarantine to end with the process", || {
        beside.daemon.admin().stats().frames_quarantined == 0
    });
    drop(other);
    beside.finish(&format!("never acking: fenced {since:?} after the change"));
}

fn replace_in_place(beside: &Beside, version: u32) {
    copage_tests::tree::rewrite_in_place(&beside.tree.file("f"), 64, version);
}

#[test]
fn local_reconnecting_with_frames_in_quarantine_is_refused_beyond_the_quota() {
    // 1 MiB of pins: 256 frames, quarantined ones included.
    let beside = Beside::start(&setup(true), |tree| {
        for i in 0..12 {
            tree.pattern(&format!("p{i}"), 64);
        }
    });
    // Each life pins one file more and is lost while its plain mapping goes on.
    let mut lives = Vec::new();
    let mut refused = 0;
    for i in 0..12 {
        let name = format!("p{i}");
        match Mute::try_start(beside.tree.root(), &beside.socket(), "greedy", &name, "pin") {
            Ok(mut life) => {
                life.stop_renewing();
                life.wait_fenced(TERM + SLACK);
                replace(&beside.tree.file(&name), 64, 2);
                lives.push(life);
            }
            Err(_) => refused += 1,
        }
    }
    let stats = beside.daemon.admin().stats();
    println!(
        "{} lives, {refused} refused, {} frames in quarantine",
        lives.len(),
        stats.frames_quarantined
    );
    assert!(refused >= 7 && lives.len() <= 5, "{} lives", lives.len());
    assert!(
        stats.frames_quarantined <= 256,
        "{}",
        stats.frames_quarantined
    );
    for life in &mut lives {
        assert_eq!(
            life.versions(),
            vec![1],
            "a pinned file stays whole for who mapped it"
        );
        life.kill();
    }
    wait::until(10 * SECOND, "quarantine to end with the processes", || {
        beside.daemon.admin().stats().frames_quarantined == 0
    });
    let mut again = Mute::start(beside.tree.root(), &beside.socket(), "greedy", "p0", "pin");
    again.kill();
    beside.finish("reconnecting with frames in quarantine");
}

#[test]
fn local_an_ack_is_not_the_truth() {
    let beside = Beside::start(&setup(false), |tree| {
        tree.pattern("f", 64);
    });
    let mut raw = Raw::try_hello(&beside.socket(), "liar").unwrap();
    let file = raw.open("export", "f", OpenHow::Map);
    raw.fault(&file, 0, 64).unwrap();
    beside.daemon.admin().reclaim(u64::from(u32::MAX));
    // Everything that is asked back is acked, nothing unmapped.
    let mut acked = 0;
    let begin = Instant::now();
    while begin.elapsed() < 4 * TERM {
        raw.tell(&Request::Renew);
        while let Some(came) = raw.hear_within(Duration::from_millis(20)) {
            if let Some(Notice::Invalidate {
                recall, file: of, ..
            }) = came.notice()
            {
                assert_eq!(of, file.token);
                raw.tell(&Request::Ack { recall });
                acked += 1;
            }
        }
    }
    assert!(acked > 0, "nothing was ever asked back");
    // Its grants are still in the table, or its frames in quarantine; not reused.
    let fd = file.fd.as_ref().unwrap();
    let plain = std::fs::File::from(fd.try_clone().unwrap());
    assert_eq!(whole_pages(&plain, 1), 64);
    beside.finish(&format!("{acked} acks without unmapping"));
}

#[test]
fn local_unmapped_said_of_what_is_not_held() {
    let beside = Beside::start(&setup(false), |tree| {
        tree.pattern("f", 64);
    });
    let mut holder = Raw::try_hello(&beside.socket(), "holder").unwrap();
    let held = holder.open("export", "f", OpenHow::Map);
    holder.fault(&held, 0, 64).unwrap();
    let mut liar = Raw::try_hello(&beside.socket(), "liar").unwrap();
    let file = liar.open("export", "f", OpenHow::Map);
    for (first, count) in [(0, 64), (0, 1 << 20), (1 << 40, 7), (63, 1)] {
        liar.tell(&Request::Unmapped {
            file: file.token,
            generation: file.generation,
            range: PageRange {
                first: PageIndex(first),
                count,
            },
        });
    }
    for recall in 0..1000 {
        liar.tell(&Request::Ack { recall });
    }
    assert!(liar.renew(), "nonsense of this kind harms nobody");
    let guests = beside.daemon.admin().guests();
    let of_holder = guests.iter().find(|g| g.name == "holder").unwrap();
    assert!(
        of_holder.grants >= 64,
        "another's word took its grants: {}",
        of_holder.grants
    );
    beside.finish("Unmapped of what is not held");
}

/// Pages of a frame file that hold something: all of them `version`, the rest zeros or nothing.
fn whole_pages(frames: &std::fs::File, version: u32) -> usize {
    let mut bytes = [0; 4096];
    let mut whole = 0;
    for index in 0..64 {
        let got = frames.read_at(&mut bytes, index * 4096).unwrap();
        match pattern::check(&bytes[..got], index) {
            PageContent::Whole(found) => {
                assert_eq!(found, version, "page {index}");
                whole += 1;
            }
            _ => assert!(
                bytes[..got].iter().all(|&b| b == 0),
                "page {index} is neither"
            ),
        }
    }
    whole
}

#[test]
fn local_a_descriptor_handed_on_reads_nothing_new_after_the_fence() {
    let beside = Beside::start(&setup(true), |tree| {
        tree.pattern("f", 64);
    });
    let mut other = Guest::connected(beside.tree.root(), &beside.socket(), "other");
    let (mapping, _) = other.map("export", "f");
    let mut raw = Raw::try_hello(&beside.socket(), "leaky").unwrap();
    let file = raw.open("export", "f", OpenHow::Map);
    raw.fault(&file, 0, 8).unwrap();
    // As if sent to another process: it outlives the session.
    let leaked = std::fs::File::from(file.fd.unwrap());
    raw.wait_hung_up(TERM + SLACK);
    // The same content for everybody else, of pages that nobody had filled before the fence; again
    // and again, as they are taken back all the time.
    let mut old = 0;
    for _ in 0..30 {
        for page in 0..64 {
            assert_eq!(other.load(mapping, page), 1);
        }
        old = whole_pages(&leaked, 1).max(old);
        assert!(
            old <= 8,
            "the leaked descriptor reads {old} pages, of 8 that were granted"
        );
    }
    replace_in_place(&beside, 2);
    for page in 0..64 {
        wait::until(10 * SECOND, "the new version", || {
            other.load(mapping, page) == 2
        });
    }
    assert!(whole_pages(&leaked, 1) <= 8);
    drop(other);
    beside.finish(&format!(
        "a leaked descriptor: {old} of 8 old pages left, none new"
    ));
}

#[test]
fn local_frames_that_are_held_for_ever_starve_nobody() {
    // Half the budget is all that one guest may hold, and what it does not give back counts.
    let setup = Setup {
        frames_mib: 8,
        limits: "frames_mib = 4".into(),
        ..setup(false)
    };
    let beside = Beside::start(&setup, |tree| {
        for i in 0..4 {
            tree.pattern(&format!("f{i}"), 2048);
        }
    });
    let socket = beside.socket();
    let mut lives = Vec::new();
    let begin = Instant::now();
    // It comes again and again, each time holding what it can get until it is fenced for it.
    while begin.elapsed() < 8 * TERM {
        let name = format!("f{}", lives.len() % 4);
        match Mute::try_start(beside.tree.root(), &socket, "hoarder", &name, "map") {
            Ok(life) => lives.push(life),
            Err(_) => std::thread::sleep(TERM / 4),
        }
        if lives.len() >= 8 {
            break;
        }
    }
    let stats = beside.daemon.admin().stats();
    assert!(stats.frames_quarantined <= 1024 + 512, "{stats:?}");
    let mut newcomer = Guest::connected(beside.tree.root(), &socket, "newcomer");
    let (mapping, _) = newcomer.map("export", "f3");
    for page in 0..2048 {
        assert_eq!(newcomer.load(mapping, page), 1);
    }
    let count = lives.len();
    for life in &mut lives {
        assert!(life.versions().iter().all(|&version| version == 1));
        life.kill();
    }
    drop(newcomer);
    beside.finish(&format!(
        "{count} lives that hold frames for ever, {} frames in quarantine",
        stats.frames_quarantined
    ));
}
