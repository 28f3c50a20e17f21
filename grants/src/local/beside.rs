//! The files beside a home, for pages that guests write, and which frames are in them.
//!
//! The cache numbers frames and knows what each holds; here is written down where a frame is that is not in
//! the home. Of a guest's file nothing else is read, whatever the guest put there.

use super::file::{self, next_data};
use super::sweeper::SweptFile;
use crate::backend::Where;
use crate::error::GrantError;
use crate::ids::{DomId, FrameNo, PAGE_SIZE_U64};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

/// A file beside the home, page for page.
#[derive(Clone, Copy)]
pub(super) enum SideFile<'a> {
    Guests(&'a SweptFile),
    /// The daemon's own.
    Own(&'a OwnedFd),
}

impl SideFile<'_> {
    /// Is the page there? (Of a guest's file that tells nothing: what it took out is as good as zeros.)
    pub(super) fn holds(self, page: u64) -> Result<bool, GrantError> {
        let start = page * PAGE_SIZE_U64;
        match self {
            Self::Guests(_) => Ok(true),
            Self::Own(file) => Ok(next_data(file, start)? == Some(start)),
        }
    }

    pub(super) fn read(self, from: u64, buf: &mut [u8]) -> Result<(), GrantError> {
        match self {
            Self::Guests(swept) => swept.file.read(from, buf),
            Self::Own(file) => file::read(file, from, buf),
        }
    }

    /// Writes within one page.
    pub(super) fn write(self, from: u64, data: &[u8]) -> Result<(), GrantError> {
        match self {
            Self::Guests(swept) => swept.write(from, data),
            Self::Own(file) => file::write(file, from, data),
        }
    }

    pub(super) fn take_out(self, page: u64) -> Result<(), GrantError> {
        match self {
            Self::Guests(swept) => {
                swept.sweep(page);
                Ok(())
            }
            Self::Own(file) => {
                let start = page * PAGE_SIZE_U64;
                file::punch(file, start, start + PAGE_SIZE_U64)
            }
        }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Beside {
    /// Frames that are not in the home: which page of it, and where.
    pub(super) placed: BTreeMap<FrameNo, (u64, Where)>,
    pub(super) arenas: BTreeMap<DomId, SweptFile>,
    pub(super) common: Option<SweptFile>,
    /// Which of the common files that there have been it is.
    pub(super) serial: u32,
    pub(super) spare: Option<OwnedFd>,
}

impl Beside {
    pub(super) fn at(&self, frame: FrameNo) -> Where {
        self.placed
            .get(&frame)
            .map_or(Where::Home, |placed| placed.1)
    }

    /// The file of a place that is not the home.
    pub(super) fn file(&self, at: Where) -> Result<SideFile<'_>, GrantError> {
        let file = match at {
            Where::Home => None,
            Where::Arena(dom) => self.arenas.get(&dom).map(SideFile::Guests),
            Where::Common => self.common.as_ref().map(SideFile::Guests),
            Where::Spare => self.spare.as_ref().map(SideFile::Own),
        };
        file.ok_or_else(|| GrantError::BadRange(format!("there is no file {at:?} of this home")))
    }

    /// Any frame that is there.
    fn first_in(&self, at: Where) -> Option<FrameNo> {
        let mut placed = self.placed.iter();
        placed.find_map(|(&frame, placed)| (placed.1 == at).then_some(frame))
    }

    pub(super) fn check_empty(&self, at: Where) -> Result<(), GrantError> {
        match self.first_in(at) {
            Some(frame) => Err(GrantError::StillGranted(frame)),
            None => Ok(()),
        }
    }

    /// The caller knows where the frame is.
    pub(super) fn check(&self, page: u64, frame: FrameNo, at: Where) -> Result<(), GrantError> {
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
