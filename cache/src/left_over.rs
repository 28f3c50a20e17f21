//! Frames that guests have mapped since an earlier life of the daemon: in quarantine from the start.

use crate::cache::{Cache, now_ms};
use crate::frames::FrameState;
use crate::limits::{DRAIN_POLL_MS, DRAIN_POLL_MS_MAX};
use copage_grants::FrameNo;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct LeftOver {
    /// In order.
    pub frames: Vec<FrameNo>,
    since_ms: u64,
    poll_ms: u64,
}

impl Cache {
    /// Takes the backend's unusable frames out of use. Once, before anything is filled.
    pub(crate) fn find_left_over(&self) {
        let mut left = self.left_over.lock();
        self.backend.unusable_frames(&mut left.frames);
        left.since_ms = now_ms();
        let mut table = self.frames.lock();
        let capacity = table.capacity();
        left.frames.retain(|frame| frame.0 < capacity);
        left.frames.sort_unstable();
        for frame in &left.frames {
            table.set_state(*frame, FrameState::Quarantined);
        }
        if !left.frames.is_empty() {
            tracing::info!(
                frames = left.frames.len(),
                "guests have frames mapped since an earlier start: they are in quarantine"
            );
        }
    }

    /// Takes frames into use that nobody has mapped any more. When to come again, in ms.
    pub(crate) fn poll_left_over(&self, now_ms: u64) -> Option<u64> {
        let mut left = self.left_over.lock();
        if left.frames.is_empty() || now_ms < left.poll_ms {
            return (!left.frames.is_empty()).then_some(left.poll_ms);
        }
        let mut still = Vec::new();
        self.backend.unusable_frames(&mut still);
        still.sort_unstable();
        let before = left.frames.len();
        {
            let mut table = self.frames.lock();
            left.frames.retain(|frame| {
                let stays = still.binary_search(frame).is_ok();
                if !stays {
                    table.set_state(*frame, FrameState::Free);
                }
                stays
            });
        }
        let age_ms = now_ms.saturating_sub(left.since_ms);
        left.poll_ms = now_ms + (age_ms / 4).clamp(DRAIN_POLL_MS, DRAIN_POLL_MS_MAX);
        let next = (!left.frames.is_empty()).then_some(left.poll_ms);
        let some_came = left.frames.len() < before;
        drop(left);
        if some_came {
            self.kick_parked();
        }
        next
    }
}
