//! Granted files over the stand-in of memfd pages. These show the library's logic: nothing here is
//! isolation, a hypercall or a kernel's grant device; tests/xen runs the same library on those.

use super::fake::{Fake, Seen, word};
use super::*;
use crate::granted::standin::StandIn;
use crate::{MapKind, MmapError};
use copage_coherence::msg::FaultHint;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const PAGES: usize = 2000;
const BYTES: u64 = (PAGES * PAGE_SIZE) as u64;

fn start() -> (Arc<Fake>, Arc<StandIn>, Client) {
    let (fake, standin) = Fake::start_granted(BYTES, true);
    let client = connect_granted(&fake);
    (fake, standin, client)
}

/// Can the kernel read the page? write(2) reports what a plain access would die of.
pub(super) fn reachable(mapping: &Mapping, page: usize) -> bool {
    let (_read, write) = rustix::pipe::pipe().unwrap();
    let at = mapping.as_ptr().wrapping_add(page * PAGE_SIZE);
    // SAFETY: within the mapping, which lives; the kernel copies from it.
    (unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&write), at.cast(), 8) }) == 8
}

fn unmapped_pages(seen: &[Seen]) -> u64 {
    seen.iter()
        .map(|s| match s {
            Seen::Unmapped { count, .. } => u64::from(*count),
            _ => 0,
        })
        .sum()
}

#[test]
fn local_granted_pages_are_read_in_windows() {
    let (fake, standin, client) = start();
    let mapping = map(&client, &MapOptions::shared());
    assert_eq!(peek(mapping.as_volatile(), 1000), word(1, 1000));
    assert_eq!(fake.faults(), [(992, 16)], "an aligned window");
    for page in 0..PAGES {
        assert_eq!(page_word(mapping.as_volatile(), page), word(1, page as u64));
    }
    let faults = fake.faults();
    assert!(faults.len() < 24, "{faults:?}");
    assert!(faults.iter().any(|&(_, count)| count >= 256), "{faults:?}");
    let asked: u64 = faults.iter().map(|f| u64::from(f.1)).sum();
    assert_eq!(
        asked, PAGES as u64,
        "nothing is asked for twice: {faults:?}"
    );
    assert_eq!(standin.mapped(), PAGES as u64);
    // Read-only, whatever is tried.
    let at = mapping.as_ptr();
    // SAFETY: the page belongs to the mapping; making it writable is what must not work.
    let protected = unsafe { libc::mprotect(at.cast(), PAGE_SIZE, libc::PROT_READ) };
    assert_eq!(protected, 0);
    // All goes when the mapping does, and the daemon hears of it before the close.
    drop(mapping);
    fake.wait("closed", |s| s.seen.contains(&Seen::Close));
    assert_eq!((standin.mapped(), standin.batches()), (0, 0));
    assert_eq!(standin.granted_pages(), 0);
    assert_eq!(unmapped_pages(&fake.state.lock().seen), PAGES as u64);
}

#[test]
fn local_granted_pages_as_a_pv_guest_maps_them() {
    let (fake, standin) = Fake::start_granted(BYTES, false);
    let client = connect_granted(&fake);
    let mapping = map(&client, &MapOptions::shared());
    for page in (0..PAGES).step_by(3) {
        assert_eq!(page_word(mapping.as_volatile(), page), word(1, page as u64));
    }
    eventually("trials are let go of", || {
        standin.mapped() == standin.granted_pages() as u64
    });
    fake.take_back(7, 0, PAGES as u32);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(7)));
    assert_eq!(standin.mapped(), 0);
    assert_eq!(standin.lies.load(Ordering::SeqCst), 0);
    assert_eq!(peek(mapping.as_volatile(), 5), word(1, 5));
}

