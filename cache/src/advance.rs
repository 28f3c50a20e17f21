//! Requests that wait: what each can do now.

use crate::cache::{Cache, now_ms};
use crate::config::Holder;
use crate::error::CacheError;
use crate::events::{CacheEvent, FaultDone, OpenDone, OpenHow};
use crate::fault::NoGrant;
use crate::file::{CachedFile, Flight, Inner, WaitKind, Waiter};
use crate::fill::Job;
use crate::limits::{FILL_PAGES_MAX, HUGE_PAGES, PIN_TRIES_MAX};
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64, PageIndex};
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Relaxed};

/// How far a waiter came.
enum Step {
    Done,
    Wait(Waiter),
    /// It waits for grants or frames of its own to be given back.
    Room(Waiter, u32, CacheError),
}

/// How often room is made for the waiters of a file before they are refused.
const ROOM_TRIES: u32 = 4;
/// And for how long, in ms, where pages are taken by force: another thread may have them in hand.
const ROOM_PATIENCE_MS: u64 = 200;

impl Cache {
    /// Looks at every request that waits on the file. `issue`: fills may be asked for (not right
    /// after one found no frames).
    pub(crate) fn advance(&self, file: &Arc<CachedFile>, issue: bool) {
        for round in 0..=ROOM_TRIES {
            let mut rooms: Vec<(Holder, u32)> = Vec::new();
            let mut inner = file.inner.lock();
            self.try_settle(file, &mut inner, now_ms());
            for waiter in std::mem::take(&mut inner.waiters) {
                match self.step(file, &mut inner, waiter, issue) {
                    Step::Done => {}
                    Step::Wait(waiter) => inner.waiters.push(waiter),
                    Step::Room(waiter, _, error) if self.is_hopeless(&waiter, round) => {
                        self.fail(file, &mut inner, waiter, error);
                    }
                    Step::Room(waiter, count, _) => {
                        rooms.push((waiter.who, count));
                        inner.waiters.push(waiter);
                    }
                }
            }
            self.settle_idle(file, &mut inner);
            drop(inner);
            if rooms.is_empty() {
                return;
            }
            for (who, count) in rooms {
                self.make_room(who, count);
            }
            if !self.force {
                // The guest was asked; its answer comes by `recall_done`.
                return self.park(file);
            }
        }
        // Its oldest pages are just being taken by somebody else.
        self.park(file);
    }

    fn is_hopeless(&self, waiter: &Waiter, round: u32) -> bool {
        let (tries_are_up, patience_ms) = match self.force {
            true => (round == ROOM_TRIES, ROOM_PATIENCE_MS),
            false => (true, 2 * u64::from(self.config.recall_deadline_ms)),
        };
        tries_are_up && now_ms() > waiter.since_ms + patience_ms
    }

    fn step(&self, file: &Arc<CachedFile>, inner: &mut Inner, waiter: Waiter, issue: bool) -> Step {
        if inner.dead {
            self.fail(file, inner, waiter, CacheError::Withdrawn);
            return Step::Done;
        }
        if inner.live.is_none() {
            return Step::Wait(waiter);
        }
        match waiter.kind.clone() {
            WaitKind::Open { how, node } => self.step_open(file, inner, waiter, how, node.export),
            WaitKind::Fault {
                generation,
                first,
                count,
                window,
            } => {
                let range = (first, count, window);
                self.step_fault(file, inner, waiter, generation, range, issue)
            }
            WaitKind::Read { offset, len } => {
                self.step_read(file, inner, waiter, offset, len, issue)
            }
            WaitKind::Pin {
                generation,
                cursor,
                tries,
            } => self.step_pin(file, inner, waiter, (generation, cursor, tries), issue),
        }
    }

    fn step_open(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
        mut waiter: Waiter,
        how: OpenHow,
        export: crate::config::ExportId,
    ) -> Step {
        // It may have waited while the export was removed.
        if let Err(e) = self.exports.check_live(export) {
            self.fail(file, inner, waiter, e);
            return Step::Done;
        }
        if file.is_coherent() {
            match self.admit_class(file, inner, how, waiter.who.class) {
                Some(Ok(())) => {}
                Some(Err(e)) => {
                    self.fail(file, inner, waiter, e);
                    return Step::Done;
                }
                None => return Step::Wait(waiter),
            }
        }
        if how != OpenHow::Pin {
            inner.add_open(waiter.who, export, how);
            self.answer_open(file, inner, &waiter, how);
            return Step::Done;
        }
        if let Err(e) = self.begin_pin(inner, waiter.who) {
            self.fail(file, inner, waiter, e);
            return Step::Done;
        }
        inner.add_open(waiter.who, export, how);
        let generation = inner.state.generation;
        waiter.kind = WaitKind::Pin {
            generation,
            cursor: 0,
            tries: 0,
        };
        self.step(file, inner, waiter, true)
    }

