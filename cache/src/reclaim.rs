//! Giving frames back: the budget is kept here.

use crate::cache::{Cache, now_ms};
use crate::config::Holder;
use crate::error::CacheError;
use crate::events::{CacheEvent, RecallReason};
use crate::file::{CachedFile, Home, Inner, each_run};
use crate::frames::FrameState;
use crate::limits::{HUGE_PAGES, RECALL_PAGES_MAX, RECLAIM_BATCH};
use copage_grants::{DomId, FrameNo, PageIndex};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// A file, the number of one of its homes, and pages of that home with their frames.
type OfHome = (Arc<CachedFile>, u32, Vec<(u32, FrameNo)>);

impl Cache {
    /// Takes up to `count` frames, at least one; gives others back for that. `false`: none now.
    pub(crate) fn reserve(&self, count: u32, out: &mut Vec<FrameNo>) -> bool {
        for _ in 0..3 {
            let missing = count - out.len() as u32;
            let (short, wanted) = {
                let mut frames = self.frames.lock();
                frames.take(missing, out);
                let short = count - out.len() as u32;
                // Nothing is to be had before the excess is gone: piece by piece, each would be waited for.
                let most = (short + frames.excess()).min(RECALL_PAGES_MAX);
                (short, frames.batch().max(short).max(most))
            };
            if short == 0 || self.evict_batch(wanted) == 0 {
                break;
            }
        }
        !out.is_empty()
    }

    /// May frames still come for who waits since `since_ms`? Whoever is asked for some answers within a deadline,
    /// or is fenced. Down to a budget that was cut it can take many rounds of asking: that is waited for as long as
    /// it goes on. It does not where guests say that they let go, and keep everything: what they keep is given up
    /// at its third deadline, and others are asked; twice that is waited for one to let go.
    pub(crate) fn frames_may_come(&self, since_ms: u64) -> bool {
        let now_ms = now_ms();
        let deadline_ms = u64::from(self.config.recall_deadline_ms);
        let mut frames = self.frames.lock();
        let is_early = |since_ms: u64, deadlines| now_ms <= since_ms + deadlines * deadline_ms;
        let goes_on = frames
            .over_since(now_ms)
            .is_some_and(|since_ms| is_early(since_ms, 6));
        frames.any_reclaimable() && (goes_on || is_early(since_ms, 2))
    }

    /// Gives back about `count` frames: those that nobody holds first, then the ones granted the
    /// longest ago. Without force the latter are asked for and come later. Returns how many came.
    pub(crate) fn evict_batch(&self, count: u32) -> u32 {
        let mut idle = Vec::new();
        let mut granted = Vec::new();
        {
            let mut frames = self.frames.lock();
            frames.pick_idle(count, &mut idle);
            let more = count.saturating_sub(idle.len() as u32);
            if self.force {
                frames.pick_granted(more, FrameState::Evicting, &mut idle);
            } else {
                let asked = frames.count(FrameState::Recalling);
                frames.pick_granted(
                    more.saturating_sub(asked),
                    FrameState::Recalling,
                    &mut granted,
                );
            }
        }
        self.ask_back(&granted, None);
        self.evict(&idle)
    }

    /// Frames by file, in the order of their pages.
    fn by_file(&self, frames: &[FrameNo]) -> Vec<OfHome> {
        let mut slots: BTreeMap<u32, Vec<(u32, FrameNo)>> = BTreeMap::new();
        let table = self.frames.lock();
        for frame in frames {
            let (slot, page) = table.place(*frame);
            slots.entry(slot).or_default().push((page, *frame));
        }
        let mut out = Vec::new();
        for (slot, mut pages) in slots {
            if let Some(file) = table.slot_file(slot).and_then(|f| f.upgrade()) {
                pages.sort_unstable_by_key(|(page, _)| *page);
                out.push((file, slot, pages));
            }
        }
        out
    }

    /// Empties frames that are `Evicting`, unless somebody was granted them meanwhile.
    pub(crate) fn evict(&self, frames: &[FrameNo]) -> u32 {
        let mut freed = 0;
        for (file, slot, pages) in self.by_file(frames) {
            freed += self.evict_of(&file, slot, pages);
        }
        freed
    }

