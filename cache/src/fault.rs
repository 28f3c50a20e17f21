//! Faults: what is there is granted at once; what is not waits for a fill.

use crate::cache::{Cache, now_ms};
use crate::config::Holder;
use crate::error::CacheError;
use crate::events::{FaultDone, FaultHint, FaultOutcome, GrantedRefs};
use crate::file::{CachedFile, Inner, WaitKind, Waiter};
use crate::limits::{
    FAULT_PAGES_MAX, FILE_WAITERS_MAX, FILL_PAGES_MAX, HUGE_PAGES, READ_AHEAD_FLIGHTS_MAX,
    READ_AHEAD_PAGES_MIN, READ_BYTES_MAX, READAHEAD_DIVISOR,
};
use copage_grants::{Access, GrantError, PageIndex, pages_for};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// Asked for pages of a coherent file.
const OF_THE_MACHINE: CacheError =
    CacheError::BadRange("the pages of a coherent file are granted by the machine");

/// Why a grant could not be written at once.
pub(crate) enum NoGrant {
    /// A limit is in the way; something may be given back first.
    Room(CacheError),
    Failed(CacheError),
}

impl Cache {
    /// Wants `count` pages (1 to 512) from `first` of `generation`. What is resident is granted and
    /// answered at once; else [`crate::CacheEvent::Faulted`] with `ticket` answers later. Pages past
    /// the end of the file are cut off; when `first` is past it, EINVAL-like
    /// [`CacheError::BadRange`].
    #[allow(clippy::too_many_arguments)] // The words of one protocol message.
    pub fn fault(
        &self,
        ticket: u64,
        file: &Arc<CachedFile>,
        who: Holder,
        generation: u32,
        first: PageIndex,
        count: u32,
        hint: FaultHint,
    ) -> FaultOutcome {
        if file.is_coherent() {
            return FaultOutcome::Ready(Err(OF_THE_MACHINE));
        }
        if count == 0 || count > FAULT_PAGES_MAX {
            return FaultOutcome::Ready(Err(CacheError::BadRange(
                "a fault asks for 1 to 512 pages",
            )));
        }
        let mut inner = file.inner.lock();
        let mut room_made = false;
        loop {
            match self.fault_now(file, &mut inner, who, generation, first, count, hint) {
                Ok(Some(done)) => return FaultOutcome::Ready(Ok(done)),
                Ok(None) => break,
                Err(NoGrant::Room(_)) if !room_made && self.force => {
                    room_made = true;
                    drop(inner);
                    self.make_room(who, count);
                    inner = file.inner.lock();
                }
                Err(NoGrant::Room(_)) => break,
                Err(NoGrant::Failed(e)) => return FaultOutcome::Ready(Err(e)),
            }
        }
        if inner.waiters.len() >= FILE_WAITERS_MAX {
            return FaultOutcome::Ready(Err(CacheError::Busy("on this file")));
        }
        self.counters.fault_misses.fetch_add(1, Relaxed);
        let first = first.0 as u32;
        let count = count
            .min((pages_for(inner.state.bytes) as u32).saturating_sub(first))
            .max(1);
        let window = self.window(&mut inner, first, count, hint);
        let kind = WaitKind::Fault {
            generation,
            first,
            count,
            window,
        };
        inner.waiters.push(Waiter {
            ticket,
            who,
            kind,
            since_ms: now_ms(),
            issued: false,
        });
        self.look_at(file, &inner);
        drop(inner);
        self.advance(file, true);
        FaultOutcome::Pending
    }