#[test]
fn local_many_threads_fault_on_granted_pages_at_once() {
    let (fake, standin, client) = start();
    fake.state.lock().slow = Duration::from_millis(1);
    fake.state.lock().grant_max = 20;
    let mapping = map(&client, &MapOptions::shared());
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let mapping = &mapping;
            scope.spawn(move || {
                for i in 0..PAGES {
                    let page = (i * 7 + thread * 331) % PAGES;
                    assert_eq!(page_word(mapping.as_volatile(), page), word(1, page as u64));
                }
            });
        }
    });
    assert_eq!(standin.mapped(), PAGES as u64, "each page is mapped once");
}

#[test]
fn local_two_mappings_of_a_granted_file_share_requests_and_have_windows_apart() {
    let (fake, standin, client) = start();
    fake.state.lock().slow = Duration::from_millis(5);
    let file = open(&client, OpenHow::Map);
    let all = file.map(&MapOptions::shared()).unwrap();
    let part = file
        .map(&MapOptions::shared().range(5 << 12, 40 << 12))
        .unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(peek(all.as_volatile(), 6), word(1, 6)));
        scope.spawn(|| assert_eq!(peek(part.as_volatile(), 2), word(1, 7)));
    });
    for page in 0..40 {
        assert_eq!(
            page_word(part.as_volatile(), page),
            word(1, page as u64 + 5)
        );
        assert_eq!(page_word(all.as_volatile(), page), word(1, page as u64));
    }
    // One goes; the other's pages stay, and the daemon finds them in use.
    drop(all);
    fake.wait("said", |s| unmapped_pages(&s.seen) >= 48);
    for page in 0..40 {
        assert_eq!(
            page_word(part.as_volatile(), page),
            word(1, page as u64 + 5)
        );
    }
    drop(part);
    drop(file);
    fake.wait("closed", |s| s.seen.contains(&Seen::Close));
    assert_eq!(standin.mapped(), 0);
}

#[test]
fn local_an_invalidate_of_a_part_takes_whole_windows_before_the_ack() {
    let (fake, standin, client) = start();
    let mapping = map(&client, &MapOptions::shared());
    mapping.populate(0..64 * PAGE_SIZE).unwrap();
    peek(mapping.as_volatile(), 100);
    assert_eq!(standin.mapped(), 80);
    fake.take_back(3, 70, 30);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(3)));
    assert_eq!(standin.mapped(), 64, "the window at 96 went whole");
    fake.take_back(4, 1, 1);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(4)));
    assert_eq!(standin.mapped(), 0);
    assert_eq!(standin.lies.load(Ordering::SeqCst), 0);
    for page in 0..128 {
        assert_eq!(page_word(mapping.as_volatile(), page), word(1, page as u64));
    }
    // Of what is not mapped, of another generation: only acked.
    fake.take_back(5, 1900, 10);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(5)));
}

#[test]
fn local_a_granted_file_that_changes() {
    let (fake, standin, client) = start();
    let file = open(&client, OpenHow::Map);
    let mapping = file.map(&MapOptions::shared()).unwrap();
    mapping.populate(0..mapping.len()).unwrap();
    fake.change(BYTES, false);
    fake.tell(41);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(41)));
    assert_eq!(standin.mapped(), 0);
    assert_eq!(standin.lies.load(Ordering::SeqCst), 0);
    for page in 0..PAGES {
        assert_eq!(page_word(mapping.as_volatile(), page), word(2, page as u64));
    }
    // By a fault, untold.
    fake.change(BYTES, false);
    fake.take_back(42, 0, 1);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(42)));
    mapping.unmap_pages(0..mapping.len()).unwrap();
    assert_eq!(page_word(mapping.as_volatile(), 7), word(3, 7));
    assert_eq!(mapping.generation().0, 3);
    mapping.populate(0..mapping.len()).unwrap();
    // Shorter.
    fake.change(10 * 4096, false);
    fake.tell(43);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(43)));
    assert_eq!(page_word(mapping.as_volatile(), 9), word(4, 9));
    assert!(!reachable(&mapping, 10) && !reachable(&mapping, PAGES - 1));
    assert_eq!(
        mapping.populate(0..mapping.len()).unwrap_err().errno(),
        libc::EINVAL
    );
}

