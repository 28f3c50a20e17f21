//! Writing a file by a mapping of it: what `pwrite` does, without the lock that it takes.

use super::frames::sys;
use crate::error::GrantError;
use crate::limits::WINDOWS_KEPT_MAX;
use crate::sys::write_own_memory;
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};

/// Address space of one window; memory is touched as pages are written.
const WINDOW_BYTES: u64 = 1 << 30;

/// Those there are, in the whole process, whose mappings are counted together.
static WINDOWS: AtomicU32 = AtomicU32::new(0);

/// A part of a file, mapped. Nobody ever gets its address: what guests change is not memory of ours.
pub(super) struct Window {
    start: *mut core::ffi::c_void,
    /// The first byte of the file that is in it.
    offset: u64,
}

// SAFETY: an address that is used in calls only, and given up when dropped.
unsafe impl Send for Window {}

impl Window {
    /// The one with byte `at` of the file.
    pub(super) fn over(file: &OwnedFd, at: u64) -> Result<Self, GrantError> {
        let offset = at - at % WINDOW_BYTES;
        // SAFETY: a new mapping, where the kernel likes, that nobody else has the address of.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                WINDOW_BYTES as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                file,
                offset,
            )
        }
        .map_err(sys("mmap of an arena"))?;
        WINDOWS.fetch_add(1, Ordering::Relaxed);
        Ok(Self { start, offset })
    }

    /// There is room to keep it for another write.
    pub(super) fn may_stay() -> bool {
        WINDOWS.load(Ordering::Relaxed) <= WINDOWS_KEPT_MAX
    }

    pub(super) fn has(&self, at: u64) -> bool {
        at.checked_sub(self.offset)
            .is_some_and(|within| within < WINDOW_BYTES)
    }

    /// Writes `data`, which is within one page, from byte `at` of the file on, which is in the window.
    ///
    /// # Errors
    /// `NoMemory` when there is no page to be had: the file may hold no more, or somebody cut it off.
    pub(super) fn write(&self, at: u64, data: &[u8]) -> Result<(), GrantError> {
        let within = (at - self.offset) as usize;
        let address = self.start.addr() + within;
        // SAFETY: within the mapping, as the caller sees to: shared memory that no Rust object is in.
        match unsafe { write_own_memory(address, data) } {
            Ok(count) if count == data.len() => Ok(()),
            Err(error) if error.raw_os_error() != Some(libc::EFAULT) => Err(GrantError::Sys {
                call: "process_vm_writev to an arena",
                source: error,
            }),
            Ok(_) | Err(_) => Err(GrantError::NoMemory(io::Error::from_raw_os_error(
                libc::ENOSPC,
            ))),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        WINDOWS.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: the range was mapped by `over`, and nobody else has its address. An error (there is none
        // for a range that is mapped) would leave address space behind, no more.
        let _ = unsafe { rustix::mm::munmap(self.start, WINDOW_BYTES as usize) };
    }
}
