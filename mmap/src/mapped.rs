//! What the library knows of one mapping, and every change of its pages.
//!
//! The lock `ops` orders the changes. The pager only ever tries it: who holds it may be moving
//! pages, and a move is over when the pager has read its event. A fault that finds it taken is
//! dropped, and who lets go of it wakes everybody who waits in the mapping; their accesses fault
//! again, if they still must.

use crate::bitmap::Bitmap;
use crate::error::{MmapError, Result};
use crate::file::{Content, FileInner};
use crate::mapping::{MapKind, PageError};
use crate::quiet::{Leaf, LeafGuard};
use crate::session::Shared;
use crate::sys::{Protection, Region};
use crate::uffd::Uffd;
use crate::window::{Window, Windows};
use copage_coherence::msg::Generation;
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

/// What `ops` protects.
struct Ops {
    /// The address space; `None` when it was unmapped.
    region: Option<Region>,
    /// All of it is SIGBUS, for good.
    refused: bool,
    /// Pages that are SIGBUS because the daemon refused them.
    refused_pages: BTreeSet<usize>,
    /// Pages that were stored to (or are just being stored to).
    private: Bitmap,
    /// Those of them that a rebase passed over: a copy of its own should be there; what is mapped
    /// below it is an older content, of which nothing comes any more.
    behind: Bitmap,
    last_error: Option<PageError>,
}

/// A mapping as pager, worker and callers share it. Pages are counted from its start.
pub(crate) struct Mapped {
    file: Arc<FileInner>,
    kind: MapKind,
    addr: usize,
    bytes: usize,
    first_page: u64,
    generation: AtomicU32,
    ops: Leaf<Ops>,
    /// The pager found `ops` taken and dropped a fault.
    missed: AtomicBool,
    /// The pager's alone; a lock because it must be shared.
    windows: Leaf<Windows>,
}

