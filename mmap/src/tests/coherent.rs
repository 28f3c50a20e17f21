//! Files that are written, over descriptors: which pages are whose, and what is shown when.

use super::fake::{Fake, Seen, word};
use super::granted::reachable;
use super::*;
use crate::MmapError;
use copage_coherence::msg::Notice;
use std::sync::Arc;

pub(super) const PAGES: usize = 600;
pub(super) const BYTES: u64 = (PAGES * PAGE_SIZE) as u64;

pub(super) fn start() -> (Arc<Fake>, Client) {
    let fake = Fake::start_coherent(BYTES);
    let client = connect(&fake);
    (fake, client)
}

pub(super) fn open_written(client: &Client) -> File {
    let root = client.attach("all").unwrap().root();
    let node = root.lookup(b"f").unwrap();
    node.open_for_writing(OpenHow::Map).unwrap()
}

pub(super) fn map_written(client: &Client) -> Mapping {
    open_written(client).map(&MapOptions::written()).unwrap()
}

/// Stores a word at a page's start.
pub(super) fn put(mapping: &Mapping, page: usize, value: u64) {
    let bytes = mapping.as_volatile_mut().unwrap();
    assert!(bytes.write_u64(page * PAGE_SIZE, value));
}

pub(super) fn held(fake: &Fake) -> Vec<u64> {
    let state = fake.state.lock();
    state
        .coherent
        .as_ref()
        .unwrap()
        .held
        .keys()
        .copied()
        .collect()
}

/// The first word of a page as the daemon has it by now.
pub(super) fn on_disk(fake: &Fake, page: usize) -> u64 {
    let state = fake.state.lock();
    let disk = &state.coherent.as_ref().unwrap().disk;
    u64::from_le_bytes(disk[page * PAGE_SIZE..][..8].try_into().unwrap())
}

pub(super) fn recall(fake: &Fake, number: u64, first: u64, count: u32) {
    fake.take_back(number, first, count);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(number)));
}

/// As when another guest wanted the page first. Two guests that forgot such answers took a page from each other for
/// ever.
#[test]
fn local_what_is_asked_for_before_it_is_asked_back_is_had_afterwards() {
    let (fake, client) = start();
    let mapping = map_written(&client);
    assert_eq!(page_word(mapping.as_volatile(), 5), word(1, 5));
    let before = fake.faults().len();
    fake.state.lock().asks_first = Some(1 << 63);
    put(&mapping, 5, 55);
    assert!(fake.state.lock().seen.contains(&Seen::Ack(1 << 63)));
    assert_eq!(held(&fake), [5]);
    assert_eq!(fake.faults()[before..].len(), 1, "asked for once");
}

#[test]
fn local_what_is_stored_is_the_files_and_goes_home_when_it_is_asked_for() {
    let (fake, client) = start();
    let mapping = map_written(&client);
    assert!(mapping.is_writable() && mapping.kind() == crate::MapKind::Shared);
    // Read first, and not.
    assert_eq!(page_word(mapping.as_volatile(), 5), word(1, 5));
    assert_eq!(held(&fake), []);
    put(&mapping, 5, 55);
    put(&mapping, 100, 66);
    assert_eq!(held(&fake), [5, 100]);
    assert_eq!(peek(mapping.as_volatile(), 5), 55);
    assert_eq!(on_disk(&fake, 5), word(1, 5), "not before it is given back");
    // Its neighbours are read as before.
    assert_eq!(page_word(mapping.as_volatile(), 6), word(1, 6));
    recall(&fake, 1 << 63, 0, 50);
    assert_eq!((on_disk(&fake, 5), held(&fake)), (55, vec![100]));
    // As another guest.
    fake.state
        .lock()
        .change_page(5, |bytes| bytes[..8].copy_from_slice(&7u64.to_le_bytes()));
    assert_eq!(peek(mapping.as_volatile(), 5), 7);
    put(&mapping, 5, 8);
    assert_eq!(
        (peek(mapping.as_volatile(), 5), held(&fake)),
        (8, vec![5, 100])
    );
    assert_eq!(fake.state.lock().coherent.as_ref().unwrap().again, 0);
}

