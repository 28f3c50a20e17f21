//! The table of frames.

use super::banks::Banks;
use super::{accounts::Accounts, ghost::Ghosts};
use crate::config::GuestId;
use crate::file::CachedFile;
use crate::limits::{RECLAIM_BATCH, WATERMARK_DIVISOR, WATERMARK_FRAMES_MAX};
use copage_grants::FrameNo;
use std::collections::HashMap;
use std::sync::Weak;

/// "No frame" in the queues, "no guest" for the charge.
pub(super) const NONE: u32 = u32::MAX;

/// What a frame is used for. The first three are queues; `Free` is one in each bank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum FrameState {
    /// Resident, granted to nobody, seen once.
    Small,
    /// Resident, granted to nobody, seen more than once.
    Main,
    /// Resident and granted; in the order of the latest grant.
    Granted,
    /// Taken for a fill.
    Filling,
    /// Chosen to be given back; whoever finds it in the index first decides.
    Evicting,
    /// Granted; its holders were asked to let go.
    Recalling,
    /// Of a home that is pinned, or was and may be mapped.
    Held,
    /// Of a retired home.
    Quarantined,
    /// Holds nothing.
    Free,
    /// Holds nothing, and is not to be used: its bank is to go, or is gone.
    Out,
}

const STATES: usize = 10;
const QUEUES: usize = 3;

/// 24 bytes a frame; with ghosts (4) and its place in an index (at most 28) below the 64 allowed.
#[derive(Clone, Copy, Debug)]
struct Meta {
    /// The home's slot.
    slot: u32,
    page: u32,
    prev: u32,
    next: u32,
    owner: u32,
    state: FrameState,
    /// Uses since it came (0 to 3), spent for further rounds in a queue; of a recalled one, deadlines passed.
    uses: u8,
}

const _: () = assert!(size_of::<Meta>() == 24);

/// A queue's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    pub head: u32,
    pub tail: u32,
}

impl Ends {
    pub(super) const EMPTY: Self = Self {
        head: NONE,
        tail: NONE,
    };
}

/// All frames, their queues, and the charges.
#[derive(Debug)]
pub(crate) struct FrameTable {
    metas: Vec<Meta>,
    queues: [Ends; QUEUES],
    pub(super) banks: Banks,
    counts: [u32; STATES],
    ghosts: Ghosts,
    budget: u32,
    /// Since the budget was cut: the least that was in use, and since when, in ms.
    over: Option<(u32, u64)>,
    slots: Vec<Option<Weak<CachedFile>>>,
    slots_free: Vec<u32>,
    /// Who is charged what.
    pub accounts: Accounts,
    /// Pages that pinned homes have or will have.
    pub pin_pages: u64,
    /// How often the charges for pins were changed: tells the audit that it looked at a moving thing.
    pub pin_moves: u64,
    /// How often a frame came to hold something or ceased to: the same for frames.
    pub frame_moves: u64,
    /// How often a page came to be written by somebody or ceased to: the same for writers.
    pub write_moves: u64,
}

impl FrameTable {
    /// No frames yet; `bank_frames` are in a bank.
    pub(crate) fn new(bank_frames: u32) -> Self {
        Self {
            metas: Vec::new(),
            queues: [Ends::EMPTY; QUEUES],
            banks: Banks::new(bank_frames),
            counts: [0; STATES],
            ghosts: Ghosts::new(0),
            budget: 0,
            over: None,
            slots: Vec::new(),
            slots_free: Vec::new(),
            accounts: Accounts::default(),
            pin_pages: 0,
            pin_moves: 0,
            frame_moves: 0,
            write_moves: 0,
        }
    }

    /// Room for frames below `end`; the new ones are not to be used yet.
    pub(super) fn grow(&mut self, end: u32) {
        let more = end.saturating_sub(self.capacity());
        if more == 0 {
            return;
        }
        let meta = Meta {
            slot: NONE,
            page: 0,
            prev: NONE,
            next: NONE,
            owner: NONE,
            state: FrameState::Out,
            uses: 0,
        };
        self.metas.resize(end as usize, meta);
        self.counts[FrameState::Out as usize] += more;
        self.ghosts = Ghosts::new(end);
    }

    /// Forgets frames from `end` on, which are all out.
    pub(super) fn cut(&mut self, end: u32) {
        let fewer = self.capacity().saturating_sub(end);
        self.metas.truncate(end as usize);
        self.metas.shrink_to_fit();
        self.counts[FrameState::Out as usize] -= fewer;
    }

    pub(crate) fn capacity(&self) -> u32 {
        self.metas.len() as u32
    }

    pub(crate) fn budget(&self) -> u32 {
        self.budget
    }

