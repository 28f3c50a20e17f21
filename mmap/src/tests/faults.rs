//! Faults, windows, refusals, arguments.

use super::fake::{Fake, Seen, word};
use super::*;
use crate::{MapKind, MmapError, UserfaultMode};
use copage_coherence::msg::FaultHint;
use std::os::fd::AsFd;

const PAGES: usize = 3000;
const BYTES: u64 = (PAGES * PAGE_SIZE) as u64;

#[test]
fn local_a_shared_mapping_reads_the_right_bytes_in_windows() {
    let fake = Fake::start(BYTES - 100);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::shared());
    assert_eq!(mapping.len() as u64, BYTES - 100);
    let bytes = mapping.as_volatile();
    for page in 0..PAGES - 1 {
        assert_eq!(page_word(bytes, page), word(1, page as u64));
    }
    let faults = fake.faults();
    assert!(faults.len() < 16, "{faults:?}");
    assert!(faults.iter().any(|&(_, count)| count == 512), "{faults:?}");
    assert!(
        faults
            .iter()
            .all(|&(first, count)| first + u64::from(count) <= PAGES as u64)
    );
    // The rest of the last page is zeros.
    assert_eq!(
        bytes.read_u8(BYTES as usize - 101),
        Some((word(1, PAGES as u64 - 1) >> 24) as u8)
    );
    // SAFETY: within the mapping's last page, which is mapped whole.
    let behind = unsafe { mapping.as_ptr().add(BYTES as usize - 1) };
    // SAFETY: as above; nobody writes.
    assert_eq!(unsafe { behind.read_volatile() }, 0);
}

#[test]
fn local_large_mappings_lie_as_huge_frames_need_it() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let file = open(&client, OpenHow::Map);
    for offset in [0, 4096, 5 << 12] {
        let options = MapOptions::shared().range(offset, 4 << 20);
        let mapping = file.map(&options).unwrap();
        assert_eq!(
            (mapping.as_ptr() as u64).wrapping_sub(offset) % (2 << 20),
            0
        );
        assert_eq!(peek(mapping.as_volatile(), 3), word(1, offset / 4096 + 3));
    }
}

#[test]
fn local_many_threads_fault_at_once_and_nothing_is_asked_for_twice() {
    let fake = Fake::start(BYTES);
    fake.state.lock().slow = Duration::from_millis(2);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::shared());
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let mapping = &mapping;
            scope.spawn(move || {
                for i in 0..PAGES {
                    let page = (i * 7 + thread * 331) % PAGES;
                    assert_eq!(page_word(mapping.as_volatile(), page), word(1, page as u64));
                }
            });
        }
    });
    let asked: u64 = fake
        .faults()
        .iter()
        .map(|&(_, count)| u64::from(count))
        .sum();
    // A fault read just after its page was granted asks again; no page more often than threads.
    assert!(asked < 3 * PAGES as u64, "{asked} pages were asked for");
}

#[test]
fn local_pages_taken_back_fault_again() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::shared());
    for round in 0..20 {
        for page in (0..PAGES).step_by(97) {
            assert_eq!(
                page_word(mapping.as_volatile(), page),
                word(1, page as u64),
                "{round}"
            );
        }
        fake.punch(0, PAGES as u64);
    }
}

#[test]
fn local_readers_race_with_punches_and_never_see_zeros() {
    let fake = Fake::start(64 * PAGE_SIZE as u64);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::shared());
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (mapping, done) = (&mapping, &done);
            scope.spawn(move || {
                let mut page = thread;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    page = (page * 5 + 1) % 64;
                    assert_eq!(peek(mapping.as_volatile(), page), word(1, page as u64));
                }
            });
        }
        for i in 0..3000 {
            fake.punch(i % 64, 1 + i % 3);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn local_threads_that_take_each_others_pages_all_get_on() {
    let fake = Fake::start(BYTES);
    fake.state.lock().thrash = true;
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::shared());
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let mapping = &mapping;
            scope.spawn(move || {
                for i in 0..200 {
                    let page = (thread * 700 + i * 3) % PAGES;
                    assert_eq!(peek(mapping.as_volatile(), page), word(1, page as u64));
                }
            });
        }
    });
}

#[test]
fn local_less_than_asked_for_is_asked_for_again() {
    let fake = Fake::start(BYTES);
    fake.state.lock().grant_max = 3;
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::shared());
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let mapping = &mapping;
            scope.spawn(move || {
                for page in thread * 10..400 {
                    assert_eq!(page_word(mapping.as_volatile(), page), word(1, page as u64));
                }
            });
        }
    });
    mapping.populate(0..mapping.len()).unwrap();
}

