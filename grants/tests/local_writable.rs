//! Pages that guests write, on the local backend: where their bytes go, and what a guest can do to files that
//! it writes. These tests cannot show what happens to mappings of the library (its own tests do).
#![allow(clippy::unwrap_used, clippy::panic)] // Tests.

use copage_grants::limits::SESSION_ARENAS_MAX;
use copage_grants::sys::PageMap;
use copage_grants::{
    Access, Backend, DomId, FrameNo, FrameStore, GrantError, HomeId, HomeSpec, LocalBackend,
    LocalConfig, PAGE_SIZE, PageIndex, TrustClass, Where,
};
use rustix::fs::FallocateFlags;
use rustix::mm::{MapFlags, ProtFlags};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

const PAGE: u64 = PAGE_SIZE as u64;
const PAGES: u64 = 10;
const TAIL: u64 = 100;
const A: Where = Where::Arena(DomId(1));
const B: Where = Where::Arena(DomId(2));
const SOON: Duration = Duration::from_secs(60);

fn made(config: LocalConfig) -> Option<LocalBackend> {
    let store = config.store;
    match LocalBackend::new(config) {
        Ok(backend) => Some(backend),
        Err(e) => {
            println!("skipped, {store:?} is not to be had here: {e}");
            None
        }
    }
}

/// One backend of each kind that this machine and user can have, with a home in which all pages are,
/// each full of its number and 1.
fn homes() -> Vec<(LocalBackend, HomeId)> {
    let stores = [FrameStore::PrivateMount, FrameStore::Memfd];
    let configs = stores.map(|store| LocalConfig {
        store,
        ..LocalConfig::default()
    });
    configs.into_iter().filter_map(made).map(filled).collect()
}

fn filled(backend: LocalBackend) -> (LocalBackend, HomeId) {
    let spec = HomeSpec {
        label: "test/file".into(),
        bytes: PAGES * PAGE + TAIL,
        class: TrustClass::OWN,
    };
    let home = backend.open_home(&spec).unwrap();
    for page in 0..=PAGES {
        store(&backend, home, page);
    }
    (backend, home)
}

fn frame(page: u64) -> FrameNo {
    FrameNo(u32::try_from(page).unwrap())
}

fn content(page: u64) -> Vec<u8> {
    let mut content = vec![u8::try_from(page).unwrap() + 1; PAGE_SIZE];
    if page == PAGES {
        content[TAIL as usize..].fill(0);
    }
    content
}

fn store(backend: &LocalBackend, home: HomeId, page: u64) {
    let data = content(page);
    let frames = [frame(page)];
    backend
        .store(home, PageIndex(page), &frames, &data)
        .unwrap();
}

fn place(backend: &LocalBackend, home: HomeId, page: u64, from: Where, to: Where) {
    try_place(backend, home, page, from, to).unwrap();
}

fn try_place(
    backend: &LocalBackend,
    home: HomeId,
    page: u64,
    from: Where,
    to: Where,
) -> Result<(), GrantError> {
    backend.place(home, PageIndex(page), frame(page), from, to, false)
}

fn load(backend: &LocalBackend, home: HomeId, page: u64) -> Vec<u8> {
    let mut buf = vec![0xee; PAGE_SIZE];
    backend
        .load(home, PageIndex(page), frame(page), &mut buf)
        .unwrap();
    buf
}

fn present(backend: &LocalBackend, home: HomeId) -> Vec<(u64, u64)> {
    let runs = backend.present_pages(home).unwrap();
    runs.into_iter()
        .map(|(page, count)| (page.0, count))
        .collect()
}

fn arena(backend: &LocalBackend, home: HomeId, dom: u16) -> File {
    File::from(backend.arena(home, DomId(dom)).unwrap())
}

fn read(file: &File, page: u64) -> Vec<u8> {
    let mut buf = vec![0xee; PAGE_SIZE];
    let read = file.read_at(&mut buf, page * PAGE).unwrap();
    buf.truncate(read);
    buf
}

