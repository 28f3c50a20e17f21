//! The pager's changes of a mapping: they only try the lock, and never wait.

use super::{Change, Form, Mapped, Ops, span};
use crate::error::MmapError;
use crate::limits::SHOWN_PAGES_MAX;
use crate::mapping::PageError;
use crate::uffd::Uffd;
use copage_grants::PAGE_SIZE;
use std::os::fd::BorrowedFd;

impl Mapped {
    /// A store to a page of the file: it is private from here on, and the store goes through when
    /// it is woken.
    pub(crate) fn store(&self, uffd: &Uffd, file_page: u64) -> Change {
        let Some(mut ops) = self.try_ops() else {
            return Change::Missed;
        };
        let (Some(addr), Some(_)) = (self.address_of(file_page), &ops.region) else {
            return Change::Done;
        };
        ops.private.set((addr - self.addr) / PAGE_SIZE);
        // EAGAIN while some mapping is moving: the store faults again and comes back here. ENOENT
        // where the page is refused: it will see that.
        let _ = uffd.unprotect(addr, PAGE_SIZE);
        Change::Done
    }

    /// A load from a page that the home has. `None`: the mapping is being changed, and who does that wakes
    /// everybody. `false`: this kernel cannot map it so that the first store is noticed.
    pub(crate) fn show(&self, uffd: &Uffd, file_page: u64) -> Option<bool> {
        let ops = self.try_ops()?;
        let Some(addr) = self.address_of(file_page).filter(|_| ops.region.is_some()) else {
            return Some(true);
        };
        let page = (addr - self.addr) / PAGE_SIZE;
        let shown = match uffd.show_protected(addr, span(self.shown_with(&ops, page))) {
            // A neighbour is mapped otherwise.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                uffd.show_protected(addr, PAGE_SIZE)
            }
            shown => shown,
        };
        match shown {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Some(false),
            Ok(()) => {}
            // There by now, a hole by now, or just moving: the access tries again and sees.
            Err(_) => uffd.wake(addr, PAGE_SIZE),
        }
        Some(true)
    }

    /// How many pages are shown for a load from `page`, as the kernel does where it is not asked to tell: not what
    /// is the mapping's own, nor of a `coherent` file, where each page is asked for by itself.
    fn shown_with(&self, ops: &Ops, page: usize) -> usize {
        if self.form != Form::Own || self.file.coherent() {
            return 1;
        }
        let end = self.pages().min(page + SHOWN_PAGES_MAX);
        let stays = |p: &usize| ops.private.get(*p) || ops.refused_pages.contains(p);
        (page + 1..end).find(stays).unwrap_or(end) - page
    }

    /// Is this page mapped from an arena? `None`: the mapping is being changed, and who does that wakes
    /// everybody.
    pub(crate) fn try_is_moved(&self, file_page: u64) -> Option<bool> {
        let ops = self.try_ops()?;
        let addr = self.address_of(file_page)?;
        Some(ops.moved.get((addr - self.addr) / PAGE_SIZE))
    }

    /// Was this page passed over by a rebase? If it is missing nevertheless, the store for which it
    /// was counted as private never came, and the daemon has nothing for it: see [`Self::restore`].
    /// `None`: the mapping is being changed, and who does that wakes everybody.
    pub(crate) fn try_is_behind(&self, file_page: u64) -> Option<bool> {
        if self.form != Form::Own {
            return Some(false);
        }
        let ops = self.try_ops()?;
        let addr = self.address_of(file_page)?;
        Some(ops.behind.get((addr - self.addr) / PAGE_SIZE))
    }

    /// Makes one page SIGBUS.
    pub(crate) fn refuse_page(
        &self,
        uffd: &Uffd,
        empty: BorrowedFd<'_>,
        file_page: u64,
        error: MmapError,
    ) -> Change {
        let Some(mut ops) = self.try_ops() else {
            return Change::Missed;
        };
        let ops = &mut *ops;
        let (Some(addr), Some(region)) = (self.address_of(file_page), &ops.region) else {
            return Change::Done;
        };
        let at = addr - self.addr;
        tracing::warn!(page = file_page, %error, "a page is refused: an access to it is SIGBUS");
        ops.last_error = Some(PageError {
            offset: Some(at),
            error,
        });
        // What is mapped by now is not refused, and a window is never cut.
        if ops.refused || ops.windows.holds(at / PAGE_SIZE) || ops.moved.get(at / PAGE_SIZE) {
            return Change::Done;
        }
        // An armed page cannot be poisoned.
        if !self.form.is_armed() && uffd.can_poison() {
            match uffd.poison(addr, PAGE_SIZE) {
                Ok(()) => {
                    ops.refused_pages.insert(at / PAGE_SIZE);
                    return Change::Done;
                }
                // There by now, or just moving: the access tries again and sees.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EEXIST | libc::EAGAIN)) => {
                    return Change::Done;
                }
                Err(_) => {}
            }
        }
        let protection = self.form.protection();
        match region.refuse(at, PAGE_SIZE, protection, empty) {
            Ok(()) => {
                ops.refused_pages.insert(at / PAGE_SIZE);
            }
            Err(e) => self.refuse_all(ops, empty, &e),
        }
        Change::Done
    }
}
