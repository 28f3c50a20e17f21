//! Faults: which of the pages asked for are wanted, and which are told.

use super::super::complete::Answer;
use super::super::ctx::Ctx;
use super::super::limits::LOST_TRIES_MAX;
use super::work::{Cell, Got, What, Work};
use copage_cache::CacheError;
use copage_coherence::msg::{FaultHint, FileToken, Generation, GrantedPlace, PageRange, Reply};
use copage_coherence::strict::{Event, Input, Place};
use copage_grants::{Access, DomId, Epoch, PageIndex, Version, Where, pages_for};

/// What a fault is answered with.
#[derive(Clone, Debug)]
pub(in crate::serve) struct StrictGranted {
    pub generation: u32,
    pub first: u64,
    pub count: u32,
    pub granter: DomId,
    pub refs: Vec<u8>,
    pub access: Access,
    pub place: GrantedPlace,
    pub version: Version,
}

impl StrictGranted {
    pub(in crate::serve) fn reply(&self) -> Reply<'_> {
        Reply::Granted {
            generation: Generation(self.generation),
            range: PageRange {
                first: PageIndex(self.first),
                count: self.count,
            },
            granter: self.granter,
            refs: &self.refs,
            access: self.access,
            place: self.place,
            version: self.version,
        }
    }
}

/// A fault as a guest asks it.
#[derive(Clone, Copy, Debug)]
pub(in crate::serve) struct FaultAsked {
    pub token: FileToken,
    pub generation: u32,
    pub range: PageRange,
    pub hint: FaultHint,
    pub access: Access,
}

impl Ctx {
    pub(in crate::serve) fn strict_fault(
        &mut self,
        number: u64,
        file: copage_cache::FileId,
        (epoch, dom): (Epoch, DomId),
        asked: FaultAsked,
    ) {
        let count = asked.range.count as usize;
        let work = Work {
            file,
            epoch,
            dom,
            access: asked.access,
            first: asked.range.first.0,
            cells: vec![Cell::Waiting { held: false }; count],
            left: count,
            what: What::Fault {
                generation: asked.generation,
                hint: asked.hint,
                lost: 0,
            },
            since_ms: self.now_ms,
        };
        self.begin_work(number, work);
    }

    /// The file is as long as it will be, and of one generation, until the answer.
    pub(super) fn start_fault(&mut self, number: u64) {
        let coherent = &self.coherent;
        let Some(work) = coherent.works.get(&number) else {
            return;
        };
        let (
            What::Fault {
                generation, hint, ..
            },
            Some(file),
        ) = (&work.what, coherent.files.get(&work.file))
        else {
            return;
        };
        let state = self.cache.current(&file.file);
        if state.generation != *generation {
            return self.end_work(number, Answer::Stale);
        }
        let pages = pages_for(state.bytes);
        if work.first >= pages {
            let error = CacheError::BadRange("the file ends before this page");
            return self.end_work(number, Answer::refused(&error));
        }
        let upto = work
            .cells
            .len()
            .min(usize::try_from(pages - work.first).unwrap_or(usize::MAX));
        // What is behind the first page is taken from nobody, unless it was asked for by name.
        let alone = |nth: usize| !self.is_against(work.place(nth), work.epoch, work.access);
        let count = match hint {
            FaultHint::Populate => upto,
            FaultHint::Random | FaultHint::Sequential => {
                (1..upto).find(|&nth| !alone(nth)).unwrap_or(upto)
            }
        };
        let held = |nth: usize| Cell::Waiting {
            held: self.holds(work.epoch, work.place(nth)),
        };
        let cells: Vec<Cell> = (0..count).map(held).collect();
        let writes = work.access == Access::ReadWrite;
        if let Some(work) = self.coherent.works.get_mut(&number) {
            work.cells = cells;
            work.left = count;
        }
        if writes {
            self.reserve(number);
        } else {
            self.want(number);
        }
    }

    /// Does somebody else hold the page in a way that stands against this access?
    fn is_against(&self, place: Place, epoch: Epoch, access: Access) -> bool {
        let writes = access == Access::ReadWrite;
        let mut holders = self.machine.pages().holders(place);
        holders.any(|(who, how)| who != epoch && (writes || how == Access::ReadWrite))
    }

