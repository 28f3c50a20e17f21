//! The windows of one shared mapping.

use super::window::{NotPlaced, Window};
use super::{Granted, MapJob, Pages};
use crate::error::MmapError;
use crate::mapped::{Form, Mapped, Ops, scratch, span};
use crate::pager::told::Told;
use crate::shared::Shared;
use crate::site::Hold;
use copage_grants::Access;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

/// Windows by their first page, counted in the mapping; none overlap.
#[derive(Default)]
pub(crate) struct Windows {
    by_first: BTreeMap<usize, Window>,
}

impl Windows {
    /// The window that holds a page.
    pub(crate) fn holds(&self, page: usize) -> bool {
        self.span_of(page).is_some()
    }

    pub(crate) fn hold_all(&self, range: Range<usize>) -> bool {
        self.free_in(range).is_empty()
    }

    fn span_of(&self, page: usize) -> Option<Range<usize>> {
        let (first, window) = self.by_first.range(..=page).next_back()?;
        let end = first + window.pages();
        (page < end).then_some(*first..end)
    }

    /// The parts of `range` that no window holds.
    fn free_in(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let mut free = Vec::new();
        let mut at = range.start;
        while at < range.end {
            if let Some(held) = self.span_of(at) {
                at = held.end;
                continue;
            }
            let next = self.by_first.range(at..range.end).next();
            let until = next.map_or(range.end, |(first, _)| *first);
            free.push(at..until);
            at = until;
        }
        free
    }

    /// The pages from the first to the last of the windows that hold any of `range`.
    fn touching(&self, range: Range<usize>) -> Option<Range<usize>> {
        let first = match self.span_of(range.start) {
            Some(held) => held.start,
            None => *self.by_first.range(range.clone()).next()?.0,
        };
        let (last, window) = self.by_first.range(..range.end).next_back()?;
        Some(first..last + window.pages())
    }

    /// After the memory was unmapped: lets go of every window in `range`, which cuts none.
    fn forget(&mut self, range: Range<usize>) {
        let mut rest = self.by_first.split_off(&range.start);
        let mut behind = rest.split_off(&range.end);
        self.by_first.append(&mut behind);
    }

    /// After all the memory was unmapped.
    pub(crate) fn forget_all(&mut self) {
        self.by_first.clear();
    }

    /// What is mapped, in runs.
    pub(crate) fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (first, window) in &self.by_first {
            let end = first + window.pages();
            match runs.last_mut() {
                Some(last) if last.end == *first => last.end = end,
                _ => runs.push(*first..end),
            }
        }
        runs
    }
}

/// What lies at a page where a fault came.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Cover {
    /// It is mapped, or refused: the access shall try again.
    There,
    /// Nothing, and nothing in this range around it either (pages of the file).
    Free(Range<u64>),
}

/// How the worker's part went.
#[derive(Debug)]
pub(crate) enum MapOutcome {
    /// Mapped wherever it was waited for and still wanted.
    Done,
    /// Spoiled: ask again.
    Spoiled,
    /// Not mapped.
    Failed(MmapError),
}

fn failed(call: &'static str, error: &io::Error) -> MapOutcome {
    MapOutcome::Failed(MmapError::sys(call, error))
}

/// The worker's part of a [`MapJob`].
pub(crate) fn map(shared: &Shared, job: &MapJob) -> MapOutcome {
    let granted = match shared.granted() {
        Ok(granted) => granted,
        Err(error) => return MapOutcome::Failed(error),
    };
    if job.crowded {
        granted.give_back_part(shared, job.refs.len());
    }
    let mut outcome = MapOutcome::Done;
    for mapped in &job.mappings {
        let of_this = match mapped.form() {
            Form::Read | Form::Write => {
                granted.make_room(shared, job.refs.len());
                mapped.map_batch(shared, granted, job)
            }
            Form::Own => mapped.copy_batch(shared, granted, job),
        };
        if !matches!(of_this, MapOutcome::Done) {
            outcome = of_this;
        }
        if let Ok(uffd) = &shared.uffd {
            mapped.wake(uffd, job.pages.first, job.refs.len() as u32);
        }
    }
    outcome
}

impl Granted {
    /// Is a batch that is in use now what it was when it was granted, and may we still have it?
    pub(super) fn still(&self, job: &MapJob) -> bool {
        #[cfg(test)]
        if self.mutants.keep_spoiled.load(Ordering::SeqCst) {
            return true;
        }
        !job.spoiled.load(Ordering::SeqCst) && job.session.has_lease()
    }
}

