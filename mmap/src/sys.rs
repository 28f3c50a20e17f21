//! Address space and event descriptors: the system calls that need `unsafe`, made safe by owning
//! what they work on.
//!
//! Nothing here, and nothing above, ever makes a Rust reference into a [`Region`]: its bytes change
//! under other processes' hands, and its pages come and go. That is what makes replacing and
//! discarding them sound; what pages a caller sees is up to the modules above.

use copage_grants::PAGE_SIZE;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags};
use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// This process, asked of the kernel each time: a forked child gets another answer.
pub(crate) fn process_id() -> u32 {
    std::process::id()
}

/// A counter that another thread polls.
pub(crate) struct EventFd(OwnedFd);

impl EventFd {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// Makes it readable. It cannot fail but by being full, and then it is readable.
    pub(crate) fn signal(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes it unreadable until the next signal.
    pub(crate) fn drain(&self) {
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An empty file: every access to a mapping of it is SIGBUS (mmap(2)).
pub(crate) fn empty_file() -> io::Result<OwnedFd> {
    Ok(memfd_create(c"copage-refused", MemfdFlags::CLOEXEC)?)
}

/// May a mapping be stored to?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    Read,
    ReadWrite,
}

impl Protection {
    fn flags(self) -> ProtFlags {
        match self {
            Self::Read => ProtFlags::READ,
            Self::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        }
    }
}

/// Pages of address space that belong to their owner here and to nobody else. Unmapped when
/// dropped.
#[derive(Debug)]
pub(crate) struct Region {
    addr: usize,
    bytes: usize,
}

/// The address as system calls want it; provenance plays no part, no reference is made of it.
fn pointer(addr: usize) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(addr)
}

impl Region {
    /// Maps `bytes` (whole pages) of `file` from `offset`, privately, at an address with
    /// `(address - offset) % align == 0`; `align` is a power of two, a page or more. The region is
    /// not copied to forked children.
    pub(crate) fn map(
        file: BorrowedFd<'_>,
        offset: u64,
        bytes: usize,
        protection: Protection,
        align: usize,
    ) -> io::Result<Self> {
        debug_assert!(bytes != 0 && bytes.is_multiple_of(PAGE_SIZE) && align.is_power_of_two());
        let slack = align.saturating_sub(PAGE_SIZE);
        let too_large = || io::Error::from_raw_os_error(libc::ENOMEM);
        let wanted = bytes.checked_add(slack).ok_or_else(too_large)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is given, so the kernel chooses one that nothing uses.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), wanted, ProtFlags::empty(), flags)
        }?;
        let reserve = Self {
            addr: start.expose_provenance(),
            bytes: wanted,
        };
        // How far the start must move up so that address and offset agree modulo `align`.
        // Truncation of the offset keeps it right modulo a power of two.
        let ahead = (offset as usize).wrapping_sub(reserve.addr) & (align - 1);
        let (head, rest) = reserve.split(ahead);
        let (region, tail) = rest.split(bytes);
        drop(head);
        drop(tail);
        // SAFETY: the fixed range is exactly `region`, which was reserved above and is ours alone.
        unsafe {
            rustix::mm::mmap(
                pointer(region.addr),
                region.bytes,
                protection.flags(),
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
                file,
                offset,
            )
        }?;
        region.advise(0, region.bytes, Advice::LinuxDontFork)?;
        Ok(region)
    }

    /// Maps `bytes` (whole pages) of memory that holds nothing yet; not copied to forked children.
    pub(crate) fn anonymous(bytes: usize, protection: Protection) -> io::Result<Self> {
        debug_assert!(bytes != 0 && bytes.is_multiple_of(PAGE_SIZE));
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is given, so the kernel chooses one that nothing uses.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, protection.flags(), flags)
        }?;
        let region = Self {
            addr: start.expose_provenance(),
            bytes,
        };
        region.advise(0, bytes, Advice::LinuxDontFork)?;
        Ok(region)
    }

    /// Maps `bytes` (whole pages) of `file` from `offset`, shared, where the kernel likes; not copied to
    /// forked children (but by a fork in the instant before this is said).
    pub(crate) fn shared(
        file: BorrowedFd<'_>,
        offset: u64,
        bytes: usize,
        protection: Protection,
    ) -> io::Result<Self> {
        // SAFETY: no address is given, so the kernel chooses one that nothing uses.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                protection.flags(),
                MapFlags::SHARED,
                file,
                offset,
            )
        }?;
        let region = Self {
            addr: start.expose_provenance(),
            bytes,
        };
        region.advise(0, bytes, Advice::LinuxDontFork)?;
        Ok(region)
    }

    /// Maps `bytes` (whole pages) of `file` from `offset` over the pages at `at`, shared. On error the pages
    /// may be unmapped: [`Self::refuse_unmapped`].
    pub(crate) fn overlay(
        &self,
        at: usize,
        bytes: usize,
        (file, offset): (BorrowedFd<'_>, u64),
        protection: Protection,
    ) -> io::Result<()> {
        let addr = self.check(at, bytes)?;
        // SAFETY: `check` saw that the fixed range lies in this region, which is ours alone and
        // into which no reference exists.
        unsafe {
            rustix::mm::mmap(
                pointer(addr),
                bytes,
                protection.flags(),
                MapFlags::SHARED | MapFlags::FIXED,
                file,
                offset,
            )
        }?;
        self.advise(at, bytes, Advice::LinuxDontFork)
    }

    pub(crate) fn addr(&self) -> usize {
        self.addr
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first `bytes` and the rest; each may be empty.
    pub(crate) fn split(self, bytes: usize) -> (Self, Self) {
        let bytes = bytes.min(self.bytes);
        let front = Self {
            addr: self.addr,
            bytes,
        };
        let back = Self {
            addr: self.addr + bytes,
            bytes: self.bytes - bytes,
        };
        // The two own it now.
        std::mem::forget(self);
        (front, back)
    }

    fn check(&self, at: usize, bytes: usize) -> io::Result<usize> {
        let end = at.checked_add(bytes);
        if bytes == 0
            || !at.is_multiple_of(PAGE_SIZE)
            || !bytes.is_multiple_of(PAGE_SIZE)
            || end.is_none_or(|end| end > self.bytes)
        {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(self.addr + at)
    }

    fn advise(&self, at: usize, bytes: usize, advice: Advice) -> io::Result<()> {
        let addr = self.check(at, bytes)?;
        // SAFETY: `check` saw that the range lies in this region, which is ours alone and into
        // which no reference exists; the advices used here unmap or mark its pages only.
        unsafe { rustix::mm::madvise(pointer(addr), bytes, advice) }?;
        Ok(())
    }

    /// Drops what is mapped of these pages; the next access faults. What was stored to privately
    /// is lost: the caller chooses pages that were not.
    pub(crate) fn discard(&self, at: usize, bytes: usize) -> io::Result<()> {
        self.advise(at, bytes, Advice::LinuxDontNeed)
    }

    /// Maps `file`, an empty one, over these pages.
    pub(crate) fn refuse(
        &self,
        at: usize,
        bytes: usize,
        protection: Protection,
        file: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let addr = self.check(at, bytes)?;
        // SAFETY: `check` saw that the fixed range lies in this region, which is ours alone and
        // into which no reference exists.
        unsafe {
            rustix::mm::mmap(
                pointer(addr),
                bytes,
                protection.flags(),
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
                file,
                0,
            )
        }?;
        self.advise(at, bytes, Advice::LinuxDontFork)
    }

    /// Moves `piece` over the pages at `at`, in one step as every other thread sees it.
    ///
    /// With a userfaultfd that has the REMAP event this waits until the pager has read the event:
    /// never from the pager. On error `piece` is unmapped and the pages are as they were, unless
    /// the kernel had no memory between its two halves of the work; then they are unmapped, which
    /// is told apart by [`Self::refuse_unmapped`].
    pub(crate) fn replace(&self, at: usize, piece: Self) -> io::Result<()> {
        let addr = self.check(at, piece.bytes)?;
        let bytes = piece.bytes;
        // SAFETY: the source is `piece`, owned and given up here; the destination lies in this
        // region (`check`), is ours alone, and no reference into either exists.
        unsafe {
            rustix::mm::mremap_fixed(
                pointer(piece.addr),
                bytes,
                bytes,
                MremapFlags::MAYMOVE,
                pointer(addr),
            )
        }?;
        // What it owned is part of `self` now.
        std::mem::forget(piece);
        Ok(())
    }

    /// After a failed [`Self::replace`]: fills the pages with `file`, an empty one, if the kernel
    /// left them unmapped, so that nothing else can land there. EEXIST: they are mapped.
    pub(crate) fn refuse_unmapped(
        &self,
        at: usize,
        bytes: usize,
        protection: Protection,
        file: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let addr = self.check(at, bytes)?;
        // SAFETY: NOREPLACE maps only where nothing is mapped, so it changes no mapping at all.
        unsafe {
            rustix::mm::mmap(
                pointer(addr),
                bytes,
                protection.flags(),
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE,
                file,
                0,
            )
        }?;
        self.advise(at, bytes, Advice::LinuxDontFork)
    }
}

/// Does this thread map everything readable as executable too (personality(2), READ_IMPLIES_EXEC)?
pub(crate) fn read_implies_exec() -> bool {
    /// `READ_IMPLIES_EXEC`, linux/personality.h.
    const READ_IMPLIES_EXEC: i32 = 0x0400000;
    // SAFETY: personality(2) with this argument only tells what the personality is.
    let now = unsafe { libc::personality(0xffff_ffff) };
    now & READ_IMPLIES_EXEC != 0
}

/// Maps pages that are there, `write`: as copies of one's own. Needs Linux 5.14 (else EINVAL). A
/// hole waits for the pager; with a userfaultfd of user mode only it is EFAULT.
pub(crate) fn populate(addr: usize, bytes: usize, write: bool) -> io::Result<()> {
    let advice = if write {
        Advice::LinuxPopulateWrite
    } else {
        Advice::LinuxPopulateRead
    };
    // SAFETY: populating faults pages in as an access would and changes no byte; where nothing is
    // mapped it is an error.
    unsafe { rustix::mm::madvise(pointer(addr), bytes, advice) }?;
    Ok(())
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.bytes != 0 {
            // SAFETY: the range is this region's own, no reference into it exists, and nobody
            // uses the region after its owner dropped it.
            let _ = unsafe { rustix::mm::munmap(pointer(self.addr), self.bytes) };
        }
    }
}