#[test]
fn local_populate_of_granted_pages_and_those_the_daemon_refuses() {
    let (fake, _standin, client) = start();
    fake.state.lock().bad.extend([40, 41]);
    for kind in [MapKind::Shared, MapKind::Private] {
        let options = MapOptions {
            kind,
            ..MapOptions::default()
        };
        let mapping = map(&client, &options);
        mapping.populate(100 << 12..900 << 12).unwrap();
        for page in (0..40).chain(42..60) {
            assert_eq!(page_word(mapping.as_volatile(), page), word(1, page as u64));
        }
        assert!(!reachable(&mapping, 40));
        let refused = mapping.last_error().unwrap();
        assert_eq!(refused.offset, Some(40 * PAGE_SIZE));
        assert_eq!(refused.error.errno(), libc::EIO);
        assert_eq!(
            mapping.populate(40 << 12..41 << 12).unwrap_err().errno(),
            libc::EIO
        );
        fake.state.lock().bad.clear();
        mapping.populate(40 << 12..42 << 12).unwrap();
        assert!(mapping.last_error().is_none());
        assert_eq!(page_word(mapping.as_volatile(), 40), word(1, 40));
        fake.state.lock().bad.extend([40, 41]);
    }
    let populates = |s: &Seen| {
        matches!(
            s,
            Seen::Fault {
                hint: FaultHint::Populate,
                count: 412,
                ..
            }
        )
    };
    assert!(fake.state.lock().seen.iter().any(populates));
}

#[test]
fn local_maps_that_fail_are_asked_for_again_then_page_by_page_then_sigbus() {
    for movable in [true, false] {
        let (fake, standin) = Fake::start_granted(BYTES, movable);
        let client = connect_granted(&fake);
        let mapping = map(&client, &MapOptions::shared());
        // Once: nobody notices.
        standin.fail_next(1);
        assert_eq!(page_word(mapping.as_volatile(), 3), word(1, 3));
        assert_eq!(fake.faults(), [(0, 16), (0, 16)]);
        assert!(mapping.last_error().is_none());
        // One bad entry for good: its window comes without it, page by page.
        standin.set_bad([100]);
        assert!(!reachable(&mapping, 100));
        let refused = mapping.last_error().unwrap();
        assert_eq!(refused.offset, Some(100 * PAGE_SIZE));
        assert_eq!(refused.error.errno(), libc::EINVAL);
        for page in (96..100).chain(101..112) {
            assert_eq!(page_word(mapping.as_volatile(), page), word(1, page as u64));
        }
        assert!(!reachable(&mapping, 100), "for good, until it is populated");
        assert_eq!(
            mapping.populate(100 << 12..101 << 12).unwrap_err().errno(),
            libc::EINVAL
        );
        standin.set_bad([]);
        mapping.populate(96 << 12..112 << 12).unwrap();
        assert_eq!(page_word(mapping.as_volatile(), 100), word(1, 100));
        drop(mapping);
        eventually("all let go", || standin.batches() == 0);
    }
}

#[test]
fn local_windows_are_capped_and_the_oldest_given_back() {
    let (fake, standin, client) = start();
    let mapping = map(&client, &MapOptions::shared());
    client.shared().granted().unwrap().set_caps(20, 100_000);
    let mut x = 1u64;
    for _ in 0..2000 {
        x = x
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let page = (x >> 33) as usize % PAGES;
        assert_eq!(page_word(mapping.as_volatile(), page), word(1, page as u64));
        assert!(client.shared().granted().unwrap().counts().0 <= 20);
    }
    // The daemon was told and could take them: what it still grants is what is mapped, or nearly.
    eventually("given back", || standin.granted_pages() <= 21 * 64);
    assert!(unmapped_pages(&fake.state.lock().seen) > 5000);
    // By pages.
    client.shared().granted().unwrap().set_caps(1000, 128);
    for page in 0..PAGES {
        assert_eq!(page_word(mapping.as_volatile(), page), word(1, page as u64));
    }
    mapping.populate(0..100 << 12).unwrap();
}

