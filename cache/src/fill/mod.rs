//! Fills: jobs of a bounded pool that bring pages from the host's files into frames.

mod read;

pub(crate) use read::Buffer;

use crate::cache::{Cache, now_ms};
use crate::coherent::FillWant;
use crate::config::Holder;
use crate::events::{OpenHow, RecallReason};
use crate::file::{CachedFile, Flight, Inner};
use crate::frames::FrameState;
use crate::limits::{HUGE_PAGES, HUGE_PAUSES_MS, HUGE_REFUSALS_MAX};
use crate::tree::NodeRef;
use copage_grants::{FrameNo, HomeId, PageIndex};
use read::ReadRun;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Duration;

/// What a pool thread does.
pub(crate) enum Job {
    /// Fill these pages.
    Fill(Arc<CachedFile>, Flight),
    /// Look at what waits on the file.
    Advance(Arc<CachedFile>),
    /// Open a file for the life of `who`'s domain that was given.
    Open {
        ticket: u64,
        node: NodeRef,
        how: OpenHow,
        who: Holder,
        write: bool,
        life: u64,
    },
    /// Fill pages of a coherent file.
    StrictFill(Arc<CachedFile>, FillWant),
    /// Give a page of a coherent file another frame; the last is since when it waits, in ms.
    StrictCopy(Arc<CachedFile>, PageIndex, FrameNo, u64),
    /// Give frames back down to the watermark or the budget.
    Refill,
}

impl Cache {
    pub(crate) fn run_job(&self, job: Job, buffer: &mut Buffer) {
        match job {
            Job::Fill(file, flight) => self.run_fill(&file, flight, buffer),
            Job::Advance(file) => {
                // First: who asks from here on may have come too late for this look.
                file.queued.store(false, Release);
                self.advance(&file, true);
                if file.is_coherent() {
                    self.advance_fills(&file);
                    self.advance_copies(&file);
                }
            }
            Job::StrictFill(file, want) => self.run_strict_fill(&file, want, buffer),
            Job::StrictCopy(file, page, from, since_ms) => {
                self.run_copy(&file, page, from, since_ms);
            }
            Job::Open {
                ticket,
                node,
                how,
                who,
                write,
                life,
            } => self.run_open(ticket, node, how, who, write, life),
            Job::Refill => {
                self.refill();
                self.refilling.store(false, Release);
                self.kick_parked();
            }
        }
    }

    /// Starts a fill of the free list ahead of need, if it is low and none is under way.
    pub(crate) fn refill_if_low(&self) {
        let low = {
            let frames = self.frames.lock();
            frames.available() < frames.watermark() || frames.used() > frames.budget()
        };
        if low && !self.refilling.swap(true, Acquire) {
            self.push_job(Job::Refill);
        }
    }

    fn run_fill(&self, file: &Arc<CachedFile>, flight: Flight, buffer: &mut Buffer) {
        let bytes = {
            let mut inner = file.inner.lock();
            let bytes = inner.live_of(flight.generation).map(|h| h.bytes);
            if bytes.is_none() {
                inner.flights.retain(|f| *f != flight);
            }
            bytes
        };
        let Some(bytes) = bytes else {
            return self.advance(file, true);
        };

        let mut frames = Vec::new();
        if !self.reserve(flight.count, &mut frames) {
            file.inner.lock().flights.retain(|f| *f != flight);
            self.counters.parked.fetch_add(1, Relaxed);
            self.park(file);
            self.advance(file, false);
            return;
        }
        let buf = buffer.pages(frames.len() as u32);
        let mut run = self.read_run(file, bytes, flight.first, buf);
        self.counters.fills.fetch_add(1, Relaxed);

        let mut inner = file.inner.lock();
        if self.is_overtaken(file, &mut inner, flight.generation) {
            self.counters.fills_dropped.fetch_add(1, Relaxed);
            inner.flights.retain(|f| *f != flight);
            self.look_at(file, &inner);
            drop(inner);
            self.give_up(file, &frames);
            return self.advance(file, true);
        }
        let good = (run.pages as usize).min(frames.len());
        let unused = frames.split_off(good);
        // `busy` keeps the home from being emptied while pages are put into it without the lock.
        let Some(home) = inner.live_of(flight.generation).map(|h| {
            h.busy += 1;
            h.id
        }) else {
            return; // Just checked by `is_overtaken`, under the same lock.
        };
        drop(inner);
        self.give_up(file, &unused);
        let first = PageIndex(flight.first.into());
        if !frames.is_empty()
            && let Err(e) = self
                .backend
                .store(home, first, &frames, &buf[..frames.len() * 4096])
        {
            self.give_up(file, &frames);
            frames.clear();
            run = ReadRun {
                pages: 0,
                error: Some(e.into()),
            };
        }
        self.publish(file, flight, frames, run);
    }

