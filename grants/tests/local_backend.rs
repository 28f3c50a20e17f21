//! The local backend, used as the cache uses it. These tests cannot show what concurrent guests
//! see (the workspace's tests do, with processes), nor anything about Xen.
#![allow(clippy::unwrap_used, clippy::panic)] // Tests.

use copage_grants::limits::ENTRIES_RESERVED;
use copage_grants::{
    Access, Backend, DomId, FrameNo, FrameStore, GrantError, HomeId, HomeSpec, LocalBackend,
    LocalConfig, PAGE_SIZE, PageIndex, Revocation, TrustClass,
};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

const PAGE: u64 = PAGE_SIZE as u64;

/// One backend of each kind that this machine and user can have.
fn backends(force: bool) -> Vec<LocalBackend> {
    [FrameStore::PrivateMount, FrameStore::Memfd]
        .into_iter()
        .filter_map(|store| {
            match LocalBackend::new(LocalConfig {
                force,
                store,
                ..LocalConfig::default()
            }) {
                Ok(backend) => Some(backend),
                Err(e) => {
                    println!("skipped, {store:?} is not to be had here: {e}");
                    None
                }
            }
        })
        .collect()
}

fn open(backend: &LocalBackend, bytes: u64) -> HomeId {
    backend
        .open_home(&HomeSpec {
            label: "test/file".into(),
            bytes,
            class: TrustClass::OWN,
        })
        .unwrap()
}

fn frames(range: std::ops::Range<u32>) -> Vec<FrameNo> {
    range.map(FrameNo).collect()
}

fn fill(backend: &LocalBackend, home: HomeId, first: u64, count: u32, byte: u8) -> Vec<FrameNo> {
    let start = u32::try_from(first).unwrap();
    let frames = frames(start..start + count);
    let data = vec![byte; frames.len() * PAGE_SIZE];
    backend
        .store(home, PageIndex(first), &frames, &data)
        .unwrap();
    frames
}

fn present(backend: &LocalBackend, home: HomeId) -> Vec<(u64, u64)> {
    backend
        .present_pages(home)
        .unwrap()
        .into_iter()
        .map(|(page, count)| (page.0, count))
        .collect()
}

#[test]
fn local_pages_come_and_go() {
    for backend in backends(true) {
        let home = open(&backend, 10 * PAGE + 100);
        fill(&backend, home, 2, 3, 7);
        let mut tail = vec![9u8; PAGE_SIZE];
        tail[100..].fill(0);
        backend
            .store(home, PageIndex(10), &[FrameNo(10)], &tail)
            .unwrap();
        assert_eq!(present(&backend, home), [(2, 3), (10, 1)]);
        let guest = File::from(backend.home_descriptor(home).unwrap());
        assert_eq!(guest.metadata().unwrap().len(), 10 * PAGE + 100);
        let mut buf = vec![0; PAGE_SIZE];
        guest.read_exact_at(&mut buf, 3 * PAGE).unwrap();
        assert_eq!(buf, [7; PAGE_SIZE]);
        backend
            .load(home, PageIndex(10), FrameNo(10), &mut buf)
            .unwrap();
        assert_eq!(buf, tail);
        backend.discard(home, PageIndex(3), &[FrameNo(3)]).unwrap();
        assert_eq!(present(&backend, home), [(2, 1), (4, 1), (10, 1)]);
        backend.close_home(home).unwrap();
        assert_eq!(
            guest.read_at(&mut buf, 3 * PAGE).unwrap(),
            0,
            "a closed home is empty"
        );
        assert!(matches!(
            backend.home_descriptor(home),
            Err(GrantError::NoSuchHome(_))
        ));
    }
}

#[test]
fn local_ranges_are_checked() {
    for backend in backends(true) {
        let home = open(&backend, 3 * PAGE);
        let page = vec![1; PAGE_SIZE];
        let bad = |result: Result<(), GrantError>| {
            assert!(matches!(result, Err(GrantError::BadRange(_))), "{result:?}");
        };
        bad(backend.store(home, PageIndex(3), &[FrameNo(0)], &page));
        bad(backend.store(home, PageIndex(u64::MAX), &[FrameNo(0)], &page));
        bad(backend.store(home, PageIndex(0), &[FrameNo(0)], &page[1..]));
        bad(backend.discard(home, PageIndex(2), &frames(0..2)));
        bad(backend.load(home, PageIndex(3), FrameNo(0), &mut page.clone()));
        bad(backend.grant(
            DomId(0x7ff0),
            Access::ReadOnly,
            &[FrameNo(0)],
            &mut Vec::new(),
        ));
        bad(backend.grant(
            DomId(1),
            Access::ReadOnly,
            &[FrameNo(u32::MAX)],
            &mut Vec::new(),
        ));
        bad(backend
            .open_home(&HomeSpec {
                label: String::new(),
                bytes: u64::MAX,
                class: TrustClass::OWN,
            })
            .map(|_| ()));
        assert!(backend.make_huge(home, PageIndex(0)).is_err());
        backend.close_home(home).unwrap();
        assert!(matches!(
            backend.close_home(home),
            Err(GrantError::NoSuchHome(_))
        ));
    }
}

