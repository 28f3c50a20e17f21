//! Pages of coherent files that are wanted back: the loop is asked, since the machine decides when nobody has
//! them and they are saved.

use crate::cache::Cache;
use crate::events::CacheEvent;
use crate::file::CachedFile;
use crate::frames::FrameState;
use crate::limits::{WANT_BACK_MAX, WANT_BACK_PAGES_MAX};
use copage_grants::{FrameNo, PageIndex};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

impl Cache {
    /// Asks for frames that were chosen to be given back. What is asked for already, or would be too much at one
    /// time, goes back to where it was.
    pub(crate) fn want_back(&self, file: &Arc<CachedFile>, slot: u32, pages: &[(u32, FrameNo)]) {
        let mut inner = file.inner.lock();
        let Some(home) = inner.home_at(slot) else {
            return;
        };
        let mut asked = Vec::new();
        {
            let mut table = self.frames.lock();
            for (page, frame) in pages {
                let chosen = [FrameState::Evicting, FrameState::Recalling];
                let is_chosen = chosen.contains(&table.state(*frame));
                if home.index.get(*page) != Some(*frame) || !is_chosen {
                    continue;
                }
                let fits = self.force && table.count(FrameState::Recalling) < WANT_BACK_MAX;
                let is_asked = table.state(*frame) == FrameState::Recalling;
                if fits || is_asked {
                    table.set_state(*frame, FrameState::Recalling);
                    asked.push(*page);
                } else {
                    table.set_state(*frame, self.resident_state(*frame));
                }
            }
        }
        self.send_want_back(file, &asked);
    }

    pub(crate) fn send_want_back(&self, file: &Arc<CachedFile>, pages: &[u32]) {
        for piece in pages.chunks(WANT_BACK_PAGES_MAX) {
            self.counters
                .want_backs
                .fetch_add(piece.len() as u64, Relaxed);
            let pages = piece.iter().map(|page| PageIndex((*page).into()));
            self.events.send(CacheEvent::WantBack {
                file: file.clone(),
                pages: pages.collect(),
            });
        }
    }

    /// A page that was wanted back could not be taken: it stays, and is asked for again when its turn comes.
    pub fn strict_keep(&self, file: &Arc<CachedFile>, page: PageIndex) {
        let mut inner = file.inner.lock();
        inner.strict.is_emptying = false;
        let number = u32::try_from(page.0).unwrap_or(u32::MAX);
        let frame = inner.live.as_ref().and_then(|home| home.index.get(number));
        if let Some(frame) = frame {
            let mut table = self.frames.lock();
            if table.state(frame) == FrameState::Recalling {
                table.set_state(frame, self.resident_state(frame));
            }
        }
    }
}