#[test]
fn local_a_load_beside_a_store_that_waits_sees_what_another_guest_stored() {
    let (fake, client) = start();
    let mapping = map_written(&client);
    assert_eq!(page_word(mapping.as_volatile(), 5), word(1, 5));
    std::thread::scope(|scope| {
        let mut state = fake.state.lock();
        let store = scope.spawn(|| put(&mapping, 5, 8));
        std::thread::sleep(Duration::from_millis(50));
        state.change_page(5, |bytes| bytes[..8].copy_from_slice(&7u64.to_le_bytes()));
        let load = scope.spawn(|| peek(mapping.as_volatile(), 5));
        std::thread::sleep(Duration::from_millis(50));
        drop(state);
        let seen = load.join().unwrap();
        assert!(seen == 7 || seen == 8, "{seen}");
        store.join().unwrap();
    });
    assert_eq!(peek(mapping.as_volatile(), 5), 8);
}

/// Another open of a file hears late that it has another home.
#[test]
fn local_of_an_older_home_nothing_is_said_to_be_unmapped() {
    let (fake, client) = start();
    let mapping = map_written(&client);
    let other = map(&client, &MapOptions::shared());
    assert_eq!(peek(other.as_volatile(), 5), word(1, 5));
    assert!(fake.rehome());
    fake.tell(1);
    put(&mapping, 5, 8);
    assert_eq!(held(&fake), [5]);
    // It hears of it by this fault.
    assert_eq!(peek(other.as_volatile(), 5), 8);
    put(&mapping, 5, 9);
    drop(client.exports());
    assert_eq!(held(&fake), [5]);
    assert_eq!(peek(other.as_volatile(), 5), 9);
    let said = |s: &Seen| matches!(s, Seen::Unmapped { generation: 1, .. });
    assert!(!fake.state.lock().seen.iter().any(said));
}

#[test]
fn local_what_is_asked_back_of_one_open_is_unmapped_in_all() {
    let (fake, client) = start();
    let (a, b) = (map_written(&client), map_written(&client));
    put(&a, 5, 1);
    put(&b, 5, 2);
    recall(&fake, 1, 5, 1);
    assert_eq!((on_disk(&fake, 5), held(&fake)), (2, vec![]));
    put(&b, 5, 3);
    assert_eq!(held(&fake), [5]);
    assert_eq!(peek(a.as_volatile(), 5), 3);
}

#[test]
fn local_a_page_is_given_back_when_its_last_mapping_ends() {
    let (fake, client) = start();
    let file = open_written(&client);
    let other = open_written(&client);
    let a = file.map(&MapOptions::written()).unwrap();
    let b = other
        .map(&MapOptions::written().range(4 << 12, 4 << 12))
        .unwrap();
    put(&a, 5, 1);
    assert_eq!(peek(b.as_volatile(), 1), 1);
    put(&b, 1, 2);
    assert_eq!(peek(a.as_volatile(), 5), 2, "one page");
    drop(a);
    // Said by the pager, which answers this behind it.
    drop(client.exports());
    assert_eq!(held(&fake), [5], "the other has it still");
    put(&b, 1, 3);
    drop(b);
    fake.wait("given back", |s| {
        s.coherent.as_ref().unwrap().held.is_empty()
    });
    assert_eq!(on_disk(&fake, 5), 3);
}