#[test]
fn local_what_is_granted_is_not_discarded() {
    for backend in backends(true) {
        let home = open(&backend, 8 * PAGE);
        let frames = fill(&backend, home, 0, 4, 1);
        let mut grants = Vec::new();
        backend
            .grant(DomId(1), Access::ReadOnly, &frames, &mut grants)
            .unwrap();
        backend
            .grant(DomId(2), Access::ReadOnly, &frames[1..2], &mut Vec::new())
            .unwrap();
        assert!(matches!(
            backend.discard(home, PageIndex(0), &frames),
            Err(GrantError::StillGranted(FrameNo(0)))
        ));
        assert_eq!(present(&backend, home), [(0, 4)]);
        let mut again = Vec::new();
        backend
            .grant(DomId(1), Access::ReadOnly, &frames, &mut again)
            .unwrap();
        assert_eq!(again, grants, "one grant for each domain and frame");

        let mut answers = Vec::new();
        backend.revoke(DomId(1), &frames[..2], &mut answers);
        assert_eq!(answers, [Revocation::StillMapped; 2]);
        backend.note_unmapped(DomId(1), &frames[..1]);
        answers.clear();
        backend.revoke(DomId(1), &frames[..2], &mut answers);
        backend.revoke(DomId(1), &frames[..1], &mut answers);
        use Revocation::{NotGranted, Revoked, StillMapped};
        assert_eq!(answers, [Revoked, StillMapped, NotGranted]);
        backend.discard(home, PageIndex(0), &frames[..1]).unwrap();

        let mut out = Vec::new();
        backend
            .force_out(home, PageIndex(1), &frames[1..], &mut |frame, dom| {
                out.push((frame.0, dom.0))
            })
            .unwrap();
        out.sort_unstable();
        assert_eq!(out, [(1, 1), (1, 2), (2, 1), (3, 1)]);
        assert_eq!(present(&backend, home), []);
        assert_eq!(backend.grant_count(DomId(1)), 0);
        let audit = backend.audit();
        assert_eq!(
            (audit.entries, audit.grants, audit.differences),
            (0, 0, vec![])
        );
    }
}

#[test]
fn local_without_force_only_the_guest_or_its_end_lets_go() {
    for backend in backends(false) {
        assert!(!backend.capabilities().forced_revoke);
        let home = open(&backend, 8 * PAGE);
        let frames = fill(&backend, home, 0, 4, 1);
        backend
            .grant(DomId(1), Access::ReadOnly, &frames, &mut Vec::new())
            .unwrap();
        let forced = backend.force_out(home, PageIndex(0), &frames, &mut |_, _| ());
        assert!(matches!(forced, Err(GrantError::Unsupported { .. })));
        let mut answers = Vec::new();
        backend.revoke(DomId(1), &frames, &mut answers);
        assert_eq!(answers, [Revocation::StillMapped; 4]);
        let end = backend.domain_ended(DomId(1));
        assert_eq!((end.revoked, end.still_mapped.len()), (4, 0));
        backend.discard(home, PageIndex(0), &frames).unwrap();
    }
}

#[test]
fn local_limits_hold() {
    let config = LocalConfig {
        entries: 10 + ENTRIES_RESERVED,
        ..LocalConfig::default()
    };
    let backend = LocalBackend::new(config).unwrap();
    backend.set_grants_max(DomId(1), 3);
    let mut out = Vec::new();
    backend
        .grant(DomId(1), Access::ReadOnly, &frames(0..2), &mut out)
        .unwrap();
    let refused = backend.grant(DomId(1), Access::ReadOnly, &frames(1..4), &mut out);
    assert!(matches!(
        refused,
        Err(GrantError::GrantsOverLimit {
            wanted: 4,
            grants_max: 3,
            ..
        })
    ));
    assert_eq!(backend.grant_count(DomId(1)), 2);
    // Twice the same frame is one grant.
    let twice = [FrameNo(2), FrameNo(2), FrameNo(0)];
    backend
        .grant(DomId(1), Access::ReadOnly, &twice, &mut out)
        .unwrap();
    assert_eq!(backend.grant_count(DomId(1)), 3);
    let full = backend.grant(DomId(2), Access::ReadOnly, &frames(0..8), &mut out);
    assert!(
        matches!(full, Err(GrantError::TableFull { .. })),
        "{full:?}"
    );
    assert_eq!(backend.grant_count(DomId(2)), 0);
    backend
        .grant(DomId(2), Access::ReadOnly, &frames(0..7), &mut out)
        .unwrap();
    assert!(
        out.iter().all(|grant| grant.gref.0 >= ENTRIES_RESERVED),
        "the first entries are the toolstack's"
    );
    let otherwise = backend.grant(DomId(2), Access::ReadWrite, &frames(0..1), &mut out);
    assert!(matches!(otherwise, Err(GrantError::BadRange(_))));
    assert_eq!(backend.audit().differences, Vec::<String>::new());
}

