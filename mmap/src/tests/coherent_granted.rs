//! Files that are written, over grants, as in a PVH guest and as in a PV one. The stand-in shows the
//! library's logic; tests/xen runs it on a hypervisor.

use super::coherent::{BYTES, PAGES, map_written, open_written, put, recall};
use super::coherent_races::add;
use super::fake::{Fake, word};
use super::*;
use crate::MmapError;
use crate::granted::standin::StandIn;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn start(movable: bool) -> (Arc<Fake>, Arc<StandIn>, Client) {
    let (fake, standin) = Fake::start_coherent_granted(BYTES, movable);
    let client = connect_granted(&fake);
    (fake, standin, client)
}

fn first_word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

/// As another guest: the first word of a page, which becomes `value`; `None`: the page is granted.
fn swap(standin: &StandIn, page: usize, value: impl FnOnce(u64) -> u64) -> Option<u64> {
    let mut before = 0;
    let changed = standin.change(page as u64, |bytes| {
        before = first_word(bytes);
        bytes[..8].copy_from_slice(&value(before).to_le_bytes());
    });
    changed.then_some(before)
}

#[test]
fn local_granted_pages_are_stored_to_and_given_back() {
    for movable in [true, false] {
        let (fake, standin, client) = start(movable);
        let mapping = map_written(&client);
        // A touch of a mapping that may be stored to is for writing at once, page by page.
        assert_eq!(page_word(mapping.as_volatile(), 5), word(1, 5));
        assert_eq!(fake.faults(), [(5, 1)]);
        put(&mapping, 5, 55);
        assert_eq!(
            (peek(mapping.as_volatile(), 5), fake.faults().len()),
            (55, 1)
        );
        recall(&fake, 1, 0, PAGES as u32);
        assert_eq!(swap(&standin, 5, |_| 56), Some(55));
        assert_eq!(peek(mapping.as_volatile(), 5), 56);
        // One that is only read is mapped so, also of a page that may be stored to.
        let read = map(&client, &MapOptions::shared());
        assert_eq!(peek(read.as_volatile(), 5), 56);
        put(&mapping, 5, 57);
        assert_eq!(peek(read.as_volatile(), 5), 57);
        drop((mapping, read));
        eventually("all to be given back", || standin.mapped() == 0);
        eventually("the last word", || swap(&standin, 5, |_| 58) == Some(57));
        assert_eq!(standin.lies.load(Ordering::SeqCst), 0);
    }
}

#[test]
fn local_no_store_to_a_granted_page_is_lost() {
    const RACED: usize = 6;
    for movable in [true, false] {
        let (fake, standin, client) = start(movable);
        let (a, b) = (map_written(&client), map_written(&client));
        for page in 0..RACED {
            assert!(swap(&standin, page, |_| 0).is_some());
        }
        let mut theirs = 0;
        std::thread::scope(|scope| {
            let ours: Vec<_> = [&a, &b, &a]
                .into_iter()
                .enumerate()
                .map(|(thread, mapping)| {
                    scope.spawn(move || {
                        for i in 0..1500 {
                            add(mapping, (i * 5 + thread) % RACED);
                        }
                    })
                })
                .collect();
            let mut round = 0;
            while ours.iter().any(|thread| !thread.is_finished()) {
                round += 1;
                recall(&fake, round, round % RACED as u64, 2);
                theirs += u64::from(swap(&standin, round as usize % RACED, |n| n + 1).is_some());
            }
        });
        recall(&fake, u64::MAX, 0, PAGES as u32);
        let sum: Option<u64> = (0..RACED).map(|page| swap(&standin, page, |n| n)).sum();
        assert_eq!(sum, Some(3 * 1500 + theirs));
        assert!(theirs > 0, "not seen here");
    }
}

#[test]
fn local_stores_to_granted_pages_that_went_with_the_daemon_are_told() {
    let (fake, _standin, client) = start(true);
    let file = open_written(&client);
    let mapping = file.map(&MapOptions::written()).unwrap();
    put(&mapping, 1, 5);
    file.sync().unwrap();
    fake.go_down();
    super::returns::away(&client);
    fake.come_back(false);
    eventually("the return", || client.reconnects() == 1);
    assert_eq!(file.sync(), Err(MmapError::WritesLost));
    assert_eq!(file.sync(), Ok(()));
    assert_eq!(peek(mapping.as_volatile(), 2), word(1, 2));
}
