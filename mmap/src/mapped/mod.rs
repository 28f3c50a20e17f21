//! What the library knows of one mapping, and every change of its pages.
//!
//! The lock `ops` orders the changes. The pager only ever tries it: who holds it may be moving
//! pages, and a move is over when the pager has read its event. A fault that finds it taken is
//! dropped, and who lets go of it wakes everybody who waits in the mapping; their accesses fault
//! again, if they still must.

mod change;
mod form;
mod moved;
mod serve;

pub(crate) use form::Form;

use crate::bitmap::Bitmap;
use crate::error::{MmapError, Result};
use crate::file::{Content, FileInner};
use crate::granted::Windows as GrantedWindows;
use crate::limits::{GRANTED_PAGES_FIRST, LOAD_PAGES_MAX, STORE_PAGES_MAX, WINDOW_PAGES_MAX};
use crate::mapping::PageError;
use crate::quiet::{Leaf, LeafGuard};
use crate::shared::Shared;
use crate::site::Site;
use crate::stamp::Stamp;
use crate::sys::Region;
use crate::uffd::Uffd;
use crate::window::{Window, Windows};
use copage_grants::{Access, PAGE_SIZE, PAGE_SIZE_U64};
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// What `ops` protects. Dropped in this order: windows are let go of when their memory is unmapped.
pub(crate) struct Ops {
    /// The address space; `None` when it was unmapped.
    pub(crate) region: Option<Region>,
    /// What lies over it, of granted files.
    pub(crate) windows: GrantedWindows,
    /// All of it is SIGBUS, for good.
    pub(crate) refused: bool,
    /// Pages that are SIGBUS because the daemon refused them.
    pub(crate) refused_pages: BTreeSet<usize>,
    /// Pages that were stored to (or are just being stored to).
    private: Bitmap,
    /// Those of them that a rebase passed over: a copy of its own should be there; what is mapped
    /// below it is an older content, of which nothing comes any more.
    pub(crate) behind: Bitmap,
    /// Pages that are mapped from an arena, not from the home ([`moved`]).
    moved: Bitmap,
    /// Of a `coherent` file.
    pub(crate) site: Option<Arc<Site>>,
    last_error: Option<PageError>,
}

impl Ops {
    /// Of `pages` pages those that are mapped from an arena, in runs.
    pub(crate) fn moved_runs(&self, pages: usize) -> Vec<Range<usize>> {
        let runs = self.moved.set_runs(0, pages).into_iter();
        runs.map(|(first, count)| first..first + count).collect()
    }
}

/// A mapping as pager, worker and callers share it. Pages are counted from its start.
pub(crate) struct Mapped {
    file: Arc<FileInner>,
    form: Form,
    addr: usize,
    bytes: usize,
    first_page: u64,
    /// A [`Stamp`].
    shows: AtomicU64,
    ops: Leaf<Ops>,
    /// The pager found `ops` taken and dropped a fault.
    missed: AtomicBool,
    /// The pager's alone; a lock because it must be shared.
    windows: Leaf<Windows>,
    /// Of stores to the file.
    stores: Leaf<Windows>,
}

/// Holds `ops` on any thread but the pager's.
pub(crate) struct OpsLock<'a> {
    guard: Option<LeafGuard<'a, Ops>>,
    mapped: &'a Mapped,
    uffd: Option<&'a Uffd>,
}

impl Drop for OpsLock<'_> {
    fn drop(&mut self) {
        self.guard = None;
        // Pairs with the fence in `try_ops`: either the pager sees the lock free, or this sees
        // that it missed something.
        fence(Ordering::SeqCst);
        if self.mapped.missed.swap(false, Ordering::SeqCst)
            && let Some(uffd) = self.uffd
        {
            uffd.wake(self.mapped.addr, self.mapped.bytes);
        }
    }
}

impl OpsLock<'_> {
    pub(crate) fn ops(&mut self) -> Option<&mut Ops> {
        self.guard.as_deref_mut()
    }
}

