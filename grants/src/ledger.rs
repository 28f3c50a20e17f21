//! The ledger: for every frame its grants, for every domain its grants from old to new, and counts.
//!
//! Arrays only. A grant is a *slot*: its entry's place counted through all tables. A record of 16
//! bytes for each slot links it into two lists:
//!
//! * the frame's, newest grant first, from `heads[frame]`. The last record holds the frame itself,
//!   marked by [`FRAME`], so that a slot leads to its frame without asking the table;
//! * the domain's, in age order.
//!
//! Slot 0 is a reserved entry and so stands for "none", which lets all arrays begin as zeros that
//! cost no memory before they are used. The ledger does not know the table: comparing the two
//! means something.

use crate::backend::Access;
use crate::ids::{DomId, FrameNo};
use crate::limits::{ENTRIES_MAX, FRAMES_MAX, GRANTS_PER_DOMAIN_DEFAULT};
use std::ops::Range;
use zerocopy::FromZeros;

/// A place in the ledger and in the tables; 0 is none.
pub(crate) type Slot = u32;

/// Marks a link that is not a slot but the frame whose list ends here.
const FRAME: u32 = 1 << 31;
const _: () = assert!(FRAMES_MAX <= FRAME && ENTRIES_MAX <= FRAME);

/// Bits of [`Record::state`].
const USED: u16 = 1;
const WRITABLE: u16 = 2;

/// One grant. Of a free slot all is zero, but for the links of [`Span`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, zerocopy::FromZeros)]
struct Record {
    frame_next: u32,
    older: Slot,
    newer: Slot,
    dom: u16,
    state: u16,
}

const _: () = assert!(size_of::<Record>() == 16);

#[derive(Clone, Copy, Debug)]
struct Domain {
    oldest: Slot,
    newest: Slot,
    count: u64,
    grants_max: u64,
}

impl Domain {
    const NEW: Self = Self {
        oldest: 0,
        newest: 0,
        count: 0,
        grants_max: GRANTS_PER_DOMAIN_DEFAULT,
    };
}

/// Free slots of one table: runs of them, the topmost here, the others linked through the record of
/// each one's first slot (its length in `older`, the next run in `newer`). Runs keep neighbours
/// together: granting a batch into one run is going along arrays.
#[derive(Clone, Copy, Debug)]
struct Span {
    at: Slot,
    len: u32,
    below: Slot,
    /// Free slots of all runs.
    free: u32,
}

/// One grant as the ledger has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub dom: DomId,
    pub frame: FrameNo,
    pub access: Access,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    records: Vec<Record>,
    heads: Vec<Slot>,
    domains: Vec<Domain>,
    spans: Vec<Span>,
}

impl Ledger {
    /// Adds the slots of a table of `entries` entries behind those there are, the first `reserved`
    /// of them never to be used. Gives its first slot; `None` when there is no room or memory.
    pub(crate) fn add_span(&mut self, entries: u32, reserved: u32) -> Option<Slot> {
        let base = u32::try_from(self.records.len()).ok()?;
        let end = base
            .checked_add(entries)
            .filter(|&end| end <= ENTRIES_MAX)?;
        if self.records.is_empty() {
            // Zeroed by the allocator: not touched, and so not there, before it is used.
            self.records = Record::new_vec_zeroed(entries as usize).ok()?;
        } else {
            Record::extend_vec_zeroed(&mut self.records, entries as usize).ok()?;
        }
        let at = base.saturating_add(reserved).min(end);
        self.spans.push(Span {
            at,
            len: end - at,
            below: 0,
            free: end - at,
        });
        Some(base)
    }

    /// Free slots of a span.
    pub(crate) fn available(&self, span: usize) -> u32 {
        self.spans[span].free
    }

    /// Slots of all spans, used or not, reserved ones included.
    pub(crate) fn slots(&self) -> u32 {
        // add_span keeps it below ENTRIES_MAX.
        self.records.len() as u32
    }

    /// Makes room for frames below `end` (at most [`FRAMES_MAX`]).
    #[inline]
    pub(crate) fn reserve_frames(&mut self, end: u32) {
        if end as usize > self.heads.len() {
            let len = (end as usize).next_power_of_two().max(1024);
            self.heads.resize(len, 0);
        }
    }

    /// `dom`'s account, made when it is first needed.
    fn domain(&mut self, dom: DomId) -> &mut Domain {
        let at = usize::from(dom.0);
        if at >= self.domains.len() {
            self.domains.resize(at + 1, Domain::NEW);
        }
        &mut self.domains[at]
    }

    fn domain_now(&self, dom: DomId) -> Domain {
        self.domains
            .get(usize::from(dom.0))
            .copied()
            .unwrap_or(Domain::NEW)
    }

