//! Fills of coherent files: each page is answered, when there are frames for it.

use crate::cache::{Cache, now_ms};
use crate::error::CacheError;
use crate::events::CacheEvent;
use crate::file::{CachedFile, Inner};
use crate::fill::{Buffer, Job};
use crate::limits::FILL_PAGES_MAX;
use copage_grants::{FrameNo, PAGE_SIZE, PageIndex, Where};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// Pages that are to be filled, and since when they wait, in ms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FillWant {
    pub first: u32,
    pub count: u32,
    pub since_ms: u64,
}

impl FillWant {
    fn pages(&self) -> impl Iterator<Item = u32> {
        self.first..self.first + self.count
    }
}

/// Where a fill puts its pages.
struct Target {
    generation: u32,
    bytes: u64,
}

impl Cache {
    /// Brings pages that are in no frame from the host's file; [`CacheEvent::Placed`] answers for each, when
    /// frames for it were to be had.
    pub fn strict_fill(&self, file: &Arc<CachedFile>, first: PageIndex, count: u32) {
        let number = u32::try_from(first.0).unwrap_or(u32::MAX);
        let fits = number.checked_add(count).is_some();
        if !fits || !(1..=FILL_PAGES_MAX).contains(&count) {
            let error = CacheError::BadRange("a fill is of 1 to 512 pages");
            let pages = first.0..first.0.saturating_add(count.into());
            return pages.for_each(|page| self.not_placed(file, page, &error));
        }
        let since_ms = now_ms();
        let want = FillWant {
            first: number,
            count,
            since_ms,
        };
        self.push_fill(file, want);
    }

    fn push_fill(&self, file: &Arc<CachedFile>, want: FillWant) {
        let job = Job::StrictFill(file.clone(), want);
        if self.fill_pool.push(job).is_err() {
            self.fail_fill(file, want, &CacheError::Stopped);
        }
    }

    fn not_placed(&self, file: &Arc<CachedFile>, page: u64, error: &CacheError) {
        self.events.send(CacheEvent::Placed {
            file: file.clone(),
            page: PageIndex(page),
            result: Err(error.clone()),
        });
    }

    fn fail_fill(&self, file: &Arc<CachedFile>, want: FillWant, error: &CacheError) {
        want.pages()
            .for_each(|page| self.not_placed(file, page.into(), error));
    }

    /// A job of the pool.
    pub(crate) fn run_strict_fill(
        &self,
        file: &Arc<CachedFile>,
        mut want: FillWant,
        buffer: &mut Buffer,
    ) {
        let target = {
            let mut inner = file.inner.lock();
            self.begin_fill(&mut inner, want)
        };
        let target = match target {
            Ok(target) => target,
            Err(error) => return self.fail_fill(file, want, &error),
        };
        let mut frames = Vec::new();
        if !self.reserve(want.count, &mut frames) {
            self.end_fill(file);
            return self.wait_for_frames(file, want);
        }
        if frames.len() < want.count as usize {
            // The rest waits, or is filled next.
            let got = frames.len() as u32;
            let rest = FillWant {
                first: want.first + got,
                count: want.count - got,
                ..want
            };
            want.count = got;
            self.push_fill(file, rest);
        }
        self.fill_pages(file, want, target, frames, buffer);
        self.refill_if_low();
    }

    fn begin_fill(&self, inner: &mut Inner, want: FillWant) -> Result<Target, CacheError> {
        if inner.dead {
            return Err(CacheError::Withdrawn);
        }
        let home = inner.live.as_mut().ok_or(CacheError::Changing)?;
        if u64::from(want.first) + u64::from(want.count) > home.pages() {
            return Err(CacheError::BadRange("past the end of the file"));
        }
        // Of a page that is in no frame by the machine's book.
        if !want.pages().all(|page| self.lose(home, page)) {
            return Err(CacheError::BadRange("the page is in a frame"));
        }
        if self.descriptors && want.pages().any(|page| home.is_taken(page, Where::Home)) {
            return Err(CacheError::Busy("for a frame that is lost"));
        }
        home.busy += 1;
        Ok(Target {
            generation: home.generation,
            bytes: home.bytes,
        })
    }

    fn end_fill(&self, file: &Arc<CachedFile>) {
        let mut inner = file.inner.lock();
        if let Some(home) = inner.live.as_mut() {
            home.busy -= 1;
        }
    }

    /// The home is the live one until the fill has ended, because it is busy.
    fn fill_pages(
        &self,
        file: &Arc<CachedFile>,
        want: FillWant,
        target: Target,
        mut frames: Vec<FrameNo>,
        buffer: &mut Buffer,
    ) {
        let buf = buffer.pages(want.count);
        let run = self.read_run(file, target.bytes, want.first, buf);
        self.counters.fills.fetch_add(1, Relaxed);
        let unused = frames.split_off((run.pages as usize).min(frames.len()));
        self.give_up(file, &unused);
        let mut error = run.error;
        let home = {
            let mut inner = file.inner.lock();
            self.check_strict_host(file, &mut inner);
            inner.live_of(target.generation).map(|home| home.id)
        };
        let stored = match home {
            _ if frames.is_empty() => Ok(()),
            Some(home) => {
                let bytes = &buf[..frames.len() * PAGE_SIZE];
                let first = PageIndex(want.first.into());
                self.backend
                    .store(home, first, &frames, bytes)
                    .map_err(CacheError::from)
            }
            None => Err(CacheError::Changing),
        };
        if let Err(e) = stored {
            self.give_up(file, &frames);
            frames.clear();
            error = Some(e);
        }
        self.publish_strict(file, want, target.generation, &frames, error);
    }

    fn publish_strict(
        &self,
        file: &Arc<CachedFile>,
        want: FillWant,
        generation: u32,
        frames: &[FrameNo],
        error: Option<CacheError>,
    ) {
        let mut inner = file.inner.lock();
        let Some(home) = inner.live_of(generation) else {
            self.give_up(file, frames);
            return self.fail_fill(file, want, &CacheError::Changing);
        };
        home.busy -= 1;
        let mut known = 0;
        {
            let mut table = self.frames.lock();
            for (page, frame) in want.pages().zip(frames) {
                known += u64::from(table.filled(*frame, home.slot, file.id.0, page, false));
                home.index.insert(page, *frame);
            }
        }
        let counters = &self.counters;
        counters
            .pages_filled
            .fetch_add(frames.len() as u64, Relaxed);
        counters.pages_refilled.fetch_add(known, Relaxed);
        // With the lock: what comes of these pages next comes after.
        for (page, frame) in want.pages().zip(frames) {
            self.events.send(CacheEvent::Placed {
                file: file.clone(),
                page: PageIndex(page.into()),
                result: Ok(*frame),
            });
        }
        let error = error.unwrap_or(CacheError::Changing);
        for page in want.pages().skip(frames.len()) {
            self.not_placed(file, page.into(), &error);
        }
    }

    /// Until frames come free, or for as long as any guest may take over giving some back.
    pub(crate) fn wait_for_frames(&self, file: &Arc<CachedFile>, want: FillWant) {
        if !self.frames_may_come(want.since_ms) {
            return self.fail_fill(file, want, &CacheError::NoFrames);
        }
        self.counters.parked.fetch_add(1, Relaxed);
        file.inner.lock().strict.fills.push_back(want);
        self.park(file);
    }

    /// Frames may have come free: fills that waited for them are tried again.
    pub(crate) fn advance_fills(&self, file: &Arc<CachedFile>) {
        let fills = std::mem::take(&mut file.inner.lock().strict.fills);
        for want in fills {
            self.push_fill(file, want);
        }
    }
}