    pub(super) fn keep_to(&mut self, budget: u32) {
        self.budget = budget;
        self.over = None;
    }

    pub(crate) fn count(&self, state: FrameState) -> u32 {
        self.counts[state as usize]
    }

    /// Frames that hold something or are about to.
    pub(crate) fn used(&self) -> u32 {
        self.capacity() - self.count(FrameState::Free) - self.count(FrameState::Out)
    }

    /// Frames that may be taken.
    pub(crate) fn available(&self) -> u32 {
        let left = self.budget.saturating_sub(self.used());
        left.min(self.count(FrameState::Free))
    }

    /// Frames in use that the budget has no room for: it was cut.
    pub(crate) fn excess(&self) -> u32 {
        self.used().saturating_sub(self.budget)
    }

    /// Of a budget that was cut: since when, in ms, the excess has not become less, or when it was gone. Counts
    /// from when it is first asked for.
    pub(crate) fn over_since(&mut self, now_ms: u64) -> Option<u64> {
        let used = self.used();
        let begun = (used > self.budget).then_some((used, now_ms));
        let (least, since_ms) = self.over.or(begun)?;
        let over = match used < least && least > self.budget {
            true => (used, now_ms),
            false => (least, since_ms),
        };
        self.over = Some(over);
        Some(over.1)
    }

    /// The part of the budget that is neither pinned nor in quarantine. What is given back ahead of
    /// need is a share of this: a share of the whole budget could be all of it, and every page would
    /// be gone before its guest has looked.
    pub(crate) fn movable(&self) -> u32 {
        let stuck = self.count(FrameState::Held) + self.count(FrameState::Quarantined);
        self.budget.saturating_sub(stuck)
    }

    /// Below this many available frames, some are given back ahead of need.
    pub(crate) fn watermark(&self) -> u32 {
        (self.movable() / WATERMARK_DIVISOR).min(WATERMARK_FRAMES_MAX)
    }

    /// How many frames are given back in one go: not so many that what was just granted goes too.
    pub(crate) fn batch(&self) -> u32 {
        RECLAIM_BATCH.min(self.movable() / 8).max(1)
    }

    /// Could anything be given back, now or when somebody answers?
    pub(crate) fn any_reclaimable(&self) -> bool {
        use FrameState::*;
        [Small, Main, Granted, Filling, Evicting, Recalling]
            .iter()
            .any(|s| self.count(*s) > 0)
            || self.available() > 0
    }

    pub(crate) fn state(&self, frame: FrameNo) -> FrameState {
        self.metas[frame.0 as usize].state
    }

    /// The home's slot and the page that a frame holds.
    pub(crate) fn place(&self, frame: FrameNo) -> (u32, u32) {
        let meta = &self.metas[frame.0 as usize];
        (meta.slot, meta.page)
    }

    /// The queue of the frame's state.
    fn queue(&mut self, n: u32) -> Option<&mut Ends> {
        match self.metas[n as usize].state {
            FrameState::Free => self.banks.of_mut(n).map(|bank| &mut bank.free),
            state => self.queues.get_mut(state as usize),
        }
    }

    /// Moves a frame to a state; for a queue, to its end. What holds nothing in a bank that is to go is
    /// `Out`.
    pub(crate) fn set_state(&mut self, frame: FrameNo, state: FrameState) {
        let n = frame.0;
        self.unlink(n);
        let old = self.metas[n as usize].state;
        let state = match (state, self.banks.of_mut(n)) {
            (FrameState::Free, Some(bank)) if !bank.is_open => FrameState::Out,
            (state, _) => state,
        };
        if let Some(bank) = self.banks.of_mut(n) {
            bank.count(old, state);
        }
        self.counts[old as usize] -= 1;
        self.counts[state as usize] += 1;
        use FrameState::{Filling, Free, Out};
        let is_empty = |s| matches!(s, Free | Filling | Out);
        self.frame_moves += u64::from(is_empty(old) != is_empty(state));
        let meta = &mut self.metas[n as usize];
        meta.state = state;
        if state == FrameState::Recalling {
            meta.uses = 0;
        }
        let Some(ends) = self.queue(n) else {
            return;
        };
        let tail = ends.tail;
        ends.tail = n;
        if tail == NONE {
            ends.head = n;
        } else {
            self.metas[tail as usize].next = n;
        }
        self.metas[n as usize].prev = tail;
    }

    fn unlink(&mut self, n: u32) {
        let Meta { prev, next, .. } = self.metas[n as usize];
        let Some(ends) = self.queue(n) else {
            return;
        };
        if prev == NONE {
            ends.head = next;
        }
        if next == NONE {
            ends.tail = prev;
        }
        if prev != NONE {
            self.metas[prev as usize].next = next;
        }
        if next != NONE {
            self.metas[next as usize].prev = prev;
        }
        self.metas[n as usize].prev = NONE;
        self.metas[n as usize].next = NONE;
    }