#[test]
fn local_all_mappings_of_a_process_show_its_stores() {
    let (fake, client) = start();
    let written = map_written(&client);
    let read = map(&client, &MapOptions::shared());
    let mine = map(&client, &MapOptions::private());
    for page in [3, 4] {
        assert_eq!(peek(read.as_volatile(), page), word(1, page as u64));
        put(&written, page, 9);
        assert_eq!(peek(read.as_volatile(), page), 9);
        assert_eq!(peek(mine.as_volatile(), page), 9);
    }
    put(&written, 3, 10);
    assert_eq!(
        (peek(read.as_volatile(), 3), peek(mine.as_volatile(), 3)),
        (10, 10)
    );
    // A store of one's own parts with it.
    store(&mine, 3 * PAGE_SIZE, 77);
    put(&written, 3, 11);
    assert_eq!(
        (peek(read.as_volatile(), 3), peek(mine.as_volatile(), 3)),
        (11, 77)
    );
    assert_eq!(mine.private_pages(), 1);
    // A page that one only reads is not to be stored to.
    assert!(read.as_volatile_mut().is_none());
    // Asked of one open, it goes in all.
    recall(&fake, 1, 3, 2);
    fake.state
        .lock()
        .change_page(4, |bytes| bytes[..8].copy_from_slice(&5u64.to_le_bytes()));
    for mapping in [&written, &read, &mine] {
        assert_eq!(peek(mapping.as_volatile(), 4), 5);
    }
    assert_eq!((peek(mine.as_volatile(), 3), on_disk(&fake, 3)), (77, 11));
}

#[test]
fn local_a_page_that_is_torn_out_faults_and_is_never_zeros() {
    let (fake, client) = start();
    let mapping = map_written(&client);
    put(&mapping, 7, 70);
    fake.state.lock().tear_out(7);
    assert_eq!(peek(mapping.as_volatile(), 7), 70);
    put(&mapping, 8, 80);
    fake.state.lock().tear_out(8);
    put(&mapping, 8, 81);
    assert_eq!(peek(mapping.as_volatile(), 8), 81);
    fake.wait("known", |s| {
        s.coherent.as_ref().unwrap().held.contains_key(&8)
    });
    // From under a reader too.
    for _ in 0..20 {
        fake.punch(0, PAGES as u64);
        assert_eq!(page_word(mapping.as_volatile(), 20), word(1, 20));
    }
}

#[test]
fn local_pages_that_several_write_are_mapped_from_the_common_file() {
    let (fake, client) = start();
    fake.state.lock().coherent.as_mut().unwrap().share = true;
    let mapping = map_written(&client);
    put(&mapping, 1, 10);
    recall(&fake, 1, 0, 10);
    assert_eq!(on_disk(&fake, 1), 10);
    fake.state.lock().coherent.as_mut().unwrap().renew_common();
    put(&mapping, 1, 11);
    assert_eq!(peek(mapping.as_volatile(), 1), 11);
    recall(&fake, 2, 0, 10);
    assert_eq!(on_disk(&fake, 1), 11);
}

#[test]
fn local_a_writer_that_goes_on_asks_for_more_at_a_time() {
    let (fake, client) = start();
    let mapping = map_written(&client);
    for page in 0..200 {
        put(&mapping, page, page as u64);
    }
    assert!(fake.faults().len() < 20, "{:?}", fake.faults());
    recall(&fake, 1, 0, PAGES as u32);
    for page in 0..200 {
        assert_eq!(on_disk(&fake, page), page as u64);
    }
    assert_eq!(on_disk(&fake, 599), word(1, 599));
}

#[test]
fn local_populate_write_makes_pages_ready_for_stores() {
    for policy in [UserfaultPolicy::Best, UserfaultPolicy::UserModeOnly] {
        let fake = Fake::start_coherent(BYTES);
        let client = connect_with(&fake, policy);
        let mapping = map_written(&client);
        mapping.populate(0..PAGES * PAGE_SIZE).unwrap();
        assert_eq!(held(&fake), []);
        mapping.populate_write(PAGE_SIZE..100 * PAGE_SIZE).unwrap();
        assert_eq!(held(&fake).len(), 99);
        let faults = fake.faults().len();
        let zero = std::fs::File::open("/dev/zero").unwrap();
        let at = mapping.as_ptr().wrapping_add(50 * PAGE_SIZE);
        // SAFETY: within the writable mapping, which lives; no reference into it exists.
        let got = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&zero), at.cast(), 8) };
        assert_eq!((got, fake.faults().len()), (8, faults));
        recall(&fake, 1, 50, 1);
        assert_eq!(on_disk(&fake, 50), 0);
    }
}