impl Mapped {
    /// For the pager: what lies at `page`, and how much around it within `within` is free. `None`: the
    /// mapping is being changed, and who does that wakes everybody.
    pub(crate) fn try_cover(&self, page: u64, within: Range<u64>) -> Option<Cover> {
        let ops = self.try_ops()?;
        let base = self.first_page();
        let last = base + self.pages() as u64;
        let (from, until) = (within.start.max(base), within.end.min(last));
        if ops.region.is_none() || ops.refused || !(from..until).contains(&page) {
            return Some(Cover::There);
        }
        if self.form() == Form::Own {
            return Some(Cover::Free(from..until));
        }
        let page = (page - base) as usize;
        if ops.windows.holds(page) || ops.refused_pages.contains(&page) {
            return Some(Cover::There);
        }
        let (mut from, mut until) = ((from - base) as usize, (until - base) as usize);
        for free in ops.windows.free_in(from..until) {
            if free.contains(&page) {
                (from, until) = (free.start, free.end);
            }
        }
        let refused = &ops.refused_pages;
        from = refused
            .range(from..page)
            .next_back()
            .map_or(from, |p| p + 1);
        until = refused.range(page..until).next().map_or(until, |p| *p);
        Some(Cover::Free(base + from as u64..base + until as u64))
    }

    /// Maps what of a batch is not mapped here.
    fn map_batch(self: &Arc<Self>, shared: &Shared, granted: &Granted, job: &MapJob) -> MapOutcome {
        let Some((first, end)) = self.clip(job.pages.first, job.refs.len() as u32) else {
            return MapOutcome::Done;
        };
        let mut lock = self.lock(shared);
        let Some(ops) = lock.ops() else {
            return MapOutcome::Done;
        };
        if ops.refused || self.stamp() != job.pages.stamp {
            return MapOutcome::Done;
        }
        for free in ops.windows.free_in(first..end) {
            // What is refused stays so until it is populated.
            let mut at = free.start;
            let mut stops: Vec<usize> = ops.refused_pages.range(free.clone()).copied().collect();
            stops.push(free.end);
            for stop in stops {
                if at < stop {
                    let outcome = self.map_run(shared, granted, ops, job, at..stop);
                    if !matches!(outcome, MapOutcome::Done) {
                        return outcome;
                    }
                }
                at = stop + 1;
            }
        }
        MapOutcome::Done
    }

    fn map_run(
        self: &Arc<Self>,
        shared: &Shared,
        granted: &Granted,
        ops: &mut Ops,
        job: &MapJob,
        run: Range<usize>,
    ) -> MapOutcome {
        let Some(region) = &ops.region else {
            return MapOutcome::Done;
        };
        // `clip` saw that the run lies in the batch.
        let skip = (self.first_page() + run.start as u64 - job.pages.first) as usize;
        let refs = &job.refs[skip..skip + run.len()];
        // One that may be stored to is mapped so, else not, whatever the grant allows.
        let access = match self.form() {
            Form::Write => Access::ReadWrite,
            Form::Read | Form::Own => Access::ReadOnly,
        };
        // Before a store can come.
        let hold = ops.site.as_ref().filter(|_| self.form() == Form::Write);
        let pages = self.first_page() + run.start as u64..self.first_page() + run.end as u64;
        let hold = hold.map(|site| Hold::new(site, pages));
        let placed = Window::place(
            &granted.device,
            &granted.held,
            (job.granter, refs, access),
            region,
            span(run.start),
            || granted.still(job),
        );
        match placed {
            Ok(mut window) => {
                if let Some(hold) = hold {
                    window.keep(hold);
                }
                granted.remember(self, run.start, &window);
                ops.windows.by_first.insert(run.start, window);
                MapOutcome::Done
            }
            Err(NotPlaced::Late) => MapOutcome::Spoiled,
            // Revoked, as we said they may be.
            Err(NotPlaced::Untouched(_)) if !granted.still(job) => MapOutcome::Spoiled,
            Err(NotPlaced::Untouched(e)) => failed("mapping grants", &e),
            Err(NotPlaced::Torn(e)) => {
                self.after_failed_replace(shared, ops, run.start, run.len(), &e);
                failed("mapping grants over the file's range", &e)
            }
        }
    }

