//! Files that change below their mappings, and pages that are asked back.

use super::fake::{Fake, Seen, word};
use super::*;
use copage_coherence::msg::{FileToken, Generation, InvalidateReason, Notice, PageRange};
use copage_grants::PageIndex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

const PAGES: usize = 300;
const BYTES: u64 = (PAGES * PAGE_SIZE) as u64;

#[test]
fn local_a_stale_fault_shows_the_newer_content() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let file = open(&client, OpenHow::Map);
    let mapping = file.map(&MapOptions::shared()).unwrap();
    assert_eq!(page_word(mapping.as_volatile(), 7), word(1, 7));
    fake.change(BYTES, true);
    assert_eq!(page_word(mapping.as_volatile(), 7), word(2, 7));
    assert_eq!(file.generation(), Generation(2));
    assert_eq!(mapping.generation(), Generation(2));
    fake.wait("unmapped", |s| {
        s.seen.contains(&Seen::Unmapped {
            generation: 1,
            first: 0,
            count: PAGES as u32,
        })
    });
    // By populate as well.
    fake.change(BYTES, true);
    mapping.populate(0..mapping.len()).unwrap();
    assert_eq!(page_word(mapping.as_volatile(), 299), word(3, 299));
    // A mapping made now is of the newest content at once.
    let other = file.map(&MapOptions::shared().range(4096, 4096)).unwrap();
    assert_eq!(other.generation(), Generation(3));
}

#[test]
fn local_a_rebase_notice_is_followed_without_force_and_acked() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::shared());
    mapping.populate(0..mapping.len()).unwrap();
    fake.change(BYTES, false);
    assert_eq!(
        page_word(mapping.as_volatile(), 7),
        word(1, 7),
        "nobody has told it"
    );
    fake.tell(41);
    fake.wait("acked", |s| {
        let unmapped = Seen::Unmapped {
            generation: 1,
            first: 0,
            count: PAGES as u32,
        };
        s.seen.ends_with(&[unmapped, Seen::Ack(41)])
    });
    for page in 0..PAGES {
        assert_eq!(page_word(mapping.as_volatile(), page), word(2, page as u64));
    }
    // Again, and for what is known already: only acked.
    fake.tell(42);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(42)));
    assert_eq!(
        fake.state
            .lock()
            .seen
            .iter()
            .filter(|s| matches!(s, Seen::Unmapped { .. }))
            .count(),
        1
    );
}

#[test]
fn local_an_invalidate_is_done_and_acked() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::private());
    store(&mapping, 11 * PAGE_SIZE, 5);
    mapping.populate(0..mapping.len()).unwrap();
    let invalidate = |recall, generation| Notice::Invalidate {
        recall,
        file: FileToken(5),
        generation: Generation(generation),
        range: PageRange {
            first: PageIndex(10),
            count: 20,
        },
        reason: InvalidateReason::Reclaim,
        deadline_ms: 1000,
    };
    fake.notify(&invalidate(8, 1), None);
    let unmapped = Seen::Unmapped {
        generation: 1,
        first: 10,
        count: 20,
    };
    fake.wait("acked", |s| s.seen.ends_with(&[unmapped, Seen::Ack(8)]));
    assert_eq!(
        mapping.as_volatile().read_u8(11 * PAGE_SIZE),
        Some(5),
        "stored to: kept"
    );
    fake.punch(10, 20);
    let before = fake.faults().len();
    assert_eq!(page_word(mapping.as_volatile(), 12), word(1, 12));
    assert!(fake.faults().len() > before);
    // Of a content that nobody maps, of a file that nobody has open: only acked.
    fake.notify(&invalidate(9, 99), None);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(9)));
    drop(mapping);
    fake.wait("closed", |s| s.seen.contains(&Seen::Close));
    fake.notify(&invalidate(10, 1), None);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(10)));
}