#[test]
fn local_oldest_grants_come_first() {
    let backend = LocalBackend::new(LocalConfig::default()).unwrap();
    for frame in [5, 3, 9, 1] {
        backend
            .grant(
                DomId(1),
                Access::ReadOnly,
                &[FrameNo(frame)],
                &mut Vec::new(),
            )
            .unwrap();
    }
    backend.note_unmapped(DomId(1), &[FrameNo(3)]);
    backend.revoke(DomId(1), &[FrameNo(3)], &mut Vec::new());
    backend
        .grant(DomId(1), Access::ReadOnly, &[FrameNo(3)], &mut Vec::new())
        .unwrap();
    let mut oldest = Vec::new();
    backend.oldest_grants(DomId(1), 3, &mut oldest);
    assert_eq!(oldest, [5, 9, 1].map(FrameNo));
    let mut seen = Vec::new();
    backend.each_grant(&mut |info| seen.push((info.frame.0, info.dom.0, info.mapped)));
    seen.sort_unstable();
    assert_eq!(
        seen,
        [(1, 1, true), (3, 1, true), (5, 1, true), (9, 1, true)]
    );
}

#[test]
fn local_the_kernel_says_whether_a_home_is_in_use() {
    for backend in backends(true) {
        let home = open(&backend, 4 * PAGE);
        fill(&backend, home, 0, 1, 1);
        assert!(!backend.home_in_use(home).unwrap());
        let guest = backend.home_descriptor(home).unwrap();
        assert!(backend.home_in_use(home).unwrap(), "open");
        let map = memmap(&guest, 4 * PAGE_SIZE);
        drop(guest);
        assert!(
            backend.home_in_use(home).unwrap(),
            "mapped after its descriptor was closed"
        );
        drop(map);
        assert!(!backend.home_in_use(home).unwrap());
        // A message on its way holds it too.
        let (a, b) = copage_grants::channel::Channel::pair().unwrap();
        let guest = backend.home_descriptor(home).unwrap();
        a.send(b"x", Some(guest.as_fd())).unwrap();
        drop(guest);
        assert!(backend.home_in_use(home).unwrap(), "in flight");
        drop((a, b));
        assert!(!backend.home_in_use(home).unwrap());
    }
}

/// A shared read-only mapping that is unmapped when dropped.
struct Map(*mut std::ffi::c_void, usize);

fn memmap(fd: impl AsFd, bytes: usize) -> Map {
    use rustix::mm::{MapFlags, ProtFlags};
    // SAFETY: a new mapping where the kernel likes.
    let start = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            bytes,
            ProtFlags::READ,
            MapFlags::SHARED,
            fd,
            0,
        )
    };
    Map(start.unwrap(), bytes)
}

impl Map {
    fn byte(&self, offset: usize) -> u8 {
        assert!(offset < self.1);
        let byte = self.0.cast::<u8>().wrapping_add(offset);
        // SAFETY: within the mapping, which lives as long as `self`.
        unsafe { byte.read_volatile() }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { rustix::mm::munmap(self.0, self.1) }.unwrap();
    }
}

#[test]
fn local_a_full_tmpfs_is_no_memory() {
    let config = LocalConfig {
        size_max_bytes: Some(16 * PAGE),
        ..LocalConfig::default()
    };
    let backend = match LocalBackend::new(config) {
        Ok(backend) => backend,
        Err(GrantError::Sys { call, source }) if !rustix::process::geteuid().is_root() => {
            println!("skipped for lack of root: {call}: {source}");
            return;
        }
        Err(e) => panic!("{e}"),
    };
    let home = open(&backend, 64 * PAGE);
    fill(&backend, home, 0, 12, 1);
    let more = frames(20..28);
    let full = backend.store(home, PageIndex(20), &more, &vec![2; 8 * PAGE_SIZE]);
    assert!(matches!(full, Err(GrantError::NoMemory(_))), "{full:?}");
    assert_eq!(present(&backend, home), [(0, 12)], "all or nothing");
    backend.discard(home, PageIndex(0), &frames(0..8)).unwrap();
    backend
        .store(home, PageIndex(20), &more, &vec![2; 8 * PAGE_SIZE])
        .unwrap();
}