    /// The case without a disk: `None` when a page is missing or the content settles.
    #[allow(clippy::too_many_arguments)]
    fn fault_now(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
        who: Holder,
        generation: u32,
        first: PageIndex,
        count: u32,
        hint: FaultHint,
    ) -> Result<Option<FaultDone>, NoGrant> {
        if inner.dead {
            return Err(NoGrant::Failed(CacheError::Withdrawn));
        }
        if !inner.may_hold_grants(who.dom) {
            return Err(NoGrant::Failed(CacheError::NotOpen(who.dom)));
        }
        self.check_host(file, inner);
        let pages = pages_for(inner.state.bytes);
        let state = inner.state;
        let Some(home) = inner.live.as_ref() else {
            if first.0 > u64::from(u32::MAX) {
                return Err(NoGrant::Failed(CacheError::BadRange(
                    "past the end of the file",
                )));
            }
            return Ok(None);
        };
        if home.generation != generation {
            self.counters.fault_stale.fetch_add(1, Relaxed);
            return Ok(Some(FaultDone::Stale(state)));
        }
        if first.0 >= pages {
            return Err(NoGrant::Failed(CacheError::BadRange(
                "past the end of the file",
            )));
        }
        let page = first.0 as u32;
        let left = (pages - first.0) as u32;
        let count = count.min(left);
        // Who reads on gets what was read ahead for it in windows as large as it has earned.
        let wide = match (hint, inner.sequence) {
            (FaultHint::Sequential, (end, grown)) if end >= first.0 => count.max(grown.min(left)),
            _ => count,
        };
        home.index.get_run(page, wide, &mut inner.scratch.0);
        if inner.scratch.0.len() < count as usize {
            return Ok(None);
        }
        if !self.cut_scratch(inner) {
            return Ok(None);
        }
        let count = inner.scratch.0.len() as u32;
        inner.wants_again(who.dom, first.0, count);
        self.grant_scratch(inner, who)?;
        let grants = self.granted_refs(inner);
        if hint == FaultHint::Sequential {
            let grown = inner.sequence.1.max(count).saturating_mul(2);
            let grown = grown.min(self.longest_window(count));
            inner.sequence = (first.0 + u64::from(count), grown);
            self.read_ahead(file, inner);
        }
        self.counters.fault_hits.fetch_add(1, Relaxed);
        Ok(Some(FaultDone::Granted {
            generation,
            first,
            count,
            grants,
        }))
    }

    /// Leaves the first frames in `inner.scratch`, which one answer can grant: their entries are in one table,
    /// since an answer names one granter, and none is being emptied for good. `false`: none can; such a page
    /// is to be had again when it has gone. (Granting it once more to each guest that lets go of it and wants
    /// it back could go on for ever.)
    pub(crate) fn cut_scratch(&self, inner: &mut Inner) -> bool {
        let frames = &mut inner.scratch.0;
        frames.truncate(self.backend.in_one_table(frames));
        if self.resize.any_leaving() {
            let table = self.frames.lock();
            let stays = frames.iter().take_while(|frame| !table.is_emptied(**frame));
            let stays = stays.count();
            drop(table);
            frames.truncate(stays);
            if frames.is_empty() {
                self.resize.hurry();
            }
        }
        !frames.is_empty()
    }

    /// By what the guest maps what [`Cache::grant_scratch`] granted.
    pub(crate) fn granted_refs(&self, inner: &Inner) -> Option<GrantedRefs> {
        let grants = &inner.scratch.1;
        let granter = self.backend.granter(grants.first()?.table)?;
        let refs = grants.iter().map(|grant| grant.gref.0).collect();
        Some(GrantedRefs { granter, refs })
    }

    /// Grants the frames in `inner.scratch` to `who`. The file's lock is held, so that none of them is
    /// taken away between the look into the index and the grant.
    pub(crate) fn grant_scratch(&self, inner: &mut Inner, who: Holder) -> Result<(), NoGrant> {
        let (pages, grants) = &mut inner.scratch;
        grants.clear();
        let mut frames = self.frames.lock();
        let account = *frames.accounts.of(who.guest);
        if account.frames + pages.len() as u64 > account.limits.frames_max {
            let fresh = pages.iter().filter(|f| frames.owner(**f).is_none()).count() as u64;
            if account.frames + fresh > account.limits.frames_max {
                return Err(NoGrant::Room(CacheError::FramesOverLimit {
                    frames: account.frames,
                    frames_max: account.limits.frames_max,
                }));
            }
        }
        match self.backend.grant(who.dom, Access::ReadOnly, pages, grants) {
            Ok(()) => {}
            Err(e @ (GrantError::GrantsOverLimit { .. } | GrantError::TableFull { .. })) => {
                return Err(NoGrant::Room(e.into()));
            }
            Err(e) => return Err(NoGrant::Failed(e.into())),
        }
        for frame in pages.iter() {
            frames.granted(*frame, who.guest);
        }
        Ok(())
    }