    /// Takes every window back that holds any of pages `range`, as armed memory: whole windows. Gives
    /// what was taken back.
    pub(crate) fn take_back(
        &self,
        shared: &Shared,
        ops: &mut Ops,
        range: Range<usize>,
    ) -> io::Result<Option<Range<usize>>> {
        let Some(taken) = ops.windows.touching(range) else {
            return Ok(None);
        };
        let uffd = shared.uffd().map_err(io::Error::from)?;
        let Some(region) = &ops.region else {
            return Ok(None);
        };
        let replaced = self
            .armed_scratch(shared, uffd, span(taken.len()))
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))
            .and_then(|piece| region.replace(span(taken.start), piece));
        if let Err(e) = replaced {
            // It must go all the same: all of the mapping is SIGBUS rather than mapped for longer.
            self.after_failed_replace(shared, ops, taken.start, taken.len(), &e);
            self.refuse_all(ops, shared.empty.as_fd(), &e);
            return Err(e);
        }
        ops.windows.forget(taken.clone());
        // Armed like the rest: they are asked for again.
        ops.refused_pages.retain(|page| !taken.contains(page));
        Ok(Some(taken))
    }

    fn armed_scratch(
        &self,
        shared: &Shared,
        uffd: &crate::uffd::Uffd,
        bytes: usize,
    ) -> crate::Result<crate::sys::Region> {
        #[cfg(test)]
        if let Ok(granted) = shared.granted()
            && granted.mutants.skip_arm.load(Ordering::SeqCst)
        {
            return crate::sys::Region::anonymous(bytes, crate::sys::Protection::Read)
                .map_err(|e| MmapError::sys("mmap", &e));
        }
        let _ = shared;
        scratch(uffd, bytes, self.form())
    }

    /// Takes one window back because there is no room, and says so. `false`: it is not there.
    pub(super) fn give_back(
        self: &Arc<Self>,
        shared: &Shared,
        first: usize,
        alive: &Weak<()>,
    ) -> bool {
        let taken = {
            let mut lock = self.lock(shared);
            let Some(ops) = lock.ops() else { return false };
            let same = |w: &Window| std::ptr::eq(Arc::as_ptr(w.alive()), alive.as_ptr());
            if !ops.windows.by_first.get(&first).is_some_and(same) {
                return false;
            }
            let stamp = self.stamp();
            self.take_back(shared, ops, first..first + 1)
                .ok()
                .flatten()
                .map(|range| (stamp, range))
        };
        if let Some((stamp, range)) = taken {
            let pages = Pages {
                stamp,
                first: self.first_page() + range.start as u64,
                count: range.len() as u64,
            };
            shared.tell(Told::GivenBack {
                file: Arc::clone(self.file()),
                pages,
            });
        }
        true
    }

    /// What a mapping that has just been unmapped held is let go of, and the daemon told.
    pub(crate) fn let_go(&self, shared: &Shared, ops: &mut Ops) {
        let mut runs = ops.windows.runs();
        ops.windows.forget_all();
        let moved = ops.moved_runs(self.pages());
        self.forget_moved(ops, 0, self.pages());
        runs.extend(moved);
        for run in runs {
            let pages = Pages {
                stamp: self.stamp(),
                first: self.first_page() + run.start as u64,
                count: run.len() as u64,
            };
            shared.tell(Told::GivenBack {
                file: Arc::clone(self.file()),
                pages,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::standin::StandIn;
    use super::super::window::Held;
    use super::*;
    use crate::sys::{Protection, Region};

    fn windows(spans: &[Range<usize>]) -> (Windows, Region, Arc<StandIn>) {
        let device = StandIn::new(true);
        let region = Region::anonymous(span(256), Protection::Read).unwrap();
        let held: Arc<Held> = Arc::default();
        let mut windows = Windows::default();
        for (n, range) in spans.iter().enumerate() {
            let granted = device.grant(1, 1, n as u64 * 1000, range.len());
            let (refs, dyn_device) = (granted, Arc::clone(&device) as Arc<_>);
            let window = Window::place(
                &dyn_device,
                &held,
                (StandIn::GRANTER, &refs, Access::ReadOnly),
                &region,
                span(range.start),
                || true,
            )
            .unwrap();
            windows.by_first.insert(range.start, window);
        }
        (windows, region, device)
    }

    #[test]
    fn local_windows_are_found_cut_around_and_forgotten_whole() {
        let (mut w, region, device) = windows(&[4..8, 8..16, 32..40]);
        assert!(w.holds(4) && w.holds(15) && !w.holds(16) && !w.holds(3));
        assert_eq!(w.free_in(0..48), [0..4, 16..32, 40..48]);
        assert_eq!(w.free_in(5..12), []);
        assert_eq!(w.touching(0..4), None);
        assert_eq!(w.touching(15..20), Some(8..16));
        assert_eq!(w.touching(7..33), Some(4..40));
        assert_eq!(w.touching(16..32), None);
        assert_eq!(w.runs(), [4..16, 32..40]);
        drop(region);
        w.forget(4..8);
        assert_eq!(w.runs(), [8..16, 32..40]);
        assert_eq!(device.mapped(), 16);
        w.forget_all();
        assert_eq!(device.mapped(), 0);
    }
}
