//! Readers of granted files whose windows are taken back under them, and mistakes that these tests
//! must notice. Over the stand-in: the logic, not isolation.

use super::fake::{Fake, Seen, word};
use super::*;
use crate::granted::Mutants;
use crate::granted::standin::StandIn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const PAGES: usize = 256;
const BYTES: u64 = (PAGES * PAGE_SIZE) as u64;

/// The first word of the page that is wrong.
fn check_page(
    bytes: VolatileBytes<'_>,
    page: usize,
    newest: &AtomicU64,
    seen: &mut [u64],
) -> Option<u64> {
    let mut data = [0; PAGE_SIZE];
    assert_eq!(bytes.read_into(page * PAGE_SIZE, &mut data), PAGE_SIZE);
    // Looked at behind the page; the change was made before it was counted.
    let newest = newest.load(Ordering::SeqCst) + 1;
    for word in data.chunks_exact(8) {
        let got = u64::from_le_bytes(word.try_into().unwrap());
        let (generation, place) = (got >> 40, got & ((1 << 40) - 1));
        // A page that is replaced while it is copied shows the newer content from there on.
        if place != page as u64 + 1 || generation < seen[page] || generation > newest {
            return Some(got);
        }
        seen[page] = generation;
    }
    None
}

/// What a race did.
#[derive(Debug)]
struct Raced {
    wrong: u64,
    read: u64,
    maps: u64,
    lies: u64,
}

/// Readers at random, one more mapping that comes and goes, populates; windows taken back until so
/// many were mapped. Every byte is checked.
fn race(movable: bool, maps: u64, changes: bool, seed: impl FnOnce(&Mutants)) -> Raced {
    let (fake, standin) = Fake::start_granted(BYTES, movable);
    let client = connect_granted(&fake);
    seed(&client.shared().granted().unwrap().mutants);
    let file = open(&client, OpenHow::Map);
    let mapping = file.map(&MapOptions::shared()).unwrap();
    let (done, newest) = (AtomicBool::new(false), AtomicU64::new(1));
    let (wrong, read) = (AtomicU64::new(0), AtomicU64::new(0));
    let until = Instant::now() + Duration::from_secs(300);
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let (mapping, file, done, newest) = (&mapping, &file, &done, &newest);
            let (wrong, read) = (&wrong, &read);
            scope.spawn(move || {
                let mut seen = vec![0; PAGES];
                let (mut x, mut rounds) = (thread + 1, 0u64);
                let mut own = None;
                while !done.load(Ordering::Relaxed) {
                    x = x
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    let page = (x >> 33) as usize % PAGES;
                    rounds += 1;
                    if thread == 2 {
                        if rounds % 64 == 0 {
                            own = Some(file.map(&MapOptions::shared()).unwrap());
                            seen.fill(0);
                        }
                        if rounds % 16 == 0 {
                            let end = (page + 40).min(PAGES);
                            // Taken back over and over it may give up; what was read stays right.
                            let _ = mapping.populate(page * PAGE_SIZE..end * PAGE_SIZE);
                        }
                    }
                    let bytes = own.as_ref().unwrap_or(mapping).as_volatile();
                    if let Some(got) = check_page(bytes, page, newest, &mut seen) {
                        println!("page {page} shows {got:#x}, was of {}", seen[page]);
                        wrong.fetch_add(1, Ordering::Relaxed);
                    }
                    read.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut x = 99u64;
        let mut recall = 0;
        while standin.maps.load(Ordering::Relaxed) < maps && Instant::now() < until {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let first = (x >> 33) % PAGES as u64;
            let count = (1 + (x >> 50) % 100).min(PAGES as u64 - first) as u32;
            recall += 1;
            if changes && recall % 64 == 0 {
                let generation = fake.change(BYTES, false);
                newest.store(generation.into(), Ordering::SeqCst);
                fake.tell(recall);
            } else {
                fake.take_back(recall, first, count);
            }
            // Some are under way together.
            let oldest = recall.saturating_sub(4);
            fake.wait("acked", |s| {
                oldest == 0 || s.seen.contains(&Seen::Ack(oldest))
            });
            if recall % 256 == 0 {
                let keep = |s: &Seen| matches!(s, Seen::Ack(r) if *r + 8 > recall);
                fake.state.lock().seen.retain(keep);
            }
        }
        fake.wait("acked", |s| s.seen.contains(&Seen::Ack(recall)));
        done.store(true, Ordering::Relaxed);
    });
    let raced = Raced {
        wrong: wrong.into_inner(),
        read: read.into_inner(),
        maps: standin.maps.load(Ordering::SeqCst),
        lies: standin.lies.load(Ordering::SeqCst),
    };
    println!("{raced:?}");
    drop(mapping);
    drop(file);
    fake.wait("closed", |s| s.seen.contains(&Seen::Close));
    assert_eq!((standin.mapped(), standin.batches()), (0, 0));
    raced
}

/// How often windows are mapped in a race: a hundred thousand times with COPAGE_TESTS_LONG.
fn rounds() -> u64 {
    if std::env::var_os("COPAGE_TESTS_LONG").is_some() {
        100_000
    } else {
        10_000
    }
}

fn race_well(movable: bool, changes: bool) {
    let raced = race(movable, rounds(), changes, |_| {});
    assert_eq!((raced.wrong, raced.lies), (0, 0), "{raced:?}");
    assert!(raced.maps >= rounds() && raced.read > 1000, "{raced:?}");
}

#[test]
fn local_readers_race_with_windows_taken_back() {
    race_well(true, false);
}

#[test]
fn local_readers_race_with_windows_taken_back_as_in_a_pv_guest() {
    race_well(false, false);
}

#[test]
fn local_readers_race_with_windows_taken_back_and_changes() {
    race_well(true, true);
}

#[test]
fn local_private_stores_race_with_changes_and_none_is_lost() {
    let (fake, _standin) = Fake::start_granted(BYTES, true);
    let client = connect_granted(&fake);
    let mapping = map(&client, &MapOptions::private());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let (mapping, done) = (&mapping, &done);
            scope.spawn(move || {
                for page in (thread..PAGES).step_by(4) {
                    store(mapping, page * PAGE_SIZE + 16, 0xee);
                    std::thread::sleep(Duration::from_micros(500));
                    for page in (thread..=page).step_by(4) {
                        let now = mapping.as_volatile().read_u8(page * PAGE_SIZE + 16);
                        assert_eq!(now, Some(0xee), "page {page}");
                    }
                }
                done.store(true, Ordering::Relaxed);
            });
        }
        let (fake, done, mapping) = (&fake, &done, &mapping);
        scope.spawn(move || {
            let mut round = 0;
            while !done.load(Ordering::Relaxed) {
                round += 1;
                match round % 3 {
                    0 => {
                        fake.change(BYTES, false);
                        fake.tell(round);
                    }
                    1 => fake.take_back(round, 0, PAGES as u32),
                    _ => mapping.unmap_pages(0..mapping.len()).unwrap(),
                }
                std::thread::sleep(Duration::from_micros(300));
            }
        });
    });
    for page in 0..PAGES {
        let bytes = mapping.as_volatile();
        assert_eq!(bytes.read_u8(page * PAGE_SIZE + 16), Some(0xee));
        let first = peek(bytes, page);
        assert_eq!(first & ((1 << 40) - 1), page as u64 + 1);
    }
    assert_eq!(mapping.private_pages(), PAGES as u64);
}

