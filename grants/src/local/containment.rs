//! Tests: what a guest can do with a home's descriptor, as the daemon's own user and as another
//! one. What they cannot show: kernels other than the one they run on.

use super::{FrameStore, LocalBackend, LocalConfig};
use crate::backend::{Backend, HomeSpec};
use crate::ids::{DomId, FrameNo, HomeId, PAGE_SIZE, PageIndex};
use crate::testing::{become_user, in_child, root_or_skip, spawn_child, wait, wait_stopped};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use rustix::process::{Signal, kill_process};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

const GUEST_UID: u32 = 61001;
const OTHER_UID: u32 = 61002;
const PAGES: usize = 4;

fn backend(store: FrameStore) -> Option<LocalBackend> {
    let made = LocalBackend::new(LocalConfig {
        store,
        ..LocalConfig::default()
    });
    if let Err(e) = &made {
        println!("skipped, {store:?} is not to be had here: {e}");
    }
    made.ok()
}

fn filled_home(backend: &LocalBackend) -> HomeId {
    let spec = HomeSpec {
        label: "secret".into(),
        bytes: (PAGES * PAGE_SIZE) as u64,
        class: crate::TrustClass::OWN,
    };
    let home = backend.open_home(&spec).unwrap();
    let frames: Vec<_> = (0..PAGES as u32).map(FrameNo).collect();
    backend
        .store(home, PageIndex(0), &frames, &vec![b'A'; PAGES * PAGE_SIZE])
        .unwrap();
    home
}

/// A mapping for the life of the test process.
fn map(
    fd: impl AsFd,
    prot: ProtFlags,
    flags: MapFlags,
) -> Result<*mut core::ffi::c_void, rustix::io::Errno> {
    // SAFETY: a new mapping where the kernel likes; it is never unmapped.
    unsafe { rustix::mm::mmap(std::ptr::null_mut(), PAGES * PAGE_SIZE, prot, flags, fd, 0) }
}

fn byte(start: *mut core::ffi::c_void) -> u8 {
    // SAFETY: the start of a mapping of `map`, which is never unmapped.
    unsafe { start.cast::<u8>().read_volatile() }
}

fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, rustix::io::Errno> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
}

/// Everything by which a reader could become a writer.
fn attack(fd: BorrowedFd<'_>) {
    let whole = (PAGES * PAGE_SIZE) as u64;
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let try_writing = || {
        for flags in [OFlags::RDWR, OFlags::WRONLY, OFlags::RDWR | OFlags::TRUNC] {
            assert!(reopen(fd, flags).is_err(), "reopen {flags:?}");
        }
        // What O_PATH gives can be opened again too.
        let path = reopen(fd, OFlags::PATH).unwrap();
        assert!(reopen(path.as_fd(), OFlags::RDWR).is_err());
        assert!(rustix::io::pwrite(fd, b"X", 0).is_err());
        assert!(rustix::fs::ftruncate(fd, 0).is_err());
        assert!(rustix::fs::fallocate(fd, FallocateFlags::empty(), 0, whole).is_err());
        assert!(rustix::fs::fallocate(fd, punch, 0, whole).is_err());
        assert!(map(fd, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED).is_err());
    };
    try_writing();
    assert!(rustix::fs::fchmod(fd, Mode::from_raw_mode(0o777)).is_err());
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    assert!(rustix::fs::chmod(path.as_str(), Mode::from_raw_mode(0o777)).is_err());
    assert!(rustix::fs::fcntl_add_seals(fd, rustix::fs::SealFlags::FUTURE_WRITE).is_err());
    try_writing();

    let shared = map(fd, ProtFlags::READ, MapFlags::SHARED).unwrap();
    let more = MprotectFlags::READ | MprotectFlags::WRITE;
    // SAFETY: the mapping is `attack`'s own.
    assert!(unsafe { rustix::mm::mprotect(shared, PAGE_SIZE, more) }.is_err());
    let remove = rustix::mm::Advice::LinuxRemove;
    // SAFETY: the mapping is `attack`'s own.
    assert!(unsafe { rustix::mm::madvise(shared, PAGE_SIZE, remove) }.is_err());
    // A private copy is the guest's own business.
    let private = map(fd, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE).unwrap();
    // SAFETY: the start of a writable mapping that is this function's own.
    unsafe { private.cast::<u8>().write_volatile(b'X') };
    let second = map(fd, ProtFlags::READ, MapFlags::SHARED).unwrap();
    assert_eq!(
        (byte(private), byte(shared), byte(second)),
        (b'X', b'A', b'A')
    );
}