/// In a PV guest a batch is mapped twice for a moment: what is full only then must be noticed before the
/// reader's range is touched. Cannot show what the hypervisor does.
#[test]
fn local_a_full_hypervisor_is_made_room_in() {
    for movable in [true, false] {
        let (fake, standin) = Fake::start_granted(BYTES, movable);
        let client = connect_granted(&fake);
        standin.set_pages_max(100);
        let mapping = map(&client, &MapOptions::shared());
        for page in (0..PAGES).step_by(17) {
            assert!(reachable(&mapping, page), "page {page}, movable {movable}");
            assert_eq!(page_word(mapping.as_volatile(), page), word(1, page as u64));
        }
        assert!(mapping.last_error().is_none());
        assert!(standin.refused.load(Ordering::SeqCst) > 0);
        drop(fake);
    }
}

#[test]
fn local_private_mappings_of_granted_files_are_copies() {
    let (fake, standin, client) = start();
    let mapping = map(&client, &MapOptions::private());
    let bytes = mapping.as_volatile();
    // Read, then stored to; stored to at once; by the kernel; many.
    peek(bytes, 100);
    store(&mapping, 100 * PAGE_SIZE, 1);
    store(&mapping, 200 * PAGE_SIZE, 1);
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let at = mapping.as_ptr().wrapping_add(600 * PAGE_SIZE);
    // SAFETY: within the private mapping, which lives; no reference into it exists.
    let got = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&zero), at.cast(), 1) };
    assert_eq!(got, 1);
    mapping.populate(0..mapping.len()).unwrap();
    mapping.populate_write(300 << 12..301 << 12).unwrap();
    assert_eq!(mapping.private_pages(), 4, "a store went unnoticed");
    for page in (0..PAGES).filter(|p| ![100, 200, 300, 600].contains(p)) {
        assert_eq!(page_word(bytes, page), word(1, page as u64));
    }
    let stored = |page: u64, value: u64| (word(1, page) & !0xff) | value;
    assert_eq!(peek(bytes, 100), stored(100, 1));
    assert_eq!(peek(bytes, 200), stored(200, 1));
    assert_eq!(peek(bytes, 600), stored(600, 0));
    assert_eq!(standin.maps.load(Ordering::SeqCst), 0, "copied, not mapped");
    eventually("entries are given back", || standin.granted_pages() == 0);
    // A change: copies that were not stored to are dropped, the others stay.
    fake.change(BYTES, false);
    fake.tell(3);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(3)));
    for page in (0..PAGES).filter(|p| ![100, 200, 300, 600].contains(p)) {
        assert_eq!(page_word(bytes, page), word(2, page as u64));
    }
    assert_eq!(peek(bytes, 100), stored(100, 1));
    store(&mapping, 5 * PAGE_SIZE, 9);
    assert_eq!(mapping.private_pages(), 5);
    // A page counted as stored to, but dropped before, gets the newest content by message.
    mapping.unmap_pages(7 << 12..8 << 12).unwrap();
    mapping.mark_private_for_tests(7);
    fake.change(BYTES, false);
    fake.tell(4);
    fake.wait("acked", |s| s.seen.contains(&Seen::Ack(4)));
    assert_eq!(page_word(bytes, 7), word(3, 7));
    // Copies that fail.
    standin.fail_next(1);
    assert_eq!(page_word(bytes, 1500), word(3, 1500));
    standin.fail_next(1000);
    assert!(!reachable(&mapping, 1800));
    assert_eq!(mapping.last_error().unwrap().error.errno(), libc::EINVAL);
}