    /// How many pages to fill for a fault of `count`.
    fn window(&self, inner: &mut Inner, first: u32, count: u32, hint: FaultHint) -> u32 {
        if hint != FaultHint::Sequential {
            return count;
        }
        let longest = self.longest_window(count);
        let (end, before) = inner.sequence;
        // It may have been given less than it was meant to have, what was there by then.
        let behind = end.checked_sub(first.into());
        let goes_on = before > 0 && behind.is_some_and(|behind| behind <= 2 * u64::from(before));
        let mut window = count;
        if goes_on {
            window = before.saturating_mul(2).clamp(count, longest);
        }
        // What it has grown to, whatever the border makes of it this time.
        let grown = window;
        // Up to a 2 MiB border, so that whole units come together and can be backed by huge frames.
        let border = (first + window) / HUGE_PAGES * HUGE_PAGES;
        if border >= first + count {
            window = border - first;
        }
        let left = (pages_for(inner.state.bytes) as u32).saturating_sub(first);
        window = window.min(left).clamp(count, FILL_PAGES_MAX.max(count));
        let reached = if goes_on { end } else { 0 };
        inner.sequence = (reached.max(u64::from(first + window)), grown);
        window
    }

    /// The longest window of a reader that asks for `count` pages at a time.
    fn longest_window(&self, count: u32) -> u32 {
        let share = self.frames.lock().budget() / READAHEAD_DIVISOR;
        self.config.readahead_pages_max.min(share).max(count)
    }

    /// Has the window behind the newest one of a sequence brought while the guest reads that one.
    pub(crate) fn read_ahead(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        let (end, grown) = inner.sequence;
        // A short sequence may be none, and a pool that is behind gains nothing by more work.
        if grown < READ_AHEAD_PAGES_MIN || inner.flights.len() >= READ_AHEAD_FLIGHTS_MAX {
            return;
        }
        let window = grown.min(self.longest_window(1));
        if let Ok(first) = u32::try_from(end) {
            self.issue(file, inner, first, first.saturating_add(window));
        }
    }

    /// Copies up to `len` bytes (at most 128 KiB) from `offset`; [`crate::CacheEvent::Read`] answers.
    pub fn read(&self, ticket: u64, file: &Arc<CachedFile>, who: Holder, offset: u64, len: u32) {
        let kind = WaitKind::Read { offset, len };
        let waiter = Waiter {
            ticket,
            who,
            kind,
            since_ms: now_ms(),
            issued: false,
        };
        if len > READ_BYTES_MAX || offset.checked_add(len.into()).is_none() {
            let e = CacheError::BadRange("a read has at most 128 KiB and ends in the file");
            return self.answer_error(&waiter, e);
        }
        if file.is_coherent() {
            return self.answer_error(&waiter, OF_THE_MACHINE);
        }
        let mut inner = file.inner.lock();
        if inner.entry(who.dom).is_none() {
            return self.answer_error(&waiter, CacheError::NotOpen(who.dom));
        }
        if inner.waiters.len() >= FILE_WAITERS_MAX {
            return self.answer_error(&waiter, CacheError::Busy("on this file"));
        }
        self.check_host(file, &mut inner);
        inner.waiters.push(waiter);
        self.look_at(file, &inner);
        drop(inner);
        self.push_advance(file);
    }
}
