//! Faults: what is asked for them, and what the answers do.

use super::faults::{InFlight, Waiter};
use super::worker::Job;
use super::{Pager, Phase};
use crate::error::{LostWhy, MmapError};
use crate::file::{Content, FileInner};
use crate::granted::Brought;
use crate::limits::EVENTS_MAX;
use crate::mapped::{Change, Form, Mapped};
use crate::session::{Answer, Recall};
use crate::stamp::Stamp;
use crate::uffd::{FaultEvent, UffdMsg};
use copage_coherence::msg::{FaultHint, Generation, OpenHow, PageRange, Reply, Request};
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64, PageIndex, Version};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Pager {
    pub(super) fn events(&mut self) {
        let shared = Arc::clone(&self.shared);
        let Ok(uffd) = &shared.uffd else { return };
        let mut events = [UffdMsg::default(); EVENTS_MAX];
        match uffd.read(&mut events) {
            Ok(count) => {
                for fault in events.iter().take(count).filter_map(UffdMsg::fault) {
                    self.fault(fault);
                }
            }
            Err(e) => self.lose(LostWhy::Sys {
                call: "read of the userfaultfd",
                errno: e.raw_os_error().unwrap_or(libc::EIO),
            }),
        }
    }

    fn fault(&mut self, fault: FaultEvent) {
        if self.phase == Phase::Ending {
            // The worker wakes it when the page is SIGBUS.
            return;
        }
        let shared = Arc::clone(&self.shared);
        let Ok(uffd) = &shared.uffd else { return };
        let found = shared.space.lock().find(fault.address).cloned();
        let Some(mapped) = found else {
            // Just being unmapped. It is for the kernel to say what the access gets.
            uffd.wake(fault.address, PAGE_SIZE);
            return;
        };
        if mapped.file().rebases.load(Ordering::SeqCst) > 0 {
            // The worker wakes it when the rebase is done.
            return;
        }
        let within = (fault.address - mapped.addr()) / PAGE_SIZE;
        let page = mapped.first_page() + within as u64;
        if fault.protected && mapped.form() == Form::Own {
            if mapped.store(uffd, page) == Change::Done {
                mapped.wake(uffd, page, 1);
            }
            return;
        }
        if self.phase != Phase::Live {
            // Whoever waits is woken when a session serves.
            return;
        }
        if mapped.file().coherent()
            && !mapped.is_granted()
            && self.is_settled(&mapped, page, &fault)
        {
            return;
        }
        match mapped.try_is_behind(page) {
            Some(false) => {}
            Some(true) => {
                self.restore(mapped, page);
                return;
            }
            // Whoever changes the mapping just now wakes it.
            None => return,
        }
        let mut write = (fault.write || fault.protected) && mapped.form() != Form::Read;
        // A store to a page that becomes the mapping's own is noticed when it finds it armed.
        if fault.minor && (!write || mapped.form() == Form::Own) {
            match mapped.show(uffd, page) {
                Some(false) => write = true,
                Some(true) | None => return,
            }
        }
        self.want(Waiter {
            mapped,
            page,
            write,
            tell: None,
        });
    }

    /// Asks for the bytes of a private page that is missing; the worker puts them there.
    fn restore(&mut self, mapped: Arc<Mapped>, page: u64) {
        if self.faults.is_restoring(&mapped, page) {
            return;
        }
        let Some(file) = mapped.file().token_in(self.session.number()) else {
            return;
        };
        let number = self.session.next_request();
        let request = Request::Read {
            file,
            offset: page * PAGE_SIZE_U64,
            len: PAGE_SIZE as u32,
        };
        self.send(number, &request);
        self.faults.insert_restore(number, mapped, page);
    }

    pub(super) fn restored(&mut self, mapped: Arc<Mapped>, file_page: u64, answer: &Answer) {
        let bytes = match answer.reply() {
            Ok(Reply::Bytes { data: [] }) => Err(MmapError::Invalid(
                "the page is past the end of the file".into(),
            )),
            Ok(Reply::Bytes { data }) if data.len() <= PAGE_SIZE => {
                let mut page = Box::new([0; PAGE_SIZE]);
                page[..data.len()].copy_from_slice(data);
                Ok(page)
            }
            Ok(other) => Err(crate::client::unexpected("one page of Bytes", &other)),
            Err(e) => Err(e),
        };
        let _ = self.shared.jobs.send(Job::Restore {
            mapped,
            file_page,
            bytes,
        });
    }

    /// Asks for a page, unless it is on its way.
    pub(super) fn want(&mut self, waiter: Waiter) {
        if self.is_recalled(&waiter) {
            return self.after_rebase(waiter);
        }
        if self.faults.join(&waiter) {
            return;
        }
        if waiter.mapped.is_granted() {
            self.want_granted(waiter);
            return;
        }
        let bytes = waiter.mapped.file().content.lock().bytes;
        let window = waiter.mapped.window(waiter.page, bytes, waiter.access());
        let count = self.faults.clip(&waiter, window.count);
        let pages = waiter.page..waiter.page + u64::from(count);
        let pages = self.unrecalled(&waiter, pages);
        self.ask(waiter, pages, window.hint, 0);
    }

    /// Asks for a page alone.
    fn ask_one(&mut self, waiter: Waiter, tries: u32) {
        let page = waiter.page;
        self.ask(waiter, page..page + 1, FaultHint::Random, tries);
    }

    /// Asks for pages, the waiter's among them. `tries`: how often mapping them has failed.
    pub(super) fn ask(&mut self, waiter: Waiter, pages: Range<u64>, hint: FaultHint, tries: u32) {
        let file = Arc::clone(waiter.mapped.file());
        let stamp = waiter.mapped.stamp();
        let now = self.session.number();
        let (Some(generation), Some(token)) = (stamp.within(now), file.token_in(now)) else {
            // A job that is with the worker shows the present content, or refuses it, and wakes.
            return waiter.answer(Brought::Again);
        };
        // A window, and what callers ask for, is at most FAULT_PAGES_MAX.
        let (first, count) = (pages.start, (pages.end - pages.start) as u32);
        let number = self.session.next_request();
        let range = PageRange {
            first: PageIndex(first),
            count,
        };
        self.send(
            number,
            &Request::Fault {
                file: token,
                generation,
                range,
                hint,
                access: waiter.access(),
            },
        );
        let mut flight = InFlight::new(file, stamp, (first, count), waiter);
        flight.tries = tries;
        self.faults.insert(number, flight);
    }

    pub(super) fn answered(
        &mut self,
        number: u64,
        flight: InFlight,
        bytes: Vec<u8>,
        fd: Option<OwnedFd>,
    ) {
        let answer = Answer::new(bytes, fd);
        match answer.reply() {
            Ok(Reply::Granted {
                range,
                granter,
                refs,
                access,
                ..
            }) if flight.file.granted() => {
                self.granted_refs(number, flight, range, (granter, access), refs);
            }
            Ok(Reply::Granted {
                range,
                access,
                place,
                ..
            }) if flight.file.coherent() => {
                self.granted_at(number, flight, range, (access, place));
            }
            Ok(Reply::Granted { range, .. }) => self.granted(flight, range),
            Ok(Reply::Stale {
                generation,
                version,
                bytes,
            }) => {
                if Stamp::new(self.session.number(), generation) <= flight.stamp {
                    let text = "stale, but there is no newer content".into();
                    self.refused(flight, &MmapError::Protocol(text));
                    return;
                }
                for waiter in flight.waiters {
                    waiter.answer(Brought::Again);
                }
                let content = (generation, version, bytes);
                self.newer(flight.file, content, answer.fd, None);
            }
            Ok(other) => {
                let error = crate::client::unexpected("Granted", &other);
                self.refused(flight, &error);
            }
            Err(error) => self.refused(flight, &error),
        }
    }

    pub(super) fn granted(&mut self, flight: InFlight, range: PageRange) {
        let shared = Arc::clone(&self.shared);
        let Ok(uffd) = &shared.uffd else { return };
        let first = range.first.0;
        let granted = first..first.saturating_add(range.count.into());
        if !granted.contains(&flight.first) {
            let text = "granted, but not the page that was asked for".into();
            self.refused(flight, &MmapError::Protocol(text));
            return;
        }
        let (here, rest): (Vec<_>, Vec<_>) = flight
            .waiters
            .into_iter()
            .partition(|w| granted.contains(&w.page));
        let own = |w: &&Waiter| w.write && w.mapped.form() == Form::Own;
        for waiter in here.iter().filter(own) {
            // Missed or not: it is woken below, and faults again if need be.
            let _ = waiter.mapped.store(uffd, waiter.page);
        }
        for (i, waiter) in here.iter().enumerate() {
            // One wake for each mapping.
            if !here[..i]
                .iter()
                .any(|w| Arc::ptr_eq(&w.mapped, &waiter.mapped))
            {
                waiter.mapped.wake(uffd, first, range.count);
            }
            waiter.answer(Brought::Until(granted.end));
        }
        for waiter in rest {
            self.want(waiter);
        }
    }

    /// The daemon refused a request: if it was for more than one page, each page that is waited for
    /// is asked for by itself, so that one bad page does not take its neighbours along.
    pub(super) fn refused(&mut self, flight: InFlight, error: &MmapError) {
        let shared = Arc::clone(&self.shared);
        let Ok(uffd) = &shared.uffd else { return };
        for waiter in flight.waiters {
            if flight.count > 1 {
                if self.is_recalled(&waiter) {
                    self.after_rebase(waiter);
                } else if !self.faults.join(&waiter) {
                    self.ask_one(waiter, flight.tries);
                }
                continue;
            }
            if waiter.tell.is_some() {
                waiter.answer(Brought::Failed(error.clone()));
                continue;
            }
            let empty = shared.empty.as_fd();
            let change = waiter
                .mapped
                .refuse_page(uffd, empty, waiter.page, error.clone());
            if change == Change::Done {
                waiter.mapped.wake(uffd, waiter.page, 1);
            }
        }
    }

    /// Hands a newer content to the worker. Faults of the file lie until it is done.
    pub(super) fn newer(
        &mut self,
        file: Arc<FileInner>,
        (generation, version, bytes): (Generation, Version, u64),
        fd: Option<OwnedFd>,
        recall: Option<Recall>,
    ) {
        // What is pinned is mapped by nobody here and keeps its home: it only hears of the newer one.
        if fd.is_none() && file.how() == OpenHow::Map && !file.granted() {
            self.lose(LostWhy::Protocol(
                "a newer content came without its descriptor".into(),
            ));
            return;
        }
        let content = Content {
            stamp: Stamp::new(self.session.number(), generation),
            version,
            bytes,
            home: fd.filter(|_| !file.granted()).map(Arc::new),
            site: None,
        };
        let content = match file.with_site(&self.shared, content) {
            Ok(content) => content,
            Err(error) => return self.lose(LostWhy::Protocol(error.to_string())),
        };
        file.rebases.fetch_add(1, Ordering::SeqCst);
        let _ = self.shared.jobs.send(Job::Rebase {
            file,
            content,
            recall,
        });
    }
}
