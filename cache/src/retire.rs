//! Generations: how one ends, how its home is emptied, how the next begins.

use crate::cache::{Cache, now_ms};
use crate::error::CacheError;
use crate::events::{CacheEvent, FileState, RecallReason};
use crate::file::{CachedFile, Home, Inner, Lease, each_run};
use crate::frames::FrameState;
use crate::limits::{DRAIN_POLL_MS_MAX, FILE_PAGES_MAX, OLD_HOMES_MAX, OLD_HOMES_PAUSE_MS};
use copage_grants::{DomId, FrameNo, HomeSpec, PageIndex, pages_for};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

impl Cache {
    /// Ends the newest generation. What can be taken back is taken back now; the rest waits for its
    /// users. The next generation begins when the content has settled.
    pub(crate) fn retire(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
        reason: RecallReason,
        now_ms: u64,
    ) {
        let Some(mut home) = inner.live.take() else {
            return;
        };
        self.counters.generations_retired.fetch_add(1, Relaxed);
        home.since_ms = now_ms;
        home.poll_ms = now_ms;
        home.reason = reason;
        let mut table = self.frames.lock();
        if home.holds_frames() {
            for frame in home.index.frames() {
                table.set_state(frame, FrameState::Quarantined);
            }
        }
        let pages = home.pages();
        table.pin_moves += 1;
        for charge in home.charges.iter_mut().filter(|c| !c.quarantined) {
            charge.quarantined = true;
            let account = table.accounts.of(charge.guest);
            account.pinned = account.pinned.saturating_sub(pages);
            account.quarantined += pages;
        }
        if std::mem::take(&mut home.reserved) {
            // From here on they count as quarantined, frame by frame.
            table.pin_pages = table.pin_pages.saturating_sub(pages);
        }
        drop(table);
        inner.old.push(home);
        let settle_ms = u64::from(self.config.host_settle_ms);
        inner.settle_until_ms = now_ms
            + match inner.lease {
                Lease::Held => 0,
                Lease::Wanted | Lease::Breaking => settle_ms,
                // Nothing will tell that the writer is done: only a bound on how often it counts.
                Lease::Never => settle_ms / 4,
            };
        inner.sequence = (0, 0);
        inner.doubt_ms = None;
        inner.retired_ms = now_ms;
        self.drain_old(file, inner, now_ms);
    }

    /// Begins the next generation if the lease is to be had or was waited for long enough.
    pub(crate) fn try_settle(&self, file: &Arc<CachedFile>, inner: &mut Inner, now_ms: u64) {
        if inner.live.is_some() || inner.dead || inner.state.generation == 0 {
            return;
        }
        self.try_lease(file, inner);
        if inner.lease == Lease::Held || now_ms >= inner.settle_until_ms {
            self.settle_now(file, inner);
        }
    }

    /// Begins a generation with what the host's file holds now.
    pub(crate) fn settle_now(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        if inner.live.is_some() || inner.dead {
            return;
        }
        let crowded_until_ms = inner.retired_ms + OLD_HOMES_PAUSE_MS;
        if inner.old.len() >= OLD_HOMES_MAX && now_ms() < crowded_until_ms {
            inner.settle_until_ms = crowded_until_ms;
            return;
        }
        // First the lease, then the look at the length: no change can lie between.
        self.try_lease(file, inner);
        if let Err(error) = self.begin_generation(file, inner) {
            for waiter in std::mem::take(&mut inner.waiters) {
                self.fail(file, inner, waiter, error.clone());
            }
            inner.settle_until_ms = now_ms() + u64::from(self.config.host_settle_ms);
        }
    }

    pub(crate) fn begin_generation(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
    ) -> Result<(), CacheError> {
        let (cookie, _) = file.read_cookie()?;
        if pages_for(cookie.bytes) > FILE_PAGES_MAX {
            return Err(CacheError::Io {
                what: "the file is too long",
                errno: libc::EFBIG,
            });
        }
        let generation = inner.state.generation + 1;
        let label = format!("{}:{}.{generation}", file.key.dev, file.key.ino);
        let id = self.backend.open_home(&HomeSpec {
            label,
            bytes: cookie.bytes,
            class: match file.is_coherent() {
                true => inner.strict.class,
                false => file.key.class,
            },
        })?;
        let slot = self.frames.lock().add_slot(Arc::downgrade(file));
        let ended = inner.state.generation;
        let mut home = Home::new(id, slot, generation, cookie.bytes);
        home.leased = inner.lease == Lease::Held;
        inner.live = Some(home);
        inner.cookie = cookie;
        inner.state = FileState {
            generation,
            version: self.new_version(),
            bytes: cookie.bytes,
            host_bounded: inner.lease != Lease::Held,
            coherent: file.is_coherent(),
        };
        // Of a coherent file the loop tells, which had it begun.
        if ended > 0 && !inner.opens.is_empty() && !file.is_coherent() {
            self.events.send(CacheEvent::Retired {
                file: file.clone(),
                generation: ended,
            });
        }
        Ok(())
    }

    /// Empties homes of ended generations as far as their users allow.
    pub(crate) fn drain_old(&self, file: &Arc<CachedFile>, inner: &mut Inner, now_ms: u64) {
        let mut old = std::mem::take(&mut inner.old);
        old.retain_mut(|home| match self.drain(file, home, now_ms) {
            Ok(ended) => !ended,
            Err(error) => {
                tracing::warn!(%error, "an old home could not be emptied; it is tried again");
                home.poll_ms = now_ms + DRAIN_POLL_MS_MAX;
                true
            }
        });
        inner.old = old;
        let deadline_ms = u64::from(self.config.recall_deadline_ms);
        let out = inner.old.iter().all(|h| {
            let emptied = h.index.is_empty() && h.busy == 0;
            // What nobody can take back cannot be waited for: it is quarantined.
            let beyond = h.exposed || !self.force && now_ms >= h.since_ms + deadline_ms;
            emptied || beyond
        });
        if inner.lease == Lease::Breaking && out && !file.is_coherent() {
            self.give_up_lease(file, inner);
        }
    }

