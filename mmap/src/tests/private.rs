//! Stores to private mappings: unseen by others, kept whatever happens, and noticed every one.

use super::fake::{Fake, word};
use super::*;
use std::sync::atomic::{AtomicBool, Ordering};

const PAGES: usize = 1500;
const BYTES: u64 = (PAGES * PAGE_SIZE) as u64;

/// The first word of a page after `store(.., page * PAGE_SIZE, value)`.
fn stored(page_word: u64, value: u8) -> u64 {
    (page_word & !0xff) | u64::from(value)
}

/// Every way in which a first store can find its page; gives pages that must be known as private.
fn store_every_way(fake: &Fake, mapping: &Mapping) -> Vec<usize> {
    let bytes = mapping.as_volatile();
    // Mapped by a read.
    peek(bytes, 100);
    store(mapping, 100 * PAGE_SIZE, 1);
    // A hole.
    store(mapping, 200 * PAGE_SIZE, 1);
    // There, never mapped: behind a window that another mapping brought.
    map(mapping.client(), &MapOptions::shared())
        .populate(0..mapping.len())
        .unwrap();
    store(mapping, 300 * PAGE_SIZE, 1);
    // Read, taken back, not there.
    peek(bytes, 400);
    fake.punch(400, 1);
    store(mapping, 400 * PAGE_SIZE, 1);
    // Read, taken back, there again.
    peek(bytes, 500);
    fake.punch(500, 1);
    map(mapping.client(), &MapOptions::shared())
        .populate(500 << 12..501 << 12)
        .unwrap();
    store(mapping, 500 * PAGE_SIZE, 1);
    // By the kernel.
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let at = mapping.as_ptr().wrapping_add(600 * PAGE_SIZE);
    // SAFETY: within the private mapping, which lives; no reference into it exists.
    let got = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&zero), at.cast(), 1) };
    assert_eq!(got, 1);
    vec![100, 200, 300, 400, 500, 600]
}

#[test]
fn local_private_stores_are_private_and_all_are_noticed() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let file = open(&client, OpenHow::Map);
    let mine = file.map(&MapOptions::private()).unwrap();
    let shared = file.map(&MapOptions::shared()).unwrap();
    let pages = store_every_way(&fake, &mine);
    assert_eq!(
        mine.private_pages(),
        pages.len() as u64,
        "a store went unnoticed"
    );
    for &page in &pages {
        let value = u8::from(page != 600);
        assert_eq!(
            peek(mine.as_volatile(), page),
            stored(word(1, page as u64), value)
        );
        assert_eq!(page_word(shared.as_volatile(), page), word(1, page as u64));
    }
    // Everything is taken back: what was stored to stays.
    fake.punch(0, PAGES as u64);
    for &page in &pages {
        let value = u8::from(page != 600);
        assert_eq!(
            peek(mine.as_volatile(), page),
            stored(word(1, page as u64), value)
        );
    }
    assert_eq!(page_word(mine.as_volatile(), 101), word(1, 101));
    assert_eq!(mine.private_pages(), pages.len() as u64);
}

/// The mutant that the test above catches.
#[test]
fn local_mutant_skip_the_arm_is_noticed() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let file = open(&client, OpenHow::Map);
    crate::mapped::SKIP_ARM.set(true);
    let mine = file.map(&MapOptions::private()).unwrap();
    crate::mapped::SKIP_ARM.set(false);
    let pages = store_every_way(&fake, &mine);
    assert_ne!(
        mine.private_pages(),
        pages.len() as u64,
        "the mutant survived"
    );
}

/// A hole that is punched into a page while somebody faults on it takes the kernel's mark along. That is a
/// race; the marks are taken by hand here.
#[test]
fn local_a_store_is_noticed_where_the_kernel_lost_its_mark() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::private());
    let bytes = mapping.as_volatile();
    let as_they_were = |page| assert_eq!(page_word(bytes, page), word(1, page as u64));
    (0..8).for_each(as_they_were);
    fake.punch(0, 8);
    let uffd = client.shared().uffd.as_ref().unwrap();
    uffd.unprotect_patiently(mapping.as_ptr().addr(), 8 * PAGE_SIZE)
        .unwrap();
    map(&client, &MapOptions::shared())
        .populate(0..8 * PAGE_SIZE)
        .unwrap();
    (0..4).for_each(as_they_were);
    (0..8).for_each(|page| store(&mapping, page * PAGE_SIZE, 1));
    assert_eq!(mapping.private_pages(), 8, "a store went unnoticed");
    fake.change(BYTES, true);
    fake.tell(1);
    fake.wait("acked", |s| s.seen.contains(&super::fake::Seen::Ack(1)));
    for page in 0..8 {
        assert_eq!(peek(bytes, page), stored(word(1, page as u64), 1));
    }
    assert_eq!(page_word(bytes, 8), word(2, 8));
}

