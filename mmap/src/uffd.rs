//! userfaultfd by its system calls: the ABI of linux/userfaultfd.h, and one descriptor with the
//! features that this library handles.

use crate::client::UserfaultPolicy;
use crate::limits::AGAIN_TRIES_MAX;
use copage_grants::PAGE_SIZE;
use rustix::fd::{FromRawFd, OwnedFd};
use rustix::fs::OFlags;
use std::ffi::{c_int, c_ulong};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// `UFFD_API`, linux/userfaultfd.h.
const UFFD_API: u64 = 0xAA;
/// `UFFD_USER_MODE_ONLY`, linux/userfaultfd.h.
const UFFD_USER_MODE_ONLY: c_int = 1;

/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`: write-protect faults. For private mappings.
const FEATURE_WP: u64 = 1 << 0;
/// `UFFD_FEATURE_EVENT_REMAP`: without it mremap takes a mapping's registration away, and a rebase
/// moves registered mappings. The event itself says nothing new: it is read and forgotten.
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
/// `UFFD_FEATURE_MISSING_SHMEM`: frame files are tmpfs files.
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// `UFFD_FEATURE_MINOR_SHMEM`: pages that the file has and the mapping has not (Linux 5.14).
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`: write protection of mappings of tmpfs files (Linux 5.19).
const FEATURE_WP_SHMEM: u64 = 1 << 12;
/// `UFFD_FEATURE_POISON`: pages that are SIGBUS (Linux 6.6).
const FEATURE_POISON: u64 = 1 << 14;
// Not asked for: EVENT_FORK (mappings are not copied to children), EVENT_REMOVE and EVENT_UNMAP
// (every discard and unmap is this library's own, and the thread that does it would wait for the
// pager), SIGBUS, THREAD_ID, EXACT_ADDRESS (nothing would use them).

const FEATURES_NEEDED: u64 = FEATURE_MISSING_SHMEM | FEATURE_EVENT_REMAP;
const FEATURES_WP: u64 = FEATURE_WP | FEATURE_WP_SHMEM | FEATURE_MINOR_SHMEM;

/// `struct uffdio_api`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<UffdioApi>() == 24);

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Clone, Copy)]
struct UffdioRange {
    start: u64,
    len: u64,
}
const _: () = assert!(size_of::<UffdioRange>() == 16);

/// `struct uffdio_register`.
#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<UffdioRegister>() == 32);
/// `UFFDIO_REGISTER_MODE_MISSING`.
const REGISTER_MISSING: u64 = 1 << 0;
/// `UFFDIO_REGISTER_MODE_WP`.
const REGISTER_WP: u64 = 1 << 1;
/// `UFFDIO_REGISTER_MODE_MINOR`.
const REGISTER_MINOR: u64 = 1 << 2;

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}
const _: () = assert!(size_of::<UffdioWriteprotect>() == 24);
/// `UFFDIO_WRITEPROTECT_MODE_WP`.
const WRITEPROTECT_WP: u64 = 1 << 0;
/// `UFFDIO_WRITEPROTECT_MODE_DONTWAKE`.
const WRITEPROTECT_DONTWAKE: u64 = 1 << 1;

/// `struct uffdio_copy`.
#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}
const _: () = assert!(size_of::<UffdioCopy>() == 40);

/// `UFFDIO_COPY_MODE_WP`.
const COPY_WP: u64 = 1 << 1;

/// `struct uffdio_continue`.
#[repr(C)]
struct UffdioContinue {
    range: UffdioRange,
    mode: u64,
    mapped: i64,
}
const _: () = assert!(size_of::<UffdioContinue>() == 32);

/// `UFFDIO_CONTINUE_MODE_WP` (Linux 6.4).
const CONTINUE_WP: u64 = 1 << 1;

/// `struct uffdio_poison` (Linux 6.6).
#[repr(C)]
struct UffdioPoison {
    range: UffdioRange,
    mode: u64,
    updated: i64,
}
const _: () = assert!(size_of::<UffdioPoison>() == 32);

/// `struct uffd_msg` with its `pagefault` arm, by far the longest that is looked at.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct UffdMsg {
    event: u8,
    reserved1: u8,
    reserved2: u16,
    reserved3: u32,
    flags: u64,
    address: u64,
    feat: u64,
}
const _: () = assert!(size_of::<UffdMsg>() == 32);
/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;
/// `UFFD_PAGEFAULT_FLAG_WRITE`.
const PAGEFAULT_WRITE: u64 = 1 << 0;
/// `UFFD_PAGEFAULT_FLAG_WP`.
const PAGEFAULT_WP: u64 = 1 << 1;
/// `UFFD_PAGEFAULT_FLAG_MINOR`.
const PAGEFAULT_MINOR: u64 = 1 << 2;

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FaultEvent {
    /// Page-aligned.
    pub(crate) address: usize,
    /// A store.
    pub(crate) write: bool,
    /// The page is there and write-protected; else it is missing.
    pub(crate) protected: bool,
    /// It is missing in the mapping, and is there in the file.
    pub(crate) minor: bool,
}