    /// A page came: `true` when it had been given back not long before.
    pub(crate) fn filled(
        &mut self,
        frame: FrameNo,
        slot: u32,
        file: u64,
        page: u32,
        held: bool,
    ) -> bool {
        let known = self.ghosts.take(file, page);
        let meta = &mut self.metas[frame.0 as usize];
        (meta.slot, meta.page, meta.owner) = (slot, page, NONE);
        meta.uses = u8::from(known);
        let state = match (held, known) {
            (true, _) => FrameState::Held,
            (false, true) => FrameState::Main,
            (false, false) => FrameState::Small,
        };
        self.set_state(frame, state);
        known
    }

    /// Somebody was granted the frame. The first one is charged.
    pub(crate) fn granted(&mut self, frame: FrameNo, guest: GuestId) {
        let meta = &mut self.metas[frame.0 as usize];
        if meta.owner == NONE {
            meta.owner = guest;
            self.accounts.of(guest).frames += 1;
        }
        if !matches!(
            self.state(frame),
            FrameState::Held | FrameState::Quarantined
        ) {
            self.set_state(frame, FrameState::Granted);
        }
    }

    /// Nobody holds a grant of the frame any more.
    pub(crate) fn ungranted(&mut self, frame: FrameNo) {
        self.discharge(frame);
        if matches!(
            self.state(frame),
            FrameState::Granted | FrameState::Recalling
        ) {
            self.set_state(frame, FrameState::Main);
        }
    }

    /// Charges the frame to another guest, because the one that was charged let go.
    pub(crate) fn charge_to(&mut self, frame: FrameNo, guest: GuestId) {
        self.discharge(frame);
        self.metas[frame.0 as usize].owner = guest;
        self.accounts.of(guest).frames += 1;
    }

    /// Who is charged for the frame.
    pub(crate) fn owner(&self, frame: FrameNo) -> Option<GuestId> {
        Some(self.metas[frame.0 as usize].owner).filter(|g| *g != NONE)
    }

    /// Frames charged to each guest, counted anew.
    pub(crate) fn frames_by_owner(&self) -> HashMap<GuestId, u64> {
        let mut counts = HashMap::new();
        for meta in self.metas.iter().filter(|m| m.owner != NONE) {
            *counts.entry(meta.owner).or_default() += 1;
        }
        counts
    }

    fn discharge(&mut self, frame: FrameNo) {
        if let Some(owner) = self.owner(frame) {
            self.metas[frame.0 as usize].owner = NONE;
            let account = self.accounts.of(owner);
            account.frames = account.frames.saturating_sub(1);
        }
    }

    /// A deadline has passed over a frame that was recalled: is it time to take it for kept? At the third one,
    /// because the first may come right after it was asked for.
    pub(crate) fn is_overdue(&mut self, frame: FrameNo) -> bool {
        let meta = &mut self.metas[frame.0 as usize];
        meta.uses = (meta.uses + 1).min(3);
        meta.state == FrameState::Quarantined || meta.uses == 3
    }

    /// A page was copied for somebody.
    pub(crate) fn used_once(&mut self, frame: FrameNo) {
        let meta = &mut self.metas[frame.0 as usize];
        meta.uses = (meta.uses + 1).min(3);
    }

    /// The frame holds nothing any more. `remember`: it was given back for want of memory.
    pub(crate) fn release(&mut self, frame: FrameNo, file: u64, remember: bool) {
        if remember {
            let page = self.metas[frame.0 as usize].page;
            self.ghosts.remember(file, page);
        }
        self.discharge(frame);
        self.metas[frame.0 as usize].slot = NONE;
        self.set_state(frame, FrameState::Free);
    }

    /// Chooses up to `count` frames that nobody holds. Pages seen once go first while they are
    /// more than a tenth of all such; what was used since gets another round.
    pub(crate) fn pick_idle(&mut self, count: u32, out: &mut Vec<FrameNo>) {
        let mut rounds = count.saturating_mul(4);
        while (out.len() as u32) < count && rounds > 0 {
            rounds -= 1;
            let (small, main) = (self.count(FrameState::Small), self.count(FrameState::Main));
            let from_small = small > 0 && (main == 0 || small > main / 9);
            let queue = if from_small {
                FrameState::Small
            } else {
                FrameState::Main
            };
            let head = self.queues[queue as usize].head;
            if head == NONE {
                return;
            }
            let meta = &mut self.metas[head as usize];
            if meta.uses > 0 && rounds > count {
                meta.uses -= 1;
                self.set_state(FrameNo(head), FrameState::Main);
            } else {
                self.set_state(FrameNo(head), FrameState::Evicting);
                out.push(FrameNo(head));
            }
        }
    }