    /// `true`: the home has ended.
    fn drain(
        &self,
        file: &Arc<CachedFile>,
        home: &mut Home,
        now_ms: u64,
    ) -> Result<bool, CacheError> {
        if home.busy > 0 || home.is_pinned() || !home.lost.is_empty() {
            return Ok(false);
        }
        // What the kernel said in this call, if it was asked.
        let mut unused = false;
        if !home.index.is_empty() {
            let mut in_use = false;
            if home.exposed || !self.force {
                if now_ms >= home.poll_ms {
                    in_use = self.backend.home_in_use(home.id).unwrap_or(true);
                    home.poll_ms = now_ms + self.poll_after(home, now_ms);
                    unused = !in_use;
                } else if home.exposed || home.recalled {
                    return Ok(false);
                } else {
                    in_use = true;
                }
            }
            if home.exposed && in_use {
                return Ok(false);
            }
            let pages = home.index.pages();
            if !self.force && !home.recalled {
                home.recalled = true;
                let granted: Vec<_> = pages
                    .iter()
                    .copied()
                    .filter(|(_, f)| self.backend.holder_count(*f) > 0)
                    .collect();
                if in_use {
                    self.recall_home(file, home, &granted);
                }
            }
            self.empty(file, home, &pages, !in_use)?;
            if !home.index.is_empty() {
                let late = now_ms >= home.since_ms + u64::from(self.config.recall_deadline_ms);
                let mut table = self.frames.lock();
                for frame in home.index.frames().filter(|_| late) {
                    table.set_state(frame, FrameState::Quarantined);
                }
                return Ok(false);
            }
        }
        if !unused && !self.may_close(home, now_ms) {
            return Ok(false);
        }
        self.backend.close_home(home.id)?;
        let mut table = self.frames.lock();
        Self::uncharge(&mut table, home);
        table.drop_slot(home.slot);
        Ok(true)
    }

    /// May an emptied home be ended? Its end is SIGBUS for whoever maps it, but guests that have not
    /// moved on to the new content are to fault and hear of it. Each was asked to; who has not by
    /// twice the deadline is fenced.
    fn may_close(&self, home: &mut Home, now_ms: u64) -> bool {
        let deadline_ms = u64::from(self.config.recall_deadline_ms);
        if now_ms >= home.since_ms + 2 * deadline_ms {
            return true;
        }
        if now_ms < home.poll_ms {
            return false;
        }
        home.poll_ms = now_ms + self.poll_after(home, now_ms);
        !self.backend.home_in_use(home.id).unwrap_or(true)
    }

    /// Takes pages of a home back: all of them by force, or those that nobody has mapped.
    /// `unused`: the kernel says that nobody can have any of them mapped.
    fn empty(
        &self,
        file: &Arc<CachedFile>,
        home: &mut Home,
        pages: &[(u32, FrameNo)],
        unused: bool,
    ) -> Result<(), CacheError> {
        let mut free = Vec::new();
        if self.force {
            free.extend_from_slice(pages);
        } else {
            let mut holders = Vec::new();
            for (page, frame) in pages {
                if self.revoke_all(*frame, unused, &mut holders) {
                    free.push((*page, *frame));
                }
            }
        }
        let id = home.id;
        each_run(&free, |first, frames| {
            let page = PageIndex(first.into());
            if self.force {
                self.backend.force_out(id, page, frames, &mut |_, _| {})?;
            } else {
                self.backend.discard(id, page, frames)?;
            }
            let mut table = self.frames.lock();
            for (n, frame) in frames.iter().enumerate() {
                home.index.remove(first + n as u32);
                table.release(*frame, file.id.0, false);
            }
            Ok(())
        })
    }

    /// Tries to end every grant of a frame; `true` when none is left. The table is the truth.
    pub(crate) fn revoke_all(
        &self,
        frame: FrameNo,
        unused: bool,
        holders: &mut Vec<DomId>,
    ) -> bool {
        holders.clear();
        self.backend.holders(frame, holders);
        let mut answers = Vec::new();
        for dom in holders.iter() {
            if unused {
                self.backend.note_unmapped(*dom, &[frame]);
            }
            self.backend.revoke(*dom, &[frame], &mut answers);
        }
        self.backend.holder_count(frame) == 0
    }

    /// Ends a file for good: its last generation is retired, nobody finds it any more.
    pub(crate) fn bury(&self, file: &Arc<CachedFile>, inner: &mut Inner, now_ms: u64) {
        if inner.dead {
            return;
        }
        inner.dead = true;
        self.forget_idle(inner);
        {
            let mut files = self.files.lock();
            if files.get(&file.key).is_some_and(|f| Arc::ptr_eq(f, file)) {
                files.remove(&file.key);
            }
        }
        if let Some(watch) = inner.watch.take() {
            self.watches.remove(watch, file);
        }
        self.retire(file, inner, RecallReason::Withdrawn, now_ms);
        if matches!(inner.lease, Lease::Held | Lease::Breaking) {
            self.give_up_lease(file, inner);
        }
        self.look_at(file, inner);
    }
}
