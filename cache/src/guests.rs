//! Guests: what their words and their ends do to grants.

use crate::cache::{Cache, now_ms};
use crate::config::{GuestId, GuestLimits, Holder};
use crate::error::CacheError;
use crate::events::{RecallEnd, RecallReason};
use crate::file::{CachedFile, Home, Inner, Unmapping, each_run};
use crate::frames::FrameState;
use crate::limits::{DRAIN_POLL_MS_MAX, HUGE_PAGES, UNMAPPING_MAX};
use copage_grants::{DomId, FrameNo, PageIndex, Revocation};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

impl Cache {
    /// Sets what a guest may have, now and after reconnects.
    pub fn set_limits(&self, guest: GuestId, limits: GuestLimits) {
        self.frames.lock().accounts.of(guest).limits = limits;
        for (dom, of) in self.guests.lock().iter() {
            if *of == guest {
                self.backend.set_grants_max(*dom, limits.grants_max);
            }
        }
    }

    /// Revokes `dom`'s grants of frames, as far as the table shows them unused, and keeps the books.
    /// `false`: some are in use still. The lock of the frames' file is held.
    pub(crate) fn revoke_from(&self, who: DomId, frames: &[FrameNo]) -> bool {
        let mut answers = Vec::with_capacity(frames.len());
        let mut table = self.frames.lock();
        self.backend.revoke(who, frames, &mut answers);
        let mut all = true;
        for (frame, answer) in frames.iter().zip(answers) {
            match answer {
                Revocation::StillMapped => all = false,
                Revocation::NotGranted => {}
                Revocation::Revoked => self.let_go(&mut table, *frame),
            }
        }
        all
    }

    /// A grant of the frame has ended: nobody or somebody else is charged for it.
    fn let_go(&self, table: &mut crate::frames::FrameTable, frame: FrameNo) {
        let mut holders = Vec::new();
        self.backend.holders(frame, &mut holders);
        if holders.is_empty() {
            return table.ungranted(frame);
        }
        let guests = self.guests.lock();
        let named: Vec<GuestId> = holders
            .iter()
            .filter_map(|d| guests.get(d).copied())
            .collect();
        if table
            .owner(frame)
            .is_none_or(|owner| !named.contains(&owner))
            && let Some(next) = named.first()
        {
            table.charge_to(frame, *next);
        }
    }

    /// Revokes what `who` holds of the file, if it has it open no more. It said itself that it
    /// unmapped it.
    pub(crate) fn settle_grants(&self, inner: &mut Inner, who: Holder) {
        if inner.may_hold_grants(who.dom) || self.backend.grant_count(who.dom) == 0 {
            return;
        }
        self.backend
            .note_unmapped(who.dom, &self.frames_held(inner, who.dom));
        self.revoke_all_of(inner, who.dom);
    }

    /// Tries to revoke all that a domain holds of the file; what is in use is tried again later.
    fn revoke_all_of(&self, inner: &mut Inner, dom: DomId) {
        let all = self.revoke_from(dom, &self.frames_held(inner, dom));
        inner.lingering.retain(|d| *d != dom);
        if !all {
            inner.lingering.push(dom);
        }
    }

    /// All frames of the file's homes that a domain holds, and maybe others: at the cost of the fewer
    /// of what is resident and what the domain holds altogether.
    fn frames_held(&self, inner: &Inner, dom: DomId) -> Vec<FrameNo> {
        let homes = || inner.old.iter().chain(&inner.live);
        let resident: usize = homes().map(|h| h.index.len()).sum();
        if resident as u64 <= self.backend.grant_count(dom) {
            return homes().flat_map(|h| h.index.frames()).collect();
        }
        let slots: HashSet<u32> = homes().map(|h| h.slot).collect();
        let mut held = Vec::new();
        self.backend.oldest_grants(dom, usize::MAX, &mut held);
        let table = self.frames.lock();
        held.retain(|frame| slots.contains(&table.place(*frame).0));
        held
    }

    /// Tries again for domains that closed the file and had it mapped still.
    pub(crate) fn retry_lingering(&self, inner: &mut Inner) {
        // Who opened it again meanwhile may map what it is granted.
        let mut lingering = std::mem::take(&mut inner.lingering);
        lingering.retain(|dom| !inner.may_hold_grants(*dom));
        inner.lingering = lingering;
        for dom in inner.lingering.clone() {
            self.revoke_all_of(inner, dom);
        }
    }

