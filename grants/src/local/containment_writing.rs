//! Tests: what a guest can do with a descriptor that it may write. What they cannot show: kernels other than
//! the one they run on.

use super::{FrameStore, LocalBackend, LocalConfig};
use crate::backend::{Backend, HomeSpec, Where};
use crate::ids::{DomId, FrameNo, HomeId, PAGE_SIZE, PageIndex, TrustClass};
use crate::testing::{become_user, in_child, root_or_skip, spawn_child, wait};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const GUEST_UID: u32 = 61003;
const PAGES: usize = 4;
const A: Where = Where::Arena(DomId(1));
const B: Where = Where::Arena(DomId(2));

fn homes() -> Vec<(LocalBackend, HomeId)> {
    let stores = [FrameStore::PrivateMount, FrameStore::Memfd];
    stores.into_iter().filter_map(filled).collect()
}

fn filled(store: FrameStore) -> Option<(LocalBackend, HomeId)> {
    let config = LocalConfig {
        store,
        ..LocalConfig::default()
    };
    let backend = match LocalBackend::new(config) {
        Ok(backend) => backend,
        Err(e) => {
            println!("skipped, {store:?} is not to be had here: {e}");
            return None;
        }
    };
    let spec = HomeSpec {
        label: "secret".into(),
        bytes: (PAGES * PAGE_SIZE) as u64,
        class: TrustClass::OWN,
    };
    let home = backend.open_home(&spec).unwrap();
    let frames: Vec<_> = (0..PAGES as u32).map(FrameNo).collect();
    let data = vec![b'A'; PAGES * PAGE_SIZE];
    backend.store(home, PageIndex(0), &frames, &data).unwrap();
    Some((backend, home))
}

fn place(backend: &LocalBackend, home: HomeId, page: u32, from: Where, to: Where) {
    let at = PageIndex(page.into());
    backend
        .place(home, at, FrameNo(page), from, to, false)
        .unwrap();
}

fn byte(backend: &LocalBackend, home: HomeId, page: u32) -> u8 {
    let mut data = vec![0; PAGE_SIZE];
    let at = PageIndex(page.into());
    backend.load(home, at, FrameNo(page), &mut data).unwrap();
    assert!(data.iter().all(|&byte| byte == data[0]));
    data[0]
}

/// Files of a mount can be opened by their handles by whoever may (root), through any file of it.
fn open_by_handle(of: BorrowedFd<'_>, mount: BorrowedFd<'_>) -> std::io::Result<OwnedFd> {
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        data: [u8; 128],
    }
    let mut handle = Handle {
        bytes: 128,
        kind: 0,
        data: [0; 128],
    };
    let mut mount_id = 0;
    // SAFETY: the path is an empty C string; the kernel writes at most the `bytes` that the handle says it has
    // room for, and the number of the mount.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            of.as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle,
            &raw mut mount_id,
            libc::AT_EMPTY_PATH,
        )
    };
    crate::sys::checked(result as i32)?;
    let flags = libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: the kernel only reads the handle, which it wrote itself.
    let result = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw const handle,
            flags,
        )
    };
    let fd = crate::sys::checked(result as i32)?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// All that a guest has does not get it at the home, or at another's arena.
fn attack(mine: BorrowedFd<'_>, readable: BorrowedFd<'_>) {
    for flags in [OFlags::RDWR, OFlags::WRONLY] {
        let path = format!("/proc/self/fd/{}", readable.as_raw_fd());
        assert!(rustix::fs::open(path, flags, Mode::empty()).is_err());
    }
    for name in [".", "..", "../secret"] {
        assert!(rustix::fs::openat(mine, name, OFlags::RDONLY, Mode::empty()).is_err());
    }
    let seals = rustix::fs::SealFlags::WRITE | rustix::fs::SealFlags::FUTURE_WRITE;
    assert!(rustix::fs::fcntl_add_seals(mine, seals).is_err());
    assert!(open_by_handle(readable, mine).is_err());
    // It may do all this to its own.
    rustix::fs::ftruncate(mine, 0).unwrap();
    rustix::fs::ftruncate(mine, 1 << 20).unwrap();
    rustix::io::pwrite(mine, &[b'X'; PAGES * PAGE_SIZE], 0).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(mine, punch, 0, PAGE_SIZE as u64).unwrap();
}

