//! Granted files: what is asked for, what the answers do, and what is said to be unmapped. All of it
//! leaves by this thread, so that the order is known: see [`crate::granted`].

use super::faults::{InFlight, Waiter};
use super::told::Told;
use super::worker::Job;
use super::{Pager, Phase};
use crate::error::MmapError;
use crate::file::FileInner;
use crate::granted::{Brought, Cover, MapJob, MapOutcome, Pages};
use crate::limits::{CONTENDED_TRIES_MAX, MAP_TRIES_MAX};
use crate::mapped::{Form, Mapped};
use copage_coherence::msg::{FaultHint, PageRange, Request};
use copage_grants::{Access, DomId, PageIndex};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Pager {
    /// What other threads have told.
    pub(super) fn told(&mut self) {
        while let Ok(told) = self.told.try_recv() {
            match told {
                Told::Connected { session, hello_ms } => self.connected(session, hello_ms),
                Told::Returned(number) => self.returned(number),
                // Callers that wait see their channel closed, and wait for a session.
                Told::Want { .. } if self.phase != Phase::Live => {}
                Told::Want {
                    mapped,
                    page,
                    end,
                    write,
                    tell,
                } => self.want_for_caller(mapped, page..end, write, tell),
                Told::Mapped { number, outcome } => self.mapped(number, outcome),
                Told::TakenBack {
                    file,
                    pages,
                    recall,
                } => {
                    // Else the worker has unmapped all that was answered before it was asked back.
                    if recall.is_none() || !file.coherent() {
                        self.faults.spoil(&pages);
                    }
                    self.say_unmapped(&file, &pages, pages.first..pages.end());
                    if let Some(recall) = recall {
                        recall.ack();
                    }
                    self.given_back(&file, &pages);
                }
                Told::GivenBack { file, pages } => self.unsaid.push((file, pages)),
            }
        }
    }

    /// Says what was given back, but for what is on its way: that is said when it has come.
    pub(super) fn say_given_back(&mut self) {
        for (file, pages) in std::mem::take(&mut self.unsaid) {
            let mut at = pages.first;
            let keep = |from: u64, until: u64, kept: &mut Vec<_>| {
                if from < until {
                    let rest = Pages {
                        first: from,
                        count: until - from,
                        ..pages
                    };
                    kept.push((Arc::clone(&file), rest));
                }
            };
            let mut kept = Vec::new();
            if !file.granted() {
                self.say_moved_home(&file, &pages);
                continue;
            }
            for part in self.faults.quiet_parts(&pages) {
                keep(at, part.start, &mut kept);
                at = part.end;
                self.say_unmapped(&file, &pages, part);
            }
            keep(at, pages.end(), &mut kept);
            self.unsaid.append(&mut kept);
        }
    }

    pub(super) fn say_unmapped(&self, file: &Arc<FileInner>, pages: &Pages, part: Range<u64>) {
        let count = part.end - part.start;
        crate::rebase::unmapped(&self.shared, file, pages.stamp, part.start, count);
    }

    /// A fault, or a caller, wants a page for which nothing is on its way.
    pub(super) fn want_granted(&mut self, waiter: Waiter) {
        let file_bytes = waiter.mapped.file().content.lock().bytes;
        let window = waiter
            .mapped
            .window(waiter.page, file_bytes, waiter.access());
        let within = window.first..window.first + u64::from(window.count);
        self.want_within(waiter, within, window.hint);
    }

    fn want_for_caller(
        &mut self,
        mapped: Arc<Mapped>,
        pages: Range<u64>,
        write: bool,
        tell: crossbeam_channel::Sender<Brought>,
    ) {
        let waiter = Waiter {
            mapped,
            page: pages.start,
            write,
            tell: Some(tell),
        };
        let rebased = waiter.mapped.file().rebases.load(Ordering::SeqCst) > 0;
        if rebased || self.is_recalled(&waiter) {
            return self.after_rebase(waiter);
        }
        if self.faults.join(&waiter) {
            return;
        }
        if waiter.mapped.is_granted() {
            self.want_within(waiter, pages, FaultHint::Populate);
        } else {
            let count = self.faults.clip(&waiter, (pages.end - pages.start) as u32);
            let pages = pages.start..pages.start + u64::from(count);
            let pages = self.unrecalled(&waiter, pages);
            self.ask(waiter, pages, FaultHint::Populate, 0);
        }
    }

    /// Somebody came while a rebase or a recall is on its way: a caller is told to look again when that is
    /// done, by way of the worker's queue; faults are woken then.
    pub(super) fn after_rebase(&mut self, waiter: Waiter) {
        if let Some(tell) = waiter.tell {
            let _ = self.shared.jobs.send(Job::Again(tell));
        }
    }

    fn want_within(&mut self, waiter: Waiter, within: Range<u64>, hint: FaultHint) {
        let shared = Arc::clone(&self.shared);
        let Ok(uffd) = &shared.uffd else { return };
        match waiter.mapped.try_cover(waiter.page, within) {
            Some(Cover::Free(free)) => {
                let free = self.faults.clip_around(&waiter, free);
                let free = self.unrecalled(&waiter, free);
                self.ask(waiter, free, hint, 0);
            }
            Some(Cover::There) => {
                waiter.mapped.wake(uffd, waiter.page, 1);
                waiter.answer(Brought::Until(waiter.page + 1));
            }
            // Who changes the mapping wakes those who fault; callers look again.
            None => self.after_rebase(waiter),
        }
    }

    /// Hands granted refs to the worker. They stay in the table until it is done with them.
    pub(super) fn granted_refs(
        &mut self,
        number: u64,
        mut flight: InFlight,
        range: PageRange,
        (DomId(granter), access): (DomId, Access),
        refs: &[u8],
    ) {
        let first = range.first.0;
        let granted = first..first.saturating_add(range.count.into());
        let refs = refs.chunks_exact(4);
        // It may begin before what was asked for; what was not asked for is not looked at.
        let enough = access == Access::ReadWrite || flight.access == Access::ReadOnly;
        if !granted.contains(&flight.first) || refs.len() != range.count as usize || !enough {
            let text = "granted, but not the page that was asked for, not as it was, or without its \
                        references";
            return self.refused(flight, &MmapError::Protocol(text.into()));
        }
        let skip = (flight.first - first) as usize;
        let refs: Vec<u32> = refs
            .skip(skip)
            .take(flight.count as usize)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        let mut mappings: Vec<Arc<Mapped>> = Vec::new();
        for waiter in &flight.waiters {
            if !mappings.iter().any(|m| Arc::ptr_eq(m, &waiter.mapped)) {
                mappings.push(Arc::clone(&waiter.mapped));
            }
        }
        // At most `flight.count`.
        flight.mapping = Some((refs.len() as u32, mappings.clone()));
        let job = MapJob {
            number,
            pages: Pages {
                stamp: flight.stamp,
                first: flight.first,
                count: refs.len() as u64,
            },
            granter,
            refs,
            mappings,
            spoiled: Arc::clone(&flight.spoiled),
            session: Arc::clone(&self.session),
            crowded: flight.tries + 1 >= MAP_TRIES_MAX,
        };
        self.faults.insert(number, flight);
        let _ = self.shared.jobs.send(Job::Map(job));
    }

    /// The worker is done with a batch.
    fn mapped(&mut self, number: u64, outcome: MapOutcome) {
        let shared = Arc::clone(&self.shared);
        let Ok(uffd) = &shared.uffd else { return };
        let Some(mut flight) = self.faults.remove(number) else {
            return;
        };
        let Some((count, mappings)) = flight.mapping.take() else {
            return;
        };
        let end = flight.first + u64::from(count);
        let asked_end = flight.first + u64::from(flight.count);
        match outcome {
            MapOutcome::Done => {
                for waiter in flight.waiters {
                    let here = mappings.iter().any(|m| Arc::ptr_eq(m, &waiter.mapped));
                    if !here {
                        self.want(waiter);
                        continue;
                    }
                    if waiter.page >= end {
                        // The answer was cut before it, and would be again.
                        let rest = waiter.page..asked_end;
                        if !waiter.mapped.is_granted() || self.is_recalled(&waiter) {
                            self.want(waiter);
                        } else if !self.faults.join(&waiter) {
                            self.want_within(waiter, rest, FaultHint::Random);
                        }
                        continue;
                    }
                    if waiter.write && waiter.mapped.form() == Form::Own {
                        // Missed or not: it is woken, and faults again if need be.
                        let _ = waiter.mapped.store(uffd, waiter.page);
                    }
                    waiter.mapped.wake(uffd, waiter.page, 1);
                    waiter.answer(Brought::Until(end));
                }
            }
            MapOutcome::Spoiled => {
                for waiter in flight.waiters {
                    self.want(waiter);
                }
            }
            MapOutcome::Failed(error) => {
                flight.tries += 1;
                tracing::debug!(%error, tries = flight.tries, "a batch of grants was not mapped");
                // Of many pages one is always somebody else's by now; one by one they are had.
                let most = match flight.file.coherent() && flight.count == 1 {
                    true => CONTENDED_TRIES_MAX,
                    false => MAP_TRIES_MAX,
                };
                if flight.tries >= most {
                    self.refused(flight, &error);
                } else {
                    self.ask_again(flight);
                }
            }
        }
    }

    /// Sends a request once more, for the same pages.
    fn ask_again(&mut self, mut flight: InFlight) {
        let asked = flight.first..flight.first + u64::from(flight.count);
        let clipped = |w: &Waiter| self.unrecalled(w, asked.clone()) != asked;
        if flight.waiters.iter().any(clipped) {
            for waiter in flight.waiters {
                self.want(waiter);
            }
            return;
        }
        let now = self.session.number();
        // It was asked in this session: a later one forgot it.
        let (Some(generation), Some(file)) = (flight.stamp.within(now), flight.file.token_in(now))
        else {
            return;
        };
        let number = self.session.next_request();
        let range = PageRange {
            first: PageIndex(flight.first),
            count: flight.count,
        };
        self.send(
            number,
            &Request::Fault {
                file,
                generation,
                range,
                hint: FaultHint::Random,
                access: flight.access,
            },
        );
        flight.spoiled = Arc::default();
        self.faults.insert(number, flight);
    }
}
