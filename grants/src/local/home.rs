//! One home: one frame file.

use super::beside::Beside;
use super::file::{next_data, next_hole, punch, read};
use super::frames::{FrameFiles, sys};
use super::handle::Handle;
use super::huge;
use crate::backend::HomeSpec;
use crate::error::GrantError;
use crate::ids::{PAGE_SIZE, PAGE_SIZE_U64, TrustClass, pages_for};
use crate::limits::HUGE_PAGES;
use parking_lot::{Mutex, RwLock};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The 2 MiB units of a home that one huge page backs, by their first page.
type HugeUnits = BTreeSet<u64>;

/// See the module. Pages are plain numbers here, already checked to be within a `u64` of bytes.
pub(super) struct Home {
    file: Handle,
    pub(super) class: TrustClass,
    pub(super) files: Arc<FrameFiles>,
    /// Changes only while `beside` and `huge` are held for writing.
    bytes: AtomicU64,
    /// The most that it ever was: frames that were not let go of in time outlast their pages.
    bytes_max: AtomicU64,
    /// Writes many pages by one call.
    bulk: bool,
    /// Held for writing while pages are taken out, because splitting a huge unit moves pages that
    /// nobody is taking out, and by whatever must be the only user of the file; held for reading by
    /// whoever uses it and must not be in the way of either.
    huge: RwLock<HugeUnits>,
    /// Locked before `huge`.
    pub(super) beside: Mutex<Beside>,
}

/// Lengths are signed to the kernel.
pub(super) fn check_bytes(bytes: u64) -> Result<(), GrantError> {
    match i64::try_from(bytes) {
        Ok(_) => Ok(()),
        Err(_) => Err(GrantError::BadRange(format!("a file of {bytes} bytes"))),
    }
}

/// The bytes of pages that are in a file of `bytes` bytes.
fn range_of(bytes: u64, first: u64, count: usize) -> Result<(u64, u64), GrantError> {
    let pages = pages_for(bytes);
    match first.checked_add(count as u64) {
        Some(end) if end <= pages => Ok((first * PAGE_SIZE_U64, end * PAGE_SIZE_U64)),
        _ => Err(GrantError::BadRange(format!(
            "{count} pages from page {first} of a home of {pages} pages"
        ))),
    }
}

impl Home {
    pub(super) fn create(
        files: &Arc<FrameFiles>,
        id: u64,
        spec: &HomeSpec,
    ) -> Result<Self, GrantError> {
        check_bytes(spec.bytes)?;
        Ok(Self {
            file: Handle::create(files, id, &spec.label, spec.bytes)?,
            class: spec.class,
            files: Arc::clone(files),
            bytes: AtomicU64::new(spec.bytes),
            bytes_max: AtomicU64::new(spec.bytes),
            bulk: files.bulk(),
            huge: RwLock::new(HugeUnits::new()),
            beside: Mutex::default(),
        })
    }

    /// Ends the home. Whoever still has it open or mapped finds an empty file: reading gives
    /// nothing, touching it SIGBUS, and never zeros.
    pub(super) fn close(&self) -> Result<(), GrantError> {
        self.beside.lock().end();
        let _alone = self.huge.write();
        self.file.end()
    }

    /// A descriptor for guests.
    pub(super) fn descriptor(&self) -> Result<OwnedFd, GrantError> {
        self.file.read_only()
    }

    /// The daemon lets go of the file, so that programs can run from it.
    pub(super) fn make_runnable(&self) -> Result<(), GrantError> {
        let _alone = self.huge.write();
        if next_hole(&*self.file.reader()?, 0)? < self.bytes() {
            let what = "programs run only from a home without holes";
            return Err(GrantError::BadRange(what.to_owned()));
        }
        self.file.rest();
        Ok(())
    }

    /// Does anybody but this process have the file open or mapped? The kernel grants a write lease
    /// only when not.
    pub(super) fn in_use(&self) -> Result<bool, GrantError> {
        let _alone = self.huge.write();
        self.file.in_use()
    }

    /// Checks that `count` pages from `first` are in the file; gives their bytes as (offset, end),
    /// `end` being a page boundary that may lie past the file's last byte.
    pub(super) fn range(&self, first: u64, count: usize) -> Result<(u64, u64), GrantError> {
        range_of(self.bytes(), first, count)
    }

    /// Puts whole pages in, from page `first` on. Gives whether pages were there that nobody had
    /// put there. On error none of them is there.
    pub(super) fn store(&self, first: u64, data: &[u8]) -> Result<bool, GrantError> {
        let (from, end) = self.range(first, data.len() / PAGE_SIZE)?;
        let _not_resting = self.huge.read();
        let file = self.file.writer()?;
        // A page that is there already would be seen half old, half new.
        let foreign = next_data(&file, from)?.is_some_and(|data| data < end);
        if foreign {
            punch(&file, from, end)?;
        }
        let stored = self.write(&file, from, end, data);
        if stored.is_err() {
            punch(&file, from, end)?;
        }
        stored.map(|()| foreign)
    }

    /// Writes up to the file's last byte; the kernel zeroes the rest of that page.
    fn write(&self, file: &OwnedFd, from: u64, end: u64, data: &[u8]) -> Result<(), GrantError> {
        let mut at = from;
        let end = end.min(self.bytes());
        while at < end {
            let step_end = if self.bulk {
                end
            } else {
                end.min(at + PAGE_SIZE_U64)
            };
            // Lengths of a slice, as are their differences.
            let piece = &data[(at - from) as usize..(step_end - from) as usize];
            match rustix::io::retry_on_intr(|| rustix::io::pwrite(file, piece, at)) {
                Ok(0) => return Err(sys("pwrite of a frame")(Errno::IO)),
                Ok(written) => at += written as u64,
                Err(errno) => return Err(sys("pwrite of a frame")(errno)),
            }
        }
        Ok(())
    }

