//! A page leaves where a session that is gone may have it mapped.
//!
//! On Xen that is its frame. Where guests have descriptors it is the file that the page is in: the writer's own
//! arena may keep it, since nobody else has that. The home and the common file may not, because guests that live
//! see there what is not the page any more.

use super::grant::live_page;
use crate::cache::{Cache, now_ms};
use crate::error::CacheError;
use crate::events::CacheEvent;
use crate::file::{CachedFile, Home, Inner};
use crate::fill::Job;
use crate::frames::FrameState;
use copage_grants::{FrameNo, PAGE_SIZE, PageIndex, Where};
use std::sync::Arc;

impl Cache {
    /// Puts what `from` holds into another frame, once; [`CacheEvent::Placed`] answers. `from` rests until it is
    /// freed. It is the same frame where the page could be put out of everybody's reach; nobody has a grant of it
    /// then.
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
        if let Some(moved) = self.move_out(&mut file.inner.lock(), page, from) {
            return self.answer_copy(file, page, moved.map(|()| from));
        }
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
        if result.is_err() {
            self.give_up(file, &frames);
        }
        self.answer_copy(file, page, result);
    }

    /// Takes the page away from the gone without another frame. `None`: it needs one.
    fn move_out(
        &self,
        inner: &mut Inner,
        page: PageIndex,
        frame: FrameNo,
    ) -> Option<Result<(), CacheError>> {
        let (home, number) = match live_page(inner, page, frame) {
            Ok(found) if self.descriptors => found,
            _ => return None,
        };
        if matches!(home.at(number), Where::Arena(_)) {
            return None;
        }
        if let Err(error) = self.move_page(home, number, frame, Where::Spare) {
            return Some(Err(error));
        }
        // Those who are gone: whatever they have mapped is nobody's page.
        let mut gone = Vec::new();
        self.backend.holders(frame, &mut gone);
        for dom in gone {
            self.backend.note_unmapped(dom, &[frame]);
            self.revoke_from(dom, &[frame]);
        }
        Some(Ok(()))
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
