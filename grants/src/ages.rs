//! Lists of slots from old to new, one for each domain, linked through one array.
//!
//! A link is kept as its distance from the neighbour: 0 older is the slot before, 0 newer the one
//! behind. Grants are given slots in a row, so most links are 0, as is memory nobody touched: a
//! batch is linked by writing nothing. The ends of a list are its owner's knowledge
//! ([`AgeList`]); their outward links are 0 like those of free slots.

use crate::ledger::{Slot, grow_zeroed};

/// Both links of one slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, zerocopy::FromZeros)]
struct Link {
    older: u32,
    newer: u32,
}

/// One list's ends; both 0 when it is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct AgeList {
    pub oldest: Slot,
    pub newest: Slot,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Ages {
    links: Vec<Link>,
}

impl Ages {
    /// Room for slots below `slots`; `None` when there is no memory.
    pub(crate) fn grow(&mut self, slots: u32) -> Option<()> {
        grow_zeroed(&mut self.links, slots)
    }

    /// The slot behind `slot` in a list of which it is not the end.
    #[inline]
    fn newer(&self, slot: Slot) -> Slot {
        self.links[slot as usize]
            .newer
            .wrapping_add(slot)
            .wrapping_add(1)
    }

    #[inline]
    fn older(&self, slot: Slot) -> Slot {
        self.links[slot as usize]
            .older
            .wrapping_add(slot)
            .wrapping_sub(1)
    }

    /// Makes `newer` follow `older`.
    #[inline]
    fn join(&mut self, older: Slot, newer: Slot) {
        let distance = newer.wrapping_sub(older).wrapping_sub(1);
        self.links[older as usize].newer = distance;
        self.links[newer as usize].older = distance.wrapping_neg();
    }

    /// Puts slots that were free, `first` to `last`, at the new end.
    #[inline]
    pub(crate) fn append(&mut self, list: &mut AgeList, first: Slot, last: Slot) {
        if list.newest == 0 {
            list.oldest = first;
        } else if list.newest + 1 != first {
            self.join(list.newest, first);
        }
        list.newest = last;
    }

    /// Takes a slot out of its list.
    #[inline]
    pub(crate) fn unlink(&mut self, list: &mut AgeList, slot: Slot) {
        match (slot == list.oldest, slot == list.newest) {
            (true, true) => *list = AgeList::default(),
            (true, false) => {
                list.oldest = self.newer(slot);
                self.links[list.oldest as usize].older = 0;
            }
            (false, true) => {
                list.newest = self.older(slot);
                self.links[list.newest as usize].newer = 0;
            }
            (false, false) => self.join(self.older(slot), self.newer(slot)),
        }
        self.links[slot as usize] = Link::default();
    }

    /// From old to new.
    pub(crate) fn iter(&self, list: AgeList) -> impl Iterator<Item = Slot> + '_ {
        let mut next = list.oldest;
        std::iter::from_fn(move || {
            let slot = (next != 0).then_some(next)?;
            next = if slot == list.newest {
                0
            } else {
                self.newer(slot)
            };
            Some(slot)
        })
    }

    /// Are the links around a slot of this list whole, and both neighbours such as `own` accepts?
    pub(crate) fn is_whole(&self, list: AgeList, slot: Slot, own: impl Fn(Slot) -> bool) -> bool {
        let Link { older, newer } = self.links[slot as usize];
        let from_older = if slot == list.oldest {
            older == 0
        } else {
            let before = self.older(slot);
            own(before) && before != list.newest && self.newer(before) == slot
        };
        let from_newer = if slot == list.newest {
            newer == 0
        } else {
            let behind = self.newer(slot);
            own(behind) && behind != list.oldest && self.older(behind) == slot
        };
        from_older && from_newer
    }

    /// Keeps two numbers with a free slot.
    pub(crate) fn keep(&mut self, slot: Slot, a: u32, b: u32) {
        self.links[slot as usize] = Link { older: a, newer: b };
    }

    /// What [`Ages::keep`] kept; the slot may be linked again.
    pub(crate) fn take(&mut self, slot: Slot) -> (u32, u32) {
        let Link { older, newer } = std::mem::take(&mut self.links[slot as usize]);
        (older, newer)
    }
}