    fn evict_of(&self, file: &Arc<CachedFile>, slot: u32, mut pages: Vec<(u32, FrameNo)>) -> u32 {
        if file.is_coherent() {
            self.want_back(file, slot, &pages);
            return 0;
        }
        let mut inner = file.inner.lock();
        let Some(home) = inner.home_at(slot) else {
            return 0;
        };
        let mut units: Vec<u32> = pages.iter().map(|(p, _)| p / HUGE_PAGES).collect();
        units.dedup();
        {
            let mut table = self.frames.lock();
            pages.retain(|(page, frame)| {
                let ours = home.index.get(*page) == Some(*frame)
                    && table.state(*frame) == FrameState::Evicting;
                let keep = ours && !home.collapsing.contains(&(page / HUGE_PAGES));
                if ours && !keep {
                    table.set_state(*frame, self.resident_state(*frame));
                }
                keep
            });
            // A 2 MiB frame goes as a whole: without one of its pages it would be 511 small ones.
            for unit in units {
                if !home.huge.remove(&unit) || !pages.iter().any(|(p, _)| p / HUGE_PAGES == unit) {
                    continue;
                }
                for page in unit * HUGE_PAGES..(unit + 1) * HUGE_PAGES {
                    let Some(frame) = home.index.get(page) else {
                        continue;
                    };
                    use FrameState::{Granted, Main, Small};
                    let takes = [Small, Main].contains(&table.state(frame))
                        || self.force && table.state(frame) == Granted;
                    if takes {
                        table.set_state(frame, FrameState::Evicting);
                        pages.push((page, frame));
                    }
                }
            }
            pages.sort_unstable_by_key(|(page, _)| *page);
        }
        let mut freed = 0;
        let id = home.id;
        let result = each_run(&pages, |first, frames| {
            let held = frames
                .iter()
                .filter(|f| self.backend.holder_count(**f) > 0)
                .count();
            let page = PageIndex(first.into());
            if held > 0 {
                self.backend.force_out(id, page, frames, &mut |_, _| {})?;
            } else {
                self.backend.discard(id, page, frames)?;
            }
            let mut table = self.frames.lock();
            for (n, frame) in frames.iter().enumerate() {
                home.index.remove(first + n as u32);
                table.release(*frame, file.id.0, true);
            }
            freed += frames.len() as u32;
            self.counters
                .reclaimed_granted
                .fetch_add(held as u64, Relaxed);
            self.counters
                .reclaimed_idle
                .fetch_add((frames.len() - held) as u64, Relaxed);
            self.counters.reclaim_calls.fetch_add(1, Relaxed);
            Ok::<(), CacheError>(())
        });
        let failed = result.is_err();
        if let Err(error) = result {
            tracing::warn!(%error, "pages could not be given back");
            let mut table = self.frames.lock();
            for (page, frame) in &pages {
                if home.index.get(*page) == Some(*frame)
                    && table.state(*frame) == FrameState::Evicting
                {
                    table.set_state(*frame, self.resident_state(*frame));
                }
            }
        }
        if failed {
            self.end_if_lost(file, &mut inner);
        }
        self.settle_idle(file, &mut inner);
        freed
    }

    /// A call that takes pages out failed: some may be gone that the index still has (of a huge
    /// frame that could not be split, for one). Nobody is granted or read what is not there: the
    /// generation ends, and its content is read anew.
    pub(crate) fn end_if_lost(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        let Some(home) = inner.live.as_ref() else {
            return;
        };
        let Ok(runs) = self.backend.present_pages(home.id) else {
            tracing::warn!("what is left of a home cannot be told: it is given up");
            return self.rotate(file, inner);
        };
        let there = |page: u64| {
            let at = runs.partition_point(|(first, _)| first.0 <= page);
            at > 0 && page < runs[at - 1].0.0 + runs[at - 1].1
        };
        if !home.index.pages().iter().all(|(p, _)| there((*p).into())) {
            tracing::warn!("pages of a home are lost: it is given up");
            self.rotate(file, inner);
        }
    }

    /// The same content in a new home.
    pub(crate) fn rotate(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        self.retire(file, inner, RecallReason::Reclaim, now_ms());
        self.settle_now(file, inner);
        self.look_at(file, inner);
    }

    /// The queue of a resident frame of a home that is not pinned.
    pub(crate) fn resident_state(&self, frame: FrameNo) -> FrameState {
        if self.backend.holder_count(frame) > 0 {
            FrameState::Granted
        } else {
            FrameState::Main
        }
    }

