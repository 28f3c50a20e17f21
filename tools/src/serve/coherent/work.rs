//! Works: requests that want pages of a coherent file.

use super::super::complete::Answer;
use super::super::ctx::Ctx;
use super::super::limits::NO_ROOM_RETRY_MS;
use copage_cache::{FileId, StrictGrant};
use copage_coherence::msg::{FAULT_PAGES_MAX, FaultHint};
use copage_coherence::strict::{DAEMON, Event, Input, Place};
use copage_grants::{Access, DomId, Epoch, FrameNo, PageIndex, Version};
use std::collections::VecDeque;

/// A machine's ticket is a work's number and which of its pages.
const PAGE_BITS: u32 = 10;
const _: () = assert!(FAULT_PAGES_MAX <= 1 << PAGE_BITS);

/// Answers to be sent, by ticket.
pub(in crate::serve) type Answers = VecDeque<(u64, Answer)>;

pub(super) fn ticket(work: u64, nth: usize) -> u64 {
    work << PAGE_BITS | nth as u64
}

/// The work, and which of its pages.
pub(super) fn split(ticket: u64) -> (u64, usize) {
    let nth = ticket & ((1 << PAGE_BITS) - 1);
    (ticket >> PAGE_BITS, nth as usize)
}

/// How far one page of a work is.
#[derive(Clone, Debug)]
pub(super) enum Cell {
    Waiting {
        /// The session had the page before it asked.
        held: bool,
    },
    /// The session has it.
    Got(Got),
    /// The session had it, and it was taken back before it was told.
    Lost,
    Failed(i32),
    /// Read, or written and saved.
    Done,
    /// Written; the machine has it saved.
    Saving,
    /// Written where others write too: nobody saves it by himself.
    Unsaved(FrameNo),
}

#[derive(Clone, Debug)]
pub(super) struct Got {
    pub frame: FrameNo,
    pub grant: StrictGrant,
    pub access: Access,
    pub version: Version,
    /// As of the waiting page.
    pub held: bool,
}

#[derive(Clone, Debug)]
pub(super) enum What {
    Fault {
        generation: u32,
        hint: FaultHint,
        /// How often the first page was lost before all was there.
        lost: u32,
    },
    Read {
        offset: u64,
        buf: Vec<u8>,
    },
    Write {
        offset: u64,
        data: Vec<u8>,
        /// The rest is being synced.
        syncing: bool,
    },
}

#[derive(Clone, Debug)]
pub(super) struct Work {
    pub file: FileId,
    /// For whom the pages are wanted: a session, or the daemon itself.
    pub epoch: Epoch,
    /// Who asked.
    pub dom: DomId,
    pub access: Access,
    pub first: u64,
    pub cells: Vec<Cell>,
    pub left: usize,
    pub what: What,
    pub since_ms: u64,
}

impl Work {
    pub(super) fn place(&self, nth: usize) -> Place {
        Place {
            file: self.file.0,
            page: PageIndex(self.first + nth as u64),
        }
    }
}

impl Ctx {
    /// Begins a work, or parks it behind what needs the file for itself.
    pub(super) fn begin_work(&mut self, number: u64, work: Work) {
        let Some(file) = self.coherent.files.get_mut(&work.file) else {
            return self.fail_work(number, libc::ESTALE);
        };
        let park = file.is_exclusive();
        if park {
            file.parked.push_back(number);
        }
        self.coherent.works.insert(number, work);
        if !park {
            self.start_work(number);
        }
    }

    /// Starts a work that nothing stands in the way of any more.
    pub(super) fn start_work(&mut self, number: u64) {
        let coherent = &mut self.coherent;
        let Some(work) = coherent.works.get(&number) else {
            return;
        };
        let Some(file) = coherent.files.get_mut(&work.file) else {
            return self.fail_work(number, libc::ESTALE);
        };
        file.active += 1;
        match work.what {
            What::Fault { .. } => self.start_fault(number),
            What::Read { .. } => self.start_read(number),
            What::Write { .. } => self.start_write(number),
        }
    }

    /// Sees to it that the disk has room for what will be stored, then wants the pages.
    pub(super) fn reserve(&mut self, number: u64) {
        let coherent = &self.coherent;
        let Some(work) = coherent.works.get(&number) else {
            return;
        };
        let Some(file) = coherent.files.get(&work.file) else {
            return self.fail_work(number, libc::ESTALE);
        };
        let (first, count) = (PageIndex(work.first), work.cells.len() as u32);
        match self.cache.strict_reserve(number, &file.file, first, count) {
            Some(Ok(())) => self.want(number),
            Some(Err(error)) => self.end_work(number, Answer::refused(&error)),
            // The cache's event says so.
            None => {}
        }
    }

    /// Wants those pages of a work that wait.
    pub(super) fn want(&mut self, number: u64) {
        let Some(work) = self.coherent.works.get(&number) else {
            return;
        };
        let (epoch, access) = (work.epoch, work.access);
        let waiting =
            |(nth, cell): (usize, &Cell)| matches!(cell, Cell::Waiting { .. }).then_some(nth);
        let wanted: Vec<(usize, Place)> = work
            .cells
            .iter()
            .enumerate()
            .filter_map(waiting)
            .map(|nth| (nth, work.place(nth)))
            .collect();
        for (nth, place) in wanted {
            self.step(Input::Page(Event::Want {
                epoch,
                ticket: ticket(number, nth),
                place,
                access,
            }));
        }
    }

