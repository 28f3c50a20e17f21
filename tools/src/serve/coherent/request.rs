//! Requests that concern coherent files.

use super::super::ctx::{Ctx, Wanted};
use super::super::session::{Conn, Open, Session};
use super::exclusive::Exclusive;
use super::fault::FaultAsked;
use copage_cache::OpenHow;
use copage_coherence::msg::{FileToken, Reply};
use copage_grants::Access;

type Refusal = (i32, &'static str);

const NO_FILE: Refusal = (libc::EBADF, "this session has no such open file");
const READ_ONLY: Refusal = (libc::EBADF, "the file is not open for writing");
const WITHDRAWN: Refusal = (libc::ESTALE, "the export is not offered any more");

/// An open file of a session that may be written.
fn writable(session: &Session, token: FileToken) -> Result<&Open, Refusal> {
    let open = session.files.get(&token).ok_or(NO_FILE)?;
    if open.withdrawn {
        Err(WITHDRAWN)
    } else if open.writes && open.file.is_coherent() {
        Ok(open)
    } else {
        Err(READ_ONLY)
    }
}

impl Ctx {
    /// A fault of an open coherent file.
    pub(in crate::serve) fn ask_fault(
        &mut self,
        conn: &Conn,
        session: &mut Session,
        number: u64,
        asked: FaultAsked,
    ) -> Result<(), Refusal> {
        let open = session.files.get(&asked.token).ok_or(NO_FILE)?;
        if open.how != OpenHow::Map {
            return Err((libc::EINVAL, "the file is not open to be mapped"));
        }
        if asked.access == Access::ReadWrite && !open.writes {
            return Err((libc::EACCES, READ_ONLY.1));
        }
        let id = open.file.id;
        let of = (session.epoch, session.who.dom);
        let ticket = self.ticket(conn.id, session, number, Wanted::Fault(asked.token));
        self.strict_fault(ticket, id, of, asked);
        Ok(())
    }

    pub(in crate::serve) fn ask_write(
        &mut self,
        conn: &Conn,
        session: &mut Session,
        number: u64,
        (token, offset, data): (FileToken, u64, &[u8]),
    ) -> Result<(), Refusal> {
        let open = writable(session, token)?;
        if i64::try_from(offset.saturating_add(data.len() as u64)).is_err() {
            return Err((libc::EFBIG, "no file is so long"));
        }
        let id = open.file.id;
        let dom = session.who.dom;
        let bytes = data.len();
        let ticket = self.ticket(conn.id, session, number, Wanted::Wrote { bytes });
        self.strict_write(ticket, id, dom, (offset, data));
        Ok(())
    }

    pub(in crate::serve) fn ask_truncate(
        &mut self,
        conn: &Conn,
        session: &mut Session,
        number: u64,
        (token, bytes): (FileToken, u64),
    ) -> Result<(), Refusal> {
        let open = writable(session, token)?;
        if i64::try_from(bytes).is_err() {
            return Err((libc::EFBIG, "no file is so long"));
        }
        let id = open.file.id;
        let ticket = self.ticket(conn.id, session, number, Wanted::Done);
        self.exclusive(id, Exclusive::Truncate { ticket, bytes });
        Ok(())
    }

    /// Also of a file that is open for reading, as fsync(2).
    pub(in crate::serve) fn ask_sync(
        &mut self,
        conn: &Conn,
        session: &mut Session,
        number: u64,
        token: FileToken,
    ) -> Result<(), Refusal> {
        let open = session.files.get(&token).ok_or(NO_FILE)?;
        if open.withdrawn {
            return Err(WITHDRAWN);
        }
        if !open.file.is_coherent() {
            return Err((libc::EINVAL, "nobody stores anything in this file"));
        }
        let id = open.file.id;
        let dom = session.who.dom;
        let ticket = self.ticket(conn.id, session, number, Wanted::Done);
        self.strict_sync(ticket, id, dom);
        Ok(())
    }

    /// The file that pages for writing are mapped from.
    pub(in crate::serve) fn ask_arena(
        &mut self,
        conn: &mut Conn,
        session: &Session,
        number: u64,
        (token, common): (FileToken, bool),
    ) -> Result<(), Refusal> {
        let open = session.files.get(&token).ok_or(NO_FILE)?;
        if open.withdrawn {
            return Err(WITHDRAWN);
        }
        if open.how != OpenHow::Map {
            return Err((libc::EINVAL, "the file is not open to be mapped"));
        }
        // What one open of a session writes its others may show.
        let id = open.file.id;
        let writes = |open: &Open| open.file.id == id && open.writes && !open.withdrawn;
        if !session.files.values().any(writes) {
            return Err(READ_ONLY);
        }
        let found = if common {
            self.cache.common(&open.file)
        } else {
            let arena = self.cache.arena(&open.file, session.who.dom);
            arena.map(|fd| (0, fd))
        };
        match found {
            Ok((serial, fd)) => {
                let reply = Reply::Arena { serial };
                self.answer_with(conn, session.epoch, number, &reply, Some(fd));
            }
            Err(error) => {
                let text = error.to_string();
                self.refuse_with(conn, session.epoch, number, error.errno(), &text);
            }
        }
        Ok(())
    }
}