    /// Ends all that a domain has of a file but its opens, which the caller has taken away. `said`:
    /// the domain itself says that it unmapped everything.
    pub(crate) fn end_opens(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
        who: Holder,
        said: bool,
    ) {
        for waiter in std::mem::take(&mut inner.waiters) {
            if waiter.who.dom == who.dom {
                self.fail(file, inner, waiter, CacheError::SessionEnded);
            } else {
                inner.waiters.push(waiter);
            }
        }
        if file.is_coherent() {
            // What it holds the machine has ended.
            return self.end_arenas(inner, who.dom);
        }
        let kept = inner.may_hold_grants(who.dom);
        let pinned: Vec<(u32, usize)> = inner
            .old
            .iter()
            .chain(&inner.live)
            .map(|h| {
                (
                    h.generation,
                    h.pinners.iter().filter(|d| **d == who.dom).count(),
                )
            })
            .collect();
        for (generation, count) in pinned {
            for _ in 0..count {
                self.unpin(file, inner, who.dom, generation);
            }
        }
        if said {
            self.settle_grants(inner, who);
        } else if !kept {
            self.revoke_all_of(inner, who.dom);
        }
    }

    /// The session missed its term: its opens end; every home that it could map is replaced, so that
    /// it can read nothing that comes later; what it may have mapped is taken or quarantined.
    pub fn guest_fenced(&self, who: Holder) {
        *self.lives.lock().entry(who.dom).or_default() += 1;
        for file in self.all_files() {
            let mut inner = file.inner.lock();
            let before = inner.opens.len();
            let mapped = inner.may_hold_grants(who.dom);
            inner.opens.retain(|e| e.who.dom != who.dom);
            let waits = inner.waiters.iter().any(|w| w.who.dom == who.dom);
            if before == inner.opens.len() && !waits {
                continue;
            }
            self.end_opens(&file, &mut inner, who, false);
            if mapped && !file.is_coherent() {
                self.retire(&file, &mut inner, RecallReason::Withdrawn, now_ms());
                self.settle_now(&file, &mut inner);
                // Its entries in homes that were emptied by force are gone.
                self.retry_lingering(&mut inner);
            }
            // What it has not let go of by now is beyond reach.
            for home in &mut inner.old {
                home.poll_ms = 0;
            }
            self.drain_old(&file, &mut inner, now_ms());
            if !file.is_coherent() {
                self.quarantine_held(&inner, who.dom);
            }
            self.settle_idle(&file, &mut inner);
            self.look_at(&file, &inner);
            drop(inner);
            self.push_advance(&file);
        }
        self.kick_parked();
    }

    /// What a fenced domain has mapped still of ended generations counts as quarantined: nobody waits for it.
    fn quarantine_held(&self, inner: &Inner, dom: DomId) {
        if self.force || inner.old.is_empty() {
            return;
        }
        let slots: HashSet<u32> = inner.old.iter().map(|home| home.slot).collect();
        let mut held = self.frames_held(inner, dom);
        let mut holders = Vec::new();
        held.retain(|frame| {
            holders.clear();
            self.backend.holders(*frame, &mut holders);
            holders.contains(&dom)
        });
        let mut table = self.frames.lock();
        for frame in held {
            if slots.contains(&table.place(frame).0) {
                table.set_state(frame, FrameState::Quarantined);
            }
        }
    }

    /// The domain exists no more, its mappings are gone with it.
    pub fn guest_ended(&self, who: Holder) {
        *self.lives.lock().entry(who.dom).or_default() += 1;
        let mut held = Vec::new();
        for file in self.all_files() {
            let mut inner = file.inner.lock();
            inner.opens.retain(|e| e.who.dom != who.dom);
            inner.lingering.retain(|d| *d != who.dom);
            let waits = inner.waiters.iter().any(|w| w.who.dom == who.dom);
            let pins = inner
                .old
                .iter()
                .chain(&inner.live)
                .any(|h| h.pinners.contains(&who.dom));
            if waits || pins || file.is_coherent() {
                // Nothing is to be revoked one by one: all goes below.
                let kept = std::mem::take(&mut inner.lingering);
                self.end_opens(&file, &mut inner, who, false);
                inner.lingering = kept;
                self.look_at(&file, &inner);
            }
        }
        // From here on nobody grants it anything: all its opens and waiters are gone.
        self.backend.oldest_grants(who.dom, usize::MAX, &mut held);
        let end = self.backend.domain_ended(who.dom);
        {
            let mut table = self.frames.lock();
            for frame in held {
                self.let_go(&mut table, frame);
            }
        }
        self.guests.lock().remove(&who.dom);
        if !end.still_mapped.is_empty() {
            self.linger(who.dom, &end.still_mapped);
        }
        for file in self.all_files() {
            let mut inner = file.inner.lock();
            if inner.is_idle() {
                self.drain_old(&file, &mut inner, now_ms());
                self.settle_idle(&file, &mut inner);
                self.look_at(&file, &inner);
            }
        }
        self.trim_idle();
        self.kick_parked();
    }

