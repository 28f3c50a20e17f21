//! The free slots of one table, as runs of neighbours: granting a batch into one run is going along
//! arrays.

use crate::ages::Ages;
use crate::ledger::Slot;
use std::ops::Range;

/// The topmost run is here, the others are linked through each one's first slot ([`Ages::keep`]: its
/// length, the next run).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    at: Slot,
    len: u32,
    below: Slot,
    /// Free slots of all runs.
    free: u32,
}

impl Span {
    /// All of `at..end` free.
    pub(crate) fn new(at: Slot, end: Slot) -> Self {
        Self {
            at,
            len: end - at,
            below: 0,
            free: end - at,
        }
    }

    /// The slots of `at..end` that `is_free` says are.
    pub(crate) fn of_free(
        at: Slot,
        end: Slot,
        ages: &mut Ages,
        is_free: impl Fn(Slot) -> bool,
    ) -> Self {
        let mut span = Self::new(end, end);
        // From above, so that each run grows downwards into one.
        for slot in (at..end).rev().filter(|&slot| is_free(slot)) {
            span.give(slot, ages);
        }
        span
    }

    /// Free slots of all runs.
    pub(crate) fn free(&self) -> u32 {
        self.free
    }

    /// The topmost run, of at least one slot when any is free.
    #[inline]
    pub(crate) fn top(&mut self, ages: &mut Ages) -> Range<Slot> {
        if self.len == 0 && self.below != 0 {
            self.at = self.below;
            (self.len, self.below) = ages.take(self.at);
        }
        self.at..self.at + self.len
    }

    /// Takes the first `count` slots of the topmost run, which has as many; gives the first.
    #[inline]
    pub(crate) fn take(&mut self, count: u32) -> Slot {
        debug_assert!(count <= self.len);
        let first = self.at;
        self.at += count;
        self.len -= count;
        self.free -= count;
        first
    }

    /// A slot is free (and its links are).
    #[inline]
    pub(crate) fn give(&mut self, slot: Slot, ages: &mut Ages) {
        self.free += 1;
        if self.len > 0 && slot + 1 == self.at {
            self.at = slot;
            self.len += 1;
        } else if self.len > 0 && slot == self.at + self.len {
            self.len += 1;
        } else {
            if self.len > 0 {
                ages.keep(self.at, self.len, self.below);
                self.below = self.at;
            }
            self.at = slot;
            self.len = 1;
        }
    }
}
