//! Fault requests under way, and who waits for which.

use crate::file::FileInner;
use crate::granted::{Brought, Pages};
use crate::mapped::{Form, Mapped};
use crate::stamp::Stamp;
use copage_grants::Access;
use crossbeam_channel::Sender;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A thread (or more) that waits for a page.
#[derive(Clone)]
pub(crate) struct Waiter {
    pub(crate) mapped: Arc<Mapped>,
    /// Counted in the file.
    pub(crate) page: u64,
    /// It stores. Of a mapping with stores of its own: the page becomes private when it is there.
    pub(crate) write: bool,
    /// A caller, not a fault: to be told what came.
    pub(crate) tell: Option<Sender<Brought>>,
}

impl Waiter {
    /// What must be asked for. A page that came as a grant for reading is not stored to: there nobody
    /// notices the first store, so one who may store asks for writing at once.
    pub(crate) fn access(&self) -> Access {
        let stores = self.write || self.mapped.is_granted();
        match self.mapped.form() {
            Form::Write if stores => Access::ReadWrite,
            _ => Access::ReadOnly,
        }
    }

    /// Tells a caller how it went; a fault is woken instead.
    pub(crate) fn answer(&self, brought: Brought) {
        if let Some(tell) = &self.tell {
            // The caller waits for exactly this; a session that is lost may have sent it away.
            let _ = tell.send(brought);
        }
    }

    fn same(&self, other: &Self) -> bool {
        self.tell.is_none()
            && other.tell.is_none()
            && self.page == other.page
            && self.write == other.write
            && Arc::ptr_eq(&self.mapped, &other.mapped)
    }
}

/// One request that was sent.
pub(crate) struct InFlight {
    pub(crate) file: Arc<FileInner>,
    pub(crate) stamp: Stamp,
    pub(crate) first: u64,
    pub(crate) count: u32,
    pub(crate) access: Access,
    pub(crate) waiters: Vec<Waiter>,
    /// Grants: how often its pages could not be mapped.
    pub(crate) tries: u32,
    /// Grants, and pages for writing: a word of ours says that some of its pages are unmapped ([`crate::granted`]).
    pub(crate) spoiled: Arc<AtomicBool>,
    /// The answer is with the worker, which maps this many pages in these mappings.
    pub(crate) mapping: Option<(u32, Vec<Arc<Mapped>>)>,
}

impl InFlight {
    /// A request that was just sent.
    pub(crate) fn new(
        file: Arc<FileInner>,
        stamp: Stamp,
        (first, count): (u64, u32),
        waiter: Waiter,
    ) -> Self {
        Self {
            file,
            stamp,
            first,
            count,
            access: waiter.access(),
            waiters: vec![waiter],
            tries: 0,
            spoiled: Arc::default(),
            mapping: None,
        }
    }

    fn is_of(&self, waiter: &Waiter) -> bool {
        self.stamp == waiter.mapped.stamp() && Arc::ptr_eq(&self.file, waiter.mapped.file())
    }

    fn end(&self) -> u64 {
        self.first + u64::from(self.count)
    }

    fn overlaps(&self, pages: &Pages) -> bool {
        self.stamp == pages.stamp && self.first < pages.end() && pages.first < self.end()
    }
}

/// The table, by request number. The pager's alone. Few at a time: it is searched in order.
#[derive(Default)]
pub(crate) struct Faults {
    by_number: HashMap<u64, InFlight>,
    /// Reads for private pages that are missing: where the bytes go.
    restores: HashMap<u64, (Arc<Mapped>, u64)>,
}

impl Faults {
    pub(crate) fn len(&self) -> usize {
        self.by_number.len() + self.restores.len()
    }

    /// Lets `waiter` wait for a request that is under way. `false`: none brings its page.
    pub(crate) fn join(&mut self, waiter: &Waiter) -> bool {
        for flight in self.by_number.values_mut() {
            let serves = flight.access == waiter.access() || flight.access == Access::ReadWrite;
            if serves && flight.is_of(waiter) && (flight.first..flight.end()).contains(&waiter.page)
            {
                if !flight.waiters.iter().any(|w| w.same(waiter)) {
                    flight.waiters.push(waiter.clone());
                }
                return true;
            }
        }
        false
    }

