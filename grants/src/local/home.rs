//! One home: one frame file.

use super::frames::{FrameFiles, sys};
use super::huge;
use crate::error::GrantError;
use crate::ids::{PAGE_SIZE, PAGE_SIZE_U64, pages_for};
use crate::limits::HUGE_PAGES;
use crate::sys::{LeaseKind, set_lease, set_lease_signal};
use parking_lot::RwLock;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// The 2 MiB units of a home that one huge page backs, by their first page.
type HugeUnits = BTreeSet<u64>;

/// See the module. Pages are plain numbers here, already checked to be within a `u64` of bytes.
pub(super) struct Home {
    files: Arc<FrameFiles>,
    /// The only open file of the inode in this process: [`Home::in_use`] rests on that.
    file: OwnedFd,
    name: String,
    bytes: u64,
    /// Writes many pages by one call.
    bulk: bool,
    /// Held for writing while pages are taken out, because splitting a huge unit moves pages that
    /// nobody is taking out; held for reading by [`Home::load`], which must not look then.
    huge: RwLock<HugeUnits>,
}

impl Home {
    pub(super) fn create(
        files: &Arc<FrameFiles>,
        id: u64,
        label: &str,
        bytes: u64,
    ) -> Result<Self, GrantError> {
        if i64::try_from(bytes).is_err() {
            return Err(GrantError::BadRange(format!("a file of {bytes} bytes")));
        }
        let (file, name) = files.create(id, label)?;
        let home = Self {
            files: Arc::clone(files),
            file,
            name,
            bytes,
            bulk: files.bulk(),
            huge: RwLock::new(HugeUnits::new()),
        };
        let made =
            rustix::fs::ftruncate(&home.file, bytes).map_err(sys("ftruncate of a frame file"));
        match made {
            Ok(()) => Ok(home),
            Err(e) => {
                // The first error is the one to tell.
                let _ = files.remove(&home.name);
                Err(e)
            }
        }
    }

    /// Ends the home. Whoever still has it open or mapped finds an empty file: reading gives
    /// nothing, touching it SIGBUS, and never zeros.
    pub(super) fn close(&self) -> Result<(), GrantError> {
        let _no_loads = self.huge.write();
        rustix::fs::ftruncate(&self.file, 0).map_err(sys("ftruncate of a frame file"))?;
        self.files.remove(&self.name)
    }

    pub(super) fn descriptor(&self) -> Result<OwnedFd, GrantError> {
        self.files.open_read_only(self.file.as_fd(), &self.name)
    }

    /// Does anybody but this process have the file open or mapped? The kernel grants a write lease
    /// only when not.
    pub(super) fn in_use(&self) -> Result<bool, GrantError> {
        // One at a time: two threads would take each other's lease away.
        let _alone = self.huge.write();
        // Somebody who kept a path descriptor may open the file while we hold the lease, and the
        // kernel then tells us by a signal: one that a process need not expect, SIGIO would end it.
        // Giving up a lease resets the choice, so it is made every time.
        set_lease_signal(&self.file, libc::SIGURG).map_err(|source| GrantError::Sys {
            call: "F_SETSIG",
            source,
        })?;
        match set_lease(&self.file, LeaseKind::Write) {
            Ok(()) => {
                set_lease(&self.file, LeaseKind::None).map_err(|source| GrantError::Sys {
                    call: "F_SETLEASE(F_UNLCK)",
                    source,
                })?;
                Ok(false)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(true),
            Err(source) => Err(GrantError::Sys {
                call: "F_SETLEASE(F_WRLCK)",
                source,
            }),
        }
    }

    /// Checks that `count` pages from `first` are in the file; gives their bytes as (offset, end),
    /// `end` being a page boundary that may lie past the file's last byte.
    pub(super) fn range(&self, first: u64, count: usize) -> Result<(u64, u64), GrantError> {
        let pages = pages_for(self.bytes);
        match first.checked_add(count as u64) {
            Some(end) if end <= pages => Ok((first * PAGE_SIZE_U64, end * PAGE_SIZE_U64)),
            _ => Err(GrantError::BadRange(format!(
                "{count} pages from page {first} of a home of {pages} pages"
            ))),
        }
    }

    /// Puts whole pages in, from page `first` on. Gives whether pages were there that nobody had
    /// put there. On error none of them is there.
    pub(super) fn store(&self, first: u64, data: &[u8]) -> Result<bool, GrantError> {
        let (from, end) = self.range(first, data.len() / PAGE_SIZE)?;
        // A page that is there already would be seen half old, half new.
        let foreign = self.has_data(from, end)?;
        if foreign {
            self.punch(from, end)?;
        }
        let stored = self.write(from, end, data);
        if stored.is_err() {
            self.punch(from, end)?;
        }
        stored.map(|()| foreign)
    }

    /// Writes up to the file's last byte; the kernel zeroes the rest of that page.
    fn write(&self, from: u64, end: u64, data: &[u8]) -> Result<(), GrantError> {
        let mut at = from;
        let end = end.min(self.bytes);
        while at < end {
            let step_end = if self.bulk {
                end
            } else {
                end.min(at + PAGE_SIZE_U64)
            };
            // Lengths of a slice, as are their differences.
            let piece = &data[(at - from) as usize..(step_end - from) as usize];
            match rustix::io::retry_on_intr(|| rustix::io::pwrite(&self.file, piece, at)) {
                Ok(0) => return Err(sys("pwrite of a frame")(Errno::IO)),
                Ok(written) => at += written as u64,
                Err(errno) => return Err(sys("pwrite of a frame")(errno)),
            }
        }
        Ok(())
    }

    /// Reads one page; past the end of the file come zeros.
    pub(super) fn load(&self, page: u64, buf: &mut [u8]) -> Result<(), GrantError> {
        let (from, _) = self.range(page, 1)?;
        let _no_splitting = self.huge.read();
        self.read(from, buf)
    }

    fn read(&self, from: u64, buf: &mut [u8]) -> Result<(), GrantError> {
        let mut have = 0;
        while have < buf.len() {
            let at = from + have as u64;
            let rest = &mut buf[have..];
            match rustix::io::retry_on_intr(|| rustix::io::pread(&self.file, &mut *rest, at)) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(n) => have += n,
                Err(errno) => return Err(sys("pread of a frame")(errno)),
            }
        }
        Ok(())
    }

