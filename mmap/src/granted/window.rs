//! One batch of grants that is mapped, and how it comes to lie over a range that others read.

use super::device::Device;
use crate::sys::Region;
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
    index: u64,
    pages: usize,
    held: Arc<Held>,
    /// Lives as long as the window, for who remembers its age.
    alive: Arc<()>,
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
        granter: u16,
        refs: &[u32],
    ) -> io::Result<Self> {
        let index = device.announce(granter, refs)?;
        held.windows.fetch_add(1, Ordering::Relaxed);
        held.pages.fetch_add(refs.len(), Ordering::Relaxed);
        Ok(Self {
            device: Arc::clone(device),
            index,
            pages: refs.len(),
            held: Arc::clone(held),
            alive: Arc::new(()),
        })
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
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
        (granter, refs): (u16, &[u32]),
        region: &Region,
        at: usize,
        still: impl FnOnce() -> bool,
    ) -> Result<Self, NotPlaced> {
        use NotPlaced::{Late, Torn, Untouched};
        let trial = Self::announce(device, held, granter, refs).map_err(Untouched)?;
        // Dropped before `trial`, whose memory it is.
        let memory = device.map(trial.index, refs.len()).map_err(Untouched)?;
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
        if held.pages.load(Ordering::Relaxed) + refs.len() > held.proven.load(Ordering::Relaxed) {
            // So many never were: a second trial, because what fails over the range leaves a hole there.
            let second = Self::announce(device, held, granter, refs).map_err(Untouched)?;
            let mapped = device.map(second.index, refs.len()).map_err(Untouched)?;
            let pages = held.pages.load(Ordering::Relaxed);
            held.proven.fetch_max(pages, Ordering::Relaxed);
            // Before `second`, whose memory it is.
            drop(mapped);
        }
        let window = Self::announce(device, held, granter, refs).map_err(Untouched)?;
        device
            .map_over(window.index, refs.len(), region, at)
            .map_err(Torn)?;
        drop(memory);
        Ok(window)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if let Err(error) = self.device.forget(self.index, self.pages) {
            tracing::warn!(%error, "a batch of grants could not be let go of");
        }
        self.held.windows.fetch_sub(1, Ordering::Relaxed);
        self.held.pages.fetch_sub(self.pages, Ordering::Relaxed);
    }
}