/// How a change by the pager went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Done; wake who waits.
    Done,
    /// Nothing was done and nobody need be woken: somebody else will.
    Missed,
}

/// Maps a range of a content where nobody sees it yet: registered, and armed if it can be stored
/// to. That order is all that keeps holes from reading as zeros, and stores from being unnoticed.
///
/// Pages are not armed before they are there: a hole that is punched while somebody faults takes the arms of
/// every mapping along (Linux: unmap_mapping_folio drops the markers), and the next store would go into a copy
/// that nobody knows of. Each page is mapped by [`Mapped::show`], with its arms, so that a store finds it armed
/// or not there. Where the kernel cannot do that (before 6.6), private mappings are armed as a whole.
pub(crate) fn fresh(
    uffd: &Uffd,
    content: &Content,
    offset: u64,
    bytes: usize,
    form: Form,
    align: usize,
) -> Result<Region> {
    let Some(home) = &content.home else {
        return scratch(uffd, bytes, form);
    };
    let region = Region::map(home.as_fd(), offset, bytes, form.protection(), align)
        .map_err(|e| MmapError::sys("mmap of the file's pages", &e))?;
    let is_shown = form.is_shown(uffd) && !skip_arm();
    let registered = match is_shown {
        true => uffd.register_all(region.addr(), bytes),
        false => uffd.register(region.addr(), bytes, form.is_armed()),
    };
    registered.map_err(|e| MmapError::sys("UFFDIO_REGISTER", &e))?;
    if form == Form::Own && !is_shown && !skip_arm() {
        uffd.protect(region.addr(), bytes)
            .map_err(|e| MmapError::sys("UFFDIO_WRITEPROTECT", &e))?;
    }
    Ok(region)
}

/// Memory that holds nothing, of a granted file or of one that nobody vouches for: registered where nobody
/// sees it yet. There is nothing to arm: pages come write-protected into a private one.
pub(crate) fn scratch(uffd: &Uffd, bytes: usize, form: Form) -> Result<Region> {
    let region = Region::anonymous(bytes, form.protection())
        .map_err(|e| MmapError::sys("mmap of the mapping's range", &e))?;
    uffd.register(region.addr(), bytes, form.is_armed())
        .map_err(|e| MmapError::sys("UFFDIO_REGISTER", &e))?;
    Ok(region)
}

