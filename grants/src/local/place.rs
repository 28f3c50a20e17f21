//! Moving a home's pages between the home and the files beside it.

use super::beside::Beside;
use super::file;
use super::frames::sys;
use super::guest_file;
use super::home::{Home, check_bytes};
use super::sweeper::SweptFile;
use crate::backend::Where;
use crate::error::GrantError;
use crate::ids::{DomId, FrameNo, PAGE_SIZE, PAGE_SIZE_U64, pages_for};
use std::collections::btree_map::Entry;
use std::os::fd::OwnedFd;

impl Home {
    /// A descriptor of `dom`'s arena, made if there is none.
    pub(super) fn arena(
        &self,
        dom: DomId,
        make: impl FnOnce() -> Result<SweptFile, GrantError>,
    ) -> Result<OwnedFd, GrantError> {
        let beside = &mut *self.beside.lock();
        // Of a session before that had the number: it may still have the file.
        if beside
            .arenas
            .get(&dom)
            .is_some_and(|arena| arena.file.is_over())
        {
            beside.check_empty(Where::Arena(dom))?;
            beside.arenas.remove(&dom);
        }
        let arena = match beside.arenas.entry(dom) {
            Entry::Occupied(arena) => arena.into_mut(),
            Entry::Vacant(place) => place.insert(make()?),
        };
        arena.file.descriptor()
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
        make: impl FnOnce() -> Result<SweptFile, GrantError>,
    ) -> Result<(u32, OwnedFd), GrantError> {
        let beside = &mut *self.beside.lock();
        let common = match &mut beside.common {
            Some(common) => common,
            none => none.insert(make()?),
        };
        Ok((beside.serial, common.file.descriptor()?))
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
            let spare = guest_file::create(self.files.mount_of_our_own(), self.bytes())?;
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
        let page = start / PAGE_SIZE_U64;
        let is_there = match at {
            Where::Home => self.holds(start)?,
            at => beside.file(at)?.holds(page)?,
        };
        if !is_there {
            let what = format!("page {page} is not at {at:?}");
            return Err(GrantError::BadRange(what));
        }
        match at {
            Where::Home => self.load_here(page, buf)?,
            at => beside.file(at)?.read(start, buf)?,
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
        beside.file(at)?.write(at_byte, &data[..within])
    }

    fn take_out(&self, beside: &Beside, page: u64, at: Where) -> Result<(), GrantError> {
        match at {
            Where::Home => self.discard_here(page, 1),
            at => beside.file(at)?.take_out(page),
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
            if beside.file(at)?.holds(page)? {
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

    /// [`crate::Backend::resize_home`]. Guests' files are as long as any can be.
    pub(super) fn resize(&self, bytes: u64) -> Result<(), GrantError> {
        check_bytes(bytes)?;
        let beside = &mut *self.beside.lock();
        let before = self.bytes();
        let first = before.min(bytes) / PAGE_SIZE_U64;
        if let Some(spare) = &beside.spare {
            let end = pages_for(before.max(bytes)) * PAGE_SIZE_U64;
            file::punch(spare, first * PAGE_SIZE_U64, end)?;
            rustix::fs::ftruncate(spare, bytes).map_err(sys("ftruncate of a spare file"))?;
        }
        self.resize_here(first, bytes)
    }
}