fn is_there(file: &File, page: u64) -> bool {
    rustix::fs::seek(file, rustix::fs::SeekFrom::Data(page * PAGE)) == Ok(page * PAGE)
}

/// The first pages of a file, mapped until the test ends.
fn map(file: impl AsFd, prot: ProtFlags) -> usize {
    let length = PAGES as usize * PAGE_SIZE;
    // SAFETY: a new mapping where the kernel likes; it is never unmapped.
    let start = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            length,
            prot,
            MapFlags::SHARED,
            file,
            0,
        )
    };
    start.unwrap().addr()
}

fn byte(start: usize, page: u64) -> u8 {
    let address = start + page as usize * PAGE_SIZE;
    let mut byte = [0];
    copage_grants::sys::read_own_memory(address, &mut byte).unwrap();
    byte[0]
}

fn is_mapped(start: usize, page: u64) -> bool {
    let address = start + page as usize * PAGE_SIZE;
    PageMap::own().unwrap().entry(address).unwrap().present()
}

#[test]
fn local_a_page_goes_round_and_keeps_its_bytes() {
    for (backend, home) in homes() {
        let readers = File::from(backend.home_descriptor(home).unwrap());
        let (one, two) = (arena(&backend, home, 1), arena(&backend, home, 2));
        let (serial, common) = backend.common(home).unwrap();
        let common = File::from(common);
        for page in [0, 3, PAGES] {
            let round = [Where::Home, A, Where::Home, Where::Spare, B, Where::Common];
            for (from, to) in round.iter().zip(round[1..].iter().chain(&[Where::Home])) {
                place(&backend, home, page, *from, *to);
                assert_eq!(load(&backend, home, page), content(page));
                assert_eq!(is_there(&readers, page), *to == Where::Home, "{to:?}");
                assert_eq!(present(&backend, home), [(0, PAGES + 1)]);
                let files = [(A, &one), (B, &two), (Where::Common, &common)];
                for (at, file) in files {
                    if at == *to {
                        let within = if page == PAGES {
                            TAIL as usize
                        } else {
                            PAGE_SIZE
                        };
                        assert_eq!(read(file, page)[..within], content(page)[..within]);
                    }
                }
            }
        }
        assert!(backend.wait_swept(SOON));
        for file in [&one, &two, &common] {
            let data = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(0));
            assert_eq!(data, Err(rustix::io::Errno::NXIO), "nothing stays behind");
        }
        assert_eq!(serial, backend.common(home).unwrap().0);
        for page in 0..=PAGES {
            assert_eq!(load(&backend, home, page), content(page));
            let (first, frames) = (PageIndex(page), [frame(page)]);
            backend.discard(home, first, &frames).unwrap();
        }
        assert_eq!(present(&backend, home), []);
        backend.close_home(home).unwrap();
        assert_eq!(backend.foreign_pages(), 0);
    }
}

#[test]
fn local_what_a_guest_stores_comes_home_and_what_it_stores_later_does_not() {
    for (backend, home) in homes() {
        let guest = arena(&backend, home, 1);
        place(&backend, home, PAGES, Where::Home, A);
        guest
            .write_all_at(&[0x77; PAGE_SIZE], PAGES * PAGE)
            .unwrap();
        let mut stored = vec![0x77; PAGE_SIZE];
        stored[TAIL as usize..].fill(0);
        assert_eq!(load(&backend, home, PAGES), stored, "zeros past the end");
        place(&backend, home, PAGES, A, Where::Home);
        guest
            .write_all_at(&[0x78; PAGE_SIZE], PAGES * PAGE)
            .unwrap();
        assert_eq!(load(&backend, home, PAGES), stored);
        assert!(backend.wait_swept(SOON));
        // And back: what it stored meanwhile is not there.
        place(&backend, home, PAGES, Where::Home, A);
        assert_eq!(
            read(&guest, PAGES)[..TAIL as usize],
            stored[..TAIL as usize]
        );
    }
}

