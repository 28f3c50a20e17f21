//! Truncation and extension.

use super::work::DiskJob;
use crate::cache::Cache;
use crate::error::CacheError;
use crate::events::{CacheEvent, FileState};
use crate::file::CachedFile;
use crate::limits::FILE_PAGES_MAX;
use copage_grants::{HomeId, PAGE_SIZE_U64, pages_for};
use std::sync::Arc;

impl Cache {
    /// Makes the file `bytes` long; [`CacheEvent::Resized`] answers. Nobody holds a page from the shorter of the two
    /// lengths on (the one it lies in included), and none is in a frame.
    pub fn strict_resize(&self, ticket: u64, file: &Arc<CachedFile>, bytes: u64) {
        self.push_disk_job(DiskJob::Resize {
            ticket,
            file: file.clone(),
            bytes,
        });
    }

    pub(crate) fn answer_resize(
        &self,
        ticket: u64,
        file: &Arc<CachedFile>,
        result: Result<FileState, CacheError>,
    ) {
        self.events.send(CacheEvent::Resized {
            ticket,
            file: file.clone(),
            result,
        });
    }

    pub(crate) fn run_strict_resize(
        &self,
        file: &Arc<CachedFile>,
        bytes: u64,
    ) -> Result<FileState, CacheError> {
        let Some(coherent) = &file.coherent else {
            return Err(CacheError::ReadOnlyExport);
        };
        if pages_for(bytes) > FILE_PAGES_MAX || i64::try_from(bytes).is_err() {
            return Err(CacheError::Io {
                what: "the file would be too long",
                errno: libc::EFBIG,
            });
        }
        let _disk = coherent.disk.lock();
        let (home, before) = self.resizable(file, bytes)?;
        let shrinks = bytes < before;
        // Guests' mappings end first, so that nobody sees a page of what is cut away.
        if shrinks {
            self.backend.resize_home(home, bytes)?;
        }
        let cut = self.own_write(file, |fd, _| {
            rustix::io::retry_on_intr(|| rustix::fs::ftruncate(fd, bytes))
                .map_err(|e| CacheError::io("truncate", e))
        });
        if let Err(error) = cut {
            if shrinks {
                self.backend.resize_home(home, before)?;
            }
            return Err(error);
        }
        if !shrinks && let Err(error) = self.backend.resize_home(home, bytes) {
            self.own_write(file, |fd, _| {
                rustix::fs::ftruncate(fd, before).map_err(|e| CacheError::io("truncate", e))
            })?;
            return Err(error.into());
        }
        let mut inner = file.inner.lock();
        if let Some(home) = inner.live.as_mut() {
            home.bytes = bytes;
        }
        inner.state.bytes = bytes;
        // The page that the file ended in may have had no room on the disk behind its end.
        let whole = bytes.min(before) / PAGE_SIZE_U64;
        inner.strict.reserved.cut(whole as u32);
        Ok(inner.state)
    }

    /// The home and its length, when all is out that must be.
    fn resizable(&self, file: &CachedFile, bytes: u64) -> Result<(HomeId, u64), CacheError> {
        let mut inner = file.inner.lock();
        if inner.dead {
            return Err(CacheError::Withdrawn);
        }
        let home = inner.live.as_mut().ok_or(CacheError::Changing)?;
        let shorter = bytes.min(home.bytes);
        let first = (shorter / PAGE_SIZE_U64) as u32;
        let last = home.pages() as u32;
        if bytes != home.bytes {
            self.lose_from(home, first);
        }
        if bytes != home.bytes && !home.index.range(first, last).is_empty() {
            return Err(CacheError::Busy("for pages past the new end"));
        }
        Ok((home.id, home.bytes))
    }
}
