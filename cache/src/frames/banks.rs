//! Banks: frames come and go in pieces of neighbours, each the memory of one of the backend's domains.
//!
//! The budget needs the lowest banks: those are *open*. The others are *leaving*: nothing new comes into
//! them, what is in them is given back, and when all their frames are out, the backend ends them.

use super::table::{Ends, FrameState, FrameTable, NONE};
use copage_grants::FrameNo;

#[derive(Debug)]
pub(super) struct Bank {
    pub free: Ends,
    pub is_open: bool,
    /// The backend has ended it.
    is_gone: bool,
    frames_free: u32,
    frames_out: u32,
}

impl Bank {
    const NEW: Self = Self {
        free: Ends::EMPTY,
        is_open: false,
        is_gone: false,
        frames_free: 0,
        frames_out: 0,
    };

    /// A frame of it goes from one state to another.
    pub(super) fn count(&mut self, old: FrameState, new: FrameState) {
        let mut add = |state, n: u32| match state {
            FrameState::Free => self.frames_free = self.frames_free.wrapping_add(n),
            FrameState::Out => self.frames_out = self.frames_out.wrapping_add(n),
            _ => {}
        };
        add(old, 1u32.wrapping_neg());
        add(new, 1);
    }
}

#[derive(Debug)]
pub(super) struct Banks {
    bank_frames: u32,
    all: Vec<Bank>,
    /// Where [`FrameTable::pick_leaving`] goes on.
    next_leaving: usize,
}

/// How one bank stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BankStats {
    /// Its number.
    pub bank: u32,
    /// Its frames.
    pub frames: u32,
    /// Those of them that hold something, are about to, or may be mapped.
    pub frames_used: u32,
    /// The budget does not need it: it goes when nothing is in it.
    pub is_leaving: bool,
}

impl Banks {
    pub(super) fn new(bank_frames: u32) -> Self {
        Self {
            bank_frames,
            all: Vec::new(),
            next_leaving: 0,
        }
    }

    #[inline]
    pub(super) fn of_mut(&mut self, frame: u32) -> Option<&mut Bank> {
        self.all.get_mut((frame / self.bank_frames) as usize)
    }

    fn of(&self, frame: u32) -> Option<&Bank> {
        self.all.get((frame / self.bank_frames) as usize)
    }

    /// The lowest bank with `count` free frames, else the one with the most of them.
    fn best(&self, count: u32) -> Option<usize> {
        let enough = self.all.iter().position(|bank| bank.frames_free >= count);
        enough.or_else(|| {
            let free = self
                .all
                .iter()
                .enumerate()
                .filter(|(_, b)| b.frames_free > 0);
            let most = free.min_by_key(|(_, bank)| std::cmp::Reverse(bank.frames_free));
            most.map(|(number, _)| number)
        })
    }

    /// Banks that hold `frames` frames.
    fn needed(&self, frames: u32) -> usize {
        frames.div_ceil(self.bank_frames) as usize
    }
}

impl FrameTable {
    fn bank_range(&self, bank: usize) -> std::ops::Range<u32> {
        let start = (bank as u32).saturating_mul(self.banks.bank_frames);
        let end = start.saturating_add(self.banks.bank_frames);
        start..end.min(self.capacity())
    }

    /// Frames below `end` are there. New ones are out before a budget needs them.
    pub(crate) fn have(&mut self, end: u32) {
        let before = self.capacity();
        self.grow(end);
        while self.banks.all.len() < self.banks.needed(end) {
            self.banks.all.push(Bank::NEW);
        }
        for bank in 0..self.banks.all.len() {
            let new = self.bank_range(bank).end.saturating_sub(before);
            let new = new.min(self.bank_range(bank).len() as u32);
            self.banks.all[bank].frames_out += new;
        }
    }

    /// A budget of at most [`FrameTable::open_end`] can be kept without making any.
    pub(crate) fn open_end(&self) -> u32 {
        let open = self.banks.all.iter().take_while(|bank| bank.is_open);
        match open.count() {
            0 => 0,
            open => self.bank_range(open - 1).end,
        }
    }

