//! Read and Write: the daemon is a holder of the pages, for the time between two steps of the machine.

use super::super::complete::Answer;
use super::super::ctx::Ctx;
use super::exclusive::Exclusive;
use super::work::{Cell, What, Work};
use copage_cache::{CacheError, FileId};
use copage_coherence::strict::{Action, DAEMON, Event, Input, Output, Place};
use copage_grants::{Access, DomId, FrameNo, PAGE_SIZE_U64, PageIndex};
use std::ops::Range;

/// Which bytes of a request lie in its page of this number, and where in the page they begin.
fn part(offset: u64, len: usize, nth: usize) -> (Range<usize>, usize) {
    let lead = (offset % PAGE_SIZE_U64) as usize;
    let page = PAGE_SIZE_U64 as usize;
    let start = (nth * page).saturating_sub(lead);
    let end = ((nth + 1) * page).saturating_sub(lead).min(len);
    let at = if nth == 0 { lead } else { 0 };
    (start.min(end)..end, at)
}

/// How many pages a range of bytes touches.
fn touched(offset: u64, len: usize) -> usize {
    let lead = (offset % PAGE_SIZE_U64) as usize;
    (lead + len).div_ceil(PAGE_SIZE_U64 as usize)
}

impl Ctx {
    pub(in crate::serve) fn strict_read(
        &mut self,
        number: u64,
        file: FileId,
        dom: DomId,
        (offset, len): (u64, u32),
    ) {
        let buf = vec![0; len as usize];
        self.begin_work(
            number,
            self.rw_work(file, dom, offset, What::Read { offset, buf }),
        );
    }

    /// Stores bytes; what lies past the end makes the file longer first.
    pub(in crate::serve) fn strict_write(
        &mut self,
        number: u64,
        file: FileId,
        dom: DomId,
        (offset, data): (u64, &[u8]),
    ) {
        let end = offset.saturating_add(data.len() as u64);
        let what = What::Write {
            offset,
            data: data.to_vec(),
            syncing: false,
        };
        let work = self.rw_work(file, dom, offset, what);
        self.coherent.counts.told.writes += 1;
        self.coherent.works.insert(number, work);
        self.write_or_grow(number, end);
    }

    /// A length is read where nothing can change it before the write: at its start.
    fn write_or_grow(&mut self, number: u64, end: u64) {
        let Some(work) = self.coherent.works.get(&number) else {
            return;
        };
        let id = work.file;
        let Some(file) = self.coherent.files.get_mut(&id) else {
            return self.fail_work(number, libc::ESTALE);
        };
        if end > self.cache.current(&file.file).bytes {
            let grow = Exclusive::Grow { work: number, end };
            self.exclusive(id, grow);
        } else if file.is_exclusive() {
            file.parked.push_back(number);
        } else {
            self.start_work(number);
        }
    }

    fn rw_work(&self, file: FileId, dom: DomId, offset: u64, what: What) -> Work {
        let (access, pages) = match &what {
            What::Write { data, .. } => (Access::ReadWrite, touched(offset, data.len())),
            What::Read { buf, .. } => (Access::ReadOnly, touched(offset, buf.len())),
            What::Fault { .. } => (Access::ReadOnly, 0),
        };
        Work {
            file,
            epoch: DAEMON,
            dom,
            access,
            first: offset / PAGE_SIZE_U64,
            cells: vec![Cell::Waiting { held: false }; pages],
            left: pages,
            what,
            since_ms: self.now_ms,
        }
    }

    pub(super) fn start_read(&mut self, number: u64) {
        let coherent = &mut self.coherent;
        let Some(work) = coherent.works.get_mut(&number) else {
            return;
        };
        let (What::Read { offset, buf }, Some(file)) =
            (&mut work.what, coherent.files.get(&work.file))
        else {
            return;
        };
        let left = self.cache.current(&file.file).bytes.saturating_sub(*offset);
        buf.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        let pages = match buf.len() {
            0 => 0,
            len => touched(*offset, len),
        };
        work.cells.truncate(pages);
        work.left = pages;
        if pages == 0 {
            self.end_read(number);
        } else {
            self.want(number);
        }
    }

    pub(super) fn start_write(&mut self, number: u64) {
        let coherent = &mut self.coherent;
        let Some(work) = coherent.works.get(&number) else {
            return;
        };
        let (What::Write { offset, data, .. }, Some(file)) =
            (&work.what, coherent.files.get_mut(&work.file))
        else {
            return;
        };
        let end = offset.saturating_add(data.len() as u64);
        if end > self.cache.current(&file.file).bytes {
            // It was cut off while this waited.
            file.active = file.active.saturating_sub(1);
            return self.write_or_grow(number, end);
        }
        self.reserve(number);
    }