#[test]
fn local_populate_brings_everything_at_once() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::shared());
    mapping.populate(5..mapping.len()).unwrap();
    let before = fake.faults();
    assert!(before.len() <= PAGES / 512 + 1, "{before:?}");
    for page in 0..PAGES {
        assert_eq!(page_word(mapping.as_volatile(), page), word(1, page as u64));
    }
    assert_eq!(fake.faults(), before);
    let populates = |s: &Seen| {
        matches!(
            s,
            Seen::Fault {
                hint: FaultHint::Populate,
                ..
            }
        )
    };
    assert!(fake.state.lock().seen.iter().any(populates));
    mapping.populate(0..0).unwrap();
    let backwards = std::ops::Range { start: 9, end: 3 };
    assert_eq!(
        mapping.populate(backwards).unwrap_err().errno(),
        libc::EINVAL
    );
    assert_eq!(
        mapping.populate(0..mapping.len() + 1).unwrap_err().errno(),
        libc::EINVAL
    );
}

fn with_refused_page(kind: MapKind) {
    let fake = Fake::start(BYTES);
    fake.state.lock().bad.extend([40, 41]);
    let client = connect(&fake);
    let mapping = map(
        &client,
        &MapOptions {
            kind,
            ..MapOptions::default()
        },
    );
    // Its neighbours come, although windows over it are refused.
    for page in (0..40).chain(42..60) {
        assert_eq!(page_word(mapping.as_volatile(), page), word(1, page as u64));
    }
    assert!(mapping.last_error().is_none());
    // write(2) reports what a plain access would die of.
    let (read, write) = rustix::pipe::pipe().unwrap();
    let at = |page: usize| mapping.as_ptr().wrapping_add(page * PAGE_SIZE);
    let write_page = |page| {
        // SAFETY: the pointer is into the mapping, which lives; the kernel copies from it.
        (unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&write), at(page).cast(), 8) }) == 8
    };
    assert!(!write_page(40));
    let refused = mapping.last_error().unwrap();
    assert_eq!(refused.offset, Some(40 * PAGE_SIZE));
    assert_eq!(refused.error.errno(), libc::EIO);
    let in_range = 40 * PAGE_SIZE..40 * PAGE_SIZE + 1;
    assert_eq!(mapping.populate(in_range).unwrap_err().errno(), libc::EIO);
    assert!(!write_page(40));
    // The disk recovers: the page can be had again, but not before somebody says so.
    fake.state.lock().bad.clear();
    assert!(!write_page(40), "refused until it is asked for again");
    mapping.populate(40 * PAGE_SIZE..42 * PAGE_SIZE).unwrap();
    assert!(mapping.last_error().is_none());
    assert!(write_page(40));
    assert_eq!(page_word(mapping.as_volatile(), 40), word(1, 40));
    if kind == MapKind::Private {
        // Armed like all others.
        store(&mapping, 40 * PAGE_SIZE, 1);
        assert_eq!(mapping.private_pages(), 1);
    }
    drop(read);
}

#[test]
fn local_a_refused_page_is_sigbus_alone_and_can_be_retried() {
    with_refused_page(MapKind::Shared);
}

#[test]
fn local_a_refused_page_of_a_private_mapping_can_be_retried_and_is_armed() {
    with_refused_page(MapKind::Private);
}

#[test]
fn local_arguments_that_mean_nothing_are_refused() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    assert_eq!(client.exports().unwrap(), ["all", "more"]);
    assert_eq!(client.attach("none").unwrap_err().errno(), libc::ENOENT);
    let file = open(&client, OpenHow::Map);
    let errno = |options: MapOptions| file.map(&options).unwrap_err().errno();
    assert_eq!(errno(MapOptions::shared().range(1, 5)), libc::EINVAL);
    assert_eq!(errno(MapOptions::shared().range(0, 0)), libc::EINVAL);
    assert_eq!(
        errno(MapOptions::shared().range(4096, u64::MAX)),
        libc::EINVAL
    );
    assert_eq!(
        errno(MapOptions::shared().range(u64::MAX - 4095, 4096)),
        libc::EINVAL
    );
    assert_eq!(
        errno(MapOptions {
            offset: BYTES + 4096,
            ..MapOptions::shared()
        }),
        libc::EINVAL
    );
    assert_eq!(
        errno(MapOptions {
            writable: true,
            ..MapOptions::shared()
        }),
        libc::EACCES
    );
    assert_eq!(errno(MapOptions::shared().range(0, 1 << 60)), libc::ENOMEM);
    assert_eq!(
        file.descriptor().unwrap_err().errno(),
        libc::EACCES,
        "not pinned"
    );
    let read_only = open(&client, OpenHow::Read);
    assert_eq!(
        read_only.map(&MapOptions::shared()).unwrap_err().errno(),
        libc::EACCES
    );
    let root = client.attach("all").unwrap().root();
    assert_eq!(
        root.lookup(&[b'x'; 300]).unwrap_err().errno(),
        libc::ENAMETOOLONG
    );
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b"] {
        assert_eq!(root.lookup(name).unwrap_err().errno(), libc::EINVAL);
    }
    // An end anywhere, and past the end of the file.
    let mapping = file
        .map(&MapOptions::shared().range(4096, 2 * BYTES - 7))
        .unwrap();
    assert_eq!(page_word(mapping.as_volatile(), 0), word(1, 1));
    assert_eq!(
        mapping.populate(0..mapping.len()).unwrap_err().errno(),
        libc::EINVAL
    );
}

