//! What the host's page cache holds of a file, and giving it back.

use super::checked;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd};

/// Pages of a range of a file, as the host's page cache has them (`struct cachestat`,
/// linux/mman.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStat {
    /// Pages in the cache.
    pub cached: u64,
    /// Of these, pages to be written.
    pub dirty: u64,
    /// Of these, pages being written.
    pub writeback: u64,
    /// Pages that were in the cache once and left it.
    pub evicted: u64,
    /// Of these, the ones that left lately.
    pub recently_evicted: u64,
}

/// `struct cachestat_range`, linux/mman.h.
#[repr(C)]
struct CacheStatRange {
    offset: u64,
    len: u64,
}

const _: () = assert!(size_of::<CacheStat>() == 40);
const _: () = assert!(size_of::<CacheStatRange>() == 16);

/// cachestat(2), the same number on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

/// What is cached of `len` bytes from `offset`; `len` 0 means up to the end.
///
/// `None` where it cannot be told: kernels before 6.5, files of others without write permission,
/// file systems that have no page cache.
pub fn cachestat(fd: impl AsFd, offset: u64, len: u64) -> io::Result<Option<CacheStat>> {
    let range = CacheStatRange { offset, len };
    let mut stat = CacheStat::default();
    // SAFETY: both structures have the kernel's layout (asserted above) and live through the call;
    // the kernel reads the first and writes the second; flags must be 0.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            fd.as_fd().as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0 as libc::c_uint,
        )
    };
    match checked(if result < 0 { -1 } else { 0 }) {
        Ok(_) => Ok(Some(stat)),
        Err(e) => match e.raw_os_error() {
            Some(libc::ENOSYS | libc::EPERM | libc::EOPNOTSUPP) => Ok(None),
            _ => Err(e),
        },
    }
}

/// Drops clean cached pages of `len` bytes from `offset` (`POSIX_FADV_DONTNEED`); `len` 0 means up
/// to the end. Pages that are mapped, dirty or only partly in the range stay.
pub fn drop_cached(fd: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    rustix::fs::fadvise(
        fd,
        offset,
        NonZeroU64::new(len),
        rustix::fs::Advice::DontNeed,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_was_written_is_cached() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7u8; 8192]).unwrap();
        match cachestat(&file, 0, 0).unwrap() {
            Some(stat) => assert_eq!(stat.cached, 2, "{stat:?}"),
            None => println!("skipped: this kernel has no cachestat"),
        }
        drop_cached(&file, 0, 0).unwrap();
    }
}