#[test]
fn local_mutant_ack_before_unmap_is_noticed() {
    let raced = race(true, 200, false, |m| {
        m.ack_first.store(true, Ordering::SeqCst)
    });
    assert!(raced.lies > 0, "the mutant survived: {raced:?}");
}

#[test]
fn local_mutant_memory_put_back_without_arming_is_noticed() {
    // Zeros, for good: nothing faults there any more, so few windows are ever mapped again.
    let (fake, _standin) = Fake::start_granted(BYTES, true);
    let client = connect_granted(&fake);
    let mapping = map(&client, &MapOptions::shared());
    let mutants = &client.shared().granted().unwrap().mutants;
    mutants.skip_arm.store(true, Ordering::SeqCst);
    assert_eq!(page_word(mapping.as_volatile(), 3), word(1, 3));
    fake.take_back(1, 3, 1);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(1)));
    assert_ne!(
        page_word(mapping.as_volatile(), 3),
        word(1, 3),
        "the mutant survived"
    );
}

/// A batch that was granted before our word that its pages are unmapped, and comes after it, names
/// other pages by then.
fn answer_that_crosses_an_ack(seed: impl FnOnce(&Mutants)) -> (u64, Arc<StandIn>) {
    let (fake, standin) = Fake::start_granted(BYTES, true);
    let client = connect_granted(&fake);
    seed(&client.shared().granted().unwrap().mutants);
    let mapping = map(&client, &MapOptions::shared());
    // The daemon grants pages 0..16 at once and its answer is long on the way.
    fake.state.lock().slow = Duration::from_millis(300);
    let got = std::thread::scope(|scope| {
        let reader = scope.spawn(|| peek(mapping.as_volatile(), 3));
        fake.wait("asked", |s| {
            s.seen.iter().any(|s| matches!(s, Seen::Fault { .. }))
        });
        // Meanwhile it wants them back, hears that they are unmapped, and grants their numbers for
        // others. (Here by hand: the fake reads one message at a time.)
        fake.take_back(1, 0, 16);
        std::thread::sleep(Duration::from_millis(100));
        standin.revoke(1, 0, 16);
        standin.grant(1, 1, 128, 16);
        fake.state.lock().slow = Duration::ZERO;
        reader.join().unwrap()
    });
    (got, standin)
}

#[test]
fn local_an_answer_that_crosses_an_ack_is_not_believed() {
    let (got, _) = answer_that_crosses_an_ack(|_| {});
    assert_eq!(got, word(1, 3));
}

#[test]
fn local_mutant_believing_an_answer_that_crosses_an_ack_is_noticed() {
    let (got, _) = answer_that_crosses_an_ack(|m| m.keep_spoiled.store(true, Ordering::SeqCst));
    assert_eq!(got, word(1, 131), "the mutant survived");
}
