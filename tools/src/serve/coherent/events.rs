//! What the machine and the cache say of coherent files, and what is done with it.

use super::super::complete::Answer;
use super::super::core::Core;
use super::super::ctx::Ctx;
use super::super::limits::LOST_POLL_MS;
use super::Gone;
use super::exclusive::Exclusive;
use super::work::split;
use copage_cache::{CacheError, CacheEvent, CachedFile, FileId};
use copage_coherence::msg::{FileToken, Notice};
use copage_coherence::strict::{Action, Event, Input, Place};
use copage_grants::{Epoch, FrameNo, PageIndex, sys};
use std::os::fd::OwnedFd;
use std::sync::Arc;

impl Ctx {
    /// Does what the machine said of a page.
    pub(in crate::serve) fn page_action(&mut self, action: Action) {
        match action {
            Action::Fill { place } => self.coherent.fills.push(place),
            Action::Copy { place, from } => {
                self.coherent.counts.told.copies += 1;
                if let Some(file) = self.coherent.file_of(place) {
                    self.cache.strict_copy(&file.file, place.page, from);
                }
            }
            Action::Save {
                place,
                frame,
                version,
            } => {
                self.coherent.counts.told.saves += 1;
                if let Some(file) = self.coherent.file_of(place) {
                    self.cache
                        .strict_save(&file.file, place.page, frame, version);
                }
            }
            Action::Grant {
                ticket,
                epoch,
                place,
                frame,
                access,
                version,
            } => {
                let (number, nth) = split(ticket);
                self.granted(number, nth, (epoch, place), (frame, access, version));
            }
            Action::Refuse { ticket, errno } => {
                if !self.taken(ticket, Some(errno)) {
                    let (number, nth) = split(ticket);
                    self.refused_page(number, nth, errno);
                }
            }
            Action::Taken { ticket, .. } => {
                self.taken(ticket, None);
            }
            Action::Free { frame } => self.cache.strict_free(frame),
            // The sessions' machine makes its own of these.
            Action::Recall { .. } | Action::Fence { .. } => {}
        }
    }

    /// Has the pages filled that were found to be in no frame, a run at a time.
    pub(in crate::serve) fn fill_pages(&mut self) {
        let mut fills = std::mem::take(&mut self.coherent.fills);
        fills.sort_unstable();
        let next = |a: &Place, b: &Place| a.file == b.file && a.page.0 + 1 == b.page.0;
        for run in fills.chunk_by(next) {
            for some in run.chunks(copage_cache::limits::FAULT_PAGES_MAX as usize) {
                let Some(&first) = some.first() else { continue };
                self.coherent.counts.told.fills += some.len() as u64;
                if let Some(file) = self.coherent.file_of(first) {
                    // A chunk has at most 512.
                    let count = some.len() as u32;
                    self.cache.strict_fill(&file.file, first.page, count);
                }
            }
        }
    }

    /// The cache says something of a coherent file. What is of others comes back.
    pub(in crate::serve) fn strict_event(&mut self, event: CacheEvent) -> Option<CacheEvent> {
        match event {
            CacheEvent::Placed { file, page, result } => self.placed(&file, page, result),
            CacheEvent::Saved {
                file,
                page,
                version,
                result,
            } => {
                let place = Place {
                    file: file.id.0,
                    page,
                };
                let errno = result.err().map(|error| {
                    tracing::warn!(%error, page = page.0, "a page could not be saved");
                    error.errno()
                });
                let event = match errno {
                    None => Event::Saved { place, version },
                    Some(errno) => Event::NotSaved { place, errno },
                };
                if errno.is_some() {
                    self.coherent.counts.told.saves_failed += 1;
                    self.dirtied(place);
                }
                self.step(Input::Page(event));
                self.page_saved(place, errno);
            }
            CacheEvent::Synced {
                ticket,
                file,
                result,
            } => self.synced(ticket, file.id, result),
            CacheEvent::Reserved { ticket, result, .. } => match result {
                Ok(()) => self.want(ticket),
                Err(error) => self.end_work(ticket, Answer::refused(&error)),
            },
            CacheEvent::Resized {
                ticket,
                file,
                result,
            } => self.resized(file.id, ticket, result),
            CacheEvent::WantBack { file, pages } => self.want_back(file.id, &pages),
            CacheEvent::HostWants { file } => self.exclusive(file.id, Exclusive::LetHostIn),
            CacheEvent::HostChanged { file } => self.exclusive(file.id, Exclusive::Reload),
            other => return Some(other),
        }
        None
    }