impl UffdMsg {
    /// The fault, if it is one; the rest (REMAP) needs only to be read.
    pub(crate) fn fault(&self) -> Option<FaultEvent> {
        (self.event == EVENT_PAGEFAULT).then_some(FaultEvent {
            address: self.address as usize & !(PAGE_SIZE - 1),
            write: self.flags & PAGEFAULT_WRITE != 0,
            protected: self.flags & PAGEFAULT_WP != 0,
            minor: self.flags & PAGEFAULT_MINOR != 0,
        })
    }
}

/// `_IOC(dir, type, nr, size)`, asm-generic/ioctl.h.
const fn ioc(dir: u64, kind: u64, nr: u64, size: usize) -> u64 {
    (dir << 30) | ((size as u64) << 16) | (kind << 8) | nr
}
const IOC_READ: u64 = 2;
const IOC_READ_WRITE: u64 = 3;
/// `#define UFFDIO_API _IOWR(UFFDIO, _UFFDIO_API, struct uffdio_api)`
const UFFDIO_API: u64 = ioc(IOC_READ_WRITE, 0xAA, 0x3F, size_of::<UffdioApi>());
/// `#define UFFDIO_REGISTER _IOWR(UFFDIO, _UFFDIO_REGISTER, struct uffdio_register)`
const UFFDIO_REGISTER: u64 = ioc(IOC_READ_WRITE, 0xAA, 0x00, size_of::<UffdioRegister>());
/// `#define UFFDIO_WAKE _IOR(UFFDIO, _UFFDIO_WAKE, struct uffdio_range)`
const UFFDIO_WAKE: u64 = ioc(IOC_READ, 0xAA, 0x02, size_of::<UffdioRange>());
/// `#define UFFDIO_WRITEPROTECT _IOWR(UFFDIO, _UFFDIO_WRITEPROTECT, struct uffdio_writeprotect)`
const UFFDIO_WRITEPROTECT: u64 = ioc(IOC_READ_WRITE, 0xAA, 0x06, size_of::<UffdioWriteprotect>());
/// `#define UFFDIO_COPY _IOWR(UFFDIO, _UFFDIO_COPY, struct uffdio_copy)`
const UFFDIO_COPY: u64 = ioc(IOC_READ_WRITE, 0xAA, 0x03, size_of::<UffdioCopy>());
/// `#define UFFDIO_CONTINUE _IOWR(UFFDIO, _UFFDIO_CONTINUE, struct uffdio_continue)`
const UFFDIO_CONTINUE: u64 = ioc(IOC_READ_WRITE, 0xAA, 0x07, size_of::<UffdioContinue>());
/// `#define UFFDIO_POISON _IOWR(UFFDIO, _UFFDIO_POISON, struct uffdio_poison)`
const UFFDIO_POISON: u64 = ioc(IOC_READ_WRITE, 0xAA, 0x08, size_of::<UffdioPoison>());
/// `#define USERFAULTFD_IOC_NEW _IO(USERFAULTFD_IOC, 0x00)`
const USERFAULTFD_IOC_NEW: u64 = ioc(0, 0xAA, 0x00, 0);
const _: () = assert!(UFFDIO_API == 0xC018_AA3F && UFFDIO_REGISTER == 0xC020_AA00);
const _: () = assert!(UFFDIO_WAKE == 0x8010_AA02 && UFFDIO_WRITEPROTECT == 0xC018_AA06);
const _: () = assert!(UFFDIO_COPY == 0xC028_AA03 && UFFDIO_CONTINUE == 0xC020_AA07);
const _: () = assert!(UFFDIO_POISON == 0xC020_AA08 && USERFAULTFD_IOC_NEW == 0xAA00);

/// Which faults arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// All.
    Full,
    /// Those of user mode; the kernel's own accesses fail with EFAULT.
    UserModeOnly,
}