fn attacked(backend: &LocalBackend, uid: Option<u32>) {
    let home = filled_home(backend);
    let fd = backend.home_descriptor(home).unwrap();
    in_child(|| {
        if let Some(uid) = uid {
            become_user(uid);
            // (A lease of the daemon's own user makes the daemon's opens fail, not wait.)
            assert!(crate::sys::set_lease(&fd, crate::sys::LeaseKind::Write).is_err());
        }
        attack(fd.as_fd());
    });
    let mut page = vec![0; PAGE_SIZE];
    for index in 0..PAGES as u32 {
        backend
            .load(home, PageIndex(index.into()), FrameNo(index), &mut page)
            .unwrap();
        assert_eq!(page, [b'A'; PAGE_SIZE]);
    }
    assert_eq!(
        backend.present_pages(home).unwrap(),
        [(PageIndex(0), PAGES as u64)]
    );
}

#[test]
fn local_read_only_cannot_be_undone_by_the_daemons_own_user() {
    // memfds do not promise this, and say so.
    if let Some(backend) = backend(FrameStore::PrivateMount) {
        assert!(backend.capabilities().read_only_enforced);
        attacked(&backend, None);
    }
    if let Some(backend) = backend(FrameStore::Memfd) {
        assert!(!backend.capabilities().read_only_enforced);
    }
}

#[test]
fn local_read_only_cannot_be_undone_by_another_user() {
    if root_or_skip("attacks on descriptors by another user") {
        for store in [FrameStore::PrivateMount, FrameStore::Memfd] {
            if let Some(backend) = backend(store) {
                attacked(&backend, Some(GUEST_UID));
            }
        }
    }
}

/// Punching takes the page from a process that is stopped: it never reads the old bytes again.
#[test]
fn local_force_takes_pages_from_a_stopped_process() {
    for store in [FrameStore::PrivateMount, FrameStore::Memfd] {
        let Some(backend) = backend(store) else {
            continue;
        };
        let home = filled_home(&backend);
        let fd = backend.home_descriptor(home).unwrap();
        backend
            .grant(
                DomId(1),
                crate::Access::ReadOnly,
                &[FrameNo(0)],
                &mut Vec::new(),
            )
            .unwrap();
        let guest = spawn_child(|| {
            let start = map(&fd, ProtFlags::READ, MapFlags::SHARED).unwrap();
            assert_eq!(byte(start), b'A');
            kill_process(rustix::process::getpid(), Signal::STOP).unwrap();
            assert_eq!(byte(start), b'B');
        });
        wait_stopped(guest);
        let mut ended = Vec::new();
        backend
            .force_out(home, PageIndex(0), &[FrameNo(0)], &mut |frame, dom| {
                ended.push((frame, dom))
            })
            .unwrap();
        assert_eq!(ended, [(FrameNo(0), DomId(1))]);
        assert_eq!(
            backend.present_pages(home).unwrap(),
            [(PageIndex(1), PAGES as u64 - 1)]
        );
        backend
            .store(home, PageIndex(0), &[FrameNo(0)], &[b'B'; PAGE_SIZE])
            .unwrap();
        kill_process(guest, Signal::CONT).unwrap();
        assert_eq!(wait(guest).exit_status(), Some(0));
    }
}

#[test]
fn local_programs_run_from_a_homes_descriptor() {
    let program = std::fs::read("/bin/true").unwrap();
    let pages = program.len().div_ceil(PAGE_SIZE);
    let mut data = program.clone();
    data.resize(pages * PAGE_SIZE, 0);
    let frames: Vec<_> = (0..pages as u32).map(FrameNo).collect();
    for store in [FrameStore::PrivateMount, FrameStore::Memfd] {
        let Some(backend) = backend(store) else {
            continue;
        };
        if !backend.capabilities().executable_mappings {
            println!("skipped: {store:?} gives no executable files here");
            continue;
        }
        let spec = HomeSpec {
            label: "true".into(),
            bytes: program.len() as u64,
            class: crate::TrustClass::OWN,
        };
        let home = backend.open_home(&spec).unwrap();
        backend.store(home, PageIndex(0), &frames, &data).unwrap();
        let fd = backend.home_descriptor(home).unwrap();
        let busy = std::io::ErrorKind::ExecutableFileBusy;
        let run = |uid: Option<u32>, patient: bool| {
            let mut command = Command::new(format!("/proc/self/fd/{}", fd.as_raw_fd()));
            if let Some(uid) = uid {
                command.gid(uid).uid(uid);
            }
            // A test beside this one that forks has every descriptor for a moment, writable ones too.
            for _ in 0..200 {
                match command.status() {
                    Err(e) if patient && e.kind() == busy => {}
                    other => return other,
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            command.status()
        };
        assert_eq!(
            run(None, false).unwrap_err().kind(),
            busy,
            "nobody said it may"
        );
        backend.make_runnable(home).unwrap();
        let root = rustix::process::geteuid().is_root();
        for uid in [None, root.then_some(GUEST_UID)] {
            assert!(run(uid, true).unwrap().success());
        }
        assert!(backend.home_in_use(home).unwrap());
        assert!(run(None, true).unwrap().success(), "asking changes nothing");
        drop(fd);
        let closed = (0..200).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            !backend.home_in_use(home).unwrap()
        });
        assert!(closed, "nobody has it open");
        let fd = backend.home_descriptor(home).unwrap();
        let run = Command::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).status();
        assert_eq!(run.unwrap_err().kind(), busy, "it was given back");
        backend.discard(home, PageIndex(0), &frames).unwrap();
        assert!(backend.make_runnable(home).is_err(), "with holes");
    }
}

