//! Asking sessions for pages, and hearing that they let go.

use super::super::core::Core;
use super::super::ctx::Ctx;
use super::super::session::{Conn, Session};
use copage_cache::{FileId, OpenHow};
use copage_coherence::msg::{
    FAULT_PAGES_MAX, FileToken, Generation, InvalidateReason, Notice, PageRange,
};
use copage_coherence::session;
use copage_coherence::strict::{Event, Input, Place};
use copage_grants::{Epoch, PageIndex};

/// Numbers of these recalls have this bit; those of the sessions' machine have it not.
const OF_PAGES: u64 = 1 << 63;

/// A page that a session is to be asked for: the machine's recall.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ask {
    epoch: Epoch,
    place: Place,
    recall: u64,
}

/// An Invalidate that a session was sent; by the number that it answers with.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) epoch: Epoch,
    token: FileToken,
    /// Those of the session's other opens of the file that it was asked through at the same time.
    others: Vec<u64>,
    asks: Vec<Ask>,
}

impl Ctx {
    /// The machine wants a session asked for a page.
    pub(in crate::serve) fn ask_page(&mut self, epoch: Epoch, recall: u64, place: Place) {
        self.coherent.counts.told.recalls += 1;
        self.lost_page(epoch, place);
        self.coherent.asks.push(Ask {
            epoch,
            place,
            recall,
        });
    }

    /// Asks one session for a run of pages, through each open of the file that maps.
    fn send_asks(&mut self, conn: &mut Conn, asks: Vec<Ask>) {
        let (Some(first), Some(session)) = (asks.first().copied(), conn.session.as_ref()) else {
            return;
        };
        let id = FileId(first.place.file);
        let Some(file) = self.coherent.files.get(&id) else {
            return;
        };
        let generation = Generation(self.cache.current(&file.file).generation);
        let opens = self.openers.get(&id).into_iter().flatten();
        let maps = |token: &FileToken| {
            let open = session.files.get(token);
            open.is_some_and(|open| open.how == OpenHow::Map)
        };
        let tokens: Vec<FileToken> = opens
            .filter(|(of, _)| *of == conn.id)
            .map(|&(_, token)| token)
            .filter(maps)
            .collect();
        if tokens.is_empty() {
            // It closed the file meanwhile, and has nothing of it mapped.
            return self.let_go(&asks);
        }
        let numbers: Vec<u64> = tokens.iter().map(|_| OF_PAGES | self.number()).collect();
        let deadline_ms = self.machine.sessions().config().invalidate_deadline_ms;
        for (&token, &number) in tokens.iter().zip(&numbers) {
            let others = numbers.iter().copied().filter(|other| *other != number);
            let asked = Asked {
                epoch: first.epoch,
                token,
                others: others.collect(),
                asks: asks.clone(),
            };
            self.coherent.asked.insert(number, asked);
            let notice = Notice::Invalidate {
                recall: number,
                file: token,
                generation,
                range: PageRange {
                    first: first.place.page,
                    // A run is not longer than what was asked for.
                    count: asks.len() as u32,
                },
                reason: InvalidateReason::Changed,
                deadline_ms,
            };
            self.notify(conn, first.epoch, &notice, None);
        }
    }

    /// A session answers one of these numbers. `false`: it is none.
    pub(in crate::serve) fn acked_page(&mut self, epoch: Epoch, number: u64) -> bool {
        if number & OF_PAGES == 0 {
            return false;
        }
        // Another's number, or one that was answered: nothing.
        if self
            .coherent
            .asked
            .get(&number)
            .is_some_and(|asked| asked.epoch == epoch)
            && let Some(asked) = self.coherent.asked.remove(&number)
        {
            self.answered_page(&asked);
        }
        true
    }

    fn answered_page(&mut self, asked: &Asked) {
        let waits = |other: &u64| self.coherent.asked.contains_key(other);
        if !asked.others.iter().any(waits) {
            self.let_go(&asked.asks);
        }
    }

    /// A session has unmapped what it was asked for. The table says whether that is so.
    fn let_go(&mut self, asks: &[Ask]) {
        for ask in asks {
            self.unmapped_page(ask.epoch, ask.place);
            self.event(session::Event::Ack {
                epoch: ask.epoch,
                recall: ask.recall,
            });
        }
    }