    /// Grants of `dom`.
    pub(crate) fn count(&self, dom: DomId) -> u64 {
        self.domain_now(dom).count
    }

    /// How many `dom` may have.
    pub(crate) fn grants_max(&self, dom: DomId) -> u64 {
        self.domain_now(dom).grants_max
    }

    pub(crate) fn set_grants_max(&mut self, dom: DomId, grants_max: u64) {
        self.domain(dom).grants_max = grants_max;
    }

    /// Domains that ever had an account are below this.
    pub(crate) fn domains(&self) -> u16 {
        // Indexed by u16 domids below the reserved ones.
        self.domains.len() as u16
    }

    #[inline]
    fn head(&self, frame: FrameNo) -> Slot {
        self.heads.get(frame.0 as usize).copied().unwrap_or(0)
    }

    /// The frame's slots, newest first.
    #[inline]
    pub(crate) fn slots_of(&self, frame: FrameNo) -> impl Iterator<Item = Slot> + '_ {
        let mut next = self.head(frame);
        std::iter::from_fn(move || {
            if next == 0 || next & FRAME != 0 {
                return None;
            }
            let slot = next;
            next = self.records[slot as usize].frame_next;
            Some(slot)
        })
    }

    /// `dom`'s slots, oldest first.
    pub(crate) fn slots_by_age(&self, dom: DomId) -> impl Iterator<Item = Slot> + '_ {
        let mut next = self.domain_now(dom).oldest;
        std::iter::from_fn(move || {
            let slot = (next != 0).then_some(next)?;
            next = self.records[slot as usize].newer;
            Some(slot)
        })
    }

    /// `dom`'s grant of `frame`.
    #[inline]
    pub(crate) fn find(&self, frame: FrameNo, dom: DomId) -> Option<Slot> {
        self.slots_of(frame)
            .find(|&slot| self.records[slot as usize].dom == dom.0)
    }

    /// Who holds the slot's grant.
    #[inline]
    pub(crate) fn dom_of(&self, slot: Slot) -> DomId {
        DomId(self.records[slot as usize].dom)
    }

    #[inline]
    pub(crate) fn access_of(&self, slot: Slot) -> Access {
        access(self.records[slot as usize].state)
    }

    /// Whose frame the slot's grant is of.
    pub(crate) fn frame_of(&self, slot: Slot) -> FrameNo {
        let mut link = self.records[slot as usize].frame_next;
        while link & FRAME == 0 && link != 0 {
            link = self.records[link as usize].frame_next;
        }
        FrameNo(link & !FRAME)
    }

    /// The slot's grant; `None` for a slot that is free.
    pub(crate) fn held(&self, slot: Slot) -> Option<Held> {
        let record = self.records.get(slot as usize)?;
        (record.state & USED != 0).then(|| Held {
            dom: DomId(record.dom),
            frame: self.frame_of(slot),
            access: access(record.state),
        })
    }

    /// Records grants of the first of `frames` to `dom`: as many as come before one that `dom` holds
    /// already, and as fit into the topmost run of free slots. Gives their slots, which are in a
    /// row. The caller has seen that the span has a free slot and that there is room for the frames.
    /// With `none_held` it has also seen that `dom` held none of them before this call.
    #[inline]
    pub(crate) fn add(
        &mut self,
        span: usize,
        frames: &[FrameNo],
        dom: DomId,
        access: Access,
        none_held: bool,
    ) -> Range<Slot> {
        let mut fit = frames.len().min(self.top_run(span) as usize);
        if !none_held {
            let held = |&frame: &FrameNo| self.find(frame, dom).is_some();
            fit = frames[..fit].iter().position(held).unwrap_or(fit);
        }
        let first = self.spans[span].at;
        let state = match access {
            Access::ReadOnly => USED,
            Access::ReadWrite => USED | WRITABLE,
        };
        let before = self.domain(dom).newest;
        let records = &mut self.records[first as usize..][..fit];
        let heads = self.heads.as_mut_slice();
        let mut slot = first;
        let mut older = before;
        for (record, frame) in records.iter_mut().zip(frames) {
            let head = &mut heads[frame.0 as usize];
            // Granted a moment ago, in this call: the frame is named twice.
            if head.wrapping_sub(first) < slot - first {
                break;
            }
            *record = Record {
                frame_next: if *head == 0 { FRAME | frame.0 } else { *head },
                older,
                newer: slot + 1,
                dom: dom.0,
                state,
            };
            *head = slot;
            older = slot;
            slot += 1;
        }
        let added = slot - first;
        if added > 0 {
            self.records[older as usize].newer = 0;
            if before != 0 {
                self.records[before as usize].newer = first;
            }
            let account = self.domain(dom);
            if before == 0 {
                account.oldest = first;
            }
            account.newest = older;
            account.count += u64::from(added);
            self.take_slots(span, added);
        }
        first..slot
    }

    /// The length of the topmost run of free slots, of at least one when any is free.
    #[inline]
    fn top_run(&mut self, span: usize) -> u32 {
        let span = &mut self.spans[span];
        if span.len == 0 && span.below != 0 {
            span.at = span.below;
            let first = std::mem::take(&mut self.records[span.at as usize]);
            span.len = first.older;
            span.below = first.newer;
        }
        span.len
    }

    #[inline]
    fn take_slots(&mut self, span: usize, count: u32) {
        let span = &mut self.spans[span];
        debug_assert!(count <= span.len);
        span.at += count;
        span.len -= count;
        span.free -= count;
    }

    fn give_slot(&mut self, span: usize, slot: Slot) {
        self.records[slot as usize] = Record::default();
        let span = &mut self.spans[span];
        span.free += 1;
        if span.len > 0 && slot + 1 == span.at {
            span.at = slot;
            span.len += 1;
        } else if span.len > 0 && slot == span.at + span.len {
            span.len += 1;
        } else {
            if span.len > 0 {
                let run = &mut self.records[span.at as usize];
                run.older = span.len;
                run.newer = span.below;
                span.below = span.at;
            }
            span.at = slot;
            span.len = 1;
        }
    }

    /// Ends a grant; gives its frame.
    pub(crate) fn remove(&mut self, span: usize, slot: Slot) -> FrameNo {
        let frame = self.frame_of(slot);
        let record = self.records[slot as usize];
        if self.heads[frame.0 as usize] == slot {
            let next = record.frame_next;
            self.heads[frame.0 as usize] = if next & FRAME == 0 { next } else { 0 };
        } else {
            let before = self
                .slots_of(frame)
                .find(|&other| self.records[other as usize].frame_next == slot);
            // A used slot is in its frame's list; the audit would tell if it were not.
            if let Some(before) = before {
                self.records[before as usize].frame_next = record.frame_next;
            }
        }
        self.unlink_age(DomId(record.dom), slot);
        self.domain(DomId(record.dom)).count -= 1;
        self.give_slot(span, slot);
        frame
    }

    fn unlink_age(&mut self, dom: DomId, slot: Slot) {
        let Record { older, newer, .. } = self.records[slot as usize];
        if older == 0 {
            self.domain(dom).oldest = newer;
        } else {
            self.records[older as usize].newer = newer;
        }
        if newer == 0 {
            self.domain(dom).newest = older;
        } else {
            self.records[newer as usize].older = older;
        }
    }

    /// Makes a grant its domain's newest.
    pub(crate) fn renew(&mut self, slot: Slot) {
        let dom = self.dom_of(slot);
        self.unlink_age(dom, slot);
        let account = self.domain(dom);
        let older = std::mem::replace(&mut account.newest, slot);
        if older == 0 {
            account.oldest = slot;
        } else {
            self.records[older as usize].newer = slot;
        }
        let record = &mut self.records[slot as usize];
        record.older = older;
        record.newer = 0;
    }

    /// Checks the links around one used slot; a line that says what is wrong.
    pub(crate) fn check_slot(&self, slot: Slot) -> Option<String> {
        let record = self.records[slot as usize];
        let frame = self.frame_of(slot);
        let account = self.domain_now(DomId(record.dom));
        if !self.slots_of(frame).any(|other| other == slot) {
            return Some(format!(
                "grant {slot} is not in the list of its frame {}",
                frame.0
            ));
        }
        let before = if record.older == 0 {
            account.oldest
        } else {
            self.records[record.older as usize].newer
        };
        let behind = if record.newer == 0 {
            account.newest
        } else {
            self.records[record.newer as usize].older
        };
        (before != slot || behind != slot)
            .then(|| format!("grant {slot} is not in the age list of d{}", record.dom))
    }

    /// Checks that `dom`'s list has as many grants as its count says, all of them its own.
    pub(crate) fn check_domain(&self, dom: DomId) -> Option<String> {
        let Domain { count, .. } = self.domain_now(dom);
        let own = |&slot: &Slot| self.held(slot).is_some_and(|held| held.dom == dom);
        // Bounded, should the list be a ring.
        let listed = self
            .slots_by_age(dom)
            .take(count as usize + 1)
            .filter(own)
            .count() as u64;
        (listed != count)
            .then(|| format!("{dom} has {listed} grants in its list and counts {count}"))
    }
}

fn access(state: u16) -> Access {
    if state & WRITABLE == 0 {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    }
}