#[test]
fn local_placing_takes_a_page_from_those_who_map_it_where_it_was() {
    for (backend, home) in homes() {
        let reader = map(backend.home_descriptor(home).unwrap(), ProtFlags::READ);
        assert_eq!((byte(reader, 2), byte(reader, 3)), (3, 4));
        let writer = map(
            backend.arena(home, DomId(1)).unwrap(),
            ProtFlags::READ | ProtFlags::WRITE,
        );
        place(&backend, home, 2, Where::Home, A);
        assert!(!is_mapped(reader, 2) && is_mapped(reader, 3));
        assert_eq!(byte(writer, 2), 3);
        assert!(is_mapped(writer, 2));
        place(&backend, home, 2, A, Where::Home);
        assert!(backend.wait_swept(SOON));
        assert!(!is_mapped(writer, 2));
        assert_eq!((byte(reader, 2), byte(writer, 2)), (3, 0));
    }
}

/// What is taken out of an arena late is not what has come there since.
#[test]
fn local_a_page_that_comes_back_at_once_stays() {
    for (backend, home) in homes() {
        let guest = arena(&backend, home, 1);
        for round in 0..500 {
            let page = round % 4;
            place(&backend, home, page, Where::Home, A);
            let stored = load(&backend, home, page) == content(page);
            assert!(stored && read(&guest, page) == content(page), "{round}");
            place(&backend, home, page, A, Where::Home);
            place(&backend, home, page, Where::Home, A);
            std::thread::yield_now();
            assert!(read(&guest, page) == content(page), "{round}");
            place(&backend, home, page, A, Where::Home);
            assert!(load(&backend, home, page) == content(page), "{round}");
        }
        assert!(backend.wait_swept(SOON));
        assert!((0..4).all(|page| !is_there(&guest, page)));
    }
}

#[test]
fn local_a_copy_leaves_the_first_where_it_is() {
    for (backend, home) in homes() {
        let copy = FrameNo(100);
        let at = PageIndex(4);
        let leave = |frame, from, to| backend.place(home, at, frame, from, to, true);
        leave(copy, Where::Home, Where::Spare).unwrap();
        let file = backend.arena(home, DomId(1)).unwrap();
        backend
            .place(home, at, copy, Where::Spare, A, false)
            .unwrap();
        File::from(file).write_all_at(&[9], 4 * PAGE).unwrap();
        assert_eq!(load(&backend, home, 4), content(4), "the old frame");
        let mut buf = vec![0; PAGE_SIZE];
        backend.load(home, at, copy, &mut buf).unwrap();
        assert_eq!((buf[0], buf[1]), (9, 5));
        // The old one is let go of, then the new one comes home.
        backend.discard(home, at, &[frame(4)]).unwrap();
        assert_eq!(present(&backend, home), [(0, PAGES + 1)]);
        let third = FrameNo(101);
        leave(third, A, Where::Home).unwrap();
        backend.discard(home, at, &[copy]).unwrap();
        backend.load(home, at, third, &mut buf).unwrap();
        assert_eq!((buf[0], buf[1]), (9, 5));
        assert!(backend.wait_swept(SOON));
    }
}

#[test]
fn local_a_frame_is_where_it_was_placed_and_nowhere_else() {
    for (backend, home) in homes() {
        let bad = |result: Result<(), GrantError>| {
            assert!(matches!(result, Err(GrantError::BadRange(_))), "{result:?}");
        };
        bad(try_place(&backend, home, 1, Where::Home, A));
        bad(try_place(&backend, home, 1, Where::Home, Where::Home));
        bad(try_place(&backend, home, 1, A, Where::Home));
        bad(try_place(
            &backend,
            home,
            PAGES + 1,
            Where::Home,
            Where::Spare,
        ));
        let _guest = arena(&backend, home, 1);
        place(&backend, home, 1, Where::Home, A);
        bad(try_place(&backend, home, 1, Where::Home, Where::Spare));
        let mut buf = vec![0; PAGE_SIZE];
        let (at, held) = (PageIndex(1), frame(1));
        bad(backend.load_at(home, at, held, Where::Home, &mut buf));
        bad(backend.load_at(home, PageIndex(2), held, A, &mut buf));
        bad(backend.discard(home, PageIndex(2), &[held]));
        bad(backend.write_at(home, at, held, A, PAGE_SIZE - 1, b"xy"));
        bad(backend.write_at(home, at, held, Where::Home, 0, b"x"));
        bad(backend.place(home, PageIndex(2), held, Where::Home, Where::Spare, true));
        backend.load_at(home, at, held, A, &mut buf).unwrap();
        assert_eq!(buf, content(1));
        backend.discard(home, PageIndex(5), &[frame(5)]).unwrap();
        bad(try_place(&backend, home, 5, Where::Home, A));
    }
}

