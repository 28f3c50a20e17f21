//! Space on the host's disk, before a page over a hole is written: want of it is an error then, not a loss later.

use super::save::write_full;
use super::work::DiskJob;
use crate::cache::Cache;
use crate::error::CacheError;
use crate::events::CacheEvent;
use crate::file::CachedFile;
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64, PageIndex};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

impl Cache {
    /// Sees to it that the disk has room for pages; `None`: [`CacheEvent::Reserved`] answers. (A file system that
    /// copies on write may want room again when they are written: there it is an error of the save.)
    pub fn strict_reserve(
        &self,
        ticket: u64,
        file: &Arc<CachedFile>,
        first: PageIndex,
        count: u32,
    ) -> Option<Result<(), CacheError>> {
        let past = CacheError::BadRange("past the end of the file");
        {
            let inner = file.inner.lock();
            let Some(home) = inner.live.as_ref() else {
                return Some(Err(CacheError::Changing));
            };
            let end = first.0.saturating_add(count.into()).min(home.pages());
            if first.0 >= end {
                return Some(Err(past));
            }
            // Pages of a file are counted in 32 bits.
            let (first, end) = (first.0 as u32, end as u32);
            if inner.strict.reserved.contains(first, end) {
                return Some(Ok(()));
            }
            self.push_disk_job(DiskJob::Reserve {
                ticket,
                file: file.clone(),
                first,
                end,
            });
        }
        None
    }

    pub(crate) fn answer_reserve(
        &self,
        ticket: u64,
        file: &Arc<CachedFile>,
        result: Result<(), CacheError>,
    ) {
        let file = file.clone();
        self.events.send(CacheEvent::Reserved {
            ticket,
            file,
            result,
        });
    }

    pub(crate) fn run_reserve(
        &self,
        file: &Arc<CachedFile>,
        first: u32,
        end: u32,
    ) -> Result<(), CacheError> {
        let Some(coherent) = &file.coherent else {
            return Err(CacheError::ReadOnlyExport);
        };
        let _disk = coherent.disk.lock();
        let from = u64::from(first) * PAGE_SIZE_U64;
        self.own_write(file, |fd, host_bytes| {
            let to = (u64::from(end) * PAGE_SIZE_U64).min(host_bytes);
            if from >= to {
                return Ok(());
            }
            let reserved = rustix::io::retry_on_intr(|| {
                rustix::fs::fallocate(fd, FallocateFlags::KEEP_SIZE, from, to - from)
            });
            match reserved {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => fill_holes(fd, from, to),
                other => other,
            }
            .map_err(|e| CacheError::io("reserve space", e))
        })?;
        file.inner.lock().strict.reserved.insert(first, end);
        Ok(())
    }
}

/// Puts zeros into what is a hole on the disk. Nobody else writes there meanwhile.
fn fill_holes(fd: BorrowedFd<'_>, from: u64, to: u64) -> Result<(), Errno> {
    let mut at = from;
    while at < to {
        let hole = match rustix::fs::seek(fd, SeekFrom::Hole(at)) {
            Ok(hole) if hole < to => hole,
            // Whoever knows no holes has none.
            Ok(_) | Err(Errno::INVAL | Errno::NXIO) => return Ok(()),
            Err(e) => return Err(e),
        };
        let data = match rustix::fs::seek(fd, SeekFrom::Data(hole)) {
            Ok(data) => data.min(to),
            Err(Errno::NXIO) => to,
            Err(e) => return Err(e),
        };
        at = hole;
        while at < data {
            let len = (data - at).min(PAGE_SIZE_U64) as usize;
            write_full(fd, &[0; PAGE_SIZE][..len], at)?;
            at += len as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_are_filled_and_data_stays() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 * PAGE_SIZE_U64 + 5).unwrap();
        file.write_all_at(&[7; PAGE_SIZE], 4 * PAGE_SIZE_U64)
            .unwrap();
        fill_holes(file.as_fd(), PAGE_SIZE_U64, 10 * PAGE_SIZE_U64 + 5).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 10 * PAGE_SIZE_U64 + 5);
        let hole = rustix::fs::seek(&file, SeekFrom::Hole(PAGE_SIZE_U64)).unwrap();
        assert!(hole >= 10 * PAGE_SIZE_U64, "{hole}");
        let mut page = [0; PAGE_SIZE];
        file.read_exact_at(&mut page, 4 * PAGE_SIZE_U64).unwrap();
        assert_eq!(page, [7; PAGE_SIZE]);
    }
}