#[test]
fn local_write_truncate_and_sync_by_message() {
    let (fake, client) = start();
    let file = open_written(&client);
    let mapping = file.map(&MapOptions::written()).unwrap();
    assert_eq!(peek(mapping.as_volatile(), 2), word(1, 2));
    let data = vec![0x11; 300_000];
    assert_eq!(file.write_at(&data, 8).unwrap(), data.len());
    assert_eq!(peek(mapping.as_volatile(), 2), 0x1111_1111_1111_1111);
    let mut back = vec![0; data.len()];
    assert_eq!(file.read_at(&mut back, 8).unwrap(), data.len());
    assert_eq!(back, data);
    file.sync().unwrap();
    assert_eq!(fake.state.lock().coherent.as_ref().unwrap().syncs, 1);
    file.set_len(5 * PAGE_SIZE as u64 + 3).unwrap();
    assert!(!reachable(&mapping, 6) && reachable(&mapping, 5));
    // Of one that is open to be read only.
    let read = open(&client, OpenHow::Map);
    assert!(read.is_coherent() && !read.is_writable());
    for error in [
        read.write_at(&[1], 0).unwrap_err(),
        read.set_len(0).unwrap_err(),
        read.map(&MapOptions::written()).unwrap_err(),
    ] {
        assert_eq!(error.errno(), libc::EACCES);
    }
}

#[test]
fn local_a_mapping_follows_the_length_of_its_file() {
    let (fake, client) = start();
    let file = open_written(&client);
    let mapping = file.map(&MapOptions::written()).unwrap();
    let resize = |bytes: u64| {
        recall(&fake, bytes, 0, PAGES as u32);
        fake.state.lock().resize(bytes);
        let token = fake.state.lock().token();
        fake.notify(&Notice::Resized { file: token, bytes }, None);
        eventually("the length", || file.len() == bytes);
    };
    put(&mapping, 9, 1);
    put(&mapping, 300, 2);
    resize(10 * PAGE_SIZE as u64);
    assert_eq!(peek(mapping.as_volatile(), 9), 1);
    assert!(!reachable(&mapping, 10) && !reachable(&mapping, 300));
    resize(BYTES);
    assert_eq!(
        (
            peek(mapping.as_volatile(), 9),
            peek(mapping.as_volatile(), 300)
        ),
        (1, 0)
    );
    put(&mapping, 300, 3);
    assert_eq!(peek(mapping.as_volatile(), 300), 3);
    recall(&fake, 1, 0, PAGES as u32);
    assert_eq!(on_disk(&fake, 300), 3);
}

#[test]
fn local_a_store_that_is_refused_is_sigbus_until_it_is_tried_again() {
    let (fake, client) = start();
    let mapping = map_written(&client);
    fake.state.lock().coherent.as_mut().unwrap().full.insert(3);
    assert_eq!(peek(mapping.as_volatile(), 3), word(1, 3));
    let error = mapping.populate_write(3 << 12..4 << 12).unwrap_err();
    assert_eq!(error.errno(), libc::ENOSPC);
    refused_store(&mapping, 3);
    fake.state.lock().coherent.as_mut().unwrap().full.clear();
    mapping.populate_write(3 << 12..4 << 12).unwrap();
    put(&mapping, 3, 4);
    assert_eq!(held(&fake), [3]);
}

/// Stores by the kernel, which says EFAULT where a plain store is SIGBUS.
fn refused_store(mapping: &Mapping, page: usize) {
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let at = mapping.as_ptr().wrapping_add(page * PAGE_SIZE);
    // SAFETY: within the writable mapping, which lives; no reference into it exists.
    let got = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&zero), at.cast(), 8) };
    assert!(got < 0, "the store was let through");
}

#[test]
fn local_a_writable_mapping_is_not_there_in_a_child() {
    let (_fake, client) = start();
    let mapping = map_written(&client);
    put(&mapping, 1, 5);
    let (_, signal) = in_child(|| {
        peek(mapping.as_volatile(), 1);
        0
    });
    assert_eq!(signal, Some(libc::SIGSEGV));
    put(&mapping, 1, 6);
    assert_eq!(peek(mapping.as_volatile(), 1), 6);
}

