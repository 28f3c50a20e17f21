//! Pages of `coherent` files where guests use descriptors: those for reading are in the home, those for
//! writing are mapped from an arena by the worker.

use super::Pager;
use super::faults::InFlight;
use super::worker::Job;
use crate::error::MmapError;
use crate::file::FileInner;
use crate::granted::Pages;
use crate::limits::MAP_TRIES_MAX;
use crate::mapped::Mapped;
use crate::session::Session;
use crate::uffd::FaultEvent;
use copage_coherence::msg::{GrantedPlace, PageRange};
use copage_grants::Access;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Pages to be mapped from an arena.
pub(crate) struct MoveJob {
    /// The request's.
    pub(crate) number: u64,
    pub(crate) file: Arc<FileInner>,
    pub(crate) pages: Pages,
    pub(crate) place: GrantedPlace,
    /// Where they are waited for, each once.
    pub(crate) mappings: Vec<Arc<Mapped>>,
    /// They were asked back meanwhile.
    pub(crate) spoiled: Arc<AtomicBool>,
    pub(crate) session: Arc<Session>,
    /// Make room in the address space first: it failed before.
    pub(crate) crowded: bool,
}

impl Pager {
    /// A fault where nothing need be asked for: the page came meanwhile, or something is wrong with it.
    pub(super) fn is_settled(
        &mut self,
        mapped: &Arc<Mapped>,
        page: u64,
        fault: &FaultEvent,
    ) -> bool {
        let Ok(uffd) = &self.shared.uffd else {
            return true;
        };
        match mapped.try_is_moved(page) {
            Some(false) => false,
            // The page was mapped after the access came here, or is a hole that should not be there: the
            // daemon took it by force.
            Some(true) if fault.protected || fault.minor => {
                mapped.wake(uffd, page, 1);
                true
            }
            Some(true) => {
                self.torn_out(mapped, page);
                true
            }
            // Whoever changes the mapping just now wakes it.
            None => true,
        }
    }

    pub(super) fn granted_at(
        &mut self,
        number: u64,
        mut flight: InFlight,
        range: PageRange,
        (access, place): (Access, GrantedPlace),
    ) {
        let first = range.first.0;
        let granted = first..first.saturating_add(range.count.into());
        let enough = access == Access::ReadWrite || flight.access == Access::ReadOnly;
        let home = place == GrantedPlace::Home;
        if !granted.contains(&flight.first) || !enough || (home && flight.access != access) {
            let text = "granted, but not the page that was asked for, or not as it was asked for";
            return self.refused(flight, &MmapError::Protocol(text.into()));
        }
        if home {
            return self.granted(flight, range);
        }
        if flight.spoiled.load(Ordering::SeqCst) {
            for waiter in flight.waiters {
                self.want(waiter);
            }
            return;
        }
        let end = granted.end.min(flight.first + u64::from(flight.count));
        let mut mappings: Vec<Arc<Mapped>> = Vec::new();
        for waiter in &flight.waiters {
            if !mappings.iter().any(|m| Arc::ptr_eq(m, &waiter.mapped)) {
                mappings.push(Arc::clone(&waiter.mapped));
            }
        }
        let pages = Pages {
            stamp: flight.stamp,
            first: flight.first,
            count: end - flight.first,
        };
        // At most `flight.count`.
        flight.mapping = Some((pages.count as u32, mappings.clone()));
        let job = MoveJob {
            number,
            file: Arc::clone(&flight.file),
            pages,
            place,
            mappings,
            spoiled: Arc::clone(&flight.spoiled),
            session: Arc::clone(&self.session),
            crowded: flight.tries + 1 >= MAP_TRIES_MAX,
        };
        self.faults.insert(number, flight);
        let _ = self.shared.jobs.send(Job::Move(job));
    }

    /// Says that pages are unmapped which we gave back, but for those that another mapping of the file has,
    /// or is about to have: they are asked back when somebody wants them.
    pub(super) fn say_moved_home(&self, file: &Arc<FileInner>, pages: &Pages) {
        let Some(site) = file.content.lock().site.clone() else {
            return;
        };
        for part in self.faults.quiet_parts(pages) {
            for (first, end) in site.free_runs(part.start, part.end) {
                self.say_unmapped(file, pages, first..end);
            }
        }
    }
}