    /// Keeps to a budget of frames that are there: opens the banks that it needs, closes the others.
    pub(crate) fn set_budget(&mut self, frames: u32) {
        let frames = frames.min(self.capacity());
        self.keep_to(frames);
        for bank in 0..self.banks.all.len() {
            let is_open = bank < self.banks.needed(frames);
            let of = &mut self.banks.all[bank];
            of.is_open = is_open;
            of.is_gone &= !is_open;
            let moves = if is_open {
                of.frames_out
            } else {
                of.frames_free
            };
            if moves == 0 {
                continue;
            }
            for frame in self.bank_range(bank).map(FrameNo) {
                // To where empty frames of such a bank belong.
                if matches!(self.state(frame), FrameState::Free | FrameState::Out) {
                    self.set_state(frame, FrameState::Free);
                }
            }
        }
    }

    /// Takes up to `count` free frames of the budget, of one bank if one has as many.
    pub(crate) fn take(&mut self, count: u32, out: &mut Vec<FrameNo>) {
        let mut left = count.min(self.available());
        while left > 0 {
            let Some(bank) = self.banks.best(left) else {
                return;
            };
            while left > 0 && self.banks.all[bank].free.head != NONE {
                let frame = FrameNo(self.banks.all[bank].free.head);
                self.set_state(frame, FrameState::Filling);
                out.push(frame);
                left -= 1;
            }
        }
    }