    /// Reads one page; past the end of the file come zeros.
    pub(super) fn load_here(&self, page: u64, buf: &mut [u8]) -> Result<(), GrantError> {
        let (from, _) = self.range(page, 1)?;
        let _no_splitting = self.huge.read();
        read(&*self.file.reader()?, from, buf)
    }

    /// Writes into a page that is there; past the end of the file nothing.
    pub(super) fn write_here(&self, at: u64, data: &[u8]) -> Result<(), GrantError> {
        let _not_resting = self.huge.read();
        self.write(&*self.file.writer()?, at, at + data.len() as u64, data)
    }

    /// Is the page at byte `from` there?
    pub(super) fn holds(&self, from: u64) -> Result<bool, GrantError> {
        let _no_splitting = self.huge.read();
        Ok(next_data(&*self.file.reader()?, from)? == Some(from))
    }

    /// Takes pages out: they are unmapped everywhere, and what comes next to them is a fault.
    pub(super) fn discard_here(&self, first: u64, count: usize) -> Result<(), GrantError> {
        let (from, end) = range_of(self.bytes_max.load(Ordering::Relaxed), first, count)?;
        let mut huge = self.huge.write();
        let file = self.file.writer()?;
        let units: Vec<u64> = huge
            .range(first.saturating_sub(HUGE_PAGES - 1)..first + count as u64)
            .copied()
            .collect();
        for unit in units {
            huge.remove(&unit);
            self.split(&file, unit, first, first + count as u64)?;
        }
        punch(&file, from, end)
    }

    /// Takes pages `first..end` out of a unit that one huge page backs, by taking the whole unit
    /// out and putting the other pages back.
    ///
    /// Punching a part of a huge page would have the kernel zero that part in place before it
    /// splits the page, for everybody who maps it meanwhile to see, and leave it at that where the
    /// page cannot be split (somebody has it pinned).
    fn split(&self, file: &OwnedFd, unit: u64, first: u64, end: u64) -> Result<(), GrantError> {
        let unit_end = unit + HUGE_PAGES;
        let kept = [(unit, first.min(unit_end)), (end.max(unit), unit_end)];
        let mut saved = Vec::new();
        for (from, to) in kept {
            if from < to {
                // At most 2 MiB.
                let mut data = vec![0; ((to - from) * PAGE_SIZE_U64) as usize];
                read(file, from * PAGE_SIZE_U64, &mut data)?;
                saved.push((from, to, data));
            }
        }
        punch(file, unit * PAGE_SIZE_U64, unit_end * PAGE_SIZE_U64)?;
        for (from, to, data) in saved {
            self.write(file, from * PAGE_SIZE_U64, to * PAGE_SIZE_U64, &data)
                .map_err(|e| GrantError::PagesLost {
                    first: unit,
                    count: HUGE_PAGES,
                    cause: Box::new(e),
                })?;
        }
        Ok(())
    }

    /// Makes the file another length; pages from `first` on, the first that is not whole before and
    /// afterwards, hold nothing but what strangers put there.
    pub(super) fn resize_here(&self, first: u64, bytes: u64) -> Result<(), GrantError> {
        let huge = self.huge.write();
        let file = self.file.writer()?;
        if let Some(unit) = huge.range(first.saturating_sub(HUGE_PAGES - 1)..).next() {
            let what = format!("the file is cut where pages from {unit} on are one huge page");
            return Err(GrantError::BadRange(what));
        }
        let end = pages_for(self.bytes().max(bytes));
        punch(&file, first * PAGE_SIZE_U64, end * PAGE_SIZE_U64)?;
        rustix::fs::ftruncate(&*file, bytes).map_err(sys("ftruncate of a frame file"))?;
        self.bytes.store(bytes, Ordering::Relaxed);
        self.bytes_max.fetch_max(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// The file's length.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Runs of pages that are there, as (first, count).
    pub(super) fn present_here(&self) -> Result<Vec<(u64, u64)>, GrantError> {
        let _no_splitting = self.huge.read();
        let file = self.file.reader()?;
        let mut runs = Vec::new();
        let mut at = 0;
        while let Some(data) = next_data(&file, at)? {
            let hole = next_hole(&file, data)?;
            // A page that came while we looked, and went.
            if hole <= data {
                break;
            }
            let first = data / PAGE_SIZE_U64;
            runs.push((first, pages_for(hole) - first));
            at = hole;
        }
        Ok(runs)
    }

    /// Backs a unit by one huge page. `false`: not to be had.
    pub(super) fn make_huge(&self, unit: u64) -> Result<bool, GrantError> {
        let pages = HUGE_PAGES as usize;
        let (from, end) = self.range(unit, pages)?;
        if !unit.is_multiple_of(HUGE_PAGES) {
            return Err(GrantError::BadRange(format!(
                "page {unit} does not begin a 2 MiB unit"
            )));
        }
        let mut huge = self.huge.write();
        if huge.contains(&unit) {
            return Ok(true);
        }
        // The kernel would fill holes with zeros. Nothing is taken out while we hold the lock.
        let file = self.file.reader()?;
        let whole = next_data(&file, from)? == Some(from)
            && next_hole(&file, from)? >= end.min(self.bytes());
        if !whole || !huge::collapse(file.as_fd(), from)? {
            return Ok(false);
        }
        huge.insert(unit);
        Ok(true)
    }
}