#[test]
fn local_a_pinned_file_has_a_descriptor() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let file = open(&client, OpenHow::Pin);
    assert!(file.pinned());
    let fd = file.descriptor().unwrap();
    let mut data = [0; 8];
    assert_eq!(rustix::io::pread(fd.as_fd(), &mut data, 8192).unwrap(), 8);
    assert_eq!(u64::from_le_bytes(data), word(1, 2));
    assert_eq!(
        file.map(&MapOptions::shared()).unwrap_err().errno(),
        libc::EACCES
    );
    file.close().unwrap();
    fake.wait("closed", |s| s.seen.contains(&Seen::Close));
}

#[test]
fn local_dropping_gives_everything_back() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::shared());
    fake.wait("forgotten", |s| {
        s.seen.iter().filter(|s| **s == Seen::Forget).count() == 2
    });
    assert_eq!(peek(mapping.as_volatile(), 9), word(1, 9));
    drop(client);
    // The mapping keeps the session alive.
    assert_eq!(peek(mapping.as_volatile(), 99), word(1, 99));
    drop(mapping);
    fake.wait("bye", |s| s.seen.ends_with(&[Seen::Close, Seen::Bye]));
}

#[test]
fn local_user_mode_only_needs_populate_for_system_calls() {
    let fake = Fake::start(BYTES);
    let client = connect_with(&fake, UserfaultPolicy::UserModeOnly);
    assert_eq!(client.userfault_mode(), UserfaultMode::UserModeOnly);
    let mapping = map(&client, &MapOptions::private());
    let (read, write) = rustix::pipe::pipe().unwrap();
    let write_page = |page: usize| {
        let at = mapping.as_ptr().wrapping_add(page * PAGE_SIZE);
        // SAFETY: the pointer is into the mapping, which lives; the kernel copies from it.
        unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&write), at.cast(), 8) }
    };
    assert_eq!(write_page(7), -1);
    assert_eq!(
        std::io::Error::last_os_error().raw_os_error(),
        Some(libc::EFAULT)
    );
    mapping.populate(0..20 * PAGE_SIZE).unwrap();
    assert_eq!(write_page(7), 8);
    // Plain accesses are served anyway.
    assert_eq!(page_word(mapping.as_volatile(), 500), word(1, 500));
    // A system call that stores.
    mapping.populate_write(0..PAGE_SIZE).unwrap();
    let at = mapping.as_ptr();
    // SAFETY: the mapping is private and at least a page long; no reference into it exists.
    let got = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&read), at.cast(), 8) };
    assert_eq!(got, 8);
    assert_eq!(peek(mapping.as_volatile(), 0), word(1, 7));
    assert_eq!(mapping.private_pages(), 1);
}

#[test]
fn local_without_userfaultfd_reading_works_and_mapping_says_why() {
    let fake = Fake::start(BYTES);
    let client = connect_with(&fake, UserfaultPolicy::None);
    assert_eq!(client.userfault_mode(), UserfaultMode::None);
    let error = open(&client, OpenHow::Map)
        .map(&MapOptions::shared())
        .unwrap_err();
    assert!(matches!(error, MmapError::NoUserfaultfd(_)), "{error}");
}

#[test]
fn local_write_from_a_mapping_waits_for_its_pages() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    assert_eq!(client.userfault_mode(), UserfaultMode::Full);
    let mapping = map(&client, &MapOptions::shared());
    let mut out = tempfile::tempfile().unwrap();
    let pointer = mapping.as_ptr();
    // SAFETY: the whole range is mapped and lives; the kernel copies from it.
    let got = unsafe {
        libc::write(
            std::os::fd::AsRawFd::as_raw_fd(&out),
            pointer.cast(),
            mapping.len(),
        )
    };
    assert_eq!(got, mapping.len() as isize);
    std::io::Seek::rewind(&mut out).unwrap();
    let mut copy = Vec::new();
    std::io::Read::read_to_end(&mut out, &mut copy).unwrap();
    for (page, bytes) in copy.chunks_exact(PAGE_SIZE).enumerate() {
        assert_eq!(bytes[4000..4008], word(1, page as u64).to_le_bytes());
    }
}