#[test]
fn local_pages_are_written_in_place_wherever_they_are() {
    for (backend, home) in homes() {
        let guest = arena(&backend, home, 1);
        backend.common(home).unwrap();
        let mut at = Where::Home;
        for (n, to) in [Where::Spare, A, Where::Common, Where::Home]
            .into_iter()
            .enumerate()
        {
            place(&backend, home, 6, at, to);
            at = to;
            let frame = frame(6);
            backend
                .write_at(home, PageIndex(6), frame, at, 10 * n, b"0123456789")
                .unwrap();
        }
        let mut wanted = content(6);
        wanted[..40].copy_from_slice(&b"0123456789".repeat(4));
        assert_eq!(load(&backend, home, 6), wanted);
        assert!(backend.wait_swept(SOON));
        assert!(!is_there(&guest, 6));
        let last = frame(PAGES);
        let tail = TAIL as usize - 5;
        backend
            .write_at(home, PageIndex(PAGES), last, at, tail, &[b'x'; 5])
            .unwrap();
        let bytes = load(&backend, home, PAGES);
        assert_eq!(
            bytes[tail - 1..tail + 6],
            [11, b'x', b'x', b'x', b'x', b'x', 0]
        );
    }
}

#[test]
fn local_an_arena_is_of_one_session() {
    for (backend, home) in homes() {
        let first = arena(&backend, home, 1);
        place(&backend, home, 0, Where::Home, A);
        let still = backend.end_arena(home, DomId(1));
        assert!(matches!(still, Err(GrantError::StillGranted(FrameNo(0)))));
        backend.domain_ended(DomId(1));
        let still = backend.arena(home, DomId(1));
        assert!(matches!(still, Err(GrantError::StillGranted(FrameNo(0)))));
        place(&backend, home, 0, A, Where::Home);
        // The number is another session's now.
        let second = arena(&backend, home, 1);
        place(&backend, home, 1, Where::Home, A);
        assert!(backend.wait_swept(SOON));
        assert_eq!(read(&second, 1), content(1));
        assert_eq!(read(&first, 1), [0; PAGE_SIZE]);
        assert!(!is_there(&second, 0));
        place(&backend, home, 1, A, Where::Home);
        backend.end_arena(home, DomId(1)).unwrap();
        backend.end_arena(home, DomId(1)).unwrap();

        let (serial, common) = backend.common(home).unwrap();
        place(&backend, home, 2, Where::Home, Where::Common);
        let still = backend.renew_common(home);
        assert!(matches!(still, Err(GrantError::StillGranted(FrameNo(2)))));
        place(&backend, home, 2, Where::Common, Where::Home);
        backend.renew_common(home).unwrap();
        let (next, renewed) = backend.common(home).unwrap();
        assert_eq!(next, serial + 1);
        place(&backend, home, 2, Where::Home, Where::Common);
        assert!(backend.wait_swept(SOON));
        assert_eq!(read(&File::from(common), 2), [0; PAGE_SIZE]);
        assert_eq!(read(&File::from(renewed), 2), content(2));
    }
}