    /// Chooses up to `count` frames whose latest grant is the longest ago, as `state`.
    pub(crate) fn pick_granted(&mut self, count: u32, state: FrameState, out: &mut Vec<FrameNo>) {
        let goal = out.len() + count as usize;
        let mut rounds = count.saturating_mul(2);
        while out.len() < goal && rounds > 0 {
            rounds -= 1;
            let head = self.queues[FrameState::Granted as usize].head;
            if head == NONE {
                return;
            }
            let meta = &mut self.metas[head as usize];
            if meta.uses > 0 && rounds > count {
                meta.uses -= 1;
                self.set_state(FrameNo(head), FrameState::Granted);
            } else {
                self.set_state(FrameNo(head), state);
                out.push(FrameNo(head));
            }
        }
    }

    /// A number by which frames name a home of `file`.
    pub(crate) fn add_slot(&mut self, file: Weak<CachedFile>) -> u32 {
        if let Some(slot) = self.slots_free.pop() {
            self.slots[slot as usize] = Some(file);
            return slot;
        }
        self.slots.push(Some(file));
        self.slots.len() as u32 - 1
    }

    pub(crate) fn drop_slot(&mut self, slot: u32) {
        self.slots[slot as usize] = None;
        self.slots_free.push(slot);
    }

    pub(crate) fn slot_file(&self, slot: u32) -> Option<Weak<CachedFile>> {
        self.slots.get(slot as usize)?.clone()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.metas.capacity() as u64 * size_of::<Meta>() as u64
            + self.ghosts.bytes()
            + self.slots.capacity() as u64 * 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_one_bank(frames: u32) -> FrameTable {
        let mut table = FrameTable::new(1000);
        table.have(frames);
        table.set_budget(frames);
        table
    }

    #[test]
    fn frames_go_round() {
        let mut table = of_one_bank(64);
        assert_eq!(table.available(), 64);
        let mut frames = Vec::new();
        table.take(10, &mut frames);
        assert_eq!((frames.len(), table.available()), (10, 54));
        for (n, frame) in frames.iter().enumerate() {
            assert!(!table.filled(*frame, 0, 1, n as u32, false));
        }
        table.granted(frames[0], 5);
        assert_eq!(table.accounts.of(5).frames, 1);
        let mut out = Vec::new();
        table.pick_idle(64, &mut out);
        assert_eq!(out.len(), 9);
        assert!(
            !out.contains(&frames[0]),
            "a granted frame is in no queue of idle ones"
        );
        for frame in out.drain(..) {
            table.release(frame, 1, true);
        }
        table.pick_granted(4, FrameState::Evicting, &mut out);
        assert_eq!(out, [frames[0]]);
        table.release(frames[0], 1, true);
        assert_eq!((table.available(), table.accounts.of(5).frames), (64, 0));
        table.take(1, &mut out);
        assert!(table.filled(out[1], 0, 1, 0, false), "the ghost is known");
        assert_eq!(table.state(out[1]), FrameState::Main);
    }

    #[test]
    fn a_cut_that_goes_on_is_told_from_one_that_does_not() {
        let mut table = of_one_bank(64);
        let mut frames = Vec::new();
        table.take(40, &mut frames);
        assert_eq!((table.excess(), table.over_since(1)), (0, None));
        table.set_budget(32);
        assert_eq!((table.excess(), table.over_since(5)), (8, Some(5)));
        assert_eq!(table.over_since(9), Some(5));
        table.release(frames[0], 0, false);
        assert_eq!((table.excess(), table.over_since(10)), (7, Some(10)));
        assert_eq!(table.over_since(20), Some(10));
        table.set_budget(33);
        assert_eq!(table.over_since(30), Some(30), "another cut");
        frames[1..7]
            .iter()
            .for_each(|frame| table.release(*frame, 0, false));
        assert_eq!((table.excess(), table.over_since(40)), (0, Some(40)));
        table.release(frames[7], 0, false);
        assert_eq!(table.over_since(50), Some(40), "it is over");
        table.set_budget(39);
        assert_eq!(table.over_since(60), None);
    }

    #[test]
    fn a_smaller_budget_gives_no_frames_until_used_is_below() {
        let mut table = of_one_bank(64);
        let mut frames = Vec::new();
        table.take(40, &mut frames);
        table.set_budget(32);
        assert_eq!(table.available(), 0);
        for frame in frames.drain(..20) {
            table.release(frame, 0, false);
        }
        assert_eq!(table.available(), 12);
    }
}