#[test]
fn local_private_copies_survive_a_rebase_and_the_rest_is_new() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::private());
    for page in (0..PAGES).step_by(10) {
        store(&mapping, page * PAGE_SIZE + 8, 1);
    }
    assert_eq!(mapping.private_pages(), 150);
    let copy = |page: usize| {
        let at = page * PAGE_SIZE;
        (
            mapping.as_volatile().read_u64(at),
            mapping.as_volatile().read_u64(at + 8),
        )
    };
    fake.change(BYTES, true);
    fake.tell(3);
    fake.wait("acked", |s| s.seen.contains(&super::fake::Seen::Ack(3)));
    for page in 0..PAGES {
        let old = word(1, page as u64);
        if page % 10 == 0 {
            assert_eq!(copy(page), (Some(old), Some(stored(old, 1))), "page {page}");
        } else {
            assert_eq!(page_word(mapping.as_volatile(), page), word(2, page as u64));
        }
    }
    // Still armed: new stores are noticed and kept too.
    for page in (5..PAGES).step_by(10) {
        store(&mapping, page * PAGE_SIZE, 7);
    }
    assert_eq!(mapping.private_pages(), 300);
    fake.change(BYTES, true);
    for page in (5..PAGES).step_by(10) {
        assert_eq!(
            peek(mapping.as_volatile(), page),
            stored(word(2, page as u64), 7)
        );
        assert_eq!(
            page_word(mapping.as_volatile(), page + 1),
            word(3, page as u64 + 1)
        );
    }
}

#[test]
fn local_a_page_marked_without_a_copy_is_not_stuck_with_the_old_content() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::private());
    mapping.populate(0..PAGE_SIZE * 4).unwrap();
    // As if a thread had died between the mark and its store.
    mapping.mark_private_for_tests(1);
    fake.change(BYTES, true);
    fake.tell(1);
    fake.wait("acked", |s| s.seen.contains(&super::fake::Seen::Ack(1)));
    assert_eq!(page_word(mapping.as_volatile(), 1), word(2, 1));
    assert_eq!(mapping.private_pages(), 1);
    store(&mapping, PAGE_SIZE, 9);
    assert_eq!(mapping.private_pages(), 1);
    assert_eq!(peek(mapping.as_volatile(), 1), stored(word(2, 1), 9));
}

#[test]
fn local_stores_race_with_rebases_punches_and_invalidates_and_none_is_lost() {
    const RACED: usize = 256;
    let fake = Fake::start((RACED * PAGE_SIZE) as u64);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::private());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let (mapping, done) = (&mapping, &done);
            scope.spawn(move || {
                for page in (thread..RACED).step_by(4) {
                    store(mapping, page * PAGE_SIZE + 16, 0xee);
                    // At once and for good.
                    let now = mapping.as_volatile().read_u8(page * PAGE_SIZE + 16);
                    assert_eq!(now, Some(0xee), "page {page}");
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
                match round % 3 {
                    0 => drop(fake.change((RACED * PAGE_SIZE) as u64, round % 2 == 0)),
                    1 => fake.punch(0, RACED as u64),
                    _ => mapping.unmap_pages(0..mapping.len()).unwrap(),
                }
                if round % 6 == 0 {
                    fake.tell(round);
                }
                round += 1;
                std::thread::sleep(Duration::from_micros(300));
            }
        });
    });
    for page in 0..RACED {
        assert_eq!(
            mapping.as_volatile().read_u8(page * PAGE_SIZE + 16),
            Some(0xee)
        );
    }
    assert_eq!(mapping.private_pages(), RACED as u64);
}