#[test]
fn local_an_arena_is_no_way_to_anything_else() {
    for (backend, home) in homes() {
        let readable = backend.home_descriptor(home).unwrap();
        let mine = backend.arena(home, DomId(1)).unwrap();
        let other = backend.arena(home, DomId(2)).unwrap();
        place(&backend, home, 0, Where::Home, A);
        place(&backend, home, 1, Where::Home, A);
        place(&backend, home, 2, Where::Home, B);
        let kind = backend.store_kind();
        if kind == FrameStore::PrivateMount {
            let devices =
                [&readable, &mine, &other].map(|fd| rustix::fs::fstat(fd).unwrap().st_dev);
            assert_ne!(devices[0], devices[1], "the home's tmpfs and the arena's");
            assert_ne!(devices[1], devices[2], "two sessions' arenas");
        }
        let root = rustix::process::geteuid().is_root();
        // memfds keep nobody of the daemon's own user out, and say so.
        let own = (kind == FrameStore::PrivateMount).then_some(None);
        let users = own.into_iter().chain(root.then_some(Some(GUEST_UID)));
        for uid in users {
            in_child(|| {
                if let Some(uid) = uid {
                    become_user(uid);
                }
                attack(mine.as_fd(), readable.as_fd());
            });
            assert_eq!(byte(&backend, home, 0), 0, "it punched its own page");
            assert_eq!(byte(&backend, home, 1), b'X');
            assert_eq!(
                (byte(&backend, home, 2), byte(&backend, home, 3)),
                (b'A', b'A')
            );
        }
        place(&backend, home, 1, A, Where::Home);
        assert_eq!(byte(&backend, home, 1), b'X');
    }
}

/// Memory of this process that a fault waits in for ever: nobody serves its userfaultfd.
fn bottomless() -> *const u8 {
    #[repr(C)]
    struct Api([u64; 3]);
    #[repr(C)]
    struct Register([u64; 4]);
    const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
    const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
    // SAFETY: takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) } as i32;
    assert!(fd >= 0, "userfaultfd: {}", std::io::Error::last_os_error());
    // SAFETY: a new mapping where the kernel likes, never unmapped.
    let memory = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            PAGE_SIZE,
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::PRIVATE,
        )
    }
    .unwrap();
    let mut api = Api([0xaa, 0, 0]);
    // SAFETY: the kernel reads and writes a struct of this size, which lives through the call.
    let result = unsafe { libc::ioctl(fd, UFFDIO_API, &raw mut api) };
    assert_eq!(result, 0);
    let mut register = Register([memory.addr() as u64, PAGE_SIZE as u64, 1, 0]);
    // SAFETY: the same.
    let result = unsafe { libc::ioctl(fd, UFFDIO_REGISTER, &raw mut register) };
    assert_eq!(result, 0);
    memory.cast()
}

/// A guest in a `write` of its arena that never ends holds the lock of the file. The daemon does not want it.
#[test]
fn local_a_guest_that_locks_its_arena_holds_nobody_up() {
    if !root_or_skip("a guest that lets a fault of the kernel's wait") {
        return;
    }
    for (backend, home) in homes() {
        let mine = backend.arena(home, DomId(1)).unwrap();
        let (_, common) = backend.common(home).unwrap();
        let guests = [&mine, &common].map(|fd| {
            spawn_child(|| {
                let bottomless = bottomless();
                // SAFETY: the kernel reads from it, or rather does not; nothing here does.
                unsafe { libc::pwrite(fd.as_raw_fd(), bottomless.cast(), PAGE_SIZE, 0) };
            })
        });
        // Until both are in it: asleep in the kernel, where it tells that.
        let until = Instant::now() + Duration::from_secs(5);
        let is_in_it = |guest: &Pid| {
            let path = format!("/proc/{}/wchan", guest.as_raw_nonzero());
            let wchan = std::fs::read_to_string(path).unwrap_or_default();
            wchan.contains("userfault")
        };
        while !guests.iter().all(is_in_it) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        for page in 0..3 {
            place(&backend, home, page, Where::Home, A);
            place(&backend, home, page, A, Where::Common);
            assert_eq!(byte(&backend, home, page), b'A');
            place(&backend, home, page, Where::Common, Where::Home);
        }
        backend.resize_home(home, PAGE_SIZE as u64 * 3).unwrap();
        assert!(
            !backend.wait_swept(Duration::from_millis(300)),
            "it is held up"
        );
        // Pages that nobody holds up go on moving; those that are held up are refused.
        let again = |page: u32| {
            let at = PageIndex(page.into());
            backend.place(home, at, FrameNo(page), Where::Home, A, false)
        };
        for page in 0..3 {
            if again(page).is_ok() {
                place(&backend, home, page, A, Where::Home);
            }
        }
        backend.end_arena(home, DomId(1)).unwrap();
        backend.renew_common(home).unwrap();
        let _mine_again = backend.arena(home, DomId(2)).unwrap();
        let other = File::from(backend.arena(home, DomId(3)).unwrap());
        let to = Where::Arena(DomId(3));
        place(&backend, home, 0, Where::Home, to);
        let mut data = vec![0; PAGE_SIZE];
        other.read_exact_at(&mut data, 0).unwrap();
        assert_eq!(data, [b'A'; PAGE_SIZE]);
        for guest in guests {
            kill_process(guest, Signal::KILL).unwrap();
            wait(guest);
        }
        assert!(backend.wait_swept(Duration::from_secs(60)));
    }
}