/// One userfaultfd.
pub(crate) struct Uffd {
    fd: OwnedFd,
    mode: Mode,
    features: u64,
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Where userfaultfds come from.
enum Source<'a> {
    Syscall,
    Device(BorrowedFd<'a>),
}

fn last_os(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A new descriptor, without its API handshake.
fn new_descriptor(source: &Source<'_>, mode: Mode) -> io::Result<OwnedFd> {
    let only = if mode == Mode::UserModeOnly {
        UFFD_USER_MODE_ONLY
    } else {
        0
    };
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | only;
    let fd = match source {
        Source::Syscall => {
            // SAFETY: userfaultfd(2) takes one flags word and touches no memory.
            let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
            // Descriptors fit an int; the error is -1.
            last_os(fd as c_int)?
        }
        Source::Device(device) => {
            // SAFETY: USERFAULTFD_IOC_NEW takes the flags by value and touches no memory.
            let fd =
                unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as c_ulong, flags) };
            last_os(fd)?
        }
    };
    // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Issues an ioctl whose argument is a struct of the kernel's.
///
/// # Safety
/// `T` must be the struct that linux/userfaultfd.h gives for `request`.
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: u64, argument: &mut T) -> io::Result<()> {
    let pointer: *mut T = argument;
    // SAFETY: `pointer` is a live, exclusive `T` for the whole call and `T` is what the kernel
    // reads and writes for `request` (this function's own contract). What the call does to the
    // address ranges named inside is argued where the ranges are chosen.
    last_os(unsafe { libc::ioctl(fd.as_raw_fd(), request as c_ulong, pointer) })?;
    Ok(())
}

