//! Write-back: what guests wrote goes into the host's file.

use super::work::DiskJob;
use crate::cache::Cache;
use crate::error::CacheError;
use crate::events::CacheEvent;
use crate::file::{CachedFile, Cookie};
use crate::fill::Buffer;
use crate::limits::FILL_PAGES_MAX;
use copage_grants::{DomId, FrameNo, PAGE_SIZE, PAGE_SIZE_U64, PageIndex, Version};
use rustix::io::Errno;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// Neighbouring pages as they were at one look each.
struct Snapshot {
    first: u32,
    frames: Vec<FrameNo>,
    /// The file's bytes in them: not past its end.
    len: usize,
}

impl Cache {
    /// Puts a page into the host's file, where it outlives the daemon; [`CacheEvent::Saved`] answers.
    pub fn strict_save(
        &self,
        file: &Arc<CachedFile>,
        page: PageIndex,
        _frame: FrameNo,
        version: Version,
    ) {
        self.push_disk_job(DiskJob::Save {
            file: file.clone(),
            page,
            version,
        });
    }

    /// Puts pages into the host's file as they are when it is their turn, written by guests or not, and waits for
    /// the disk if that is to be `durable`; [`CacheEvent::Synced`] answers. An error of the disk is told once to
    /// each session that had the file open when it happened: `who` is the one that asks now.
    pub fn strict_sync(
        &self,
        ticket: u64,
        file: &Arc<CachedFile>,
        who: Option<DomId>,
        pages: Vec<(PageIndex, FrameNo)>,
        durable: bool,
    ) {
        self.push_disk_job(DiskJob::Sync {
            ticket,
            file: file.clone(),
            who,
            pages,
            durable,
        });
    }

    pub(crate) fn answer_save(
        &self,
        file: &Arc<CachedFile>,
        page: PageIndex,
        version: Version,
        result: Result<(), CacheError>,
    ) {
        self.events.send(CacheEvent::Saved {
            file: file.clone(),
            page,
            version,
            result,
        });
    }

    pub(crate) fn answer_sync(
        &self,
        ticket: u64,
        file: &Arc<CachedFile>,
        result: Result<(), CacheError>,
    ) {
        self.events.send(CacheEvent::Synced {
            ticket,
            file: file.clone(),
            result,
        });
    }

    pub(crate) fn run_sync(
        &self,
        file: &Arc<CachedFile>,
        who: Option<DomId>,
        pages: Vec<(PageIndex, FrameNo)>,
        durable: bool,
        buffer: &mut Buffer,
    ) -> Result<(), CacheError> {
        self.counters.syncs.fetch_add(1, Relaxed);
        let mut pages: Vec<PageIndex> = pages.into_iter().map(|(page, _)| page).collect();
        {
            let mut inner = file.inner.lock();
            if durable && std::mem::take(&mut inner.strict.rewrite) {
                // The kernel let go of pages that the disk did not take: all that is here goes there again.
                let home = inner.live.as_ref();
                let all = home.map(|home| home.index.pages()).unwrap_or_default();
                pages.extend(all.into_iter().map(|(page, _)| PageIndex(page.into())));
            }
        }
        pages.sort_unstable();
        pages.dedup();
        let saved = self.save_pages(file, &pages, buffer);
        let synced = match durable {
            true => self.wait_for_disk(file),
            false => Ok(()),
        };
        if saved.is_err() {
            file.inner.lock().strict.rewrite |= durable;
        }
        let told = self.tell_error(file, who);
        saved.and(synced).and(told)
    }

    fn wait_for_disk(&self, file: &CachedFile) -> Result<(), CacheError> {
        match rustix::io::retry_on_intr(|| rustix::fs::fdatasync(&file.data)) {
            Ok(()) => Ok(()),
            Err(errno) => {
                // The kernel tells it once, to this descriptor, which stands for all sessions.
                let mut inner = file.inner.lock();
                let strict = &mut inner.strict;
                strict.errors += 1;
                strict.errno = errno.raw_os_error();
                strict.rewrite = true;
                self.counters.sync_errors.fetch_add(1, Relaxed);
                Err(CacheError::io("fdatasync", errno))
            }
        }
    }

    /// The last error that `who` has not been told of.
    fn tell_error(&self, file: &CachedFile, who: Option<DomId>) -> Result<(), CacheError> {
        let mut inner = file.inner.lock();
        let (errors, errno) = (inner.strict.errors, inner.strict.errno);
        let mut is_new = false;
        for open in inner.opens.iter_mut().filter(|o| Some(o.who.dom) == who) {
            is_new |= std::mem::replace(&mut open.errors_seen, errors) < errors;
        }
        match is_new {
            true => Err(CacheError::Io {
                what: "an earlier fdatasync",
                errno,
            }),
            false => Ok(()),
        }
    }