    /// Shortens a window that begins at `waiter`'s page so that nothing is asked for twice.
    pub(crate) fn clip(&self, waiter: &Waiter, count: u32) -> u32 {
        self.by_number
            .values()
            .filter(|flight| flight.is_of(waiter) && flight.first > waiter.page)
            .map(|flight| u32::try_from(flight.first - waiter.page).unwrap_or(u32::MAX))
            .fold(count, u32::min)
    }

    /// Shortens `free` around `waiter`'s page so that nothing is asked for twice.
    pub(crate) fn clip_around(&self, waiter: &Waiter, free: Range<u64>) -> Range<u64> {
        let of_it = |flight: &&InFlight| flight.is_of(waiter);
        self.by_number.values().filter(of_it).fold(free, |free, f| {
            if f.first > waiter.page {
                free.start..free.end.min(f.first)
            } else {
                // It does not hold the page itself: that would have been joined.
                free.start.max(f.end().min(waiter.page))..free.end
            }
        })
    }

    /// Our word that `pages` are unmapped is about to be sent, which the daemon did not ask for, or not as
    /// [`Self::spoil_answered`] has it: what was asked for before it and is not mapped counts for nothing. Of
    /// any file: two opens may be of one.
    pub(crate) fn spoil(&mut self, pages: &Pages) {
        for flight in self.by_number.values() {
            if flight.overlaps(pages) {
                flight.spoiled.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Pages of a `coherent` file were asked back: of what was asked for, only what the worker has still to
    /// map counts for nothing. An answer that comes later was given after our Ack, since until then the daemon
    /// gives them to nobody; to forget that one too would be to ask in vain for as long as another wants them.
    pub(crate) fn spoil_answered(&mut self, pages: &Pages) {
        for flight in self.by_number.values() {
            if flight.mapping.is_some() && flight.overlaps(pages) {
                flight.spoiled.store(true, Ordering::SeqCst);
            }
        }
    }

    /// The parts of `pages` that nothing on its way covers.
    pub(crate) fn quiet_parts(&self, pages: &Pages) -> Vec<Range<u64>> {
        let mut busy: Vec<Range<u64>> = self
            .by_number
            .values()
            .filter(|flight| flight.overlaps(pages))
            .map(|flight| flight.first..flight.end())
            .collect();
        busy.sort_unstable_by_key(|range| range.start);
        let mut parts = Vec::new();
        let mut at = pages.first;
        for range in busy {
            if at < range.start {
                parts.push(at..range.start);
            }
            at = at.max(range.end);
        }
        if at < pages.end() {
            parts.push(at..pages.end());
        }
        parts
    }

    pub(crate) fn insert(&mut self, number: u64, flight: InFlight) {
        self.by_number.insert(number, flight);
    }

    pub(crate) fn remove(&mut self, number: u64) -> Option<InFlight> {
        self.by_number.remove(&number)
    }

    /// A page is being read for a private mapping.
    pub(crate) fn is_restoring(&self, mapped: &Arc<Mapped>, page: u64) -> bool {
        self.restores
            .values()
            .any(|(m, p)| *p == page && Arc::ptr_eq(m, mapped))
    }

    pub(crate) fn insert_restore(&mut self, number: u64, mapped: Arc<Mapped>, page: u64) {
        self.restores.insert(number, (mapped, page));
    }

    pub(crate) fn remove_restore(&mut self, number: u64) -> Option<(Arc<Mapped>, u64)> {
        self.restores.remove(&number)
    }

    /// The session is over: nothing of it counts any more.
    pub(crate) fn clear(&mut self) {
        for flight in self.by_number.values() {
            flight.spoiled.store(true, Ordering::SeqCst);
        }
        self.by_number.clear();
        self.restores.clear();
    }
}