    fn linger(&self, dom: DomId, frames: &[FrameNo]) {
        let places: Vec<u32> = {
            let table = self.frames.lock();
            let mut slots: Vec<u32> = frames.iter().map(|f| table.place(*f).0).collect();
            slots.sort_unstable();
            slots.dedup();
            slots
        };
        for slot in places {
            let file = self.frames.lock().slot_file(slot).and_then(|f| f.upgrade());
            let Some(file) = file else { continue };
            let mut inner = file.inner.lock();
            if !inner.lingering.contains(&dom) {
                inner.lingering.push(dom);
            }
            self.look_at(&file, &inner);
        }
    }

    fn frames_in(home: &Home, first: PageIndex, count: u32) -> Vec<(u32, FrameNo)> {
        let Ok(first) = u32::try_from(first.0) else {
            return Vec::new();
        };
        let end = u64::from(first.saturating_add(count)).min(home.pages()) as u32;
        home.index.range(first.min(end), end)
    }

    /// The guest says that it unmapped pages: its grants of them end, where the table agrees.
    pub fn unmapped(
        &self,
        file: &Arc<CachedFile>,
        who: Holder,
        generation: u32,
        first: PageIndex,
        count: u32,
    ) {
        if self.backend.grant_count(who.dom) == 0 || file.is_coherent() {
            return;
        }
        let mut inner = file.inner.lock();
        let Some(home) = inner.home_of(generation) else {
            return;
        };
        let frames: Vec<_> = Self::frames_in(home, first, count)
            .into_iter()
            .map(|(_, f)| f)
            .collect();
        self.backend.note_unmapped(who.dom, &frames);
        if !self.revoke_from(who.dom, &frames) && inner.unmapping.len() < UNMAPPING_MAX {
            inner.unmapping.push(Unmapping {
                dom: who.dom,
                generation,
                first,
                count,
                until_ms: now_ms() + u64::from(self.config.recall_deadline_ms),
            });
            self.look_at(file, &inner);
        }
    }

    /// Looks again at entries that showed a mapping when their guest said that it had unmapped. In vain
    /// where it maps the page a second time.
    pub(crate) fn retry_unmapping(&self, inner: &mut Inner, now_ms: u64) {
        for range in std::mem::take(&mut inner.unmapping) {
            let Some(home) = inner.home_of(range.generation) else {
                continue;
            };
            let pages = Self::frames_in(home, range.first, range.count);
            let frames: Vec<_> = pages.into_iter().map(|(_, frame)| frame).collect();
            if !self.revoke_from(range.dom, &frames) && now_ms < range.until_ms {
                inner.unmapping.push(range);
            }
        }
    }

    /// A recall of a range has ended for `dom`: what nobody holds any more is given back.
    pub fn recall_done(
        &self,
        file: &Arc<CachedFile>,
        generation: u32,
        first: PageIndex,
        count: u32,
        dom: DomId,
        end: RecallEnd,
    ) {
        let mut inner = file.inner.lock();
        let is_live = inner.live_of(generation).is_some();
        let mut done = true;
        if let Some(home) = inner.home_of(generation) {
            let pages = Self::frames_in(home, first, count);
            let frames: Vec<_> = pages.iter().map(|(_, f)| *f).collect();
            // The answer is only a hint to look: whether it let go, the table says, perhaps later.
            let gone = end != RecallEnd::Acked || self.revoke_from(dom, &frames);
            done = if is_live {
                let done = self.take_recalled(file, home, &pages);
                if !gone {
                    home.recalling = home.recalling.max(self.count_recalled(&pages));
                }
                done
            } else {
                self.take_let_go(file, home, &pages)
            };
        }
        if !done {
            self.end_if_lost(file, &mut inner);
        }
        if !is_live {
            self.drain_old(file, &mut inner, now_ms());
        }
        self.settle_idle(file, &mut inner);
        self.look_at(file, &inner);
        drop(inner);
        self.kick_parked();
    }

    fn count_recalled(&self, pages: &[(u32, FrameNo)]) -> u32 {
        let table = self.frames.lock();
        let recalled = |(_, f): &&(u32, FrameNo)| table.state(*f) == FrameState::Recalling;
        pages.iter().filter(recalled).count() as u32
    }