    /// Asks the holders of frames (all of them, or one) to let go.
    pub(crate) fn ask_back(&self, frames: &[FrameNo], only: Option<DomId>) {
        for (file, slot, pages) in self.by_file(frames) {
            if file.is_coherent() {
                self.want_back(&file, slot, &pages);
                continue;
            }
            let mut inner = file.inner.lock();
            let Some(home) = inner.home_at(slot) else {
                continue;
            };
            let generation = home.generation;
            if home.recalling == 0 {
                home.recall_ms = now_ms();
            }
            home.recalling = home.recalling.saturating_add(pages.len() as u32);
            self.send_recalls(&file, generation, &pages, only, RecallReason::Reclaim);
            self.look_at(&file, &inner);
        }
    }

    /// Asks all holders of a home for all of it at once: run by run would be as many questions as a
    /// guest that touches every other page likes.
    pub(crate) fn recall_home(
        &self,
        file: &Arc<CachedFile>,
        home: &Home,
        granted: &[(u32, FrameNo)],
    ) {
        let (Some((first, _)), Some((last, _))) = (granted.first(), granted.last()) else {
            return;
        };
        let mut holders = BTreeSet::new();
        let mut of_one = Vec::new();
        for (_, frame) in granted {
            self.backend.holders(*frame, &mut of_one);
            holders.extend(of_one.drain(..));
        }
        self.counters.recalls.fetch_add(1, Relaxed);
        self.events.send(CacheEvent::Recall {
            file: file.clone(),
            generation: home.generation,
            first: PageIndex((*first).into()),
            count: last - first + 1,
            holders: holders.into_iter().collect(),
            reason: home.reason,
        });
    }

    pub(crate) fn send_recalls(
        &self,
        file: &Arc<CachedFile>,
        generation: u32,
        pages: &[(u32, FrameNo)],
        only: Option<DomId>,
        reason: RecallReason,
    ) {
        let sent: Result<(), ()> = each_run(pages, |first, frames| {
            let mut holders = Vec::new();
            match only {
                Some(dom) => holders.push(dom),
                None => frames
                    .iter()
                    .for_each(|f| self.backend.holders(*f, &mut holders)),
            }
            holders.sort_unstable();
            holders.dedup();
            self.counters.recalls.fetch_add(1, Relaxed);
            self.events.send(CacheEvent::Recall {
                file: file.clone(),
                generation,
                first: PageIndex(first.into()),
                count: frames.len() as u32,
                holders,
                reason,
            });
            Ok(())
        });
        debug_assert!(sent.is_ok());
    }

    /// Gives back the oldest grants of a domain that is at a limit of its own.
    pub(crate) fn make_room(&self, who: Holder, count: u32) {
        let mut oldest = Vec::new();
        let most = if self.force {
            u32::MAX
        } else {
            RECALL_PAGES_MAX
        };
        let wanted = count.clamp(RECLAIM_BATCH, most) as usize;
        self.backend.oldest_grants(who.dom, wanted, &mut oldest);
        {
            let mut frames = self.frames.lock();
            oldest.retain(|frame| frames.state(*frame) == FrameState::Granted);
            let state = if self.force {
                FrameState::Evicting
            } else {
                FrameState::Recalling
            };
            for frame in &oldest {
                frames.set_state(*frame, state);
            }
        }
        if self.force {
            self.evict(&oldest);
        } else {
            self.ask_back(&oldest, Some(who.dom));
        }
    }

    /// Brings the frames in use down to the budget, and a little more.
    pub(crate) fn refill(&self) {
        loop {
            let (missing, batch) = {
                let frames = self.frames.lock();
                let wanted = frames.excess() + 2 * frames.watermark();
                (wanted.saturating_sub(frames.available()), frames.batch())
            };
            if missing == 0 || self.evict_batch(missing.clamp(batch, 8 * RECLAIM_BATCH)) == 0 {
                return;
            }
        }
    }

    /// Gives back about `pages` pages, granted ones too; returns how many came at once.
    pub fn reclaim(&self, pages: u64) -> u64 {
        let mut freed = 0;
        while freed < pages {
            let batch = (pages - freed).min(u64::from(8 * RECLAIM_BATCH)) as u32;
            match self.evict_batch(batch) {
                0 => break,
                n => freed += u64::from(n),
            }
        }
        self.kick_parked();
        freed
    }

    /// Gives back all that is neither pinned nor quarantined.
    pub fn drop_all(&self) {
        self.reclaim(u64::MAX);
    }
}
