//! Pages of a home that are not in the home: those that guests write.
//!
//! The cache numbers frames and knows what each holds; here is written down where a frame is that is not in
//! the home. Of a guest's file nothing else is read, whatever the guest put there.

use super::guest_file::{GuestFiles, SideFile};
use super::home::{Home, check_bytes};
use crate::backend::Where;
use crate::error::GrantError;
use crate::ids::{DomId, FrameNo, PAGE_SIZE, PAGE_SIZE_U64, pages_for};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// See the module.
#[derive(Default)]
pub(super) struct Beside {
    /// Frames that are not in the home: which page of it, and where.
    placed: BTreeMap<FrameNo, (u64, Where)>,
    arenas: BTreeMap<DomId, SideFile>,
    common: Option<SideFile>,
    /// Which of the common files that there have been it is.
    serial: u32,
    spare: Option<SideFile>,
}

impl Beside {
    fn at(&self, frame: FrameNo) -> Where {
        self.placed
            .get(&frame)
            .map_or(Where::Home, |placed| placed.1)
    }

    /// None of the home, and none before it is made.
    fn file(&self, at: Where) -> Option<&SideFile> {
        match at {
            Where::Home => None,
            Where::Arena(dom) => self.arenas.get(&dom),
            Where::Common => self.common.as_ref(),
            Where::Spare => self.spare.as_ref(),
        }
    }

    fn existing(&self, at: Where) -> Result<&SideFile, GrantError> {
        self.file(at)
            .ok_or_else(|| GrantError::BadRange(format!("there is no file {at:?} of this home")))
    }

    fn files(&self) -> impl Iterator<Item = &SideFile> {
        let others = self.common.iter().chain(&self.spare);
        self.arenas.values().chain(others)
    }

    /// Any frame that is there.
    fn first_in(&self, at: Where) -> Option<FrameNo> {
        let mut placed = self.placed.iter();
        placed.find_map(|(&frame, placed)| (placed.1 == at).then_some(frame))
    }

    fn check_empty(&self, at: Where) -> Result<(), GrantError> {
        match self.first_in(at) {
            Some(frame) => Err(GrantError::StillGranted(frame)),
            None => Ok(()),
        }
    }

    /// The caller knows where the frame is.
    fn check(&self, page: u64, frame: FrameNo, at: Where) -> Result<(), GrantError> {
        let known = self.placed.get(&frame).copied();
        match known.unwrap_or((page, Where::Home)) {
            known if known == (page, at) => Ok(()),
            (page, known) => Err(GrantError::BadRange(format!(
                "frame {} holds page {page}, which is at {known:?}, not {at:?}",
                frame.0
            ))),
        }
    }

    /// The home is closed.
    pub(super) fn end(&mut self) {
        *self = Self {
            serial: self.serial,
            ..Self::default()
        };
    }

    /// Frames that guests can have mapped for writing.
    pub(super) fn writable(&self) -> Vec<FrameNo> {
        let writable = |at| matches!(at, Where::Arena(_) | Where::Common);
        let placed = self.placed.iter().filter(|(_, placed)| writable(placed.1));
        placed.map(|(&frame, _)| frame).collect()
    }
}

