//! Stores against recalls, answers on their way, punches, rebases and unmapping: none is lost, none goes
//! where nobody sees it.

use super::coherent::{PAGES, held, map_written, on_disk, open_written, recall, start};
use super::fake::{Fake, Seen};
use super::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Adds 1 to a page's first word.
pub(super) fn add(mapping: &Mapping, page: usize) -> u64 {
    assert!(mapping.is_writable() && page * PAGE_SIZE < mapping.len());
    let at = mapping
        .as_ptr()
        .wrapping_add(page * PAGE_SIZE)
        .cast::<u64>();
    // SAFETY: an aligned word within a mapping that lives; everybody's accesses to it are atomic.
    let word = unsafe { AtomicU64::from_ptr(at) };
    word.fetch_add(1, Ordering::SeqCst)
}

const RACED: usize = 8;

/// Set when it ends, by a failure too: who waits for it must not hide that.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Counted is from 0 on.
fn zeroed(fake: &Fake) {
    for page in 0..RACED as u64 {
        fake.state
            .lock()
            .change_page(page, |bytes| bytes[..8].fill(0));
    }
}

/// Threads count in a few pages while `disturb` is called again and again; at the end every count is there.
fn count_while(mappings: &[&Mapping], fake: &Fake, mut disturb: impl FnMut(u64) + Send) {
    zeroed(fake);
    let done = AtomicBool::new(false);
    let counts: Vec<AtomicU64> = (0..RACED).map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        let (done, counts) = (&done, &counts);
        scope.spawn(move || {
            let mut round = 1;
            while !done.load(Ordering::Relaxed) {
                disturb(round);
                round += 1;
            }
        });
        let threads: Vec<_> = (0..4usize)
            .map(|thread| {
                let mapping = mappings[thread % mappings.len()];
                scope.spawn(move || {
                    for i in 0..2000 {
                        let page = (i * 5 + thread) % RACED;
                        add(mapping, page);
                        counts[page].fetch_add(1, Ordering::SeqCst);
                        if i % 16 == 0 {
                            std::thread::sleep(Duration::from_micros(50));
                        }
                    }
                })
            })
            .collect();
        let _done = SetAtEnd(done);
        for thread in threads {
            thread.join().unwrap();
        }
    });
    recall(fake, u64::MAX, 0, PAGES as u32);
    for (page, count) in counts.iter().enumerate() {
        assert_eq!(
            on_disk(fake, page),
            count.load(Ordering::SeqCst),
            "page {page}"
        );
    }
    assert_eq!(held(fake), []);
}

/// Not many recalls at a time: else nothing but recalls gets on.
fn bounded(fake: &Fake, round: u64) {
    if round > 6 {
        fake.wait("acked", |s| s.recalls.keys().all(|r| *r + 6 > round));
    }
}

#[test]
fn local_no_store_is_lost_to_recalls() {
    let (fake, client) = start();
    let mapping = map_written(&client);
    count_while(&[&mapping], &fake, |round| {
        recall(&fake, round, round % RACED as u64, 3);
    });
}

/// What a second mapping, or open, makes happen: a page is asked for while it is asked back, and had as soon as
/// that was said.
#[test]
fn local_no_store_is_lost_to_recalls_with_two_opens() {
    let (fake, client) = start();
    let (a, b) = (map_written(&client), map_written(&client));
    fake.state.lock().slow = Duration::from_micros(100);
    count_while(&[&a, &b], &fake, |round| {
        let first = round % RACED as u64;
        fake.take_back(round, first, 3);
        bounded(&fake, round);
        std::thread::sleep(Duration::from_micros(round % 7 * 50));
    });
    assert!(fake.state.lock().held_up > 0, "not seen here");
}

#[test]
fn local_no_store_is_lost_to_unmapping_and_mapping_again() {
    let (fake, client) = start();
    let file = open_written(&client);
    let stays = file.map(&MapOptions::written()).unwrap();
    count_while(&[&stays], &fake, |round| {
        let short = file.map(&MapOptions::written()).unwrap();
        add_nothing(&short, round as usize % RACED);
        if round % 3 == 0 {
            fake.take_back(round, 0, 2);
            bounded(&fake, round);
        }
    });
}

/// A store that changes nothing.
fn add_nothing(mapping: &Mapping, page: usize) {
    let at = mapping
        .as_ptr()
        .wrapping_add(page * PAGE_SIZE)
        .cast::<u64>();
    // SAFETY: as in `add`.
    unsafe { AtomicU64::from_ptr(at) }.fetch_add(0, Ordering::SeqCst);
}

#[test]
fn local_no_store_is_lost_to_rebases_and_punches_of_the_home() {
    let (fake, client) = start();
    let mapping = map_written(&client);
    let reader = map(&client, &MapOptions::shared());
    zeroed(&fake);
    let read = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _read = SetAtEnd(&read);
        scope.spawn(|| {
            let mut last = [0; RACED];
            while !read.load(Ordering::Relaxed) {
                for (page, last) in last.iter_mut().enumerate() {
                    let now = peek(reader.as_volatile(), page);
                    assert!(now >= *last, "page {page} went back from {last} to {now}");
                    *last = now;
                }
            }
        });
        count_while(&[&mapping], &fake, |round| match round % 4 {
            0 => {
                recall(&fake, 2 * round, 0, PAGES as u32);
                if fake.rehome() {
                    fake.tell(2 * round + 1);
                    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(2 * round + 1)));
                }
            }
            1 => fake.punch(0, PAGES as u64),
            _ => recall(&fake, 2 * round, round % RACED as u64, 2),
        });
    });
}

/// Another guest counts too, whenever the page is not ours.
#[test]
fn local_two_writers_bounce_pages_and_both_get_on() {
    let (fake, client) = start();
    let mapping = map_written(&client);
    let mut number = 0;
    fake.state.lock().change_page(0, |bytes| bytes[..8].fill(0));
    std::thread::scope(|scope| {
        let ours = scope.spawn(|| {
            for _ in 0..3000 {
                add(&mapping, 0);
            }
        });
        while !ours.is_finished() {
            number += 1;
            // It waits for the page, and is the next that gets it.
            fake.state
                .lock()
                .coherent
                .as_mut()
                .unwrap()
                .wanted
                .insert(0);
            recall(&fake, number, 0, 1);
        }
    });
    recall(&fake, u64::MAX, 0, 1);
    let theirs = fake.state.lock().coherent.as_ref().unwrap().theirs;
    assert_eq!(on_disk(&fake, 0), 3000 + theirs);
    assert!(theirs > 0);
}
