//! A page gets another frame, because a session that is gone may have its own mapped.

use crate::cache::{Cache, now_ms};
use crate::error::CacheError;
use crate::events::CacheEvent;
use crate::file::{CachedFile, Home};
use crate::fill::Job;
use crate::frames::FrameState;
use copage_grants::{FrameNo, PAGE_SIZE, PageIndex, Where};
use std::sync::Arc;

impl Cache {
    /// Puts what `from` holds into another frame, once; [`CacheEvent::Placed`] answers. `from` rests until it is
    /// freed. It is the same frame where no session can reach what it holds.
    pub fn strict_copy(&self, file: &Arc<CachedFile>, page: PageIndex, from: FrameNo) {
        let job = Job::StrictCopy(file.clone(), page, from, now_ms());
        if self.fill_pool.push(job).is_err() {
            self.answer_copy(file, page, Err(CacheError::Stopped));
        }
    }

    fn answer_copy(
        &self,
        file: &Arc<CachedFile>,
        page: PageIndex,
        result: Result<FrameNo, CacheError>,
    ) {
        let file = file.clone();
        self.events.send(CacheEvent::Placed { file, page, result });
    }

    /// A job of the pool.
    pub(crate) fn run_copy(
        &self,
        file: &Arc<CachedFile>,
        page: PageIndex,
        from: FrameNo,
        since_ms: u64,
    ) {
        let mut frames = Vec::new();
        if !self.reserve(1, &mut frames) {
            if !self.frames_may_come(since_ms) {
                return self.answer_copy(file, page, Err(CacheError::NoFrames));
            }
            file.inner.lock().strict.copies.push((page, from, since_ms));
            return self.park(file);
        }
        let mut inner = file.inner.lock();
        let result = match (inner.live.as_mut(), frames.first()) {
            (Some(home), Some(to)) => self.copy_page(file, home, page, from, *to),
            _ => Err(CacheError::Changing),
        };
        // The frame is not used where the page stays in its own.
        if !matches!(&result, Ok(frame) if *frame != from) {
            self.give_up(file, &frames);
        }
        self.answer_copy(file, page, result);
    }

    fn copy_page(
        &self,
        file: &CachedFile,
        home: &mut Home,
        page: PageIndex,
        from: FrameNo,
        to: FrameNo,
    ) -> Result<FrameNo, CacheError> {
        let number = u32::try_from(page.0).unwrap_or(u32::MAX);
        if home.index.get(number) != Some(from) {
            return Err(CacheError::BadRange("the page is in another frame"));
        }
        let at = home.at(number);
        // In the home it would be seen before it is saved.
        let there = match self.descriptors {
            true => Where::Spare,
            false => Where::Home,
        };
        if self.descriptors && at == there {
            // Whoever had it for writing with others that have let go since: what it can reach is not the page
            // any more.
            return Ok(from);
        }
        if self.descriptors {
            self.backend.place(home.id, page, to, at, there, true)?;
        } else {
            let mut bytes = [0; PAGE_SIZE];
            self.backend.load(home.id, page, from, &mut bytes)?;
            let start = page.byte_offset().unwrap_or(u64::MAX);
            let end = home.bytes.saturating_sub(start).min(PAGE_SIZE as u64);
            bytes[end as usize..].fill(0);
            self.backend.store(home.id, page, &[to], &bytes)?;
        }
        home.lost.insert(from, (number, at));
        home.index.insert(number, to);
        home.put(number, there);
        let mut table = self.frames.lock();
        table.filled(to, home.slot, file.id.0, number, false);
        table.set_state(from, FrameState::Quarantined);
        Ok(to)
    }

    /// Of pages from `first` on, which are taken: frames that sessions have mapped all the same, which are gone.
    pub(crate) fn lose_from(&self, home: &mut Home, first: u32) {
        let pages = home.index.range(first, u32::MAX);
        pages.into_iter().for_each(|(page, _)| {
            self.lose(home, page);
        });
    }

    /// The same of one page; `false`: nobody has its frame mapped, and it stays in it.
    pub(crate) fn lose(&self, home: &mut Home, page: u32) -> bool {
        let Some(frame) = home.index.get(page) else {
            return true;
        };
        if self.backend.holder_count(frame) == 0 {
            return false;
        }
        home.lost.insert(frame, (page, home.at(page)));
        home.index.remove(page);
        home.places.remove(&page);
        self.frames.lock().set_state(frame, FrameState::Quarantined);
        true
    }

    pub(crate) fn advance_copies(&self, file: &Arc<CachedFile>) {
        let copies = std::mem::take(&mut file.inner.lock().strict.copies);
        for (page, from, since_ms) in copies {
            let job = Job::StrictCopy(file.clone(), page, from, since_ms);
            if self.fill_pool.push(job).is_err() {
                self.answer_copy(file, page, Err(CacheError::Stopped));
            }
        }
    }
}