impl Home {
    /// A descriptor of `dom`'s arena.
    pub(super) fn arena(
        &self,
        dom: DomId,
        files: impl FnOnce() -> Result<Arc<GuestFiles>, GrantError>,
    ) -> Result<OwnedFd, GrantError> {
        let beside = &mut *self.beside.lock();
        // Of a session before that had the number: it may still have the file.
        if beside.arenas.get(&dom).is_some_and(SideFile::is_over) {
            beside.check_empty(Where::Arena(dom))?;
            beside.arenas.remove(&dom);
        }
        let arena = match beside.arenas.entry(dom) {
            std::collections::btree_map::Entry::Occupied(arena) => arena.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(SideFile::for_guests(&files()?, self.bytes())?)
            }
        };
        arena.descriptor()
    }

    pub(super) fn end_arena(&self, dom: DomId) -> Result<(), GrantError> {
        let beside = &mut *self.beside.lock();
        beside.check_empty(Where::Arena(dom))?;
        beside.arenas.remove(&dom);
        Ok(())
    }

    /// A descriptor of the common file, and its number.
    pub(super) fn common(
        &self,
        files: impl FnOnce() -> Result<Arc<GuestFiles>, GrantError>,
    ) -> Result<(u32, OwnedFd), GrantError> {
        let beside = &mut *self.beside.lock();
        let common = match &mut beside.common {
            Some(common) => common,
            none => none.insert(SideFile::for_guests(&files()?, self.bytes())?),
        };
        Ok((beside.serial, common.descriptor()?))
    }

    pub(super) fn renew_common(&self) -> Result<(), GrantError> {
        let beside = &mut *self.beside.lock();
        beside.check_empty(Where::Common)?;
        beside.common = None;
        beside.serial += 1;
        Ok(())
    }

    /// [`crate::Backend::place`]. Gives whether a page was at `to`, in the home, that nobody had put there.
    pub(super) fn place(
        &self,
        page: u64,
        frame: FrameNo,
        (from, to): (Where, Where),
        leave: bool,
    ) -> Result<bool, GrantError> {
        let (start, _) = self.range(page, 1)?;
        let beside = &mut *self.beside.lock();
        if from == to {
            return Err(GrantError::BadRange(format!("page {page} is at {to:?}")));
        }
        // A copy gets a frame that is new.
        let at = if leave { Where::Home } else { from };
        beside.check(page, frame, at)?;
        if to == Where::Spare && beside.spare.is_none() {
            let spare = SideFile::own(self.files.mount_of_our_own(), self.bytes())?;
            beside.spare = Some(spare);
        }
        let mut data = [0; PAGE_SIZE];
        self.read_at(beside, start, from, &mut data)?;
        let foreign = match to {
            Where::Home => self.store(page, &data)?,
            to => {
                self.write_beside(beside, start, to, &data)?;
                false
            }
        };
        if !leave && let Err(error) = self.take_out(beside, page, from) {
            // The first error is the one to tell.
            let _ = self.take_out(beside, page, to);
            return Err(error);
        }
        match to {
            Where::Home => beside.placed.remove(&frame),
            to => beside.placed.insert(frame, (page, to)),
        };
        Ok(foreign)
    }

    /// Reads a page that is there, wherever that is; zeros past the end of the file.
    fn read_at(
        &self,
        beside: &Beside,
        start: u64,
        at: Where,
        buf: &mut [u8],
    ) -> Result<(), GrantError> {
        let file = match at {
            Where::Home => None,
            at => Some(beside.existing(at)?),
        };
        let is_there = match (at, file) {
            (Where::Spare, Some(file)) => file.holds(start)?,
            // A guest may have taken the page out of its own file: that is as good as zeros.
            (_, Some(_)) => true,
            (_, None) => self.holds(start)?,
        };
        if !is_there {
            let what = format!("there is no page at byte {start} of {at:?}");
            return Err(GrantError::BadRange(what));
        }
        match file {
            Some(file) => file.read(start, buf)?,
            None => self.load_here(start / PAGE_SIZE_U64, buf)?,
        }
        let within = usize::try_from(self.bytes().saturating_sub(start)).unwrap_or(usize::MAX);
        if let Some(tail) = buf.get_mut(within..) {
            tail.fill(0);
        }
        Ok(())
    }

    /// Writes up to the end of the file.
    fn write_beside(
        &self,
        beside: &Beside,
        at_byte: u64,
        at: Where,
        data: &[u8],
    ) -> Result<(), GrantError> {
        let within = self.bytes().saturating_sub(at_byte);
        let within = usize::try_from(within)
            .unwrap_or(usize::MAX)
            .min(data.len());
        beside.existing(at)?.write(at_byte, &data[..within])
    }

    fn take_out(&self, beside: &Beside, page: u64, at: Where) -> Result<(), GrantError> {
        let start = page * PAGE_SIZE_U64;
        match at {
            Where::Home => self.discard_here(page, 1),
            at => beside.existing(at)?.punch(start, start + PAGE_SIZE_U64),
        }
    }

    /// Reads one page, wherever the frame is; past the end of the file come zeros.
    pub(super) fn load(
        &self,
        page: u64,
        frame: FrameNo,
        at: Option<Where>,
        buf: &mut [u8],
    ) -> Result<(), GrantError> {
        let (start, _) = self.range(page, 1)?;
        let beside = &*self.beside.lock();
        let at = at.unwrap_or_else(|| beside.at(frame));
        beside.check(page, frame, at)?;
        match at {
            Where::Home => self.load_here(page, buf),
            at => self.read_at(beside, start, at, buf),
        }
    }

    /// [`crate::Backend::write_at`]
    pub(super) fn write_at(
        &self,
        page: u64,
        frame: FrameNo,
        at: Where,
        offset: usize,
        data: &[u8],
    ) -> Result<(), GrantError> {
        let (start, _) = self.range(page, 1)?;
        if offset
            .checked_add(data.len())
            .is_none_or(|end| end > PAGE_SIZE)
        {
            let what = format!(
                "{} bytes from {offset} on are not within a page",
                data.len()
            );
            return Err(GrantError::BadRange(what));
        }
        let beside = &*self.beside.lock();
        beside.check(page, frame, at)?;
        let at_byte = start + offset as u64;
        match at {
            Where::Home if !self.holds(start)? => Err(GrantError::BadRange(format!(
                "page {page} is not in the home"
            ))),
            Where::Home => self.write_here(at_byte, data),
            at => self.write_beside(beside, at_byte, at, data),
        }
    }

    /// Takes pages out of where their frames are.
    pub(super) fn discard(&self, first: u64, frames: &[FrameNo]) -> Result<(), GrantError> {
        self.range(first, frames.len())?;
        let beside = &mut *self.beside.lock();
        let pages = || (first..).zip(frames);
        for (page, &frame) in pages() {
            beside.check(page, frame, beside.at(frame))?;
        }
        let mut here = Vec::new();
        for (page, &frame) in pages() {
            match beside.at(frame) {
                Where::Home => here.push(page),
                at => {
                    self.take_out(beside, page, at)?;
                    beside.placed.remove(&frame);
                }
            }
        }
        for run in here.chunk_by(|a, b| a + 1 == *b) {
            self.discard_here(run[0], run.len())?;
        }
        Ok(())
    }

    /// Runs of pages that are there or beside, as (first, count), in order.
    pub(super) fn present_pages(&self) -> Result<Vec<(u64, u64)>, GrantError> {
        let beside = &*self.beside.lock();
        let mut runs = self.present_here()?;
        if beside.placed.is_empty() {
            return Ok(runs);
        }
        for &(page, at) in beside.placed.values() {
            if at != Where::Spare || beside.existing(at)?.holds(page * PAGE_SIZE_U64)? {
                runs.push((page, 1));
            }
        }
        runs.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (first, count) in runs {
            match merged.last_mut() {
                Some((start, length)) if first <= *start + *length => {
                    *length = (*length).max(first + count - *start);
                }
                _ => merged.push((first, count)),
            }
        }
        Ok(merged)
    }

    /// [`crate::Backend::resize_home`]
    pub(super) fn resize(&self, bytes: u64) -> Result<(), GrantError> {
        check_bytes(bytes)?;
        let beside = &mut *self.beside.lock();
        let before = self.bytes();
        let first = before.min(bytes) / PAGE_SIZE_U64;
        if let Some((frame, (page, at))) =
            beside.placed.iter().find(|(_, (page, _))| *page >= first)
        {
            return Err(GrantError::BadRange(format!(
                "page {page} is at {at:?} still, in frame {}",
                frame.0
            )));
        }
        let end = pages_for(before.max(bytes)) * PAGE_SIZE_U64;
        for file in beside.files() {
            file.punch(first * PAGE_SIZE_U64, end)?;
            file.resize(bytes)?;
        }
        self.resize_here(first, bytes)
    }
}