#[test]
fn local_stores_that_went_with_the_daemon_are_told_once() {
    let (fake, client) = start();
    let file = open_written(&client);
    let other = open_written(&client);
    let mapping = file.map(&MapOptions::written()).unwrap();
    put(&mapping, 1, 5);
    file.sync().unwrap();
    fake.go_down();
    super::returns::away(&client);
    fake.come_back(false);
    eventually("the return", || client.reconnects() == 1);
    eventually("what is on the disk", || {
        peek(mapping.as_volatile(), 1) == word(1, 1)
    });
    for file in [&file, &other] {
        assert_eq!(file.sync(), Err(MmapError::WritesLost));
        assert_eq!(file.sync(), Ok(()));
    }
    put(&mapping, 1, 6);
    recall(&fake, 9, 0, PAGES as u32);
    file.sync().unwrap();
    fake.go_down();
    super::returns::away(&client);
    fake.come_back(false);
    eventually("the return", || client.reconnects() == 2);
    assert_eq!(file.sync(), Ok(()), "all was given back and synced");
    assert_eq!(peek(mapping.as_volatile(), 1), 6);
    assert!(fake.state.lock().wrong.is_empty());
}

/// Else the next store goes where the last one was lost, and the next sync knows nothing of it.
#[test]
fn local_what_is_lost_is_told_when_no_store_goes_there_any_more() {
    let (fake, client) = start();
    let file = open_written(&client);
    let mapping = file.map(&MapOptions::written()).unwrap();
    put(&mapping, 1, 5);
    fake.go_down();
    super::returns::away(&client);
    // Whoever is to show the next daemon's content waits for this.
    let lock = mapping.mapped.lock(client.shared());
    fake.come_back(false);
    eventually("the return", || client.reconnects() == 1);
    eventually("the next content to be known", || {
        let known = file.inner().content.lock().stamp;
        known.session() > mapping.mapped.stamp().session()
    });
    std::thread::scope(|scope| {
        let sync = scope.spawn(|| file.sync());
        std::thread::sleep(Duration::from_millis(100));
        assert!(!sync.is_finished(), "told while stores still go there");
        drop(lock);
        assert_eq!(sync.join().unwrap(), Err(MmapError::WritesLost));
    });
    put(&mapping, 1, 6);
    assert_eq!(held(&fake), [1]);
    assert_eq!(file.sync(), Ok(()));
}

#[test]
fn local_what_a_daemon_that_died_did_not_answer_is_not_asked_again() {
    let (fake, client) = start();
    let file = open_written(&client);
    fake.state.lock().dies_after = Some(0);
    let wrote = file.write_at(&[1], 0);
    assert_eq!(wrote, Err(MmapError::Unanswered));
    assert_eq!(wrote.unwrap_err().errno(), libc::EIO);
    fake.come_back(false);
    assert_eq!(file.write_at(&[1], 0), Ok(1));
}

#[test]
fn local_a_newer_content_takes_the_place_of_pages_that_are_written() {
    let (fake, client) = start();
    let file = open_written(&client);
    let mapping = file.map(&MapOptions::written()).unwrap();
    put(&mapping, 1, 5);
    recall(&fake, 1, 0, PAGES as u32);
    put(&mapping, 2, 6);
    recall(&fake, 2, 0, PAGES as u32);
    // The home is another, as after a fence; what it holds is the same.
    let next = fake.change(BYTES, true);
    fake.tell(3);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(3)));
    assert_eq!(mapping.generation().0, next);
    assert_eq!(
        (
            peek(mapping.as_volatile(), 1),
            peek(mapping.as_volatile(), 2)
        ),
        (5, 6)
    );
    put(&mapping, 1, 7);
    assert_eq!(held(&fake), [1]);
    assert_eq!(file.sync(), Ok(()), "nothing was lost");
    // By a daemon that forgot to ask for what we write: it is told.
    fake.change(BYTES, true);
    fake.tell(4);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(4)));
    assert_eq!(file.sync(), Err(MmapError::WritesLost));
}