    /// All pages of a fault are settled: the longest run of one kind from the first page on is told.
    pub(super) fn end_fault(&mut self, number: u64) {
        let now_ms = self.now_ms;
        let patience_ms = 2 * u64::from(self.machine.sessions().config().invalidate_deadline_ms);
        let Some(work) = self.coherent.works.get_mut(&number) else {
            return;
        };
        let waited_ms = now_ms.saturating_sub(work.since_ms);
        let What::Fault {
            generation, lost, ..
        } = &mut work.what
        else {
            return;
        };
        let generation = *generation;
        match work.cells.first_mut() {
            Some(Cell::Got(_)) => {}
            Some(cell @ Cell::Lost) if *lost < LOST_TRIES_MAX => {
                *lost += 1;
                *cell = Cell::Waiting { held: false };
                work.left = 1;
                return self.want(number);
            }
            // The guest's own pages were asked back to make room; or frames and entries are on their way back
            // (after a restart all entries of a table rest for a term).
            Some(cell @ Cell::Failed(libc::EDQUOT | libc::ENOMEM)) if waited_ms < patience_ms => {
                *cell = Cell::Waiting { held: false };
                work.left = 1;
                return self.try_again(number);
            }
            Some(Cell::Failed(errno)) => {
                let errno = *errno;
                self.release_rest(number, 0);
                return self.fail_work(number, errno);
            }
            _ => {
                self.release_rest(number, 0);
                return self.fail_work(number, libc::EAGAIN);
            }
        }
        let run = run_of(&work.cells);
        let Some(granted) = told(&work.cells, run, generation, work.first) else {
            return self.fail_work(number, libc::EIO);
        };
        let writes = work.access == Access::ReadWrite;
        self.release_rest(number, run);
        if writes {
            self.coherent.counts.waited(waited_ms);
        }
        self.end_work(number, Answer::Granted(Box::new(granted)));
    }

    /// Gives back what was granted behind the run that is told, unless the session had it before.
    fn release_rest(&mut self, number: u64, run: usize) {
        let Some(work) = self.coherent.works.get(&number) else {
            return;
        };
        let (epoch, dom) = (work.epoch, work.dom);
        let rest = work.cells.iter().enumerate().skip(run);
        let rest: Vec<_> = rest
            .filter_map(|(nth, cell)| match cell {
                Cell::Got(got) if !got.held => Some((work.place(nth), got.frame)),
                _ => None,
            })
            .collect();
        let Some(file) = self.coherent.files.get(&work.file) else {
            return;
        };
        let file = file.file.clone();
        for (place, frame) in rest {
            // It was never told of it, so it has nothing mapped.
            self.cache.strict_unmapped(dom, &file, place.page, frame);
            self.step(Input::Page(Event::Released { epoch, place }));
        }
    }
}

/// The longest run from the first page on that one answer can tell.
fn run_of(cells: &[Cell]) -> usize {
    let Some(Cell::Got(first)) = cells.first() else {
        return 0;
    };
    let alike = |cell: &&Cell| match cell {
        Cell::Got(got) => {
            let (a, b) = (&got.grant, &first.grant);
            a.granter == b.granter
                && a.at == b.at
                && a.serial == b.serial
                && got.access == first.access
        }
        _ => false,
    };
    cells.iter().take_while(alike).count()
}

fn told(cells: &[Cell], run: usize, generation: u32, first: u64) -> Option<StrictGranted> {
    let gots = cells.iter().take(run).filter_map(|cell| match cell {
        Cell::Got(got) => Some(got),
        _ => None,
    });
    let gots: Vec<&Got> = gots.collect();
    let one = gots.first()?;
    let refs = gots.iter().filter_map(|got| got.grant.gref);
    let place = match one.grant.at {
        Where::Home | Where::Spare => GrantedPlace::Home,
        Where::Arena(_) => GrantedPlace::Arena,
        Where::Common => GrantedPlace::Common {
            serial: one.grant.serial,
        },
    };
    Some(StrictGranted {
        generation,
        first,
        count: u32::try_from(run).ok()?,
        granter: one.grant.granter.unwrap_or(DomId(0)),
        refs: refs.flat_map(u32::to_le_bytes).collect(),
        access: one.access,
        place,
        version: one.version,
    })
}