    /// The machine granted a page.
    pub(super) fn granted(
        &mut self,
        number: u64,
        nth: usize,
        (epoch, place): (Epoch, Place),
        (frame, access, version): (FrameNo, Access, Version),
    ) {
        if epoch == DAEMON {
            return self.granted_daemon(number, nth, place, frame);
        }
        let coherent = &mut self.coherent;
        let grant = coherent.granted.get(&(epoch, place)).copied();
        match access {
            Access::ReadOnly => coherent.counts.told.granted_read += 1,
            Access::ReadWrite => {
                if self.machine.pages().is_shared_rw(place) {
                    coherent.counts.told.granted_shared += 1;
                } else {
                    coherent.counts.told.granted_write += 1;
                }
                self.dirtied(place);
            }
        }
        let Some(work) = self.coherent.works.get_mut(&number) else {
            // Nobody waits for it: the session is ending.
            return;
        };
        let Some(cell) = work.cells.get_mut(nth) else {
            return;
        };
        let held = matches!(cell, Cell::Waiting { held: true });
        *cell = match grant {
            Some(grant) => Cell::Got(Got {
                frame,
                grant,
                access,
                version,
                held,
            }),
            None => Cell::Lost,
        };
        self.settled_page(number);
    }

    /// The machine refused a page.
    pub(super) fn refused_page(&mut self, number: u64, nth: usize, errno: i32) {
        let work = self.coherent.works.get_mut(&number);
        if let Some(cell) = work.and_then(|work| work.cells.get_mut(nth)) {
            *cell = Cell::Failed(errno);
            self.settled_page(number);
        }
    }

    /// One page more of a work is settled.
    pub(super) fn settled_page(&mut self, number: u64) {
        let Some(work) = self.coherent.works.get_mut(&number) else {
            return;
        };
        work.left = work.left.saturating_sub(1);
        if work.left > 0 {
            return;
        }
        match work.what {
            What::Fault { .. } => self.end_fault(number),
            What::Read { .. } => self.end_read(number),
            What::Write { .. } => self.end_write(number),
        }
    }

    /// Entries that ended in the last step: what was to be told of them is not true any more.
    pub(in crate::serve) fn forget_ended(&mut self) {
        while let Some((epoch, place)) = self.coherent.ended.pop() {
            self.lost_page(epoch, place);
        }
    }

    /// A session has a page no more, or is asked for it: works of it that are not answered yet do not tell of it.
    pub(super) fn lost_page(&mut self, epoch: Epoch, place: Place) {
        let faults = self.coherent.works.values_mut().filter(|work| {
            work.epoch == epoch && work.file.0 == place.file && place.page.0 >= work.first
        });
        for work in faults {
            let nth = usize::try_from(place.page.0 - work.first).unwrap_or(usize::MAX);
            if let Some(cell @ Cell::Got(_)) = work.cells.get_mut(nth) {
                *cell = Cell::Lost;
            }
        }
    }

    /// Ends a work; the file may be free for what needs it for itself.
    pub(super) fn end_work(&mut self, number: u64, answer: Answer) {
        let coherent = &mut self.coherent;
        if let Some(work) = coherent.works.remove(&number)
            && let Some(file) = coherent.files.get_mut(&work.file)
        {
            file.active = file.active.saturating_sub(1);
            if file.active == 0 && file.is_exclusive() {
                coherent.ready.push_back(work.file);
            }
        }
        coherent.answers.push_back((number, answer));
    }

    /// Wants what is left of a work again, after a while.
    pub(super) fn try_again(&mut self, number: u64) {
        let at_ms = self.now_ms + NO_ROOM_RETRY_MS;
        self.coherent.again.push_back((at_ms, number));
    }

    /// What fell due of coherent files.
    pub(in crate::serve) fn strict_due(&mut self) {
        while let Some(&(at_ms, number)) = self.coherent.again.front() {
            if at_ms > self.now_ms {
                break;
            }
            self.coherent.again.pop_front();
            self.want(number);
        }
        self.retry_exclusives();
        self.write_back();
        self.poll_lost();
    }

    pub(super) fn fail_work(&mut self, number: u64, errno: i32) {
        self.end_work(number, Answer::failed(errno));
    }

    /// Works of a session that is gone: the machine answers none of them.
    pub(in crate::serve) fn end_works_of(&mut self, epoch: Epoch) {
        let of = |(number, work): (&u64, &Work)| (work.epoch == epoch).then_some(*number);
        let gone: Vec<u64> = self.coherent.works.iter().filter_map(of).collect();
        for number in gone {
            let coherent = &mut self.coherent;
            let file = coherent.works.get(&number).map(|work| work.file);
            let file = file.and_then(|id| coherent.files.get_mut(&id));
            let parked = file.and_then(|file| {
                let at = file.parked.iter().position(|n| *n == number)?;
                file.parked.remove(at)
            });
            if parked.is_some() {
                // It is not counted among those under way.
                coherent.works.remove(&number);
                let gone = Answer::failed(libc::ESTALE);
                coherent.answers.push_back((number, gone));
            } else {
                self.fail_work(number, libc::ESTALE);
            }
        }
    }
}