#[test]
fn local_private_mappings_of_granted_files_for_system_calls_in_user_mode_only() {
    let (fake, standin) = Fake::start_granted(BYTES, true);
    let options = ConnectOptions {
        name: "guest".into(),
        userfault: UserfaultPolicy::UserModeOnly,
        ..ConnectOptions::default()
    };
    let client = Client::connect_with_device(&fake.socket(), &options, standin).unwrap();
    for kind in [MapKind::Shared, MapKind::Private] {
        let options = MapOptions {
            kind,
            ..MapOptions::default()
        };
        let mapping = map(&client, &options);
        assert!(!reachable(&mapping, 7));
        mapping.populate(0..20 * PAGE_SIZE).unwrap();
        assert!(reachable(&mapping, 7));
        assert_eq!(page_word(mapping.as_volatile(), 500), word(1, 500));
    }
}

#[test]
fn local_granted_files_are_read_by_message_and_not_pinned() {
    let (fake, _standin, client) = start();
    let file = open(&client, OpenHow::Read);
    let mut data = [0; 16];
    assert_eq!(file.read_at(&mut data, 3 * 4096).unwrap(), 16);
    assert_eq!(data[..8], word(1, 3).to_le_bytes());
    let root = client.attach("all").unwrap().root();
    let error = root.lookup(b"f").unwrap().open(OpenHow::Pin).unwrap_err();
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
    // Without a device: reading works, mapping says what is missing.
    let client = connect(&fake);
    let file = open(&client, OpenHow::Map);
    assert_eq!(file.read_at(&mut data, 0).unwrap(), 16);
    if !std::path::Path::new("/dev/xen/gntdev").exists() {
        let error = file.map(&MapOptions::shared()).unwrap_err();
        assert!(matches!(error, MmapError::NoGrants(_)), "{error}");
        assert_eq!(error.errno(), libc::EOPNOTSUPP);
    }
}

#[test]
fn local_a_lost_session_takes_granted_pages_away_whole() {
    let (fake, standin) = Fake::start_granted(BYTES, true);
    let client = connect_granted_for(&fake, 0);
    let file = open(&client, OpenHow::Map);
    let mapping = file.map(&MapOptions::shared()).unwrap();
    let mine = file.map(&MapOptions::private()).unwrap();
    mapping.populate(0..100 << 12).unwrap();
    store(&mine, 0, 1);
    let (sender, told) = crossbeam_channel::unbounded();
    client.on_lost(move |why| sender.send(why.clone()).unwrap());
    fake.state.lock().stuck = true;
    std::thread::scope(|scope| {
        let fault = scope.spawn(|| reachable(&mapping, 400));
        let call = scope.spawn(|| mapping.populate(500 << 12..501 << 12));
        fake.wait("both", |s| {
            let asked = |s: &&Seen| {
                matches!(
                    s,
                    Seen::Fault {
                        first: 400 | 500,
                        ..
                    }
                )
            };
            s.seen.iter().filter(asked).count() == 2
        });
        fake.die();
        assert!(!fault.join().unwrap(), "a fault was answered by nobody");
        assert!(matches!(call.join().unwrap(), Err(MmapError::Lost(_))));
    });
    told.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(!reachable(&mapping, 3) && !reachable(&mine, 0) && !reachable(&mine, 100));
    assert_eq!((standin.mapped(), standin.batches()), (0, 0));
    assert!(matches!(mapping.populate(0..1), Err(MmapError::Lost(_))));
}

#[test]
fn local_a_forked_child_has_no_granted_pages() {
    let (_fake, standin, client) = start();
    let mapping = map(&client, &MapOptions::shared());
    mapping.populate(0..32 << 12).unwrap();
    let before = (standin.mapped(), standin.batches());
    let child = in_child(|| {
        let at = mapping.as_ptr();
        // SAFETY: not mapped in the child: SIGSEGV, which is what is tested.
        i32::from(unsafe { at.read_volatile() })
    });
    assert_eq!(child, (None, Some(libc::SIGSEGV)));
    let error = MmapError::Forked;
    let child = in_child(|| {
        let right = mapping.populate(0..4096).err().as_ref() == Some(&error);
        i32::from(!right)
    });
    assert_eq!(child, (Some(0), None));
    assert_eq!((standin.mapped(), standin.batches()), before);
    assert_eq!(page_word(mapping.as_volatile(), 31), word(1, 31));
}