/// A guest that kept a path descriptor opens the file while the daemon holds its lease for a
/// moment: the kernel signals the daemon, which must not die of it.
#[test]
fn local_asking_who_uses_a_home_survives_a_guest_that_opens_it() {
    for store in [FrameStore::PrivateMount, FrameStore::Memfd] {
        let Some(backend) = backend(store) else {
            continue;
        };
        let home = filled_home(&backend);
        let fd = backend.home_descriptor(home).unwrap();
        let guest = spawn_child(|| {
            let path = reopen(fd.as_fd(), OFlags::PATH).unwrap();
            drop(fd);
            loop {
                let _ = reopen(path.as_fd(), OFlags::RDONLY);
            }
        });
        let until = std::time::Instant::now() + std::time::Duration::from_millis(200);
        while std::time::Instant::now() < until {
            backend.home_in_use(home).unwrap();
        }
        kill_process(guest, Signal::KILL).unwrap();
        wait(guest);
    }
}

/// Tries to get at `pid`; true when something worked.
fn gets_into(pid: rustix::process::Pid) -> bool {
    use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let number = pid.as_raw_nonzero().get();
    let stolen = pidfd_getfd(&pidfd, 0, PidfdGetfdFlags::empty()).is_ok();
    let looked = std::fs::File::open(format!("/proc/{number}/mem")).is_ok()
        || std::fs::read_link(format!("/proc/{number}/fd/0")).is_ok();
    // SAFETY: attaches to another process; nothing of ours is touched, and we end right after.
    let traced = unsafe {
        libc::ptrace(
            libc::PTRACE_SEIZE,
            number,
            0 as libc::c_long,
            0 as libc::c_long,
        )
    } == 0;
    stolen || looked || traced
}

#[test]
fn local_nobody_gets_into_an_undumpable_daemon() {
    if !root_or_skip("getting at a daemon as its own and as another user") {
        return;
    }
    for (undumpable, guest_uid, may) in [
        (true, GUEST_UID, Some(false)),
        (true, OTHER_UID, Some(false)),
        (false, OTHER_UID, Some(false)),
        // What the call is for. (Where ptrace is restricted otherwise, it is not needed.)
        (false, GUEST_UID, None),
    ] {
        let daemon = spawn_child(|| {
            become_user(GUEST_UID);
            let dumpable = rustix::process::DumpableBehavior::Dumpable;
            rustix::process::set_dumpable_behavior(dumpable).unwrap();
            if undumpable {
                crate::sys::make_undumpable().unwrap();
            }
            kill_process(rustix::process::getpid(), Signal::STOP).unwrap();
        });
        wait_stopped(daemon);
        in_child(|| {
            become_user(guest_uid);
            let got = gets_into(daemon);
            match may {
                Some(may) => assert_eq!(got, may, "undumpable {undumpable}, as {guest_uid}"),
                None if got => {}
                None => println!("this machine lets no process at another of its user anyway"),
            }
        });
        kill_process(daemon, Signal::KILL).unwrap();
        wait(daemon);
    }
}

/// A guest of the daemon's own user may take a lease: the daemon must not wait for it.
#[test]
fn local_a_guests_lease_holds_nobody_up() {
    for store in [FrameStore::PrivateMount, FrameStore::Memfd] {
        let Some(backend) = backend(store) else {
            continue;
        };
        let home = filled_home(&backend);
        let fd = backend.home_descriptor(home).unwrap();
        backend.make_runnable(home).unwrap();
        let before = std::time::Instant::now();
        crate::sys::set_lease_signal(&fd, libc::SIGURG).unwrap();
        crate::sys::set_lease(&fd, crate::sys::LeaseKind::Write).unwrap();
        assert!(backend.home_in_use(home).unwrap());
        assert!(backend.home_descriptor(home).is_err());
        assert!(backend.discard(home, PageIndex(0), &[FrameNo(0)]).is_err());
        assert!(before.elapsed() < std::time::Duration::from_secs(5));
        // Dropping it would not do at once: a test beside this one that forks has it for a moment.
        crate::sys::set_lease(&fd, crate::sys::LeaseKind::None).unwrap();
        backend.discard(home, PageIndex(0), &[FrameNo(0)]).unwrap();
    }
}
