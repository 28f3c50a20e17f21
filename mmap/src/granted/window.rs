//! One batch of grants that is mapped, and how it comes to lie over a range that others read.

use super::device::{Batch, Device};
use crate::site::Hold;
use crate::sys::Region;
use copage_grants::Access;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How much a session has mapped.
#[derive(Debug, Default)]
pub(crate) struct Held {
    pub(crate) windows: AtomicUsize,
    pub(crate) pages: AtomicUsize,
    /// Pages, each as often as it was mapped, that were mapped at one time: the hypervisor can track so many.
    proven: AtomicUsize,
}

/// A batch. Whole or not at all: there is no way to let go of a part.
///
/// Its owner drops it when its memory is unmapped: only then are its entries out of use, and only
/// after that may anybody be told so.
pub(crate) struct Window {
    device: Arc<dyn Device>,
    batch: Batch,
    held: Arc<Held>,
    /// Lives as long as the window, for who remembers its age.
    alive: Arc<()>,
    /// Stores to it are the file's: dropped when they can come no more.
    hold: Option<Hold>,
}

/// Why a batch was not placed.
#[derive(Debug)]
pub(crate) enum NotPlaced {
    /// The range is as it was.
    Untouched(io::Error),
    /// The range may have lost its pages.
    Torn(io::Error),
    /// `still` said no. The range is as it was.
    Late,
}

impl Window {
    fn announce(
        device: &Arc<dyn Device>,
        held: &Arc<Held>,
        (granter, refs, access): (u16, &[u32], Access),
    ) -> io::Result<Self> {
        let batch = device.announce(granter, refs, access)?;
        held.windows.fetch_add(1, Ordering::Relaxed);
        held.pages.fetch_add(refs.len(), Ordering::Relaxed);
        Ok(Self {
            device: Arc::clone(device),
            batch,
            held: Arc::clone(held),
            alive: Arc::new(()),
            hold: None,
        })
    }

    pub(crate) fn pages(&self) -> usize {
        self.batch.pages
    }

    /// Keeps what says that its pages may be stored to.
    pub(crate) fn keep(&mut self, hold: Hold) {
        self.hold = Some(hold);
    }

    pub(crate) fn alive(&self) -> &Arc<()> {
        &self.alive
    }

    /// Maps a batch over the pages at `at` of `region`, which every other thread sees appear in one
    /// step. `still` is asked when the entries are in use, and so stay what they are, and nobody has
    /// seen them yet.
    pub(crate) fn place(
        device: &Arc<dyn Device>,
        held: &Arc<Held>,
        entries: (u16, &[u32], Access),
        region: &Region,
        at: usize,
        still: impl FnOnce() -> bool,
    ) -> Result<Self, NotPlaced> {
        use NotPlaced::{Late, Torn, Untouched};
        let announce = || Self::announce(device, held, entries).map_err(Untouched);
        let trial = announce()?;
        // Dropped before `trial`, whose memory it is.
        let memory = device.map(trial.batch).map_err(Untouched)?;
        if !still() {
            drop(memory);
            return Err(Late);
        }
        if device.movable() {
            region.replace(at, memory).map_err(Torn)?;
            return Ok(trial);
        }
        // While the trial is mapped the hypervisor lets the same domain map these entries again,
        // whatever becomes of them.
        if held.pages.load(Ordering::Relaxed) + trial.pages() > held.proven.load(Ordering::Relaxed)
        {
            // So many never were: a second trial, because what fails over the range leaves a hole there.
            let second = announce()?;
            let mapped = device.map(second.batch).map_err(Untouched)?;
            let pages = held.pages.load(Ordering::Relaxed);
            held.proven.fetch_max(pages, Ordering::Relaxed);
            // Before `second`, whose memory it is.
            drop(mapped);
        }
        let window = announce()?;
        device.map_over(window.batch, region, at).map_err(Torn)?;
        drop(memory);
        Ok(window)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if let Err(error) = self.device.forget(self.batch) {
            tracing::warn!(%error, "a batch of grants could not be let go of");
        }
        self.held.windows.fetch_sub(1, Ordering::Relaxed);
        self.held
            .pages
            .fetch_sub(self.batch.pages, Ordering::Relaxed);
    }
}