    /// Gives back the pages of a live home that were recalled and that nobody holds. `false`: it
    /// failed.
    fn take_recalled(
        &self,
        file: &Arc<CachedFile>,
        home: &mut Home,
        pages: &[(u32, FrameNo)],
    ) -> bool {
        let free: Vec<_> = {
            let table = self.frames.lock();
            let asked = home.recalling > 0;
            let idle = |f| [FrameState::Main, FrameState::Small].contains(&table.state(f));
            let recalled =
                |f| [FrameState::Recalling, FrameState::Quarantined].contains(&table.state(f));
            let ours = |f| asked && idle(f) || recalled(f);
            let none = |f| self.backend.holder_count(f) == 0;
            pages
                .iter()
                .copied()
                .filter(|(_, f)| ours(*f) && none(*f))
                .collect()
        };
        home.recalling = home.recalling.saturating_sub(pages.len() as u32);
        self.take_free(file, home, &free, true)
    }

    /// The same of a home whose generation has ended: what nobody holds is wanted by nobody.
    fn take_let_go(
        &self,
        file: &Arc<CachedFile>,
        home: &mut Home,
        pages: &[(u32, FrameNo)],
    ) -> bool {
        if home.exposed || home.is_pinned() {
            return true;
        }
        let mut free = pages.to_vec();
        free.retain(|(_, f)| self.backend.holder_count(*f) == 0);
        self.take_free(file, home, &free, false)
    }

    /// Empties frames that nobody holds; `false`: it failed.
    fn take_free(
        &self,
        file: &Arc<CachedFile>,
        home: &mut Home,
        free: &[(u32, FrameNo)],
        remember: bool,
    ) -> bool {
        let id = home.id;
        for (page, _) in free {
            home.huge.remove(&(page / HUGE_PAGES));
        }
        let done = each_run(free, |first, frames| {
            self.backend.discard(id, PageIndex(first.into()), frames)?;
            let mut table = self.frames.lock();
            for (n, frame) in frames.iter().enumerate() {
                home.index.remove(first + n as u32);
                table.release(*frame, file.id.0, remember);
            }
            let taken = frames.len() as u64;
            self.counters.reclaimed_granted.fetch_add(taken, Relaxed);
            self.counters.reclaim_calls.fetch_add(1, Relaxed);
            Ok::<(), CacheError>(())
        });
        if let Err(error) = &done {
            tracing::warn!(%error, "recalled pages could not be given back");
        }
        done.is_ok()
    }

    /// Looks at the table for recalled pages of the live home whose holders let go without a word, or
    /// later than they said. What they keep is in quarantine when that takes two to three times the deadline:
    /// others are asked then.
    pub(crate) fn poll_recalls(&self, file: &Arc<CachedFile>, inner: &mut Inner, now_ms: u64) {
        let Some(home) = inner.live.as_mut().filter(|h| h.recalling > 0) else {
            return;
        };
        let recalled: Vec<_> = {
            let table = self.frames.lock();
            let is = |f| [FrameState::Recalling, FrameState::Quarantined].contains(&table.state(f));
            home.index
                .pages()
                .into_iter()
                .filter(|(_, f)| is(*f))
                .collect()
        };
        home.recalling = recalled.len() as u32;
        let mut holders = Vec::new();
        for (_, frame) in &recalled {
            self.revoke_all(*frame, false, &mut holders);
        }
        let done = self.take_recalled(file, home, &recalled);
        home.recalling = recalled
            .iter()
            .filter(|(p, f)| home.index.get(*p) == Some(*f))
            .count() as u32;
        let left: Vec<_> = recalled
            .into_iter()
            .filter(|(page, frame)| home.index.get(*page) == Some(*frame))
            .map(|(_, frame)| frame)
            .collect();
        let deadline_ms = u64::from(self.config.recall_deadline_ms);
        let mut is_kept = false;
        if now_ms > home.recall_ms + deadline_ms {
            // Each is counted by itself: others are asked while these are.
            home.recall_ms = now_ms;
            let mut table = self.frames.lock();
            let mut all = true;
            for frame in left {
                let is_stuck = table.is_overdue(frame);
                all &= is_stuck;
                if is_stuck && table.state(frame) != FrameState::Quarantined {
                    table.set_state(frame, FrameState::Quarantined);
                    is_kept |= table.is_emptied(frame);
                }
            }
            if all {
                home.poll_ms = now_ms + DRAIN_POLL_MS_MAX;
            }
        }
        if !done {
            self.end_if_lost(file, inner);
        }
        if is_kept {
            // Its memory is to go, so nobody is granted it any more: others have the page elsewhere.
            self.rotate(file, inner);
        }
    }
}
