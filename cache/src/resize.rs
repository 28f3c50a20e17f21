//! The budget as it moves: banks of frames made, emptied, and given back.
//!
//! A larger budget waits for its banks to be made. A smaller one holds at once for new frames; a thread gives
//! back what is in the banks beyond it, asks guests for what they have mapped, and ends each bank in which
//! nothing is left, however long that takes.

use crate::cache::{Cache, now_ms};
use crate::error::CacheError;
use crate::frames::{FrameState, FrameTable};
use crate::limits::{
    DRAIN_POLL_MS, DRAIN_POLL_MS_MAX, FRAMES_MAX, FRAMES_MIN, LEAVING_PAGES_MAX, RECALL_PAGES_MAX,
};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Resize {
    /// Held while banks are made or ended, so that none is opened that is being ended.
    making: Mutex<()>,
    /// The thread has been told to look, or looks.
    queued: AtomicBool,
    /// Some banks are leaving. Written with the frame table's lock.
    leaving: AtomicBool,
    /// When it is told next, in ms.
    poll_ms: AtomicU64,
    /// How long to wait after that, in ms.
    pause_ms: AtomicU64,
}

impl Resize {
    #[inline]
    pub(crate) fn any_leaving(&self) -> bool {
        self.leaving.load(Relaxed)
    }

    /// Somebody waits for a page that has to leave its bank first.
    pub(crate) fn hurry(&self) {
        self.pause_ms.store(0, Relaxed);
        self.poll_ms.fetch_min(now_ms() + DRAIN_POLL_MS, Relaxed);
    }
}

fn check(frames: &FrameTable, asked: u32) -> Result<(), CacheError> {
    if !(FRAMES_MIN..=FRAMES_MAX).contains(&asked) {
        return Err(CacheError::BudgetOutOfBounds {
            min: FRAMES_MIN,
            max: FRAMES_MAX,
        });
    }
    let held = frames.pin_pages + u64::from(frames.count(FrameState::Quarantined));
    if held >= u64::from(asked) {
        let held = held.min(u64::from(u32::MAX)) as u32;
        return Err(CacheError::BudgetBelowPinned { held, asked });
    }
    Ok(())
}

impl Cache {
    /// Changes the budget, while everything goes on. A smaller one is kept at once for new frames; what is
    /// too much is given back in the background, and then the memory that held it. A larger one may have
    /// memory made for it, which takes seconds on Xen; when that fails nothing is changed.
    pub fn set_frames_max(&self, frames_max: u32) -> Result<(), CacheError> {
        let is_done = {
            let mut frames = self.frames.lock();
            check(&frames, frames_max)?;
            let is_there = frames_max <= frames.open_end();
            if is_there {
                // Only closes banks: none that is being ended comes into use.
                self.keep_to(&mut frames, frames_max);
            }
            is_there
        };
        if !is_done {
            let _making = self.resize.making.lock();
            let there = self.backend.make_frames(frames_max)?;
            let mut frames = self.frames.lock();
            // What was made and is refused here after all, is leaving.
            frames.have(there.end);
            let kept = frames.budget();
            let checked = check(&frames, frames_max);
            self.keep_to(&mut frames, if checked.is_ok() { frames_max } else { kept });
            checked?;
        }
        self.events.wake();
        self.refill_if_low();
        self.kick_parked();
        Ok(())
    }

    pub(crate) fn keep_to(&self, frames: &mut FrameTable, budget: u32) {
        frames.set_budget(budget);
        self.resize.leaving.store(frames.any_leaving(), Relaxed);
        self.resize.poll_ms.store(0, Relaxed);
        self.resize.pause_ms.store(0, Relaxed);
    }

    /// Has the thread look at banks that are leaving; when to come again, in ms.
    pub(crate) fn poll_resize(&self, now_ms: u64) -> Option<u64> {
        let resize = &self.resize;
        if !resize.any_leaving() {
            return None;
        }
        if now_ms >= resize.poll_ms.load(Relaxed) && !resize.queued.swap(true, Relaxed) {
            let pause_ms = resize.pause_ms.load(Relaxed);
            let pause_ms = pause_ms.clamp(DRAIN_POLL_MS, DRAIN_POLL_MS_MAX);
            // Longer each time, until something goes on.
            resize.pause_ms.store(pause_ms + pause_ms / 2, Relaxed);
            resize.poll_ms.store(now_ms + pause_ms, Relaxed);
            if self.resize_pool.push(()).is_err() {
                resize.queued.store(false, Relaxed);
            }
        }
        Some(resize.poll_ms.load(Relaxed).max(now_ms + DRAIN_POLL_MS))
    }

    pub(crate) fn run_resize(&self) {
        let used = self.frames.lock().used();
        self.empty_leaving();
        let ended = self.end_emptied();
        {
            let frames = self.frames.lock();
            if ended || frames.used() < used {
                self.resize.pause_ms.store(0, Relaxed);
            }
            self.resize.leaving.store(frames.any_leaving(), Relaxed);
        }
        self.kick_parked();
        self.resize.queued.store(false, Relaxed);
    }

    /// Gives back what is in leaving banks, and asks guests for what they have mapped of it. A bank at a time,
    /// so that the table is not locked for long.
    fn empty_leaving(&self) {
        let mut in_vain = 0;
        loop {
            let (mut idle, mut granted) = (Vec::new(), Vec::new());
            let banks = {
                let mut frames = self.frames.lock();
                let asked = frames.count(FrameState::Recalling);
                let (granted_as, granted_max) = match self.force {
                    true => (FrameState::Evicting, RECALL_PAGES_MAX),
                    // Who has too many questions to answer is taken for dead.
                    false => (
                        FrameState::Recalling,
                        LEAVING_PAGES_MAX.saturating_sub(asked),
                    ),
                };
                let most = (RECALL_PAGES_MAX, granted_max);
                frames.pick_leaving(most, granted_as, (&mut idle, &mut granted))
            };
            if self.force {
                idle.append(&mut granted);
            }
            if !granted.is_empty() {
                self.ask_back(&granted, None);
            }
            in_vain += 1;
            if !idle.is_empty() && self.evict(&idle) > 0 {
                in_vain = 0;
            }
            if in_vain >= banks {
                return;
            }
        }
    }

    /// Ends banks in which nothing is. `true`: some are gone.
    fn end_emptied(&self) -> bool {
        let _making = self.resize.making.lock();
        let emptied = self.frames.lock().emptied();
        let mut any = false;
        for bank in emptied {
            match self.backend.end_bank(bank) {
                Ok(true) => {
                    self.frames.lock().gone(bank);
                    any = true;
                }
                Ok(false) => {}
                Err(error) => tracing::warn!(bank, %error, "a bank of frames could not be ended"),
            }
        }
        any
    }
}