#[cfg(test)]
thread_local! {
    /// The seeded mutant "skip the arm": stores to private mappings that this thread makes go
    /// unnoticed. Never in a real build.
    pub(crate) static SKIP_ARM: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

#[cfg(test)]
fn skip_arm() -> bool {
    SKIP_ARM.get()
}

#[cfg(not(test))]
const fn skip_arm() -> bool {
    false
}

/// Bytes of `pages` pages; pages of a mapping, so that it cannot overflow.
pub(crate) const fn span(pages: usize) -> usize {
    pages * PAGE_SIZE
}

impl Mapped {
    pub(crate) fn new(
        file: Arc<FileInner>,
        form: Form,
        first_page: u64,
        content: &Content,
        region: Region,
    ) -> Self {
        let (addr, bytes) = (region.addr(), region.bytes());
        let least = if file.granted() {
            GRANTED_PAGES_FIRST
        } else {
            1
        };
        let most = match content.site {
            Some(_) => LOAD_PAGES_MAX,
            None => WINDOW_PAGES_MAX,
        };
        Self {
            file,
            form,
            addr,
            bytes,
            first_page,
            shows: AtomicU64::new(content.stamp.bits()),
            ops: Leaf::new(Ops {
                region: Some(region),
                windows: GrantedWindows::default(),
                refused: false,
                refused_pages: BTreeSet::new(),
                private: Bitmap::new(bytes / PAGE_SIZE),
                behind: Bitmap::new(bytes / PAGE_SIZE),
                moved: Bitmap::new(bytes / PAGE_SIZE),
                site: content.site.clone(),
                last_error: None,
            }),
            missed: AtomicBool::new(false),
            windows: Leaf::new(Windows::new(least, most)),
            stores: Leaf::new(Windows::new(1, STORE_PAGES_MAX)),
        }
    }

    /// Its pages come from grants, not from a descriptor.
    pub(crate) fn is_granted(&self) -> bool {
        self.file.granted()
    }

    /// What it maps is entered with the daemon page by page: by the pager, and until it was said to be
    /// unmapped.
    pub(crate) fn is_counted(&self) -> bool {
        self.file.is_counted()
    }

    pub(crate) fn file(&self) -> &Arc<FileInner> {
        &self.file
    }

    pub(crate) fn form(&self) -> Form {
        self.form
    }

    pub(crate) fn addr(&self) -> usize {
        self.addr
    }

    /// Whole pages.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn pages(&self) -> usize {
        self.bytes / PAGE_SIZE
    }

    /// The file's page at its start.
    pub(crate) fn first_page(&self) -> u64 {
        self.first_page
    }

    /// The content that its pages are of.
    pub(crate) fn stamp(&self) -> Stamp {
        Stamp::from_bits(self.shows.load(Ordering::Acquire))
    }

    /// The address of a page of the file, if it is mapped here.
    fn address_of(&self, file_page: u64) -> Option<usize> {
        let page = usize::try_from(file_page.checked_sub(self.first_page)?).ok()?;
        (page < self.pages()).then(|| self.addr + span(page))
    }

    /// Wakes who waits for pages `first..first + count` of the file.
    pub(crate) fn wake(&self, uffd: &Uffd, first: u64, count: u32) {
        let from = first.max(self.first_page);
        let until = (first + u64::from(count)).min(self.first_page + self.pages() as u64);
        if let Some(addr) = self.address_of(from)
            && from < until
        {
            uffd.wake(addr, span((until - from) as usize));
        }
    }

    /// Wakes all who wait.
    pub(crate) fn wake_all(&self, uffd: &Uffd) {
        uffd.wake(self.addr, self.bytes);
    }

    /// What to ask for at a fault on a page of the file whose length is `file_bytes`.
    pub(crate) fn window(&self, file_page: u64, file_bytes: u64, access: Access) -> Window {
        let mapped_end = self.first_page + self.pages() as u64;
        let end = mapped_end
            .min(file_bytes.div_ceil(PAGE_SIZE_U64))
            .max(file_page + 1);
        let windows = match access {
            Access::ReadOnly => &self.windows,
            Access::ReadWrite => &self.stores,
        };
        windows.lock().choose(file_page, end)
    }

    /// For the pager: `None` when somebody holds it, who will wake everybody when done.
    pub(crate) fn try_ops(&self) -> Option<LeafGuard<'_, Ops>> {
        if let Some(guard) = self.ops.try_lock() {
            return Some(guard);
        }
        self.missed.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // Free by now: its holder may have looked before `missed` was set.
        self.ops.try_lock()
    }

    /// For every thread but the pager.
    pub(crate) fn lock<'a>(&'a self, shared: &'a Shared) -> OpsLock<'a> {
        OpsLock {
            guard: Some(self.ops.lock()),
            mapped: self,
            uffd: shared.uffd.as_ref().ok(),
        }
    }

    /// All of it SIGBUS: one mapping in place of many always fits.
    pub(crate) fn refuse_all(&self, ops: &mut Ops, empty: BorrowedFd<'_>, error: &io::Error) {
        if let Some(region) = &ops.region {
            match region.refuse(0, region.bytes(), self.form.protection(), empty) {
                Ok(()) => {
                    ops.windows.forget_all();
                    self.forget_moved(ops, 0, self.pages());
                }
                Err(e) => tracing::error!(error = %e, "a mapping could not be refused"),
            }
        }
        ops.refused = true;
        ops.last_error = Some(PageError {
            offset: None,
            error: MmapError::sys("mapping fresh pages", error),
        });
    }
}