    fn placed(
        &mut self,
        file: &Arc<CachedFile>,
        page: PageIndex,
        result: Result<FrameNo, CacheError>,
    ) {
        let place = Place {
            file: file.id.0,
            page,
        };
        let event = match result {
            Ok(frame) => Event::Placed { place, frame },
            Err(error) => {
                tracing::debug!(%error, page = page.0, "a page could not be filled");
                let errno = error.errno();
                Event::NotPlaced { place, errno }
            }
        };
        self.step(Input::Page(event));
    }

    /// A session is gone; the machine has taken its pages. `files`: what it had open, and whether to map. `process`:
    /// whose mappings end with it.
    pub(in crate::serve) fn strict_over(
        &mut self,
        epoch: Epoch,
        files: Vec<(FileId, bool)>,
        fenced: bool,
        process: Option<OwnedFd>,
    ) {
        self.end_works_of(epoch);
        self.forget_asks(epoch);
        if let Some(who) = self.coherent.who.remove(&epoch)
            && self.machine.pages().lost().any(|(_, of)| of == epoch)
        {
            let is_dead = false;
            let gone = Gone {
                who,
                process,
                is_dead,
            };
            self.coherent.gone.insert(epoch, gone);
        }
        let descriptors = self.backend.capabilities().descriptors;
        for (id, maps) in files {
            // It has the descriptor of the home still, and is to read nothing more.
            if fenced && maps && descriptors {
                self.exclusive(id, Exclusive::Rehome);
            } else {
                self.forget_file(id);
            }
        }
    }

    /// Looks whether sessions that are gone have let go of what they may have mapped.
    pub(in crate::serve) fn poll_lost(&mut self) {
        if self.coherent.gone.is_empty() || self.now_ms < self.coherent.lost_ms {
            return;
        }
        self.coherent.lost_ms = self.now_ms + LOST_POLL_MS;
        let lost: Vec<(FrameNo, Epoch)> = self.machine.pages().lost().collect();
        self.coherent
            .gone
            .retain(|epoch, _| lost.iter().any(|(_, of)| of == epoch));
        for gone in self.coherent.gone.values_mut() {
            if gone.process.as_ref().is_some_and(sys::has_ended) {
                gone.is_dead = true;
                gone.process = None;
            }
        }
        for (frame, epoch) in lost {
            let gone = self.coherent.gone.get(&epoch);
            let drained =
                |gone: &Gone| (self.cache).strict_drained(gone.who.dom, frame, gone.is_dead);
            if gone.is_some_and(drained) {
                self.step(Input::Page(Event::Drained { epoch, frame }));
            }
        }
    }
}

impl Core {
    /// Tells a session that a file of it has another length, or remembers to when there is no room.
    pub(in crate::serve) fn tell_length(&mut self, id: u64, token: FileToken) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let has_room = conn.has_room();
        let Some(session) = conn.session.as_mut() else {
            return;
        };
        let epoch = session.epoch;
        let Some(open) = session.files.get_mut(&token) else {
            return;
        };
        if !has_room {
            if !std::mem::replace(&mut open.length_due, true) {
                conn.lengths.push_back(token);
            }
            return;
        }
        let bytes = self.ctx.cache.current(&open.file).bytes;
        let notice = Notice::Resized { file: token, bytes };
        self.ctx.notify(conn, epoch, &notice, None);
        self.settle_conn(id);
    }

    /// What the machine and the cache led to: answers first, then what is asked.
    pub(in crate::serve) fn act_strict(&mut self) -> bool {
        self.ctx.forget_ended();
        let mut more = self.ctx.exclusives();
        for id in std::mem::take(&mut self.ctx.coherent.rehomed) {
            for (conn, token) in self.ctx.openers.get(&id).cloned().unwrap_or_default() {
                if let Some(conn) = self.conns.get_mut(&conn) {
                    self.ctx.rebase(conn, token);
                }
            }
            more = true;
        }
        // Who asked for another length hears of it first, as everybody does.
        for id in std::mem::take(&mut self.ctx.coherent.resized) {
            for (conn, token) in self.ctx.openers.get(&id).cloned().unwrap_or_default() {
                self.tell_length(conn, token);
            }
            more = true;
        }
        while let Some((number, answer)) = self.ctx.coherent.answers.pop_front() {
            more = true;
            self.answer(number, answer);
        }
        more
    }
}
