//! Reading a file's pages without leaving them in the host's page cache.

use crate::cache::Cache;
use crate::error::CacheError;
use crate::file::CachedFile;
use crate::limits::FILL_PAGES_MAX;
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64, sys};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// Pages in one question to cachestat(2) and one drop behind: the host's readahead comes in such
/// pieces.
const DROP_PAGES: u64 = 32;

/// One fill's worth of memory, aligned as `O_DIRECT` wants it. One for each thread.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    pub(crate) fn new() -> Self {
        let bytes = vec![0; (FILL_PAGES_MAX as usize + 1) * PAGE_SIZE];
        let start = bytes.as_ptr().align_offset(PAGE_SIZE).min(PAGE_SIZE);
        Self { bytes, start }
    }

    pub(crate) fn pages(&mut self, count: u32) -> &mut [u8] {
        let len = count as usize * PAGE_SIZE;
        &mut self.bytes[self.start..self.start + len]
    }
}

/// What a read brought.
pub(crate) struct ReadRun {
    /// Whole pages that are good, from the first.
    pub pages: u32,
    /// Why the page behind them is not.
    pub error: Option<CacheError>,
}

impl Cache {
    /// Reads `buf.len()` bytes of whole pages from page `first` of a file that is `bytes` long. What
    /// lies past the end is zeroed, whatever the buffer held before. A file that has become shorter
    /// gives fewer pages; its cookie tells.
    pub(crate) fn read_run(
        &self,
        file: &Arc<CachedFile>,
        bytes: u64,
        first: u32,
        buf: &mut [u8],
    ) -> ReadRun {
        let offset = u64::from(first) * PAGE_SIZE_U64;
        let wanted = bytes.saturating_sub(offset).min(buf.len() as u64) as usize;
        let direct = file.inner.lock().direct.clone();
        let result = match direct {
            Some(fd) => match read_full((*fd).as_fd(), buf, offset, wanted) {
                Err(Errno::INVAL) => {
                    file.inner.lock().direct = None;
                    self.read_buffered(file, buf, offset, wanted)
                }
                other => {
                    if let Ok(got) = other {
                        self.counters.bytes_direct.fetch_add(got as u64, Relaxed);
                    }
                    other
                }
            },
            None => self.read_buffered(file, buf, offset, wanted),
        };
        match result {
            Ok(got) => finish(buf, got, wanted),
            Err(_) => self.read_by_page(file, buf, offset, wanted),
        }
    }

    /// Drops behind what was not cached before.
    fn read_buffered(
        &self,
        file: &CachedFile,
        buf: &mut [u8],
        offset: u64,
        wanted: usize,
    ) -> Result<usize, Errno> {
        let block = DROP_PAGES * PAGE_SIZE_U64;
        let end = offset + buf.len() as u64;
        let mut fresh = Vec::new();
        let mut at = offset;
        while at < end {
            let len = block.min(end - at);
            if let Ok(Some(stat)) = sys::cachestat(file.data(), at, len)
                && stat.cached == 0
            {
                fresh.push((at, len));
            }
            at += len;
        }
        let got = read_full(file.data(), buf, offset, wanted)?;
        for (at, len) in fresh {
            // Only memory is at stake: what stays is the host's to reclaim.
            let _ = sys::drop_cached(file.data(), at, len);
        }
        self.counters.bytes_buffered.fetch_add(got as u64, Relaxed);
        Ok(got)
    }

    /// After an error: page by page up to the one that cannot be read, so that only who asked for
    /// that one is told.
    fn read_by_page(
        &self,
        file: &CachedFile,
        buf: &mut [u8],
        offset: u64,
        wanted: usize,
    ) -> ReadRun {
        self.counters.fill_errors.fetch_add(1, Relaxed);
        let mut got = 0;
        while got < wanted {
            let len = PAGE_SIZE.min(wanted - got);
            let page = &mut buf[got..got + PAGE_SIZE];
            match read_full(file.data(), page, offset + got as u64, len) {
                Ok(n) if n >= len => got += len,
                Ok(_) => break,
                Err(e) => {
                    let mut run = finish(buf, got, got);
                    run.error = Some(CacheError::io("read", e));
                    return run;
                }
            }
        }
        finish(buf, got, wanted)
    }
}

/// Reads until `wanted` bytes are there or the file ends. The reads ask for whole pages, as
/// `O_DIRECT` wants; bytes past `wanted` count for nothing.
fn read_full(
    fd: BorrowedFd<'_>,
    buf: &mut [u8],
    offset: u64,
    wanted: usize,
) -> Result<usize, Errno> {
    let mut got = 0;
    while got < wanted {
        match rustix::io::pread(fd, &mut buf[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(Errno::INTR) => {}
            // After a short read the rest begins where O_DIRECT cannot: that is the file's end.
            Err(Errno::INVAL) if got > 0 && got % PAGE_SIZE != 0 => break,
            Err(e) => return Err(e),
        }
    }
    Ok(got.min(wanted))
}

/// Zeroes the tail and says which pages are good: all, or those wholly before a premature end.
fn finish(buf: &mut [u8], got: usize, wanted: usize) -> ReadRun {
    buf[got..].fill(0);
    let short = got < wanted;
    let pages = if short {
        got / PAGE_SIZE
    } else {
        got.div_ceil(PAGE_SIZE)
    };
    let error = short.then_some(CacheError::Io {
        what: "read: the file ended early",
        errno: libc::EIO,
    });
    ReadRun {
        pages: pages as u32,
        error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_zeroed_whatever_was_there() {
        let mut buf = vec![7; 3 * PAGE_SIZE];
        let run = finish(&mut buf, 5000, 5000);
        assert_eq!(run.pages, 2);
        assert!(run.error.is_none());
        assert!(buf[5000..].iter().all(|b| *b == 0));
        let run = finish(&mut buf, 5000, 9000);
        assert_eq!(run.pages, 1);
        assert!(run.error.is_some());
    }

    #[test]
    fn the_buffer_is_aligned() {
        let mut buffer = Buffer::new();
        let pages = buffer.pages(FILL_PAGES_MAX);
        assert_eq!(pages.as_ptr().align_offset(PAGE_SIZE), 0);
    }
}