    /// A session's word that it has a page mapped no more.
    fn unmapped_page(&mut self, epoch: Epoch, place: Place) {
        let frame = self.machine.pages().content(place).map(|(frame, _)| frame);
        let who = self.coherent.who.get(&epoch);
        let file = self.coherent.files.get(&FileId(place.file));
        if let (Some(frame), Some(who), Some(file)) = (frame, who, file) {
            self.cache
                .strict_unmapped(who.dom, &file.file, place.page, frame);
        }
    }

    /// A session unmapped pages of its own will, in all its opens of the file. One that lies loses stores.
    pub(in crate::serve) fn strict_unmapped(
        &mut self,
        epoch: Epoch,
        id: FileId,
        (first, count): (PageIndex, u32),
    ) {
        let range = first.0..first.0.saturating_add(count.into());
        let held: Vec<Place> = if count <= FAULT_PAGES_MAX {
            let place = |page| Place {
                file: id.0,
                page: PageIndex(page),
            };
            range.map(place).filter(|p| self.holds(epoch, *p)).collect()
        } else {
            let all = self.held(epoch, id).into_iter();
            all.filter(|place| range.contains(&place.page.0)).collect()
        };
        for place in held {
            // Who was asked for it says so by its Ack.
            if !self.machine.pages().is_leaving(epoch, place) {
                self.unmapped_page(epoch, place);
                self.step(Input::Page(Event::Released { epoch, place }));
            }
        }
    }

    pub(super) fn holds(&self, epoch: Epoch, place: Place) -> bool {
        let mut holders = self.machine.pages().holders(place);
        holders.any(|(who, _)| who == epoch)
    }

    /// The pages of a file that a session holds.
    fn held(&self, epoch: Epoch, id: FileId) -> Vec<Place> {
        let places = self.machine.pages().places_of(epoch);
        let of_file = places.filter(|place| place.file == id.0);
        of_file.filter(|place| self.holds(epoch, *place)).collect()
    }

    /// An open has ended: what it was asked is answered, and with the last of a session its pages go.
    pub(in crate::serve) fn strict_closed(
        &mut self,
        conn: u64,
        session: &Session,
        id: FileId,
        token: FileToken,
    ) {
        let epoch = session.epoch;
        let of = |(number, asked): (&u64, &Asked)| {
            (asked.epoch == epoch && asked.token == token).then_some(*number)
        };
        let numbers: Vec<u64> = self.coherent.asked.iter().filter_map(of).collect();
        for number in numbers {
            self.acked_page(epoch, number);
        }
        let mut opens = self.openers.get(&id).into_iter().flatten();
        if opens.any(|(of, _)| *of == conn) {
            return;
        }
        for place in self.held(epoch, id) {
            self.unmapped_page(epoch, place);
            self.step(Input::Page(Event::Released { epoch, place }));
        }
        self.forget_file(id);
    }

    /// A session is gone: nobody answers for it.
    pub(in crate::serve) fn forget_asks(&mut self, epoch: Epoch) {
        self.coherent.asks.retain(|ask| ask.epoch != epoch);
        self.coherent.asked.retain(|_, asked| asked.epoch != epoch);
    }
}

impl Core {
    /// Sends what is to be asked, a run of pages at a time. A session that reads slowly is asked when it
    /// has read what waits; its deadline runs.
    pub(in crate::serve) fn send_asks(&mut self) {
        let mut asks = std::mem::take(&mut self.ctx.coherent.asks);
        asks.sort_unstable();
        let next = |a: &Ask, b: &Ask| {
            a.epoch == b.epoch
                && a.place.file == b.place.file
                && a.place.page.0 + 1 == b.place.page.0
        };
        let mut wait = Vec::new();
        let mut told = Vec::new();
        for run in asks.chunk_by(next) {
            let Some(epoch) = run.first().map(|ask| ask.epoch) else {
                continue;
            };
            let id = self.ctx.by_epoch.get(&epoch).copied();
            let Some(conn) = id.and_then(|id| self.conns.get_mut(&id)) else {
                continue;
            };
            if !conn.has_room() {
                wait.extend_from_slice(run);
                continue;
            }
            self.ctx.send_asks(conn, run.to_vec());
            told.push(conn.id);
        }
        self.ctx.coherent.asks.append(&mut wait);
        told.dedup();
        for id in told {
            self.settle_conn(id);
        }
    }
}