    /// The daemon holds a page now: it does what it wanted it for, and lets go.
    pub(super) fn granted_daemon(&mut self, number: u64, nth: usize, place: Place, frame: FrameNo) {
        let coherent = &mut self.coherent;
        let mut cell = Cell::Done;
        let mut wrote = false;
        if let Some(work) = coherent.works.get_mut(&number)
            && let Some(file) = coherent.files.get(&work.file)
        {
            let done = match &mut work.what {
                What::Read { offset, buf } => {
                    let (range, at) = part(*offset, buf.len(), nth);
                    let to = buf.get_mut(range).unwrap_or_default();
                    self.cache
                        .strict_read(&file.file, place.page, frame, at, to)
                }
                What::Write { offset, data, .. } => {
                    wrote = true;
                    let (range, at) = part(*offset, data.len(), nth);
                    let bytes = data.get(range).unwrap_or_default();
                    self.cache
                        .strict_write(&file.file, place.page, frame, at, bytes)
                }
                What::Fault { .. } => Ok(()),
            };
            if let Err(error) = done {
                wrote = false;
                cell = Cell::Failed(error.errno());
            }
        }
        let before = self.actions.len();
        self.step(Input::Page(Event::Released {
            epoch: DAEMON,
            place,
        }));
        if wrote {
            let saves = |output: &Output| matches!(output, Output::Page(Action::Save { place: p, .. }) if *p == place);
            if self.actions.iter().skip(before).any(saves) {
                cell = Cell::Saving;
                let waiting = self.coherent.saving.entry(place).or_default();
                waiting.push((number, nth));
            } else {
                self.dirtied(place);
                cell = Cell::Unsaved(frame);
            }
        }
        let Some(work) = self.coherent.works.get_mut(&number) else {
            return;
        };
        let saving = matches!(cell, Cell::Saving);
        if let Some(slot) = work.cells.get_mut(nth) {
            *slot = cell;
        }
        if !saving {
            self.settled_page(number);
        }
    }

    /// A page was saved, or could not be.
    pub(super) fn page_saved(&mut self, place: Place, errno: Option<i32>) {
        for (number, nth) in self.coherent.saving.remove(&place).unwrap_or_default() {
            let work = self.coherent.works.get_mut(&number);
            if let Some(cell @ Cell::Saving) = work.and_then(|work| work.cells.get_mut(nth)) {
                *cell = errno.map_or(Cell::Done, Cell::Failed);
                self.settled_page(number);
            }
        }
    }

    pub(super) fn end_read(&mut self, number: u64) {
        let Some(work) = self.coherent.works.get_mut(&number) else {
            return;
        };
        let What::Read { offset, buf } = &mut work.what else {
            return;
        };
        let failed = work
            .cells
            .iter()
            .position(|cell| !matches!(cell, Cell::Done));
        let upto = failed.map_or(buf.len(), |nth| part(*offset, buf.len(), nth).0.start);
        buf.truncate(upto);
        let bytes = std::mem::take(buf);
        match failed.and_then(|nth| work.cells.get(nth)) {
            Some(Cell::Failed(errno)) if bytes.is_empty() => {
                let errno = *errno;
                self.fail_work(number, errno);
            }
            _ => self.end_work(number, Answer::Read(Ok(bytes))),
        }
    }

    /// All pages are written. Those that others have for writing too are saved by nobody: they are synced.
    pub(super) fn end_write(&mut self, number: u64) {
        let coherent = &mut self.coherent;
        let Some(work) = coherent.works.get_mut(&number) else {
            return;
        };
        let Some(file) = coherent.files.get(&work.file) else {
            return self.fail_work(number, libc::ESTALE);
        };
        let unsaved = |(nth, cell): (usize, &Cell)| match cell {
            Cell::Unsaved(frame) => Some((PageIndex(work.first + nth as u64), *frame)),
            _ => None,
        };
        let unsaved: Vec<_> = work.cells.iter().enumerate().filter_map(unsaved).collect();
        let What::Write {
            offset,
            data,
            syncing,
        } = &mut work.what
        else {
            return;
        };
        if !unsaved.is_empty() {
            *syncing = true;
            self.cache
                .strict_sync(number, &file.file, None, unsaved, false);
            return;
        }
        let failed = work
            .cells
            .iter()
            .position(|cell| !matches!(cell, Cell::Done));
        let count = failed.map_or(data.len(), |nth| part(*offset, data.len(), nth).0.start);
        match failed.and_then(|nth| work.cells.get(nth)) {
            Some(Cell::Failed(errno)) if count == 0 => {
                let errno = *errno;
                self.fail_work(number, errno);
            }
            _ => {
                let bytes = self.cache.current(&file.file).bytes;
                // A request has at most 128 KiB.
                let count = count as u32;
                self.end_work(number, Answer::Wrote { count, bytes });
            }
        }
    }

    /// The pages of a write that nobody saves were synced.
    pub(super) fn write_synced(&mut self, number: u64, result: Result<(), CacheError>) -> bool {
        let Some(work) = self.coherent.works.get_mut(&number) else {
            return false;
        };
        if !matches!(work.what, What::Write { syncing: true, .. }) {
            return false;
        }
        for cell in &mut work.cells {
            if matches!(cell, Cell::Unsaved(_)) {
                *cell = match &result {
                    Ok(()) => Cell::Done,
                    Err(error) => Cell::Failed(error.errno()),
                };
            }
        }
        self.end_write(number);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_cut_at_pages() {
        assert_eq!(touched(0, 4096), 1);
        assert_eq!(touched(1, 4096), 2);
        assert_eq!(touched(4095, 1), 1);
        assert_eq!(touched(4095, 4098), 3);
        assert_eq!(part(4095, 4098, 0), (0..1, 4095));
        assert_eq!(part(4095, 4098, 1), (1..4097, 0));
        assert_eq!(part(4095, 4098, 2), (4097..4098, 0));
        assert_eq!(part(8192, 10, 0), (0..10, 0));
    }
}
