//! Many threads on one cache at once: faults, reclaim, budget changes, fences, pins, host changes.
//! Every page read has the bytes of one version of its file; at the end the audit is clean.
//!
//! Cannot show: every interleaving; it runs the ones that come.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::*;
use copage_cache::*;
use copage_grants::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

const PAGES: u64 = 300;

#[test]
fn local_everything_at_once() {
    let mut rig = Rig::new(128);
    let versions: Vec<Vec<u8>> = (0..4)
        .map(|n| content(n + 1, PAGES as usize * PAGE))
        .collect();
    for file in 0..3 {
        rig.write(&format!("f{file}"), &versions[0]);
    }
    rig.write("p", &content(9, 20 * PAGE));
    let files: Vec<Arc<CachedFile>> = (0..3).map(|n| rig.map(&format!("f{n}"), who(1))).collect();
    for guest in 2..=3 {
        for n in 0..3 {
            rig.map(&format!("f{n}"), who(guest));
        }
    }
    let stop = AtomicBool::new(false);
    let looked = AtomicU64::new(0);
    let refused = std::sync::Mutex::new(std::collections::BTreeMap::<String, u64>::new());
    let tickets = AtomicU64::new(1 << 32);
    let (cache, dir) = (rig.cache.clone(), rig.dir.path().to_path_buf());
    std::thread::scope(|scope| {
        for guest in 1..=3_u16 {
            let (cache, files, stop, versions) = (&cache, &files, &stop, &versions);
            let (looked, tickets, refused) = (&looked, &tickets, &refused);
            scope.spawn(move || {
                let mut n = u64::from(guest);
                while !stop.load(Relaxed) {
                    n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let file = &files[(n >> 60) as usize % 3];
                    let page = (n >> 33) % PAGES;
                    // The answer of a fault that waits goes to the rig; asking again finds the page.
                    let mut granted = None;
                    for _ in 0..20 {
                        let generation = cache.current(file).generation;
                        let ticket = tickets.fetch_add(1, Relaxed);
                        let first = PageIndex(page);
                        let outcome = cache.fault(
                            ticket,
                            file,
                            who(guest),
                            generation,
                            first,
                            1,
                            FaultHint::Random,
                        );
                        match outcome {
                            FaultOutcome::Ready(Ok(FaultDone::Granted { generation, .. })) => {
                                granted = Some(generation);
                                break;
                            }
                            FaultOutcome::Ready(Err(e)) => {
                                *refused.lock().unwrap().entry(e.to_string()).or_insert(0) += 1
                            }
                            _ => {}
                        }
                        std::thread::sleep(Duration::from_micros(500));
                    }
                    let Some(generation) = granted else { continue };
                    let Ok(fd) = cache.descriptor(file, generation) else {
                        continue;
                    };
                    let mut buf = vec![0; PAGE];
                    let home = std::fs::File::from(fd);
                    let at = page * PAGE as u64;
                    // Ended meanwhile: an ended home is cut to nothing.
                    if std::os::unix::fs::FileExt::read_exact_at(&home, &mut buf, at).is_err() {
                        continue;
                    }
                    let start = page as usize * PAGE;
                    let known = versions.iter().any(|v| v[start..start + PAGE] == buf[..]);
                    // All zero: taken back before the look, as a mapping would fault again.
                    assert!(
                        known || buf.iter().all(|b| *b == 0),
                        "page {page} is of no version"
                    );
                    looked.fetch_add(u64::from(known), Relaxed);
                }
            });
        }
        let (cache, stop, dir, versions) = (&cache, &stop, &dir, &versions);
        scope.spawn(move || {
            for round in 0_u32.. {
                if stop.load(Relaxed) {
                    return;
                }
                cache.reclaim(u64::from(round % 50));
                let _ = cache.set_frames_max([128, 64, 96][(round % 3) as usize]);
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        scope.spawn(move || {
            for round in 1_usize.. {
                std::thread::sleep(Duration::from_millis(80));
                if stop.load(Relaxed) {
                    return;
                }
                // A new file of the same length, in place: what is read meanwhile may be either.
                let path = dir.join(format!("f{}", round % 3));
                let host = std::fs::File::options().write(true).open(path).unwrap();
                std::os::unix::fs::FileExt::write_all_at(&host, &versions[round % 4], 0).unwrap();
            }
        });
        let start = Instant::now();
        let mut round = 0_u32;
        while start.elapsed() < Duration::from_secs(4) {
            rig.break_leases();
            rig.pump_discarding(Duration::from_millis(1));
            round += 1;
            if round.is_multiple_of(40) {
                let node = rig.node("p");
                rig.cache.open(
                    tickets.fetch_add(1, Relaxed),
                    node,
                    OpenHow::Pin,
                    who(9),
                    false,
                );
            }
            if round.is_multiple_of(60) {
                rig.cache.guest_ended(who(9));
            }
            if round.is_multiple_of(100) {
                rig.cache.guest_fenced(who(3));
                for n in 0..3 {
                    let node = rig.node(&format!("f{n}"));
                    rig.cache.open(
                        tickets.fetch_add(1, Relaxed),
                        node,
                        OpenHow::Map,
                        who(3),
                        false,
                    );
                }
            }
        }
        stop.store(true, Relaxed);
        // A host writer may wait for a lease to be given up.
        for _ in 0..100 {
            rig.break_leases();
            rig.pump_discarding(Duration::from_millis(1));
        }
    });
    rig.cache.guest_ended(who(9));
    rig.until("nothing waits", |s| s.waiting == 0 && s.homes_retired == 0);
    rig.audit();
    assert!(
        looked.load(Relaxed) > 100,
        "{looked:?} {refused:?} {:?}",
        rig.cache.stats()
    );
    let current: Vec<Vec<u8>> = (0..3)
        .map(|n| std::fs::read(rig.path(&format!("f{n}"))).unwrap())
        .collect();
    for (file, data) in files.iter().zip(&current) {
        for page in (0..PAGES).step_by(17) {
            rig.check(file, who(1), page, data);
        }
    }
    rig.audit();
}

/// Not a test: figures. `cargo test --release -p copage-cache --test local_threads -- --ignored --nocapture`
#[test]
#[ignore = "prints figures"]
fn local_figures() {
    let mut rig = Rig::with(
        local(true),
        CacheConfig {
            frames_max: 16_384,
            collapse: false,
            ..config(64)
        },
    );
    rig.write("f", &content(1, 16_384 * PAGE));
    let a = who(1);
    let file = rig.map("f", a);
    for unit in 0..16 {
        rig.fault(&file, a, unit * 512, 512).unwrap();
    }
    let generation = rig.cache.current(&file).generation;
    for count in [1, 16, 512] {
        let start = Instant::now();
        for n in 0..10_000_u64 {
            let first = PageIndex((n * 7919) % (8192 - u64::from(count) + 1));
            let outcome = rig
                .cache
                .fault(n, &file, a, generation, first, count, FaultHint::Random);
            assert!(matches!(outcome, FaultOutcome::Ready(Ok(_))));
        }
        println!("resident fault of {count}: {:?}", start.elapsed() / 10_000);
    }
    for divisor in [2, 4, 8, 16] {
        rig.cache.set_frames_max(16_384 / divisor).unwrap();
        let before = rig.cache.stats();
        let start = Instant::now();
        let mut n = 1_u64;
        for _ in 0..20_000 {
            n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            rig.fault(&file, a, (n >> 33) % 16_384, 1).unwrap();
        }
        let after = rig.cache.stats();
        println!(
            "budget 1/{divisor}: {:?} a fault, {} misses, {} calls for {} pages given back, {} bytes a frame",
            start.elapsed() / 20_000,
            after.fault_misses - before.fault_misses,
            after.reclaim_calls - before.reclaim_calls,
            after.reclaimed_granted - before.reclaimed_granted,
            after.metadata_bytes / u64::from(after.frames_resident),
        );
    }
}