#[test]
fn local_frame_files_of_other_users_grow_with_the_budget() {
    let config = LocalConfig {
        class_size_max_bytes: Some(16 * PAGE),
        store: FrameStore::PrivateMount,
        ..LocalConfig::default()
    };
    let backend = match LocalBackend::new(config) {
        Ok(backend) => backend,
        Err(e) if !rustix::process::geteuid().is_root() => {
            println!("skipped for lack of root: {e}");
            return;
        }
        Err(e) => panic!("{e}"),
    };
    let home_of = |user| {
        let spec = HomeSpec {
            label: "f".into(),
            bytes: 64 * PAGE,
            class: TrustClass(user),
        };
        backend.open_home(&spec).unwrap()
    };
    let home = home_of(1000);
    let store = |home, first: u32| {
        let frames = frames(first..first + 10);
        backend.store(home, PageIndex(first.into()), &frames, &[1; 10 * PAGE_SIZE])
    };
    store(home, 0).unwrap();
    assert!(matches!(store(home, 10), Err(GrantError::NoMemory(_))));
    let there = backend.make_frames(32).unwrap();
    assert!(there.end == 32 && there.bank_frames > 32, "{there:?}");
    store(home, 10).unwrap();
    // A class that comes later, and a budget that was larger once.
    backend.make_frames(8).unwrap();
    let later = home_of(1001);
    for first in [0, 10, 20] {
        store(later, first).unwrap();
    }
    assert!(store(later, 30).is_err());
}

#[test]
fn local_huge_units_lose_only_what_is_taken_out() {
    for backend in backends(true) {
        let home = open(&backend, 3 * 512 * PAGE);
        let all = frames(0..1536);
        let data: Vec<u8> = (0..1536u32)
            .flat_map(|page| [(page % 251) as u8 + 1; PAGE_SIZE])
            .collect();
        // A unit with a hole is not made huge: the kernel would fill the hole with zeros.
        backend
            .store(home, PageIndex(0), &all[..1000], &data[..1000 * PAGE_SIZE])
            .unwrap();
        assert!(!backend.make_huge(home, PageIndex(512)).unwrap());
        assert_eq!(present(&backend, home), [(0, 1000)]);
        backend
            .store(
                home,
                PageIndex(1000),
                &all[1000..],
                &data[1000 * PAGE_SIZE..],
            )
            .unwrap();
        for unit in [0, 512, 1024] {
            if !backend.make_huge(home, PageIndex(unit)).unwrap() {
                println!("skipped: no huge pages to be had here");
                return;
            }
            assert!(backend.make_huge(home, PageIndex(unit)).unwrap());
        }
        assert!(backend.make_huge(home, PageIndex(1)).is_err());
        let guest = backend.home_descriptor(home).unwrap();
        let map = memmap(&guest, 1536 * PAGE_SIZE);
        assert_eq!(map.byte(600 * PAGE_SIZE), (600 % 251) as u8 + 1);
        backend
            .discard(home, PageIndex(510), &all[510..1030])
            .unwrap();
        assert_eq!(present(&backend, home), [(0, 510), (1030, 506)]);
        let mut buf = vec![0; PAGE_SIZE];
        for page in (0..510).chain(1030..1536) {
            backend
                .load(home, PageIndex(page), FrameNo(page as u32), &mut buf)
                .unwrap();
            assert_eq!(buf, [(page % 251) as u8 + 1; PAGE_SIZE], "page {page}");
        }
        assert_eq!(map.byte(509 * PAGE_SIZE), (509 % 251) as u8 + 1);
    }
}

/// A guest that maps a home plainly and reads a hole leaves a page of zeros there. It must not
/// survive the filling of that page.
#[test]
fn local_zeros_that_a_guest_left_are_replaced() {
    for backend in backends(true) {
        let home = open(&backend, 8 * PAGE);
        fill(&backend, home, 0, 2, 1);
        let map = memmap(backend.home_descriptor(home).unwrap(), 8 * PAGE_SIZE);
        assert_eq!(map.byte(5 * PAGE_SIZE), 0);
        assert_eq!(present(&backend, home), [(0, 2), (5, 1)]);
        fill(&backend, home, 4, 3, 8);
        assert_eq!(map.byte(5 * PAGE_SIZE), 8);
        assert_eq!(backend.foreign_pages(), 1);
    }
}