/// Holds `ops` on any thread but the pager's.
struct OpsLock<'a> {
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
    fn ops(&mut self) -> Option<&mut Ops> {
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
pub(crate) fn fresh(
    uffd: &Uffd,
    content: &Content,
    offset: u64,
    bytes: usize,
    kind: MapKind,
    align: usize,
) -> Result<Region> {
    let home = content
        .home
        .as_ref()
        .ok_or_else(|| MmapError::Protocol("a content without a descriptor".into()))?;
    let (protection, private) = protection(kind);
    let region = Region::map(home.as_fd(), offset, bytes, protection, align)
        .map_err(|e| MmapError::sys("mmap of the file's pages", &e))?;
    uffd.register(region.addr(), bytes, private)
        .map_err(|e| MmapError::sys("UFFDIO_REGISTER", &e))?;
    if private && !skip_arm() {
        uffd.protect(region.addr(), bytes)
            .map_err(|e| MmapError::sys("UFFDIO_WRITEPROTECT", &e))?;
    }
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

const fn protection(kind: MapKind) -> (Protection, bool) {
    match kind {
        MapKind::Shared => (Protection::Read, false),
        MapKind::Private => (Protection::ReadWrite, true),
    }
}

/// Bytes of `pages` pages; pages of a mapping, so that it cannot overflow.
const fn span(pages: usize) -> usize {
    pages * PAGE_SIZE
}

impl Mapped {
    pub(crate) fn new(
        file: Arc<FileInner>,
        kind: MapKind,
        first_page: u64,
        generation: Generation,
        region: Region,
    ) -> Self {
        let (addr, bytes) = (region.addr(), region.bytes());
        Self {
            file,
            kind,
            addr,
            bytes,
            first_page,
            generation: AtomicU32::new(generation.0),
            ops: Leaf::new(Ops {
                region: Some(region),
                refused: false,
                refused_pages: BTreeSet::new(),
                private: Bitmap::new(bytes / PAGE_SIZE),
                behind: Bitmap::new(bytes / PAGE_SIZE),
                last_error: None,
            }),
            missed: AtomicBool::new(false),
            windows: Leaf::new(Windows::default()),
        }
    }

    pub(crate) fn file(&self) -> &Arc<FileInner> {
        &self.file
    }

    pub(crate) fn kind(&self) -> MapKind {
        self.kind
    }

    pub(crate) fn addr(&self) -> usize {
        self.addr
    }

    /// Whole pages.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    fn pages(&self) -> usize {
        self.bytes / PAGE_SIZE
    }

    /// The file's page at its start.
    pub(crate) fn first_page(&self) -> u64 {
        self.first_page
    }

    /// The content that its pages are of.
    pub(crate) fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::Acquire))
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
    pub(crate) fn window(&self, file_page: u64, file_bytes: u64) -> Window {
        let mapped_end = self.first_page + self.pages() as u64;
        let end = mapped_end
            .min(file_bytes.div_ceil(PAGE_SIZE_U64))
            .max(file_page + 1);
        self.windows.lock().choose(file_page, end)
    }

    // ---- the pager's changes: they try the lock ----

    fn try_ops(&self) -> Option<LeafGuard<'_, Ops>> {
        if let Some(guard) = self.ops.try_lock() {
            return Some(guard);
        }
        self.missed.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // Free by now: its holder may have looked before `missed` was set.
        self.ops.try_lock()
    }

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

    /// Was this page passed over by a rebase? If it is missing nevertheless, the store for which it
    /// was counted as private never came, and the daemon has nothing for it: see [`Self::restore`].
    /// `None`: the mapping is being changed, and who does that wakes everybody.
    pub(crate) fn try_is_behind(&self, file_page: u64) -> Option<bool> {
        if self.kind == MapKind::Shared {
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
        ops.last_error = Some(PageError {
            offset: Some(at),
            error,
        });
        if ops.refused {
            return Change::Done;
        }
        // A private mapping's pages are armed, and an armed page cannot be poisoned.
        if self.kind == MapKind::Shared && uffd.can_poison() {
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
        let (protection, _) = protection(self.kind);
        match region.refuse(at, PAGE_SIZE, protection, empty) {
            Ok(()) => {
                ops.refused_pages.insert(at / PAGE_SIZE);
            }
            Err(e) => refuse_all(ops, self.kind, empty, &e),
        }
        Change::Done
    }

    // ---- changes by all other threads: they take the lock ----

    fn lock<'a>(&'a self, shared: &'a Shared) -> OpsLock<'a> {
        OpsLock {
            guard: Some(self.ops.lock()),
            mapped: self,
            uffd: shared.uffd.as_ref().ok(),
        }
    }

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
        crate::sys::populate(self.addr + span(first), span(end - first), write)
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
            return Err(error.unwrap_or_else(|| shared.session.lost_error()));
        }
        let pages: Vec<usize> = ops.refused_pages.range(first..end).copied().collect();
        for page in pages {
            self.renew(shared, ops, page)?;
            ops.refused_pages.remove(&page);
        }
        ops.last_error = None;
        Ok(())
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
                        let (protection, _) = protection(self.kind);
                        match region.refuse(span(page), PAGE_SIZE, protection, shared.empty.as_fd())
                        {
                            Ok(()) => {
                                ops.refused_pages.insert(page);
                            }
                            Err(e) => refuse_all(ops, self.kind, shared.empty.as_fd(), &e),
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
        if content.generation != self.generation() {
            // A rebase is on its way and brings fresh pages.
            return Ok(());
        }
        let offset = (self.first_page + page as u64) * PAGE_SIZE_U64;
        let piece = fresh(uffd, &content, offset, PAGE_SIZE, self.kind, PAGE_SIZE)?;
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
        if ops.region.is_none() || ops.refused || self.generation() >= content.generation {
            return;
        }
        let align = if self.bytes >= crate::limits::HUGE_BYTES {
            crate::limits::HUGE_BYTES
        } else {
            PAGE_SIZE
        };
        let offset = self.first_page * PAGE_SIZE_U64;
        let scratch = match fresh(uffd, content, offset, self.bytes, self.kind, align) {
            Ok(scratch) => scratch,
            Err(error) => {
                let e = io::Error::from_raw_os_error(error.errno());
                refuse_all(ops, self.kind, shared.empty.as_fd(), &e);
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
                refuse_all(ops, self.kind, shared.empty.as_fd(), &e);
                return;
            }
        }
        ops.behind = ops.private.clone();
        ops.refused_pages.clear();
        ops.last_error = None;
        self.generation
            .store(content.generation.0, Ordering::Release);
    }

    /// Makes sure that pages which a failed move may have unmapped are still this mapping's.
    fn after_failed_replace(
        &self,
        shared: &Shared,
        ops: &mut Ops,
        page: usize,
        count: usize,
        error: &io::Error,
    ) {
        let (protection, _) = protection(self.kind);
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

    /// The session is lost: all of it is SIGBUS.
    pub(crate) fn refuse_lost(&self, shared: &Shared) {
        let mut lock = self.lock(shared);
        let Some(ops) = lock.ops() else { return };
        if let Some(region) = &ops.region {
            let (protection, _) = protection(self.kind);
            if let Err(e) = region.refuse(0, self.bytes, protection, shared.empty.as_fd()) {
                tracing::error!(error = %e, "a mapping of a lost session could not be refused");
            }
            ops.refused = true;
            ops.last_error = Some(PageError {
                offset: None,
                error: shared.session.lost_error(),
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
        }
    }

    /// Unmaps it unless somebody is just changing it.
    pub(crate) fn try_unmap(&self) -> bool {
        match self.ops.try_lock() {
            Some(mut ops) => {
                ops.region = None;
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

/// All of it SIGBUS: one mapping in place of many always fits.
fn refuse_all(ops: &mut Ops, kind: MapKind, empty: BorrowedFd<'_>, error: &io::Error) {
    let (protection, _) = protection(kind);
    if let Some(region) = &ops.region
        && let Err(e) = region.refuse(0, region.bytes(), protection, empty)
    {
        tracing::error!(error = %e, "a mapping could not be refused");
    }
    ops.refused = true;
    ops.last_error = Some(PageError {
        offset: None,
        error: MmapError::sys("mapping fresh pages", error),
    });
}