    fn step_fault(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
        mut waiter: Waiter,
        generation: u32,
        (first, count, window): (u32, u32, u32),
        issue: bool,
    ) -> Step {
        let ticket = waiter.ticket;
        if !inner.may_hold_grants(waiter.who.dom) {
            self.answer_error(&waiter, CacheError::NotOpen(waiter.who.dom));
            return Step::Done;
        }
        let state = inner.state;
        let Some(home) = inner.live.as_ref().filter(|h| h.generation == generation) else {
            self.events.send(CacheEvent::Faulted {
                ticket,
                result: Ok(FaultDone::Stale(state)),
            });
            return Step::Done;
        };
        if u64::from(first) >= home.pages() {
            self.answer_error(&waiter, CacheError::BadRange("past the end of the file"));
            return Step::Done;
        }
        if !waiter.issued && issue {
            waiter.issued = true;
            self.issue(file, inner, first, first + window);
            if inner.sequence.0 >= u64::from(first) + u64::from(window) {
                self.read_ahead(file, inner);
            }
        }
        if inner
            .flights
            .iter()
            .any(|f| f.overlaps(generation, first, first + count))
        {
            return Step::Wait(waiter);
        }
        let Some(home) = inner.live.as_ref() else {
            return Step::Wait(waiter);
        };
        home.index.get_run(first, window, &mut inner.scratch.0);
        if inner.scratch.0.is_empty() {
            return self.again(file, inner, waiter, (first, first + count), issue);
        }
        if !self.cut_scratch(inner) {
            self.park(file);
            return Step::Wait(waiter);
        }
        let count = inner.scratch.0.len() as u32;
        inner.wants_again(waiter.who.dom, first.into(), count);
        let result = match self.grant_scratch(inner, waiter.who) {
            Ok(()) => Ok(FaultDone::Granted {
                generation,
                first: PageIndex(first.into()),
                count,
                grants: self.granted_refs(inner),
            }),
            Err(NoGrant::Room(e)) => return Step::Room(waiter, count, e),
            Err(NoGrant::Failed(e)) => Err(e),
        };
        self.events.send(CacheEvent::Faulted { ticket, result });
        Step::Done
    }

    /// Asks for pages (once more), or waits for frames, or gives up when there will be none.
    fn again(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
        waiter: Waiter,
        (first, end): (u32, u32),
        issue: bool,
    ) -> Step {
        if issue {
            self.issue(file, inner, first, end);
            return Step::Wait(waiter);
        }
        if !self.frames_may_come(waiter.since_ms) {
            self.fail(file, inner, waiter, CacheError::NoFrames);
            return Step::Done;
        }
        Step::Wait(waiter)
    }

    fn step_read(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
        waiter: Waiter,
        offset: u64,
        len: u32,
        issue: bool,
    ) -> Step {
        let generation = inner.state.generation;
        let end = (offset + u64::from(len)).min(inner.state.bytes);
        if offset >= end {
            self.events.send(CacheEvent::Read {
                ticket: waiter.ticket,
                result: Ok(Vec::new()),
            });
            return Step::Done;
        }
        let first = (offset / PAGE_SIZE_U64) as u32;
        let last = end.div_ceil(PAGE_SIZE_U64) as u32;
        let Some(home) = inner.live.as_ref() else {
            return Step::Wait(waiter);
        };
        if !home
            .index
            .get_run(first, last - first, &mut inner.scratch.0)
        {
            if inner
                .flights
                .iter()
                .any(|f| f.overlaps(generation, first, last))
            {
                return Step::Wait(waiter);
            }
            // They must all be there at once; else each would push out the one before, for ever.
            if last - first > self.frames.lock().movable() {
                self.fail(file, inner, waiter, CacheError::NoFrames);
                return Step::Done;
            }
            return self.again(file, inner, waiter, (first, last), issue);
        }
        // The file's lock is held: nothing is taken away while it is copied.
        let mut bytes = Vec::with_capacity((end - offset) as usize);
        let mut page = [0; PAGE_SIZE];
        for (n, frame) in inner.scratch.0.iter().enumerate() {
            let number = u64::from(first) + n as u64;
            if let Err(e) = self
                .backend
                .load(home.id, PageIndex(number), *frame, &mut page)
            {
                self.answer_error(&waiter, e.into());
                return Step::Done;
            }
            let start = number * PAGE_SIZE_U64;
            let from = offset.saturating_sub(start) as usize;
            let to = (end - start).min(PAGE_SIZE_U64) as usize;
            bytes.extend_from_slice(&page[from..to]);
        }
        let mut frames = self.frames.lock();
        for frame in &inner.scratch.0 {
            frames.used_once(*frame);
        }
        self.events.send(CacheEvent::Read {
            ticket: waiter.ticket,
            result: Ok(bytes),
        });
        Step::Done
    }