    /// Takes pages out: they are unmapped everywhere, and what comes next to them is a fault.
    pub(super) fn discard(&self, first: u64, count: usize) -> Result<(), GrantError> {
        let (from, end) = self.range(first, count)?;
        let mut huge = self.huge.write();
        let units: Vec<u64> = huge
            .range(first.saturating_sub(HUGE_PAGES - 1)..first + count as u64)
            .copied()
            .collect();
        for unit in units {
            huge.remove(&unit);
            self.split(unit, first, first + count as u64)?;
        }
        self.punch(from, end)
    }

    /// Takes pages `first..end` out of a unit that one huge page backs, by taking the whole unit
    /// out and putting the other pages back.
    ///
    /// Punching a part of a huge page would have the kernel zero that part in place before it
    /// splits the page, for everybody who maps it meanwhile to see, and leave it at that where the
    /// page cannot be split (somebody has it pinned).
    fn split(&self, unit: u64, first: u64, end: u64) -> Result<(), GrantError> {
        let unit_end = unit + HUGE_PAGES;
        let kept = [(unit, first.min(unit_end)), (end.max(unit), unit_end)];
        let mut saved = Vec::new();
        for (from, to) in kept {
            if from < to {
                // At most 2 MiB.
                let mut data = vec![0; ((to - from) * PAGE_SIZE_U64) as usize];
                self.read(from * PAGE_SIZE_U64, &mut data)?;
                saved.push((from, to, data));
            }
        }
        self.punch(unit * PAGE_SIZE_U64, unit_end * PAGE_SIZE_U64)?;
        for (from, to, data) in saved {
            self.write(from * PAGE_SIZE_U64, to * PAGE_SIZE_U64, &data)
                .map_err(|e| GrantError::PagesLost {
                    first: unit,
                    count: HUGE_PAGES,
                    cause: Box::new(e),
                })?;
        }
        Ok(())
    }

    fn punch(&self, from: u64, end: u64) -> Result<(), GrantError> {
        if from == end {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, from, end - from))
            .map_err(sys("fallocate(punch) of a frame file"))
    }

    /// Is there any page in these bytes?
    fn has_data(&self, from: u64, end: u64) -> Result<bool, GrantError> {
        Ok(self.next_data(from)?.is_some_and(|data| data < end))
    }

    fn next_data(&self, from: u64) -> Result<Option<u64>, GrantError> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(data) => Ok(Some(data)),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(sys("lseek(SEEK_DATA)")(errno)),
        }
    }

    fn next_hole(&self, from: u64) -> Result<u64, GrantError> {
        rustix::fs::seek(&self.file, SeekFrom::Hole(from)).map_err(sys("lseek(SEEK_HOLE)"))
    }

    /// Runs of pages that are there, as (first, count).
    pub(super) fn present_pages(&self) -> Result<Vec<(u64, u64)>, GrantError> {
        let _no_splitting = self.huge.read();
        let mut runs = Vec::new();
        let mut at = 0;
        while let Some(data) = self.next_data(at)? {
            let hole = match self.next_hole(data) {
                // Taken out since.
                Err(GrantError::Sys { source, .. })
                    if source.raw_os_error() == Some(libc::ENXIO) =>
                {
                    break;
                }
                hole => hole?,
            };
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
        let whole =
            self.next_data(from)? == Some(from) && self.next_hole(from)? >= end.min(self.bytes);
        if !whole || !huge::collapse(self.file.as_fd(), from)? {
            return Ok(false);
        }
        huge.insert(unit);
        Ok(true)
    }
}
