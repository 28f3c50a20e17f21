//! Guests that want everything at once: handles, open files, pins, sessions, grants. Each gets up to
//! its limit and an error beyond, and an honest guest beside it is served all along.
//!
//! Cannot show: that the limits are wise. Limits on time are in hostile_terms.rs.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_coherence::msg::{OpenHow, Request};
use copage_tests::beside::Beside;
use copage_tests::daemon::Setup;
use copage_tests::raw::Raw;
use std::time::{Duration, Instant};

const LIMITS: &str = "handles_max = 100\nfiles_max = 20\npinned_mib = 2\ngrants_max = 512";

fn setup() -> Setup {
    Setup {
        limits: LIMITS.into(),
        ..Setup::default()
    }
}

#[test]
fn local_handles_up_to_the_limit() {
    let beside = Beside::start(&setup(), |tree| {
        for i in 0..300 {
            std::fs::write(tree.file(&format!("f{i}")), b"x").unwrap();
        }
    });
    let mut raw = Raw::try_hello(&beside.socket(), "greedy").unwrap();
    let root = raw.attach("export");
    let mut got = Vec::new();
    let mut refused = 0;
    for i in 0..300 {
        match raw.lookup(root, format!("f{i}").as_bytes()) {
            Ok(node) => got.push(node),
            Err(errno) => {
                assert!(
                    [libc::ENFILE, libc::EMFILE, libc::EDQUOT].contains(&errno),
                    "{errno}"
                );
                refused += 1;
            }
        }
    }
    assert!(
        (90..=100).contains(&got.len()) && refused >= 200,
        "{} and {refused}",
        got.len()
    );
    // Thousands of lookups of what it has already are not new handles.
    for _ in 0..2000 {
        raw.lookup(root, b"f0").unwrap();
    }
    // Listing with handles gives what fits and does not lie about the rest.
    let _ = raw.ask(&Request::Readdir {
        node: root,
        cookie: 0,
        bytes_max: 65536,
        handles: true,
    });
    // What is given back can be had again.
    for node in got.drain(..).take(50) {
        raw.tell(&Request::Forget {
            node,
            count: u64::MAX,
        });
    }
    assert!(
        raw.lookup(root, b"f299").is_ok(),
        "after Forget there is room"
    );
    // A second session of the same guest does not double what it may hold in all... but a new
    // session after the first has ended begins with nothing.
    drop(raw);
    let mut again = Raw::try_hello(&beside.socket(), "greedy").unwrap();
    let root = again.attach("export");
    assert!(again.lookup(root, b"f1").is_ok());
    beside.finish("handles up to the limit");
}

#[test]
fn local_everything_opened_pinned_at_once() {
    let beside = Beside::start(&setup(), |tree| {
        for i in 0..40 {
            tree.pattern(&format!("f{i}"), 100);
        }
        tree.pattern("large", 4096);
    });
    let mut raw = Raw::try_hello(&beside.socket(), "greedy").unwrap();
    let root = raw.attach("export");
    let mut waiting = Vec::new();
    for i in 0..40 {
        let node = raw.lookup(root, format!("f{i}").as_bytes()).unwrap();
        waiting.push(
            raw.tell(&Request::Open {
                node,
                how: OpenHow::Pin,
                write: false,
            })
            .unwrap(),
        );
    }
    let large = raw.lookup(root, b"large").unwrap();
    waiting.push(
        raw.tell(&Request::Open {
            node: large,
            how: OpenHow::Pin,
            write: false,
        })
        .unwrap(),
    );
    let (mut opened, mut refused) = (0, 0);
    let begin = Instant::now();
    while !waiting.is_empty() {
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "{} opens are not answered",
            waiting.len()
        );
        assert!(raw.renew(), "fenced for wanting much");
        // Renewing has put what came before it aside.
        while let Some(came) = raw
            .earlier
            .pop()
            .or_else(|| raw.hear_within(Duration::from_millis(100)))
        {
            assert!(came.notice().is_none(), "{:?}", came.notice());
            waiting.retain(|&number| came.request() != Some(number));
            match came.errno() {
                None => opened += 1,
                Some(_) => refused += 1,
            }
        }
    }
    // 2 MiB are 512 pages: five files of a hundred.
    assert!(
        (1..=5).contains(&opened),
        "{opened} files pinned, {refused} refused"
    );
    let stats = beside.daemon.admin().stats();
    assert!(
        stats.frames_pinned <= 512,
        "{} frames pinned",
        stats.frames_pinned
    );
    // Files beyond files_max, mapped.
    let mut more = 0;
    for i in 0..40 {
        let node = raw.lookup(root, format!("f{i}").as_bytes()).unwrap();
        match raw.try_open(node, OpenHow::Map) {
            Ok(_) => more += 1,
            Err(errno) => assert!(
                [libc::EMFILE, libc::EDQUOT, libc::ENFILE].contains(&errno),
                "{errno}"
            ),
        }
    }
    assert!(opened + more <= 20, "{opened} and {more} files open");
    beside.finish(&format!(
        "everything pinned at once: {opened} opened, {refused} refused"
    ));
}

#[test]
fn local_grants_up_to_the_limit_are_its_own_oldest() {
    let beside = Beside::start(&setup(), |tree| {
        tree.pattern("large", 2048);
    });
    let mut raw = Raw::try_hello(&beside.socket(), "greedy").unwrap();
    let file = raw.open("export", "large", OpenHow::Map);
    for first in (0..2048).step_by(64) {
        raw.fault(&file, first, 64).unwrap();
        let guests = beside.daemon.admin().guests();
        let greedy = guests.iter().find(|g| g.name == "greedy").unwrap();
        assert!(greedy.grants <= 512, "{} grants of 512", greedy.grants);
    }
    beside.finish("grants over the limit");
}

#[test]
fn local_sessions_without_end() {
    let beside = Beside::start(&setup(), |_| {});
    let mut sessions = Vec::new();
    let mut refused = 0;
    for _ in 0..600 {
        match Raw::try_hello(&beside.socket(), "greedy") {
            Ok(raw) => sessions.push(raw),
            Err(_) => refused += 1,
        }
        if refused > 20 {
            break;
        }
    }
    assert!(refused > 0, "{} sessions and no end", sessions.len());
    let mut other = Raw::try_hello(&beside.socket(), "modest").expect("others get in");
    other.attach("export");
    let count = sessions.len();
    drop(sessions);
    // Connecting and going away thousands of times leaves nothing behind.
    let before = beside.daemon.descriptors();
    for _ in 0..1000 {
        if let Ok(mut raw) = Raw::try_hello(&beside.socket(), "modest") {
            raw.tell(&Request::Bye);
        }
    }
    beside.daemon.descriptors_back_to(before);
    beside.finish(&format!("{count} sessions of one guest, then refused"));
}