    fn step_pin(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
        mut waiter: Waiter,
        (generation, mut cursor, tries): (u32, u32, u32),
        issue: bool,
    ) -> Step {
        let newest = inner.state.generation;
        if generation != newest {
            self.unpin(file, inner, waiter.who.dom, generation);
            let begun = if tries < PIN_TRIES_MAX {
                self.begin_pin(inner, waiter.who)
            } else {
                Err(CacheError::Changing)
            };
            if let Err(e) = begun {
                inner.drop_open(waiter.who, OpenHow::Pin);
                self.answer_error(&waiter, e);
                return Step::Done;
            }
            waiter.kind = WaitKind::Pin {
                generation: newest,
                cursor: 0,
                tries: tries + 1,
            };
            return self.step(file, inner, waiter, issue);
        }
        let Some(home) = inner.live.as_mut() else {
            return Step::Wait(waiter);
        };
        let pages = home.pages() as u32;
        while cursor < pages && home.index.get(cursor).is_some() {
            cursor += 1;
        }
        waiter.kind = WaitKind::Pin {
            generation,
            cursor,
            tries,
        };
        if cursor < pages {
            let end = ((cursor / HUGE_PAGES + 1) * HUGE_PAGES).min(pages);
            if inner
                .flights
                .iter()
                .any(|f| f.overlaps(generation, cursor, end))
            {
                return Step::Wait(waiter);
            }
            return self.again(file, inner, waiter, (cursor, end), issue);
        }
        home.index.get_run(0, pages, &mut inner.scratch.0);
        match self.grant_scratch(inner, waiter.who) {
            Ok(()) => {}
            Err(NoGrant::Room(e)) => return Step::Room(waiter, pages, e),
            Err(NoGrant::Failed(e)) => {
                self.fail(file, inner, waiter, e);
                return Step::Done;
            }
        }
        if let Some(home) = inner.live.as_mut() {
            home.exposed = true;
        }
        inner.scratch = Default::default(); // As long as the file: not kept.
        self.answer_open(file, inner, &waiter, OpenHow::Pin);
        Step::Done
    }

    /// Asks for fills of the pages of `first..end` that are neither there nor under way.
    pub(crate) fn issue(&self, file: &Arc<CachedFile>, inner: &mut Inner, first: u32, end: u32) {
        let Some(home) = inner.live.as_ref() else {
            return;
        };
        let generation = home.generation;
        let end = end.min(home.pages() as u32);
        let mut at = first;
        while at < end {
            if home.index.get(at).is_some() {
                at += 1;
                continue;
            }
            if let Some(f) = inner
                .flights
                .iter()
                .find(|f| f.overlaps(generation, at, at + 1))
            {
                at = f.end();
                continue;
            }
            let mut stop = at + 1;
            while stop < end
                && stop - at < FILL_PAGES_MAX
                && home.index.get(stop).is_none()
                && !inner
                    .flights
                    .iter()
                    .any(|f| f.overlaps(generation, stop, stop + 1))
            {
                stop += 1;
            }
            let flight = Flight {
                generation,
                first: at,
                count: stop - at,
            };
            inner.flights.push(flight);
            self.push_job(Job::Fill(file.clone(), flight));
            at = stop;
        }
    }

    fn answer_open(&self, file: &Arc<CachedFile>, inner: &Inner, waiter: &Waiter, how: OpenHow) {
        let done = OpenDone {
            file: file.clone(),
            state: inner.state,
            how,
        };
        self.events.send(CacheEvent::Opened {
            ticket: waiter.ticket,
            result: Ok(done),
        });
    }

    /// Ends a waiter with an error; a pinned open is undone.
    pub(crate) fn fail(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
        waiter: Waiter,
        e: CacheError,
    ) {
        if let WaitKind::Pin { generation, .. } = waiter.kind {
            self.unpin(file, inner, waiter.who.dom, generation);
            inner.drop_open(waiter.who, OpenHow::Pin);
            self.settle_grants(inner, waiter.who);
        }
        self.answer_error(&waiter, e);
    }

    pub(crate) fn answer_error(&self, waiter: &Waiter, error: CacheError) {
        let ticket = waiter.ticket;
        self.events.send(match waiter.kind {
            WaitKind::Open { .. } | WaitKind::Pin { .. } => CacheEvent::Opened {
                ticket,
                result: Err(error),
            },
            WaitKind::Fault { .. } => CacheEvent::Faulted {
                ticket,
                result: Err(error),
            },
            WaitKind::Read { .. } => CacheEvent::Read {
                ticket,
                result: Err(error),
            },
        });
    }

    /// The file's requests are looked at again when frames came free.
    pub(crate) fn park(&self, file: &Arc<CachedFile>) {
        let mut parked = self.parked.lock();
        if parked.is_empty() {
            self.parked_ms.store(now_ms(), Relaxed);
        }
        parked.insert(file.id, file.clone());
        drop(parked);
        self.events.wake();
    }

    /// Frames or grants came free: whoever waits for them tries again.
    pub(crate) fn kick_parked(&self) {
        let files = std::mem::take(&mut *self.parked.lock());
        for file in files.into_values() {
            self.push_advance(&file);
        }
    }

    /// Has a thread of the pool look at what waits on the file, once however often it is asked for.
    pub(crate) fn push_advance(&self, file: &Arc<CachedFile>) {
        if !file.queued.swap(true, AcqRel) {
            self.push_job(Job::Advance(file.clone()));
        }
    }

    pub(crate) fn push_job(&self, job: Job) {
        if let Err(job) = self.fill_pool.push(job) {
            // Stopping: `shutdown` answers whoever still waits.
            drop(job);
        }
    }
}
