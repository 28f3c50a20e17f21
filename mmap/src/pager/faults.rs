//! Fault requests under way, and who waits for which.

use crate::file::FileInner;
use crate::mapped::Mapped;
use copage_coherence::msg::Generation;
use std::collections::HashMap;
use std::sync::Arc;

/// A thread (or more) that waits for a page.
#[derive(Clone)]
pub(crate) struct Waiter {
    pub(crate) mapped: Arc<Mapped>,
    /// Counted in the file.
    pub(crate) page: u64,
    /// It stores: the page becomes private when it is there.
    pub(crate) write: bool,
}

impl Waiter {
    fn same(&self, other: &Self) -> bool {
        self.page == other.page
            && self.write == other.write
            && Arc::ptr_eq(&self.mapped, &other.mapped)
    }
}

/// One request that was sent.
pub(crate) struct InFlight {
    pub(crate) file: Arc<FileInner>,
    pub(crate) generation: Generation,
    pub(crate) first: u64,
    pub(crate) count: u32,
    pub(crate) waiters: Vec<Waiter>,
}

impl InFlight {
    fn is_of(&self, waiter: &Waiter) -> bool {
        self.generation == waiter.mapped.generation()
            && Arc::ptr_eq(&self.file, waiter.mapped.file())
    }

    fn end(&self) -> u64 {
        self.first + u64::from(self.count)
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
            if flight.is_of(waiter) && (flight.first..flight.end()).contains(&waiter.page) {
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

    pub(crate) fn clear(&mut self) {
        self.by_number.clear();
        self.restores.clear();
    }
}
