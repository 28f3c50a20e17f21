//! Pages of a `coherent` file that are not in its home: this session may store to them, so they are mapped
//! from its arena, or from the file that all writers have in common, over the home's.
//!
//! Both ways are one mremap(2) of pages that were made ready where nobody sees them, registered and, where
//! a store must be noticed, armed: another thread's access comes before it or after it. So a store goes
//! into the page that the daemon takes back after our word, or it faults.

use super::{Form, Mapped, Ops, fresh, scratch, skip_arm, span};
use crate::error::{MmapError, Result};
use crate::granted::Pages;
use crate::pager::told::Told;
use crate::shared::Shared;
use crate::site::Site;
use crate::sys::{Protection, Region};
use crate::uffd::Uffd;
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Pages of an arena where nobody sees them yet: a hole is a fault, and so is a store that is to be
/// the mapping's own.
fn piece(
    uffd: &Uffd,
    from: BorrowedFd<'_>,
    offset: u64,
    bytes: usize,
    form: Form,
) -> Result<Region> {
    let mapped = match form {
        Form::Write => Region::shared(from, offset, bytes, Protection::ReadWrite),
        Form::Read | Form::Own => Region::map(from, offset, bytes, form.protection(), PAGE_SIZE),
    };
    let region = mapped.map_err(|e| MmapError::sys("mmap of pages for writing", &e))?;
    let own = form == Form::Own;
    uffd.register(region.addr(), bytes, own)
        .map_err(|e| MmapError::sys("UFFDIO_REGISTER", &e))?;
    if own && !skip_arm() {
        uffd.protect(region.addr(), bytes)
            .map_err(|e| MmapError::sys("UFFDIO_WRITEPROTECT", &e))?;
    }
    Ok(region)
}

impl Mapped {
    /// Maps what of `pages` is in this mapping from `from`, if `still` says that they may be had. `false`: it
    /// said no. What is the mapping's own, refused or mapped so already stays.
    pub(crate) fn move_in(
        &self,
        shared: &Shared,
        pages: &Pages,
        from: BorrowedFd<'_>,
        still: impl FnOnce() -> bool,
    ) -> Result<bool> {
        let count = u32::try_from(pages.count).unwrap_or(u32::MAX);
        let Some((first, end)) = self.clip(pages.first, count) else {
            return Ok(true);
        };
        let uffd = shared.uffd()?;
        let mut lock = self.lock(shared);
        let Some(ops) = lock.ops() else {
            return Ok(true);
        };
        let Some(site) = ops.site.clone() else {
            return Ok(true);
        };
        if ops.refused || ops.region.is_none() || self.stamp() != pages.stamp {
            return Ok(true);
        }
        if !still() {
            return Ok(false);
        }
        let mut at = first;
        while at < end {
            let stays = |p: &usize| {
                ops.moved.get(*p) || ops.private.get(*p) || ops.refused_pages.contains(p)
            };
            let until = (at..end).find(|p| stays(p)).unwrap_or(end);
            if at < until {
                self.move_run(shared, uffd, ops, &site, (at, until), from)?;
            }
            at = until + 1;
        }
        Ok(true)
    }

    fn move_run(
        &self,
        shared: &Shared,
        uffd: &Uffd,
        ops: &mut Ops,
        site: &Site,
        (first, end): (usize, usize),
        from: BorrowedFd<'_>,
    ) -> Result<()> {
        let offset = (self.first_page() + first as u64) * PAGE_SIZE_U64;
        let piece = piece(uffd, from, offset, span(end - first), self.form())?;
        let Some(region) = &ops.region else {
            return Ok(());
        };
        // Before a store can come.
        if self.form() == Form::Write {
            site.hold(self.file_pages(first, end));
        }
        if let Err(e) = region.replace(span(first), piece) {
            if self.form() == Form::Write {
                site.let_go(self.file_pages(first, end));
            }
            self.after_failed_replace(shared, ops, first, end - first, &e);
            return Err(MmapError::sys("mremap of pages for writing", &e));
        }
        for page in first..end {
            ops.moved.set(page);
        }
        Ok(())
    }

    fn file_pages(&self, first: usize, end: usize) -> impl Iterator<Item = u64> + use<> {
        let base = self.first_page();
        (first..end).map(move |page| base + page as u64)
    }

    /// Forgets that pages were moved: they are not mapped any more.
    pub(crate) fn forget_moved(&self, ops: &mut Ops, first: usize, end: usize) {
        for (run, count) in ops.moved.set_runs(first, end) {
            if let (Form::Write, Some(site)) = (self.form(), &ops.site) {
                site.let_go(self.file_pages(run, run + count));
            }
            for page in run..run + count {
                ops.moved.unset(page);
            }
        }
    }

    /// Puts pages of the home back over those of `first..end` that were moved. If the machine refuses, all of
    /// the mapping is SIGBUS: they must go.
    pub(crate) fn take_home(&self, shared: &Shared, first: usize, end: usize) {
        let Ok(uffd) = &shared.uffd else { return };
        let mut lock = self.lock(shared);
        let Some(ops) = lock.ops() else { return };
        if ops.refused || ops.region.is_none() {
            return;
        }
        let content = self.file().content.lock().clone();
        for (run, count) in ops.moved.set_runs(first, end) {
            let mut own = Vec::new();
            let mut at = run;
            while at < run + count {
                // A copy of one's own stays as it is; should it be missing, it is read anew.
                if ops.private.get(at) {
                    own.push(at);
                    at += 1;
                    continue;
                }
                let until = (at..run + count)
                    .find(|p| ops.private.get(*p))
                    .unwrap_or(run + count);
                let offset = (self.first_page() + at as u64) * PAGE_SIZE_U64;
                let bytes = span(until - at);
                // A newer content is on its way to the mapping and replaces all of it.
                let armed = if content.stamp == self.stamp() {
                    fresh(uffd, &content, offset, bytes, self.form(), PAGE_SIZE)
                } else {
                    scratch(uffd, bytes, self.form())
                };
                let armed = armed.map_err(|e| std::io::Error::from_raw_os_error(e.errno()));
                let Some(region) = &ops.region else { return };
                if let Err(e) = armed.and_then(|piece| region.replace(span(at), piece)) {
                    self.after_failed_replace(shared, ops, at, until - at, &e);
                    self.refuse_all(ops, shared.empty.as_fd(), &e);
                    return;
                }
                at = until;
            }
            for page in own {
                ops.behind.set(page);
            }
            self.forget_moved(ops, run, run + count);
        }
    }

    /// Gives back what was moved, of all the mapping, and says so.
    pub(crate) fn give_home(self: &Arc<Self>, shared: &Shared) {
        let stamp = self.stamp();
        self.take_home(shared, 0, self.pages());
        shared.tell(Told::GivenBack {
            file: Arc::clone(self.file()),
            pages: Pages {
                stamp,
                first: self.first_page(),
                count: self.pages() as u64,
            },
        });
    }
}