    /// Puts stored pages into the index, or throws them away when their generation has ended.
    fn publish(&self, file: &Arc<CachedFile>, flight: Flight, frames: Vec<FrameNo>, run: ReadRun) {
        let mut inner = file.inner.lock();
        inner.flights.retain(|f| *f != flight);
        let is_live = inner.live_of(flight.generation).is_some();
        let mut collapse = None;
        if let Some(home) = inner.home_of(flight.generation) {
            // Also for a home that has ended meanwhile: it is emptied with the rest right below.
            let held = home.holds_frames();
            let mut table = self.frames.lock();
            let mut known = 0;
            for (n, frame) in frames.iter().enumerate() {
                let page = flight.first + n as u32;
                known += u64::from(table.filled(*frame, home.slot, file.id.0, page, held));
                home.index.insert(page, *frame);
                if !is_live && held {
                    table.set_state(*frame, FrameState::Quarantined);
                }
            }
            drop(table);
            self.counters
                .pages_filled
                .fetch_add(frames.len() as u64, Relaxed);
            self.counters.pages_refilled.fetch_add(known, Relaxed);
            home.busy -= 1;
            if is_live && self.config.collapse && !frames.is_empty() {
                let unit = flight.first / HUGE_PAGES;
                let start = unit * HUGE_PAGES;
                let whole = !home.huge.contains(&unit)
                    && !home.collapsing.contains(&unit)
                    && (start..start + HUGE_PAGES).all(|p| home.index.get(p).is_some());
                if whole {
                    home.busy += 1;
                    home.collapsing.insert(unit);
                    collapse = Some((home.id, unit));
                }
            }
        }
        if let Some(error) = run.error {
            let page = flight.first + run.pages;
            for waiter in std::mem::take(&mut inner.waiters) {
                if waiter.kind.wants(flight.generation, page) {
                    self.fail(file, &mut inner, waiter, error.clone());
                } else {
                    inner.waiters.push(waiter);
                }
            }
        }
        if !is_live {
            self.drain_old(file, &mut inner, now_ms());
        }
        self.look_at(file, &inner);
        drop(inner);
        self.advance(file, true);
        if let Some((home, unit)) = collapse {
            let first = PageIndex(u64::from(unit) * u64::from(HUGE_PAGES));
            let huge = self.make_huge(home, first);
            let mut inner = file.inner.lock();
            if let Some(home) = inner.home_of(flight.generation) {
                home.busy -= 1;
                home.collapsing.remove(&unit);
                if huge {
                    home.huge.insert(unit);
                }
            }
            self.drain_old(file, &mut inner, now_ms());
            self.look_at(file, &inner);
        }
        self.refill_if_low();
    }

    /// Slower memory is all that a failure means. Often it is passing: the kernel will not collapse a
    /// page that a guest maps at that moment. Where it never works, one try is enough.
    fn make_huge(&self, home: HomeId, first: PageIndex) -> bool {
        for pause_ms in HUGE_PAUSES_MS {
            if self.backend.make_huge(home, first).unwrap_or(false) {
                self.counters.huge_refusals.store(0, Relaxed);
                return true;
            }
            if self.counters.huge_refusals.fetch_add(1, Relaxed) >= HUGE_REFUSALS_MAX {
                return false;
            }
            std::thread::sleep(Duration::from_millis(pause_ms));
        }
        false
    }

    /// Did the content change while it was read? Then its generation ends here.
    fn is_overtaken(&self, file: &Arc<CachedFile>, inner: &mut Inner, generation: u32) -> bool {
        if inner.live_of(generation).is_none() || inner.dead {
            return true;
        }
        // Without a stat there is no knowing: the next fill tells, and a broken file fails by itself.
        let Ok((cookie, _)) = file.read_cookie() else {
            return false;
        };
        if cookie == inner.cookie {
            inner.churn = 0;
            return false;
        }
        if !self.is_changed(inner, cookie) {
            return false;
        }
        self.retire(file, inner, RecallReason::Changed, now_ms());
        true
    }

    pub(crate) fn give_up(&self, file: &CachedFile, frames: &[FrameNo]) {
        if frames.is_empty() {
            return;
        }
        let mut table = self.frames.lock();
        for frame in frames {
            table.release(*frame, file.id.0, false);
        }
    }
}
