//! What of a file is in this machine's memory.

use copage_grants::PAGE_SIZE;
use copage_grants::sys::cachestat;
use memmap2::MmapOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// How many pages of the file's first `bytes` bytes are in the page cache: by cachestat(2), on kernels
/// before 6.5 by mincore(2). `None` where it cannot be told.
pub(super) fn resident_pages(file: impl AsFd, bytes: u64) -> io::Result<Option<u64>> {
    let len = match usize::try_from(bytes) {
        Ok(0) => return Ok(Some(0)),
        Ok(len) => len,
        Err(_) => return Ok(None),
    };
    if let Some(stat) = cachestat(file.as_fd(), 0, bytes)? {
        return Ok(Some(stat.cached));
    }
    by_mincore(file, len).map(Some)
}

fn by_mincore(file: impl AsFd, len: usize) -> io::Result<u64> {
    // Never read: no page of it is touched.
    let map = MmapOptions::new()
        .len(len)
        .map_raw_read_only(file.as_fd().as_raw_fd())?;
    let mut pages = vec![0u8; len.div_ceil(PAGE_SIZE)];
    // SAFETY: the range is `map`'s, which lives through the call and begins at a page's start; the
    // kernel writes one byte for each page of it, and `pages` has as many.
    let result = unsafe { libc::mincore(map.as_mut_ptr().cast(), len, pages.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(pages.iter().filter(|page| **page & 1 != 0).count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn both_ways_count_the_same() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5 * PAGE_SIZE + 1]).unwrap();
        assert_eq!(resident_pages(&file, 0).unwrap(), Some(0));
        assert_eq!(by_mincore(&file, 5 * PAGE_SIZE + 1).unwrap(), 6);
        file.set_len(9 * PAGE_SIZE as u64).unwrap();
        assert_eq!(by_mincore(&file, 9 * PAGE_SIZE).unwrap(), 6);
        let counted = resident_pages(&file, 9 * PAGE_SIZE as u64).unwrap();
        assert!(counted.is_none_or(|pages| pages == 6), "{counted:?}");
    }
}