    /// Writes pages, which are in order; those that are in no frame any more were saved before they went. The first
    /// error is told, and the others are written all the same.
    pub(crate) fn save_pages(
        &self,
        file: &Arc<CachedFile>,
        pages: &[PageIndex],
        buffer: &mut Buffer,
    ) -> Result<(), CacheError> {
        let Some(coherent) = &file.coherent else {
            return Ok(());
        };
        let mut result = Ok(());
        let mut rest = pages;
        while !rest.is_empty() {
            let most = rest.len().min(FILL_PAGES_MAX as usize);
            let disk = coherent.disk.lock();
            let (taken, snapshot) = self.snapshot(file, &rest[..most], buffer);
            rest = &rest[taken..];
            let saved = match snapshot {
                Err(error) => Err(error),
                Ok(snapshot) if snapshot.frames.is_empty() => Ok(()),
                Ok(snapshot) => self.write_snapshot(file, &snapshot, buffer),
            };
            drop(disk);
            result = result.and(saved);
        }
        result
    }

    /// Copies the first run of neighbours among `pages`. Gives how many of `pages` are dealt with: those that are
    /// in no frame too.
    fn snapshot(
        &self,
        file: &CachedFile,
        pages: &[PageIndex],
        buffer: &mut Buffer,
    ) -> (usize, Result<Snapshot, CacheError>) {
        let buf = buffer.pages(FILL_PAGES_MAX);
        let mut snapshot = Snapshot {
            first: 0,
            frames: Vec::new(),
            len: 0,
        };
        for (n, page) in pages.iter().enumerate() {
            // Page by page: the loop wants the lock too. Who writes meanwhile is in this look or in the next.
            let inner = file.inner.lock();
            let number = u32::try_from(page.0).unwrap_or(u32::MAX);
            let Some(home) = inner.live.as_ref().filter(|home| page.0 < home.pages()) else {
                continue;
            };
            let Some(frame) = home.index.get(number) else {
                continue;
            };
            if snapshot.frames.is_empty() {
                snapshot.first = number;
            } else if number != snapshot.first + snapshot.frames.len() as u32 {
                return (n, Ok(snapshot));
            }
            let start = snapshot.frames.len() * PAGE_SIZE;
            let bytes = &mut buf[start..start + PAGE_SIZE];
            let at = home.at(number);
            if let Err(error) = self.backend.load_at(home.id, *page, frame, at, bytes) {
                // What was copied before it is written first; this page comes next, alone.
                return match snapshot.frames.is_empty() {
                    true => (n + 1, Err(error.into())),
                    false => (n, Ok(snapshot)),
                };
            }
            let left = home.bytes - page.0 * PAGE_SIZE_U64;
            snapshot.len = start + left.min(PAGE_SIZE_U64) as usize;
            snapshot.frames.push(frame);
        }
        (pages.len(), Ok(snapshot))
    }

    fn write_snapshot(
        &self,
        file: &Arc<CachedFile>,
        snapshot: &Snapshot,
        buffer: &mut Buffer,
    ) -> Result<(), CacheError> {
        let offset = u64::from(snapshot.first) * PAGE_SIZE_U64;
        let bytes = &buffer.pages(FILL_PAGES_MAX)[..snapshot.len];
        self.own_write(file, |fd, host_bytes| {
            // The host may have made the file shorter meanwhile: what is past its end is gone.
            let room = host_bytes.saturating_sub(offset).min(bytes.len() as u64) as usize;
            write_full(fd, &bytes[..room], offset).map_err(|e| CacheError::io("write", e))
        })?;
        let pages = snapshot.frames.len() as u64;
        self.counters.pages_saved.fetch_add(pages, Relaxed);
        let inner = file.inner.lock();
        for (number, frame) in (snapshot.first..).zip(&snapshot.frames) {
            if let Some(home) = inner.live.as_ref()
                && home.index.get(number) == Some(*frame)
            {
                let page = PageIndex(number.into());
                self.backend.note_saved(home.id, page, *frame)?;
            }
        }
        Ok(())
    }

    /// Changes the host's file, so that the change is not taken for the host's. `coherent.disk` is held. `change`
    /// is told how long the file is on the host.
    pub(crate) fn own_write<T>(
        &self,
        file: &Arc<CachedFile>,
        change: impl FnOnce(BorrowedFd<'_>, u64) -> Result<T, CacheError>,
    ) -> Result<T, CacheError> {
        let Some(coherent) = &file.coherent else {
            return Err(CacheError::ReadOnlyExport);
        };
        coherent
            .writable
            .map_err(|e| CacheError::io("open for writing", e))?;
        let (before, _) = file.read_cookie()?;
        coherent.is_writing.store(true, SeqCst);
        let result = change(file.data(), before.bytes);
        let after = file.read_cookie();
        let mut inner = file.inner.lock();
        let number = self.counters.own_writes.fetch_add(1, SeqCst) + 1;
        coherent.own_write.store(number, SeqCst);
        coherent.is_writing.store(false, SeqCst);
        if !self.is_own(&inner, before) {
            self.tell_changed(file, &mut inner);
        }
        if let Ok((after, _)) = after {
            inner.cookie = after;
        }
        result
    }

    /// Is the host's file as the daemon knows it? Under a lease nobody else writes it.
    pub(crate) fn is_own(&self, inner: &crate::file::Inner, cookie: Cookie) -> bool {
        let known = &inner.cookie;
        inner.lease == crate::file::Lease::Held
            || cookie.bytes == known.bytes && cookie.mtime == known.mtime
    }
}

/// Writes all of it, however many calls that takes.
pub(super) fn write_full(fd: BorrowedFd<'_>, bytes: &[u8], offset: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pwrite(fd, &bytes[done..], offset + done as u64) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
