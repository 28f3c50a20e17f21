//! Asking the kernel to back 2 MiB of a frame file by one huge page.

use super::frames::sys;
use crate::error::GrantError;
use crate::ids::PAGE_SIZE;
use crate::limits::HUGE_PAGES;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::BorrowedFd;

const UNIT_BYTES: usize = HUGE_PAGES as usize * PAGE_SIZE;

/// Address space of our own, unmapped when dropped.
struct Reserved {
    start: *mut core::ffi::c_void,
    bytes: usize,
}

impl Reserved {
    fn new(bytes: usize) -> Result<Self, Errno> {
        // SAFETY: a new anonymous mapping, where the kernel likes, of pages nobody may touch.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        Ok(Self { start, bytes })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, nobody else has its address, and what was mapped
        // over parts of it is gone with it. An error (there is none for a range that is mapped)
        // would leave address space behind, no more.
        let _ = unsafe { rustix::mm::munmap(self.start, self.bytes) };
    }
}

/// Collapses the 2 MiB from `offset` of `file` into one huge page, through a mapping that lives for
/// the call. `false`: the kernel cannot or will not, nothing has changed.
pub(super) fn collapse(file: BorrowedFd<'_>, offset: u64) -> Result<bool, GrantError> {
    /// `MADV_COLLAPSE`, include/uapi/asm-generic/mman-common.h, Linux 6.1.
    const MADV_COLLAPSE: libc::c_int = 25;
    // Twice the size, so that an aligned unit is in it.
    let space = Reserved::new(2 * UNIT_BYTES).map_err(sys("mmap for MADV_COLLAPSE"))?;
    let skip = space.start.cast::<u8>().align_offset(UNIT_BYTES);
    let unit = space.start.wrapping_byte_add(skip);
    // SAFETY: the fixed range lies within `space`, which is ours and holds nothing.
    unsafe {
        rustix::mm::mmap(
            unit,
            UNIT_BYTES,
            ProtFlags::READ,
            MapFlags::SHARED | MapFlags::FIXED,
            file,
            offset,
        )
    }
    .map_err(sys("mmap of a frame file"))?;
    // SAFETY: the range is the mapping just made; collapsing changes what backs it, not what it
    // holds.
    let result = unsafe { libc::madvise(unit, UNIT_BYTES, MADV_COLLAPSE) };
    Ok(result == 0)
}