    fn leaving(&self) -> impl Iterator<Item = usize> + '_ {
        let banks = self.banks.all.iter().enumerate();
        let leaving = banks.filter(|(_, bank)| !bank.is_open && !bank.is_gone);
        leaving.map(|(number, _)| number)
    }

    /// Is any bank leaving?
    pub(crate) fn any_leaving(&self) -> bool {
        self.leaving().next().is_some()
    }

    /// Banks that are leaving and in which nothing is.
    pub(crate) fn emptied(&self) -> Vec<u32> {
        let is_empty = |bank: &usize| {
            self.banks.all[*bank].frames_out as usize == self.bank_range(*bank).len()
        };
        self.leaving().filter(is_empty).map(|n| n as u32).collect()
    }

    /// The backend has ended a bank that was emptied.
    pub(crate) fn gone(&mut self, bank: u32) {
        if let Some(bank) = self.banks.all.get_mut(bank as usize) {
            bank.is_gone = true;
        }
        while self.banks.all.last().is_some_and(|bank| bank.is_gone) {
            let start = self.bank_range(self.banks.all.len() - 1).start;
            self.banks.all.pop();
            self.cut(start);
        }
    }

    /// Is the frame of a leaving bank, and free to be emptied but for guests that were asked to let go? One
    /// that is granted and was not asked for yet is still as good as any.
    pub(crate) fn is_emptied(&self, frame: FrameNo) -> bool {
        self.state(frame) != FrameState::Granted
            && self.banks.of(frame.0).is_some_and(|bank| !bank.is_open)
    }

    /// Chooses frames of one leaving bank, of the next one each time: up to so many that nobody holds, and up
    /// to so many that are granted. The latter become `granted_as`. Gives how many such banks hold anything:
    /// all have been looked at after as many calls.
    pub(crate) fn pick_leaving(
        &mut self,
        (idle_max, granted_max): (u32, u32),
        granted_as: FrameState,
        (idle, granted): (&mut Vec<FrameNo>, &mut Vec<FrameNo>),
    ) -> usize {
        let (idle_max, granted_max) = (idle_max as usize, granted_max as usize);
        let holds = |bank: &usize| {
            (self.banks.all[*bank].frames_out as usize) < self.bank_range(*bank).len()
        };
        let banks: Vec<usize> = self.leaving().filter(holds).collect();
        let next = self.banks.next_leaving;
        let Some(&bank) = banks.iter().find(|n| **n >= next).or(banks.first()) else {
            return 0;
        };
        self.banks.next_leaving = bank + 1;
        for frame in self.bank_range(bank).map(FrameNo) {
            match self.state(frame) {
                FrameState::Small | FrameState::Main if idle.len() < idle_max => {
                    self.set_state(frame, FrameState::Evicting);
                    idle.push(frame);
                }
                FrameState::Granted if granted.len() < granted_max => {
                    self.set_state(frame, granted_as);
                    granted.push(frame);
                }
                _ => {}
            }
        }
        banks.len()
    }

    /// How the banks stand that are there.
    pub(crate) fn bank_stats(&self) -> Vec<BankStats> {
        let banks = self.banks.all.iter().enumerate();
        let there = banks.filter(|(_, bank)| !bank.is_gone);
        there
            .map(|(number, bank)| {
                let frames = self.bank_range(number).len() as u32;
                BankStats {
                    bank: number as u32,
                    frames,
                    frames_used: frames - bank.frames_free - bank.frames_out,
                    is_leaving: !bank.is_open,
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three_of_eight() -> FrameTable {
        let mut table = FrameTable::new(8);
        table.have(24);
        assert_eq!((table.available(), table.open_end()), (0, 0));
        table.set_budget(20);
        assert_eq!((table.available(), table.open_end()), (20, 24));
        table
    }

    fn take(table: &mut FrameTable, count: u32) -> Vec<u32> {
        let mut out = Vec::new();
        table.take(count, &mut out);
        out.into_iter().map(|frame| frame.0).collect()
    }

    #[test]
    fn frames_of_one_fill_are_of_one_bank() {
        let mut table = three_of_eight();
        assert_eq!(take(&mut table, 5), [0, 1, 2, 3, 4]);
        assert_eq!(take(&mut table, 4), [8, 9, 10, 11]);
        assert_eq!(
            take(&mut table, 3),
            [5, 6, 7],
            "the lowest that has as many"
        );
        table.release(FrameNo(1), 0, false);
        assert_eq!(take(&mut table, 8), [16, 17, 18, 19, 20, 21, 22, 23]);
        assert_eq!(take(&mut table, 3), [1], "the budget, not what is there");
        table.set_budget(24);
        table.release(FrameNo(2), 0, false);
        let none_has_five = [12, 13, 14, 15, 2];
        assert_eq!(take(&mut table, 5), none_has_five);
    }

    #[test]
    fn a_leaving_bank_is_emptied_and_goes_and_comes_again() {
        let mut table = three_of_eight();
        let all = take(&mut table, 20);
        for (page, frame) in all.iter().enumerate() {
            table.filled(FrameNo(*frame), 0, 1, page as u32, false);
        }
        table.granted(FrameNo(17), 5);
        table.set_budget(8);
        assert!(table.any_leaving());
        assert_eq!((table.open_end(), table.available()), (8, 0));
        assert_eq!(table.emptied(), Vec::<u32>::new());
        let (mut idle, mut granted) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            let to = (&mut idle, &mut granted);
            assert_eq!(table.pick_leaving((100, 100), FrameState::Recalling, to), 2);
        }
        assert_eq!(granted, [FrameNo(17)]);
        assert_eq!(idle.len(), 11);
        assert!(idle.iter().all(|frame| frame.0 >= 8));
        for frame in idle {
            table.release(frame, 1, false);
        }
        assert_eq!(table.emptied(), [1]);
        assert_eq!((table.used(), table.available()), (9, 0));
        table.gone(1);
        assert_eq!(table.capacity(), 24, "one above it stays");
        assert!(table.any_leaving());
        assert_eq!(table.bank_stats().len(), 2);
        assert_eq!(table.bank_stats()[1].frames_used, 1);
        // Back into use, the one that was gone too, once it was made again.
        table.have(24);
        table.set_budget(24);
        assert_eq!((table.open_end(), table.available()), (24, 15));
        table.set_budget(8);
        table.release(FrameNo(17), 1, false);
        assert_eq!(table.emptied(), [1, 2]);
        table.gone(2);
        table.gone(1);
        assert_eq!((table.capacity(), table.used()), (8, 8));
        assert!(!table.any_leaving());
        table.have(40);
        table.set_budget(33);
        assert_eq!((table.open_end(), table.available()), (40, 25));
    }
}