/// Readers of a file that changes all the time see whole pages, never zeros, never an older content
/// after a newer one, and the newest once they were told.
fn readers_of_a_changing_file(options: &MapOptions, force: bool) {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let mapping = map(&client, options);
    let (done, newest) = (AtomicBool::new(false), AtomicU32::new(1));
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (mapping, done, newest) = (&mapping, &done, &newest);
            scope.spawn(move || {
                let mut seen = vec![0; PAGES];
                let mut x = thread;
                while !done.load(Ordering::Relaxed) {
                    x = x
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    let page = (x >> 33) as usize % PAGES;
                    let got = peek(mapping.as_volatile(), page);
                    let (generation, place) = (got >> 40, got & ((1 << 40) - 1));
                    assert_eq!(place, page as u64 + 1, "page {page} shows {got:#x}");
                    assert!(generation >= seen[page], "page {page} went back");
                    assert!(generation <= u64::from(newest.load(Ordering::SeqCst)) + 1);
                    seen[page] = generation;
                }
            });
        }
        for round in 0..200 {
            let generation = fake.change(BYTES, force);
            newest.store(generation, Ordering::SeqCst);
            if round % 2 == 0 || !force {
                fake.tell(round);
                fake.wait("acked", |s| s.seen.contains(&Seen::Ack(round)));
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    let newest = newest.load(Ordering::SeqCst);
    for page in 0..PAGES {
        assert_eq!(
            page_word(mapping.as_volatile(), page),
            word(newest, page as u64)
        );
    }
}

#[test]
fn local_readers_of_a_changing_file_with_force() {
    readers_of_a_changing_file(&MapOptions::shared(), true);
}

#[test]
fn local_readers_of_a_changing_file_without_force() {
    readers_of_a_changing_file(&MapOptions::shared(), false);
}

#[test]
fn local_readers_of_a_changing_file_through_a_private_mapping() {
    readers_of_a_changing_file(&MapOptions::private(), true);
}

#[test]
fn local_a_file_that_shrinks_and_grows() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let file = open(&client, OpenHow::Map);
    let mapping = file.map(&MapOptions::shared()).unwrap();
    mapping.populate(0..mapping.len()).unwrap();
    let (_read, write) = rustix::pipe::pipe().unwrap();
    let reachable = |page: usize| {
        let at = mapping.as_ptr().wrapping_add(page * PAGE_SIZE);
        // SAFETY: within the mapping, which lives; the kernel copies from it.
        (unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&write), at.cast(), 8) }) == 8
    };
    fake.change(10 * 4096 + 16, true);
    assert_eq!(page_word(mapping.as_volatile(), 9), word(2, 9));
    assert_eq!(file.len(), 10 * 4096 + 16);
    let last = 10 * PAGE_SIZE;
    assert_eq!(mapping.as_volatile().read_u64(last), Some(word(2, 10)));
    assert_eq!(
        mapping.as_volatile().read_u64(last + 16),
        Some(0),
        "zeros behind the end"
    );
    assert!(reachable(10));
    assert!(
        !reachable(11) && !reachable(299),
        "SIGBUS behind the last page"
    );
    fake.change(BYTES, true);
    fake.tell(1);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(1)));
    assert!(reachable(11));
    assert_eq!(page_word(mapping.as_volatile(), 299), word(3, 299));
}

#[test]
fn local_a_stale_that_is_not_newer_is_refused_and_not_asked_for_ever() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::shared());
    // The daemon's newest becomes older than what the guest has.
    fake.change(BYTES, true);
    assert_eq!(page_word(mapping.as_volatile(), 1), word(2, 1));
    {
        let mut state = fake.state.lock();
        state.newest = 1;
        state.homes[&2].punch(0, PAGES as u64);
    }
    let error = mapping.populate(0..4096).unwrap_err();
    assert_eq!(error.errno(), libc::EPROTO);
    let (_read, write) = rustix::pipe::pipe().unwrap();
    let at = mapping.as_ptr().wrapping_add(40 * PAGE_SIZE);
    // SAFETY: within the mapping, which lives; the kernel copies from it.
    let got = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&write), at.cast(), 8) };
    assert_eq!(got, -1);
    assert_eq!(mapping.last_error().unwrap().error.errno(), libc::EPROTO);
}

/// The daemon gives no descriptor of a newer home to who has pinned the older: it has holes.
#[test]
fn local_a_pinned_file_hears_of_newer_content_and_keeps_its_own() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let file = open(&client, OpenHow::Pin);
    let opened = file.opened_version();
    fake.change(4096, false);
    let notice = Notice::Rebase {
        recall: 43,
        file: FileToken(5),
        generation: Generation(2),
        version: copage_grants::Version::new(1, 2),
        bytes: 4096,
        deadline_ms: 1000,
    };
    fake.notify(&notice, None);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(43)));
    assert_eq!(client.lost(), None);
    assert_eq!(file.generation(), Generation(2));
    assert!(file.version() > file.opened_version() && file.opened_version() == opened);
    let stat = rustix::fs::fstat(file.descriptor().unwrap()).unwrap();
    assert_eq!(stat.st_size.unsigned_abs(), BYTES);
    fake.wait("nothing said to be unmapped", |s| {
        !s.seen
            .iter()
            .any(|seen| matches!(seen, Seen::Unmapped { .. }))
    });
}