#[test]
fn local_a_file_is_cut_and_grows() {
    for (backend, home) in homes() {
        let readers = File::from(backend.home_descriptor(home).unwrap());
        let guest = arena(&backend, home, 1);
        place(&backend, home, 1, Where::Home, A);
        place(&backend, home, 2, Where::Home, Where::Spare);
        place(&backend, home, 7, Where::Home, Where::Spare);
        for page in 5..=PAGES {
            backend
                .discard(home, PageIndex(page), &[frame(page)])
                .unwrap();
        }
        let bytes = 5 * PAGE + 10;
        backend.resize_home(home, bytes).unwrap();
        assert_eq!(readers.metadata().unwrap().len(), bytes);
        assert_eq!(present(&backend, home), [(0, 5)]);
        assert_eq!(read(&readers, 5), [0; 10]);
        let beyond = backend.store(home, PageIndex(6), &[frame(6)], &content(6));
        assert!(matches!(beyond, Err(GrantError::BadRange(_))));
        // A frame that was let go of late outlasts its page.
        backend.discard(home, PageIndex(9), &[FrameNo(77)]).unwrap();
        // What a guest stores past the end is not there when the file grows.
        guest.write_all_at(&[0x55; PAGE_SIZE], 5 * PAGE).unwrap();
        backend.resize_home(home, 20 * PAGE).unwrap();
        let mut page = vec![0; PAGE_SIZE];
        page[..10].fill(6);
        backend
            .store(home, PageIndex(5), &[frame(5)], &page)
            .unwrap();
        backend
            .store(home, PageIndex(19), &[frame(19)], &content(19))
            .unwrap();
        place(&backend, home, 5, Where::Home, A);
        place(&backend, home, 19, Where::Home, A);
        assert_eq!(load(&backend, home, 5), page);
        assert_eq!(read(&guest, 5), page);
        assert_eq!(read(&guest, 19), content(19));
        assert_eq!(load(&backend, home, 1), content(1));
        assert_eq!(present(&backend, home), [(0, 6), (19, 1)]);
        let too_long = backend.resize_home(home, u64::MAX);
        assert!(matches!(too_long, Err(GrantError::BadRange(_))));
    }
}

#[test]
fn local_pages_in_arenas_are_forced_out_and_listed_and_audited() {
    for (backend, home) in homes() {
        let guest = arena(&backend, home, 1);
        backend.common(home).unwrap();
        let frames: Vec<FrameNo> = (2..6).map(frame).collect();
        let mut out = Vec::new();
        place(&backend, home, 3, Where::Home, A);
        place(&backend, home, 4, Where::Home, Where::Common);
        place(&backend, home, 5, Where::Home, Where::Spare);
        let (reader, writer) = (DomId(2), DomId(1));
        backend
            .grant(reader, Access::ReadOnly, &frames[..1], &mut out)
            .unwrap();
        backend
            .grant(writer, Access::ReadWrite, &frames[1..3], &mut out)
            .unwrap();
        assert_eq!(present(&backend, home), [(0, PAGES + 1)]);
        assert!(backend.home_in_use(home).unwrap(), "by its writer");
        assert_eq!(backend.audit().differences, Vec::<String>::new());
        let first = PageIndex(2);
        let granted = backend.discard(home, first, &frames);
        assert!(matches!(granted, Err(GrantError::StillGranted(FrameNo(2)))));
        let mut gone = Vec::new();
        let mut evicted = |frame: FrameNo, dom: DomId| gone.push((frame.0, dom.0));
        backend
            .force_out(home, first, &frames, &mut evicted)
            .unwrap();
        gone.sort_unstable();
        assert_eq!(gone, [(2, 2), (3, 1), (4, 1)]);
        assert_eq!(present(&backend, home), [(0, 2), (6, PAGES - 5)]);
        assert!(backend.wait_swept(SOON));
        assert!(!is_there(&guest, 3));
        assert!(!backend.home_in_use(home).unwrap());
        let audit = backend.audit();
        assert_eq!((audit.entries, audit.differences), (0, vec![]));
    }
}

