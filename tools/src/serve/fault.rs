//! Faults of files that only the host writes, and their answers.

use super::coherent::FaultAsked;
use super::convert;
use super::ctx::{Ctx, Wanted};
use super::dispatch::{NO_FILE, READ_ONLY, Refusal};
use super::session::{Conn, Session};
use copage_cache::{FaultDone, FaultOutcome, OpenHow};
use copage_coherence::msg::{
    FAULT_PAGES_MAX, FileToken, Generation, GrantedPlace, PageRange, Reply,
};
use copage_grants::{Access, DomId, Version};

impl Ctx {
    pub(super) fn fault(
        &mut self,
        conn: &mut Conn,
        session: &mut Session,
        number: u64,
        asked: FaultAsked,
    ) -> Result<(), Refusal> {
        let FaultAsked { token, range, .. } = asked;
        if range.count > FAULT_PAGES_MAX {
            return Err((libc::EINVAL, "a fault asks for 512 pages at most"));
        }
        let open = session.files.get(&token).ok_or(NO_FILE)?;
        if open.withdrawn {
            return Err((libc::ESTALE, "the export is not offered any more"));
        }
        if open.how == OpenHow::Pin {
            // It has all pages, and the newer home, which has holes, is not for who pins.
            return Err((libc::EINVAL, "a pinned file has no faults"));
        }
        if open.file.is_coherent() {
            return self.ask_fault(conn, session, number, asked);
        }
        if asked.access == Access::ReadWrite {
            return Err(READ_ONLY);
        }
        let file = open.file.clone();
        let ticket = self.ticket(conn.id, session, number, Wanted::Fault(token));
        let outcome = self.cache.fault(
            ticket,
            &file,
            session.who,
            asked.generation,
            range.first,
            range.count,
            convert::fault_hint(asked.hint),
        );
        if let FaultOutcome::Ready(result) = outcome {
            self.tickets.remove(&ticket);
            session.in_flight -= 1;
            match result {
                Ok(done) => self.faulted(conn, session, number, token, done),
                Err(error) => {
                    let text = error.to_string();
                    self.refuse_as(conn, session, number, error.errno(), &text);
                }
            }
        }
        Ok(())
    }

    /// Answers a fault.
    pub(super) fn faulted(
        &mut self,
        conn: &mut Conn,
        session: &Session,
        number: u64,
        token: FileToken,
        done: FaultDone,
    ) {
        match done {
            FaultDone::Granted {
                generation,
                first,
                count,
                grants,
            } => {
                let (granter, refs) = grants.map_or((DomId(0), Vec::new()), |g| {
                    let refs = g.refs.iter().flat_map(|gref| gref.to_le_bytes());
                    (g.granter, refs.collect())
                });
                let reply = Reply::Granted {
                    generation: Generation(generation),
                    range: PageRange { first, count },
                    granter,
                    refs: &refs,
                    access: Access::ReadOnly,
                    place: GrantedPlace::Home,
                    version: Version(0),
                };
                self.answer(conn, session, number, &reply);
            }
            FaultDone::Stale(_) => self.stale(conn, session, number, token),
        }
    }

    /// Answers a fault of a generation that is not the newest.
    pub(super) fn stale(
        &mut self,
        conn: &mut Conn,
        session: &Session,
        number: u64,
        token: FileToken,
    ) {
        let Some(open) = session.files.get(&token) else {
            self.refuse_as(conn, session, number, NO_FILE.0, NO_FILE.1);
            return;
        };
        match self.newest(&open.file) {
            Ok((state, fd)) => {
                let reply = Reply::Stale {
                    generation: Generation(state.generation),
                    version: state.version,
                    bytes: state.bytes,
                };
                self.answer_with(conn, session.epoch, number, &reply, fd);
            }
            Err(error) => {
                let text = error.to_string();
                self.refuse_as(conn, session, number, error.errno(), &text);
            }
        }
    }
}
