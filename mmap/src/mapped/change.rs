//! The changes of a mapping by every thread but the pager: they take the lock, and may wait for the
//! pager.

use super::{Form, Mapped, Ops, fresh, span};
use crate::error::{MmapError, Result};
use crate::file::Content;
use crate::limits::HUGE_BYTES;
use crate::mapping::PageError;
use crate::shared::Shared;
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Mapped {
    pub(crate) fn private_pages(&self) -> u64 {
        // Readers of the state take the lock shortly; a fault that is dropped meanwhile would be
        // woken by nobody, so they look whether one was.
        let mut lock = self.lock(self.file.client.shared());
        lock.ops().map_or(0, |ops| ops.private.count())
    }

    pub(crate) fn last_error(&self) -> Option<PageError> {
        let mut lock = self.lock(self.file.client.shared());
        lock.ops().and_then(|ops| ops.last_error.clone())
    }

    /// Maps what is there of pages `first..end`. No lock: this may fault and wait for the pager.
    pub(crate) fn populate(&self, first: usize, end: usize, write: bool) -> io::Result<()> {
        if self.is_granted() && self.form != Form::Own {
            // Windows are mapped as they come: nothing is left to do, unless they have gone again.
            let mut lock = self.lock(self.file.client.shared());
            return match lock.ops() {
                Some(ops) if ops.refused => Err(io::Error::from_raw_os_error(libc::EHWPOISON)),
                Some(ops) if !ops.windows.hold_all(first..end) => {
                    Err(io::Error::from_raw_os_error(libc::EFAULT))
                }
                _ => Ok(()),
            };
        }
        let uffd = self.file.client.shared().uffd.as_ref();
        if !write && uffd.is_ok_and(|uffd| self.form.is_shown(uffd)) {
            return self.show_all(first, end);
        }
        crate::sys::populate(self.addr + span(first), span(end - first), write)
    }

    /// As the pager does at loads, where system calls may not fault.
    fn show_all(&self, first: usize, end: usize) -> io::Result<()> {
        let shared = self.file.client.shared();
        let Ok(uffd) = &shared.uffd else {
            return Ok(());
        };
        for page in first..end {
            let at = self.addr + span(page);
            let shown = {
                let _lock = self.lock(shared);
                uffd.show_protected(at, PAGE_SIZE)
            };
            match shown.map_err(|e| (e.raw_os_error(), e)) {
                Ok(()) | Err((Some(libc::EEXIST), _)) => {}
                Err((Some(libc::EFAULT), e)) => return Err(e),
                // Mapped from elsewhere, refused, or just moving.
                Err(_) => crate::sys::populate(at, PAGE_SIZE, false)?,
            }
        }
        Ok(())
    }

    /// Marks pages as stored to and lets stores through.
    pub(crate) fn make_private(&self, shared: &Shared, first: usize, end: usize) -> Result<()> {
        let uffd = shared.uffd()?;
        let mut lock = self.lock(shared);
        let Some(ops) = lock.ops() else { return Ok(()) };
        if ops.region.is_none() || ops.refused {
            return Ok(());
        }
        uffd.unprotect_patiently(self.addr + span(first), span(end - first))
            .map_err(|e| MmapError::sys("UFFDIO_WRITEPROTECT", &e))?;
        for page in first..end {
            ops.private.set(page);
        }
        Ok(())
    }

    /// Drops what is mapped of pages `first..end`, but what was stored to. Poisoned pages can be
    /// asked for again then; they stay on the list, which only makes `try_again` renew them.
    pub(crate) fn discard(&self, shared: &Shared, first: usize, end: usize) -> io::Result<()> {
        let mut lock = self.lock(shared);
        let Some(ops) = lock.ops() else { return Ok(()) };
        if self.is_granted() && self.form != Form::Own {
            return self.take_back(shared, ops, first..end).map(|_| ());
        }
        let Some(region) = &ops.region else {
            return Ok(());
        };
        for (run, count) in ops.private.clear_runs(first, end) {
            region.discard(span(run), span(count))?;
        }
        Ok(())
    }

    /// The pages of the file `first..first + count` as pages of this mapping.
    pub(crate) fn clip(&self, first: u64, count: u32) -> Option<(usize, usize)> {
        let from = first.max(self.first_page);
        let until = first
            .saturating_add(count.into())
            .min(self.first_page + self.pages() as u64);
        (from < until).then(|| {
            (
                (from - self.first_page) as usize,
                (until - self.first_page) as usize,
            )
        })
    }

    /// Puts fresh pages in place of those in `first..end` that were refused.
    pub(crate) fn try_again(&self, shared: &Shared, first: usize, end: usize) -> Result<()> {
        let mut lock = self.lock(shared);
        let Some(ops) = lock.ops() else { return Ok(()) };
        if ops.refused {
            let error = ops.last_error.as_ref().map(|e| e.error.clone());
            return Err(error.unwrap_or_else(|| shared.line.lost_error()));
        }
        let pages: Vec<usize> = ops.refused_pages.range(first..end).copied().collect();
        for page in pages {
            self.renew(shared, ops, page)?;
            ops.refused_pages.remove(&page);
        }
        ops.last_error = None;
        Ok(())
    }

    /// Puts fresh pages in place of all that were refused, and wakes whoever waits.
    pub(crate) fn renew_refused(&self, shared: &Shared) {
        if let Err(error) = self.try_again(shared, 0, self.pages()) {
            tracing::debug!(%error, "refused pages stay refused");
        }
    }

    /// A page that a rebase passed over is missing: gives it a copy of its own, of the newest
    /// content, or makes it SIGBUS when that could not be read. Only if nothing is there, which the
    /// kernel sees in the same step: a store may have come meanwhile, and must not be lost.
    pub(crate) fn restore(
        &self,
        shared: &Shared,
        file_page: u64,
        bytes: Result<Box<[u8; PAGE_SIZE]>>,
    ) {
        let (Ok(uffd), Some(addr)) = (&shared.uffd, self.address_of(file_page)) else {
            return;
        };
        let page = (addr - self.addr) / PAGE_SIZE;
        let mut lock = self.lock(shared);
        if let Some(ops) = lock.ops()
            && ops.region.is_some()
            && !ops.refused
            && ops.behind.get(page)
        {
            let put = bytes.and_then(|bytes| {
                uffd.copy_patiently(addr, &bytes)
                    .or_else(|e| match e.raw_os_error() {
                        Some(libc::EEXIST) => Ok(()),
                        _ => Err(MmapError::sys("UFFDIO_COPY", &e)),
                    })
            });
            if let Err(error) = put {
                ops.last_error = Some(PageError {
                    offset: Some(span(page)),
                    error,
                });
                // The mark, if there is one, would keep the poison off; a store is known already.
                let _ = uffd.unprotect_patiently(addr, PAGE_SIZE);
                let poisoned = uffd.can_poison().then(|| uffd.poison(addr, PAGE_SIZE));
                match (poisoned, &ops.region) {
                    (Some(Ok(())), _) => {
                        ops.refused_pages.insert(page);
                    }
                    // There by now, or just moving: the access tries again and sees.
                    (Some(Err(_)), _) | (None, None) => {}
                    (None, Some(region)) => {
                        let protection = self.form.protection();
                        match region.refuse(span(page), PAGE_SIZE, protection, shared.empty.as_fd())
                        {
                            Ok(()) => {
                                ops.refused_pages.insert(page);
                            }
                            Err(e) => self.refuse_all(ops, shared.empty.as_fd(), &e),
                        }
                    }
                }
            }
        }
        drop(lock);
        uffd.wake(addr, PAGE_SIZE);
    }

    /// Puts a fresh page of the content that the mapping shows in place of one page.
    fn renew(&self, shared: &Shared, ops: &mut Ops, page: usize) -> Result<()> {
        let uffd = shared.uffd()?;
        let Some(region) = &ops.region else {
            return Ok(());
        };
        if ops.refused {
            return Ok(());
        }
        let content = self.file.content.lock().clone();
        if content.stamp != self.stamp() {
            // A rebase is on its way and brings fresh pages.
            return Ok(());
        }
        let offset = (self.first_page + page as u64) * PAGE_SIZE_U64;
        let piece = fresh(uffd, &content, offset, PAGE_SIZE, self.form, PAGE_SIZE)?;
        region.replace(span(page), piece).map_err(|e| {
            self.after_failed_replace(shared, ops, page, 1, &e);
            MmapError::sys("mremap over a refused page", &e)
        })
    }

    /// Shows a newer content: every page that was not stored to becomes a fresh one of it.
    ///
    /// Without private pages this is one step for every other thread. If the machine refuses (it
    /// can: each private page splits the mapping, and vm.max_map_count bounds the parts), all of
    /// the mapping is SIGBUS from then on.
    pub(crate) fn rebase(&self, shared: &Shared, content: &Content) {
        let Ok(uffd) = &shared.uffd else { return };
        let mut lock = self.lock(shared);
        let Some(ops) = lock.ops() else { return };
        if ops.region.is_none() || ops.refused || self.stamp() >= content.stamp {
            return;
        }
        let align = if self.bytes >= HUGE_BYTES {
            HUGE_BYTES
        } else {
            PAGE_SIZE
        };
        let offset = self.first_page * PAGE_SIZE_U64;
        let scratch = match fresh(uffd, content, offset, self.bytes, self.form, align) {
            Ok(scratch) => scratch,
            Err(error) => {
                let e = io::Error::from_raw_os_error(error.errno());
                self.refuse_all(ops, shared.empty.as_fd(), &e);
                return;
            }
        };
        let mut rest = scratch;
        let mut at = 0;
        for (run, count) in ops.private.clear_runs(0, self.pages()) {
            let (gap, from) = rest.split(span(run - at));
            drop(gap);
            let (piece, behind) = from.split(span(count));
            rest = behind;
            at = run + count;
            let Some(region) = &ops.region else { return };
            if let Err(e) = region.replace(span(run), piece) {
                self.after_failed_replace(shared, ops, run, count, &e);
                self.refuse_all(ops, shared.empty.as_fd(), &e);
                return;
            }
        }
        // Replaced, all of them: only shared mappings have any, and those have no private pages.
        ops.windows.forget_all();
        self.forget_moved(ops, 0, self.pages());
        ops.site = content.site.clone();
        ops.behind = ops.private.clone();
        ops.refused_pages.clear();
        ops.last_error = None;
        self.shows.store(content.stamp.bits(), Ordering::Release);
    }

    /// Makes sure that pages which a failed move may have unmapped are still this mapping's.
    pub(crate) fn after_failed_replace(
        &self,
        shared: &Shared,
        ops: &mut Ops,
        page: usize,
        count: usize,
        error: &io::Error,
    ) {
        let protection = self.form.protection();
        if let Some(region) = &ops.region {
            // EEXIST, the usual case: they are mapped as before.
            let filled =
                region.refuse_unmapped(span(page), span(count), protection, shared.empty.as_fd());
            if filled.is_ok() {
                ops.refused_pages.extend(page..page + count);
            }
        }
        ops.last_error = Some(PageError {
            offset: Some(span(page)),
            error: MmapError::sys("mremap of fresh pages", error),
        });
    }

    /// All of it is SIGBUS for good, for this reason.
    pub(crate) fn refuse(&self, shared: &Shared, error: &MmapError) {
        let mut lock = self.lock(shared);
        let Some(ops) = lock.ops() else { return };
        tracing::info!(%error, "a mapping is refused: an access to it is SIGBUS");
        if let Some(region) = &ops.region {
            let protection = self.form.protection();
            match region.refuse(0, self.bytes, protection, shared.empty.as_fd()) {
                Ok(()) => {
                    ops.windows.forget_all();
                    self.forget_moved(ops, 0, self.pages());
                }
                Err(e) => {
                    tracing::error!(error = %e, "a lost mapping could not be refused");
                }
            }
            ops.refused = true;
            ops.last_error = Some(PageError {
                offset: None,
                error: error.clone(),
            });
        }
        drop(lock);
        if let Ok(uffd) = &shared.uffd {
            self.wake_all(uffd);
        }
    }

    /// Unmaps it, waiting for who is changing it.
    pub(crate) fn unmap(&self, shared: &Shared) {
        let mut lock = self.lock(shared);
        if let Some(ops) = lock.ops() {
            ops.region = None;
            self.let_go(shared, ops);
        }
    }

    /// Unmaps it unless somebody is just changing it.
    pub(crate) fn try_unmap(&self, shared: &Shared) -> bool {
        match self.ops.try_lock() {
            Some(mut ops) => {
                ops.region = None;
                self.let_go(shared, &mut ops);
                true
            }
            None => false,
        }
    }

    /// In a forked child: never unmaps, never takes a lock (nobody is left to let go of it).
    pub(crate) fn abandon(self: &Arc<Self>) {
        std::mem::forget(Arc::clone(self));
    }
}