#[test]
fn local_a_guest_that_cuts_off_or_fills_its_arena_harms_itself() {
    let limited = LocalConfig {
        store: FrameStore::PrivateMount,
        arena_size_max_bytes: Some(4 * PAGE),
        ..LocalConfig::default()
    };
    let Some((backend, home)) = made(limited).map(filled) else {
        return;
    };
    let guest = arena(&backend, home, 1);
    for page in 0..4 {
        place(&backend, home, page, Where::Home, A);
    }
    let full = try_place(&backend, home, 4, Where::Home, A);
    assert!(matches!(full, Err(GrantError::NoMemory(_))), "{full:?}");
    assert_eq!(load(&backend, home, 4), content(4), "nothing has changed");
    assert_eq!(present(&backend, home), [(0, PAGES + 1)]);
    // Room comes as soon as a page is out, and is waited for.
    for round in 0..200 {
        place(&backend, home, round % 4, A, Where::Home);
        place(&backend, home, 4 + round % 2, Where::Home, A);
        place(&backend, home, 4 + round % 2, A, Where::Home);
        place(&backend, home, round % 4, Where::Home, A);
    }
    // Another session's arena has a limit of its own.
    let other = arena(&backend, home, 2);
    place(&backend, home, 4, Where::Home, B);
    place(&backend, home, 3, A, Where::Home);
    assert!(backend.wait_swept(SOON));
    place(&backend, home, 5, Where::Home, A);
    // It fills what is left, and more.
    place(&backend, home, 5, A, Where::Home);
    assert!(backend.wait_swept(SOON));
    let filled = rustix::fs::fallocate(&guest, FallocateFlags::empty(), 100 * PAGE, PAGE);
    filled.unwrap();
    let more = rustix::fs::fallocate(&guest, FallocateFlags::empty(), 200 * PAGE, PAGE);
    assert_eq!(more, Err(rustix::io::Errno::NOSPC));
    let full = try_place(&backend, home, 5, Where::Home, A);
    assert!(matches!(full, Err(GrantError::NoMemory(_))), "{full:?}");
    // It cuts the file off: its pages are zeros, as if it had stored them.
    guest.set_len(PAGE).unwrap();
    assert_eq!(load(&backend, home, 0), content(0));
    assert_eq!(load(&backend, home, 1), [0; PAGE_SIZE]);
    place(&backend, home, 1, A, Where::Home);
    assert_eq!(load(&backend, home, 1), [0; PAGE_SIZE]);
    let cut = try_place(&backend, home, 1, Where::Home, A);
    assert!(matches!(cut, Err(GrantError::NoMemory(_))), "{cut:?}");
    assert_eq!(read(&other, 4), content(4));
    // When the session is over, what it kept holds a page at most.
    for page in [0, 2] {
        place(&backend, home, page, A, Where::Home);
    }
    backend.domain_ended(DomId(1));
    backend.end_arena(home, DomId(1)).unwrap();
    assert!(backend.wait_swept(SOON));
    guest.set_len(10 * PAGE).unwrap();
    guest.write_all_at(b"x", 0).unwrap();
    let more = guest.write_all_at(b"x", PAGE).unwrap_err();
    assert_eq!(more.raw_os_error(), Some(libc::ENOSPC));
}

#[test]
fn local_a_session_has_so_many_arenas_and_no_more() {
    if copage_grants::sys::raise_open_files().unwrap() < 8 * SESSION_ARENAS_MAX as u64 {
        println!("skipped: this process may not open as many files");
        return;
    }
    for (backend, _) in homes() {
        let open = || {
            let spec = HomeSpec {
                label: "many".into(),
                bytes: PAGE,
                class: TrustClass::OWN,
            };
            backend.open_home(&spec).unwrap()
        };
        let homes: Vec<HomeId> = (0..SESSION_ARENAS_MAX).map(|_| open()).collect();
        for home in &homes {
            drop(backend.arena(*home, DomId(1)).unwrap());
        }
        let one_more = open();
        let refused = backend.arena(one_more, DomId(1));
        assert!(matches!(refused, Err(GrantError::NoMemory(_))));
        drop(backend.arena(homes[0], DomId(1)).unwrap());
        drop(backend.arena(one_more, DomId(2)).unwrap());
        backend.end_arena(homes[3], DomId(1)).unwrap();
        assert!(backend.wait_swept(SOON));
        drop(backend.arena(one_more, DomId(1)).unwrap());
    }
}