fn handshake(fd: BorrowedFd<'_>, features: u64) -> io::Result<u64> {
    let mut api = UffdioApi {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: UFFDIO_API takes `struct uffdio_api`.
    unsafe { ioctl(fd, UFFDIO_API, &mut api) }?;
    Ok(api.features)
}

fn range(addr: usize, bytes: usize) -> UffdioRange {
    UffdioRange {
        start: addr as u64,
        len: bytes as u64,
    }
}

impl Uffd {
    fn from_source(source: &Source<'_>, mode: Mode) -> io::Result<Self> {
        // The handshake can be done once: the first descriptor asks what there is.
        let probe = new_descriptor(source, mode)?;
        let there = handshake(probe.as_fd(), 0)?;
        drop(probe);
        if there & FEATURES_NEEDED != FEATURES_NEEDED {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let mut features = FEATURES_NEEDED | (there & FEATURE_POISON);
        if there & FEATURES_WP == FEATURES_WP {
            features |= FEATURES_WP;
        }
        let fd = new_descriptor(source, mode)?;
        handshake(fd.as_fd(), features)?;
        Ok(Self { fd, mode, features })
    }

    /// A full one without the daemon's help.
    pub(crate) fn full() -> io::Result<Self> {
        let first = Self::from_source(&Source::Syscall, Mode::Full);
        let Err(error) = first else { return first };
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open("/dev/userfaultfd", flags, rustix::fs::Mode::empty()) {
            Ok(device) => Self::from_source(&Source::Device(device.as_fd()), Mode::Full),
            Err(_) => Err(error),
        }
    }

    /// The best one that `policy` allows; `device` is the daemon's `/dev/userfaultfd`. The error is
    /// the text for who wants to map.
    pub(crate) fn open(
        policy: UserfaultPolicy,
        full: Option<Self>,
        device: Option<BorrowedFd<'_>>,
    ) -> Result<Self, String> {
        match policy {
            UserfaultPolicy::None => return Err("this client asked for none".into()),
            UserfaultPolicy::Best => {
                if let Some(full) = full {
                    return Ok(full);
                }
                if let Some(device) = device
                    && let Ok(uffd) = Self::from_source(&Source::Device(device), Mode::Full)
                {
                    return Ok(uffd);
                }
            }
            UserfaultPolicy::UserModeOnly => {}
        }
        Self::from_source(&Source::Syscall, Mode::UserModeOnly).map_err(|error| {
            let why = match error.raw_os_error() {
                Some(libc::ENOSYS) => "the kernel is built without CONFIG_USERFAULTFD",
                Some(libc::EPERM) => "userfaultfd(2) is not allowed here (a seccomp filter?)",
                Some(libc::EOPNOTSUPP) => {
                    "the kernel's userfaultfd does not do shared memory files"
                }
                Some(libc::EINVAL) => "the kernel is older than 5.11",
                _ => "userfaultfd(2) failed",
            };
            format!("{why} ({error}); files can be read, not mapped; `copage doctor` says more")
        })
    }

    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// Can mappings be had that are stored to?
    pub(crate) fn can_protect(&self) -> bool {
        self.features & FEATURES_WP == FEATURES_WP
    }

    /// Can pages be made SIGBUS without another mapping?
    pub(crate) fn can_poison(&self) -> bool {
        self.features & FEATURE_POISON != 0
    }

    /// Can pages be mapped write-protected in one step? The kernel says so of what came a little later.
    pub(crate) fn can_show(&self) -> bool {
        self.can_protect() && self.can_poison()
    }

    /// From here on missing pages of the range (and stores, with `protect`) come here.
    pub(crate) fn register(&self, addr: usize, bytes: usize, protect: bool) -> io::Result<()> {
        let mode = REGISTER_MISSING | if protect { REGISTER_WP } else { 0 };
        self.register_for(addr, bytes, mode)
    }

    /// From here on every first access to a page of the range comes here, whether the file has the page or
    /// not: then it is [`Self::show_protected`]'s.
    pub(crate) fn register_all(&self, addr: usize, bytes: usize) -> io::Result<()> {
        self.register_for(addr, bytes, REGISTER_MISSING | REGISTER_WP | REGISTER_MINOR)
    }

    fn register_for(&self, addr: usize, bytes: usize, mode: u64) -> io::Result<()> {
        let mut argument = UffdioRegister {
            range: range(addr, bytes),
            mode,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER takes `struct uffdio_register`.
        unsafe { ioctl(self.fd.as_fd(), UFFDIO_REGISTER, &mut argument) }
    }

    /// Lets the threads go on that wait for faults in the range. They fault again if they must.
    pub(crate) fn wake(&self, addr: usize, bytes: usize) {
        let mut argument = range(addr, bytes);
        // Fails only for ranges that are no addresses.
        // SAFETY: UFFDIO_WAKE takes `struct uffdio_range`.
        let _ = unsafe { ioctl(self.fd.as_fd(), UFFDIO_WAKE, &mut argument) };
    }

    fn writeprotect(&self, addr: usize, bytes: usize, mode: u64) -> io::Result<()> {
        let mut argument = UffdioWriteprotect {
            range: range(addr, bytes),
            mode,
        };
        // SAFETY: UFFDIO_WRITEPROTECT takes `struct uffdio_writeprotect`.
        unsafe { ioctl(self.fd.as_fd(), UFFDIO_WRITEPROTECT, &mut argument) }
    }

    fn writeprotect_patiently(&self, addr: usize, bytes: usize, mode: u64) -> io::Result<()> {
        let mut tries = 0;
        loop {
            match self.writeprotect(addr, bytes, mode) {
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) && tries < AGAIN_TRIES_MAX => {
                    tries += 1;
                    std::thread::yield_now();
                }
                result => return result,
            }
        }
    }

    /// Arms the range: the next store to each page comes here. Waits while mappings are just
    /// moving, which needs the pager: never from the pager.
    pub(crate) fn protect(&self, addr: usize, bytes: usize) -> io::Result<()> {
        self.writeprotect_patiently(addr, bytes, WRITEPROTECT_WP)
    }

    /// As [`Self::unprotect`], waiting while mappings are just moving: never from the pager.
    pub(crate) fn unprotect_patiently(&self, addr: usize, bytes: usize) -> io::Result<()> {
        self.writeprotect_patiently(addr, bytes, WRITEPROTECT_DONTWAKE)
    }

    /// Lets stores to the range through, waking nobody. EAGAIN while mappings are just moving.
    pub(crate) fn unprotect(&self, addr: usize, bytes: usize) -> io::Result<()> {
        self.writeprotect(addr, bytes, WRITEPROTECT_DONTWAKE)
    }

    /// Maps pages that the file has, write-protected in the same step, and wakes who waits there: the first one,
    /// and of the others those before one that cannot be. EEXIST where something is mapped, EFAULT where the
    /// file has a hole, ENOENT where the range is in more than one mapping, EAGAIN while mappings are just moving,
    /// EINVAL before Linux 6.4.
    pub(crate) fn show_protected(&self, addr: usize, bytes: usize) -> io::Result<()> {
        let mut argument = UffdioContinue {
            range: range(addr, bytes),
            mode: CONTINUE_WP,
            mapped: 0,
        };
        // SAFETY: UFFDIO_CONTINUE takes `struct uffdio_continue`.
        match unsafe { ioctl(self.fd.as_fd(), UFFDIO_CONTINUE, &mut argument) } {
            Err(_) if argument.mapped > 0 => Ok(()),
            result => result,
        }
    }

    /// Makes missing pages SIGBUS. EEXIST where something is mapped, EAGAIN while mappings are just
    /// moving. Wakes who waits there.
    pub(crate) fn poison(&self, addr: usize, bytes: usize) -> io::Result<()> {
        let mut argument = UffdioPoison {
            range: range(addr, bytes),
            mode: 0,
            updated: 0,
        };
        // SAFETY: UFFDIO_POISON takes `struct uffdio_poison`.
        unsafe { ioctl(self.fd.as_fd(), UFFDIO_POISON, &mut argument) }
    }

    /// Puts a page of one's own at `addr`, of a private mapping, if nothing is mapped there, in one
    /// step; EEXIST where something is. Wakes who waits there. Waits while mappings are just
    /// moving: never from the pager.
    pub(crate) fn copy_patiently(&self, addr: usize, page: &[u8; PAGE_SIZE]) -> io::Result<()> {
        let mut tries = 0;
        loop {
            let mut argument = UffdioCopy {
                dst: addr as u64,
                src: page.as_ptr().expose_provenance() as u64,
                len: PAGE_SIZE as u64,
                mode: 0,
                copy: 0,
            };
            // SAFETY: UFFDIO_COPY takes `struct uffdio_copy`; `src` is a page that lives.
            let result = unsafe { ioctl(self.fd.as_fd(), UFFDIO_COPY, &mut argument) };
            match result {
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) && tries < AGAIN_TRIES_MAX => {
                    tries += 1;
                    std::thread::yield_now();
                }
                result => return result,
            }
        }
    }

    /// Puts pages of one's own at `addr`, write-protected: the first store to each comes here. Pages
    /// that are there already stay as they are. Wakes who waits. Waits while mappings are just
    /// moving: never from the pager.
    pub(crate) fn copy_protected(&self, addr: usize, pages: &[[u8; PAGE_SIZE]]) -> io::Result<()> {
        let (mut at, mut tries) = (0, 0);
        while at < pages.len() {
            let rest = &pages[at..];
            let mut argument = UffdioCopy {
                dst: (addr + at * PAGE_SIZE) as u64,
                src: rest.as_ptr().expose_provenance() as u64,
                len: size_of_val(rest) as u64,
                mode: COPY_WP,
                copy: 0,
            };
            // SAFETY: UFFDIO_COPY takes `struct uffdio_copy`; `src` are pages that live.
            match unsafe { ioctl(self.fd.as_fd(), UFFDIO_COPY, &mut argument) } {
                Ok(()) => return Ok(()),
                // Some were copied, then something was in the way: go on behind them, and see what.
                Err(_) if argument.copy > 0 => at += argument.copy as usize / PAGE_SIZE,
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => at += 1,
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) && tries < AGAIN_TRIES_MAX => {
                    tries += 1;
                    std::thread::yield_now();
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Reads what is there, without waiting; how many.
    pub(crate) fn read(&self, events: &mut [UffdMsg]) -> io::Result<usize> {
        let pointer = events.as_mut_ptr();
        // SAFETY: the buffer is `events`, exclusively ours for the call, of this many bytes, and
        // every bit pattern is an `UffdMsg`.
        let got = unsafe { libc::read(self.fd.as_raw_fd(), pointer.cast(), size_of_val(events)) };
        match usize::try_from(got) {
            Ok(bytes) => Ok(bytes / size_of::<UffdMsg>()),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::WouldBlock {
                    Ok(0)
                } else {
                    Err(error)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_gives_the_mode_it_should() {
        fn open(policy: UserfaultPolicy, device: Option<BorrowedFd<'_>>) -> Mode {
            Uffd::open(policy, None, device).unwrap().mode()
        }
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open("/dev/userfaultfd", flags, rustix::fs::Mode::empty()) {
            // What a daemon hands to a guest that may make no full one by itself.
            Ok(device) => {
                assert_eq!(
                    open(UserfaultPolicy::Best, Some(device.as_fd())),
                    Mode::Full
                );
            }
            Err(e) => eprintln!("not shown here: /dev/userfaultfd: {e}"),
        }
        assert_eq!(open(UserfaultPolicy::Best, None), Mode::UserModeOnly);
        assert_eq!(
            open(UserfaultPolicy::UserModeOnly, None),
            Mode::UserModeOnly
        );
        let none = Uffd::open(UserfaultPolicy::None, None, None);
        assert!(none.is_err());
    }

    #[test]
    fn a_descriptor_that_is_no_userfaultfd_device_is_not_used() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let uffd = Uffd::open(UserfaultPolicy::Best, None, Some(null.as_fd())).unwrap();
        assert_eq!(uffd.mode(), Mode::UserModeOnly);
    }
}
