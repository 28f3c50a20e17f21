//! Requests: what each does. Nothing here waits; what may touch a disk goes to the cache's threads
//! with a ticket.

use super::coherent::FaultAsked;
use super::convert;
use super::ctx::{Ctx, Wanted};
use super::limits::STRIKES_MAX;
use super::session::{Conn, Hello, Session};
use copage_cache::{MetaOp, NodeRef, OpenHow};
use copage_coherence::msg::{
    DATA_BYTES_MAX, FenceReason, Generation, Handle, HelloFlags, NAME_BYTES_MAX, PROTOCOL_VERSION,
    PageRange, Reply, Request, decode_header,
};
use copage_coherence::session::{Action, Event, Guest};
use copage_coherence::strict::Output;
use copage_grants::channel::Peer;

/// The longest name of an extended attribute, in bytes (`XATTR_NAME_MAX`, linux/limits.h).
const XATTR_NAME_BYTES_MAX: usize = 255;

/// What becomes of a connection after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// It goes on.
    GoOn,
    /// It said Bye, or never became a session.
    Close,
}

/// An error for the guest: errno and text.
pub(super) type Refusal = (i32, &'static str);

const NO_HANDLE: Refusal = (
    libc::EBADF,
    "this handle is not of this session, or was given back",
);
pub(super) const READ_ONLY: Refusal = (libc::EROFS, "the export is read-only");
pub(super) const NO_FILE: Refusal = (libc::EBADF, "this session has no such open file");

impl Ctx {
    /// Takes one message of a guest.
    pub(super) fn message(&mut self, conn: &mut Conn, bytes: &[u8]) -> After {
        let frame = match decode_header(bytes) {
            Ok(frame) => frame,
            Err(error) => {
                // Nothing in it can be believed, so it cannot be answered either.
                tracing::debug!(conn = conn.id, %error, "garbage");
                self.counts.messages_bad += 1;
                return self.no_protocol(conn);
            }
        };
        let request = match Request::decode(&frame) {
            Ok(request) => request,
            Err(error) => {
                self.counts.messages_bad += 1;
                conn.strikes += 1;
                if conn.strikes >= STRIKES_MAX || frame.request == 0 {
                    return self.no_protocol(conn);
                }
                self.refuse(conn, frame.request, libc::EPROTO, &error.to_string());
                return After::GoOn;
            }
        };
        let number = frame.request;
        let Some(epoch) = conn.session.as_ref().map(|s| s.epoch) else {
            return self.first_message(conn, number, &request);
        };
        if frame.epoch != epoch {
            // An old epoch counts for nothing; only the sender hears of it.
            if request.is_answered() {
                let text = "this epoch is over; connect again";
                self.refuse(conn, number, libc::ESTALE, text);
            }
            return After::GoOn;
        }
        self.counts.requests += 1;
        // Taken out so that the session and the connection's outbox can be used side by side.
        let Some(mut session) = conn.session.take() else {
            return After::GoOn;
        };
        session.requests += 1;
        let after = self.request(conn, &mut session, number, request);
        conn.session = Some(session);
        match after {
            Ok(after) => after,
            Err((errno, text)) => {
                self.refuse(conn, number, errno, text);
                After::GoOn
            }
        }
    }

    fn no_protocol(&mut self, conn: &mut Conn) -> After {
        match &conn.session {
            Some(session) => {
                self.fence(session.epoch, FenceReason::Protocol);
                After::GoOn
            }
            None => After::Close,
        }
    }

    /// Before the session there is Hello and nothing else.
    fn first_message(&mut self, conn: &mut Conn, number: u64, request: &Request<'_>) -> After {
        let Request::Hello {
            version,
            flags,
            name,
            uuid: _,
        } = request
        else {
            if request.is_answered() {
                self.refuse(conn, number, libc::EPROTO, "a session begins with Hello");
            }
            return After::Close;
        };
        let HelloFlags { wants_userfaultfd } = *flags;
        if *version != PROTOCOL_VERSION {
            let text = format!("the daemon speaks version {PROTOCOL_VERSION}, the guest {version}");
            self.refuse(conn, number, libc::EPROTONOSUPPORT, &text);
            return After::Close;
        }
        if conn.hello.is_some() {
            return After::Close;
        }
        let found = match &conn.peer {
            Peer::Process(process) => self.guests.identify(process.uid, name),
            Peer::Domain(domain) => {
                let found = self.guests.identify_domain(domain, name);
                found.map(|guest| (guest, false))
            }
        };
        let (guest, is_new) = match found {
            Ok(found) => found,
            Err(error) => {
                self.counts.sessions_refused += 1;
                self.refuse(conn, number, error.errno(), &error.to_string());
                return After::Close;
            }
        };
        if is_new {
            self.limit_guest(guest);
        }
        conn.hello = Some(Hello {
            request: number,
            guest,
            wants_userfaultfd,
        });
        self.event(Event::Connect {
            conn: conn.id,
            guest: Guest(guest),
        });
        After::GoOn
    }

    fn request(
        &mut self,
        conn: &mut Conn,
        session: &mut Session,
        number: u64,
        request: Request<'_>,
    ) -> Result<After, Refusal> {
        match request {
            Request::Hello { .. } => return Err((libc::EPROTO, "the session has begun")),
            Request::Exports => {
                let names = self.exports.names_for(&session.name);
                self.answer(conn, session, number, &Reply::Exports { names: &names });
            }
            Request::Attach { export } => match self.exports.attach(export, &session.name) {
                Ok(export) => {
                    self.submit(
                        conn,
                        session,
                        number,
                        Wanted::Attached,
                        MetaOp::Root { export },
                    );
                }
                Err((errno, text)) => self.refuse_as(conn, session, number, errno, &text),
            },
            Request::Lookup { parent, name } => {
                let parent = node(session, parent)?;
                check_name(name)?;
                let op = MetaOp::Lookup {
                    parent,
                    name: name.to_vec(),
                };
                self.submit(conn, session, number, Wanted::Entry, op);
            }
            Request::Getattr { node: handle } => {
                let op = MetaOp::Attr {
                    node: node(session, handle)?,
                };
                self.submit(conn, session, number, Wanted::Attr, op);
            }
            Request::Readlink { node: handle } => {
                let op = MetaOp::Readlink {
                    node: node(session, handle)?,
                };
                self.submit(conn, session, number, Wanted::Bytes, op);
            }
            Request::Readdir {
                node: handle,
                cookie,
                bytes_max,
                handles,
            } => {
                let node = node(session, handle)?;
                let bytes_max = bytes_max.min(DATA_BYTES_MAX);
                let op = MetaOp::Readdir {
                    node,
                    cookie,
                    bytes_max,
                    nodes: handles,
                };
                self.submit(conn, session, number, Wanted::Dir { bytes_max }, op);
            }
            Request::Getxattr { node: handle, name } => {
                let node = node(session, handle)?;
                if name.is_empty() || name.contains(&0) {
                    return Err((libc::EINVAL, "not the name of an extended attribute"));
                }
                if name.len() > XATTR_NAME_BYTES_MAX {
                    return Err((libc::ERANGE, "no extended attribute has so long a name"));
                }
                let op = MetaOp::Getxattr {
                    node,
                    name: name.to_vec(),
                };
                self.submit(conn, session, number, Wanted::Bytes, op);
            }
            Request::Listxattr { node: handle } => {
                let op = MetaOp::Listxattr {
                    node: node(session, handle)?,
                };
                self.submit(conn, session, number, Wanted::Bytes, op);
            }
            Request::Statfs { node: handle } => {
                let op = MetaOp::Statfs {
                    node: node(session, handle)?,
                };
                self.submit(conn, session, number, Wanted::StatFs, op);
            }
            Request::Forget { node, count } => {
                if session.handles.forget(node, count) == Some(true)
                    && let Some(guest) = self.guests.get_mut(session.who.guest)
                {
                    guest.handles = guest.handles.saturating_sub(1);
                }
            }
            Request::Open {
                node: handle,
                how,
                write,
            } => {
                let node = node(session, handle)?;
                let how = convert::open_how(how);
                self.open(conn, session, number, node, (how, write))?;
            }
            Request::Close { file } => {
                let open = session.files.remove(&file).ok_or(NO_FILE)?;
                self.forget_open(conn.id, session.who.guest, file, &open);
                if open.file.is_coherent() {
                    // Its pages go before the open does.
                    self.strict_closed(conn.id, session, open.file.id, file);
                }
                if !open.withdrawn {
                    self.cache.close(&open.file, open.how, session.who);
                }
                for recall in open.asked {
                    self.event(Event::Settle {
                        epoch: session.epoch,
                        recall,
                    });
                }
                self.answer(conn, session, number, &Reply::Done);
            }
            Request::Fault {
                file,
                generation,
                range,
                hint,
                access,
            } => {
                let asked = FaultAsked {
                    token: file,
                    generation: generation.0,
                    range,
                    hint,
                    access,
                };
                self.fault(conn, session, number, asked)?;
            }
            Request::Read { file, offset, len } => {
                let open = session.files.get(&file).ok_or(NO_FILE)?;
                if open.withdrawn {
                    return Err((libc::ESTALE, "the export is not offered any more"));
                }
                let cached = open.file.clone();
                let len = len.min(DATA_BYTES_MAX);
                let ticket = self.ticket(conn.id, session, number, Wanted::Bytes);
                if cached.is_coherent() {
                    self.strict_read(ticket, cached.id, session.who.dom, (offset, len));
                } else {
                    self.cache.read(ticket, &cached, session.who, offset, len);
                }
            }
            Request::Write { file, offset, data } => {
                self.ask_write(conn, session, number, (file, offset, data))?;
            }
            Request::Truncate { file, bytes } => {
                self.ask_truncate(conn, session, number, (file, bytes))?;
            }
            Request::Sync { file } => self.ask_sync(conn, session, number, file)?,
            Request::Arena { file, common } => {
                self.ask_arena(conn, session, number, (file, common))?;
            }
            Request::Ack { recall } => {
                let epoch = session.epoch;
                if !self.acked_page(epoch, recall) {
                    self.event(Event::Ack { epoch, recall });
                }
            }
            Request::Unmapped {
                file,
                generation,
                range,
            } => {
                if let Some(open) = session.files.get(&file)
                    && !open.withdrawn
                {
                    let Generation(generation) = generation;
                    let PageRange { first, count } = range;
                    if open.file.is_coherent() {
                        let id = open.file.id;
                        // Of an older content nothing is held, and the newer may be granted by now.
                        if generation != self.cache.current(&open.file).generation {
                            return Ok(After::GoOn);
                        }
                        self.strict_unmapped(session.epoch, id, (first, count));
                    } else {
                        self.cache
                            .unmapped(&open.file, session.who, generation, first, count);
                    }
                }
            }
            Request::Renew => self.renew(conn, session, number),
            Request::Bye => return Ok(After::Close),
        }
        Ok(After::GoOn)
    }

    fn renew(&mut self, conn: &mut Conn, session: &Session, number: u64) {
        let before = self.actions.len();
        self.event(Event::Renew {
            epoch: session.epoch,
        });
        let renewed = Output::Session(Action::Renewed {
            epoch: session.epoch,
        });
        if self.actions.iter().skip(before).any(|a| *a == renewed) {
            let lease_ttl_ms = self.machine.sessions().config().lease_ttl_ms;
            self.answer(conn, session, number, &Reply::Renewed { lease_ttl_ms });
        }
    }

    fn open(
        &mut self,
        conn: &mut Conn,
        session: &mut Session,
        number: u64,
        node: NodeRef,
        (how, write): (OpenHow, bool),
    ) -> Result<(), Refusal> {
        if how == OpenHow::Pin && !self.backend.capabilities().descriptors {
            let text = "nothing can be pinned here: this daemon grants frames and has no descriptors \
                        to give";
            return Err((libc::EOPNOTSUPP, text));
        }
        let guest = self.guests.get_mut(session.who.guest).ok_or(NO_FILE)?;
        if guest.files >= guest.limits.files_max as usize {
            return Err((
                libc::EMFILE,
                "the guest has as many files open as it may (files_max)",
            ));
        }
        // Counted from here on, so that opens under way cannot pass the limit together.
        guest.files += 1;
        let export = node.export;
        let ticket = self.ticket(conn.id, session, number, Wanted::Opened { export, write });
        self.cache.open(ticket, node, how, session.who, write);
        Ok(())
    }

    fn submit(
        &mut self,
        conn: &Conn,
        session: &mut Session,
        number: u64,
        wanted: Wanted,
        op: MetaOp,
    ) {
        let ticket = self.ticket(conn.id, session, number, wanted);
        self.cache.submit(ticket, op);
    }

    /// Replies while the session is taken out of its connection.
    pub(super) fn answer(
        &mut self,
        conn: &mut Conn,
        session: &Session,
        number: u64,
        reply: &Reply<'_>,
    ) {
        self.answer_with(conn, session.epoch, number, reply, None);
    }

    pub(super) fn refuse_as(
        &mut self,
        conn: &mut Conn,
        session: &Session,
        number: u64,
        errno: i32,
        text: &str,
    ) {
        self.refuse_with(conn, session.epoch, number, errno, text);
    }
}

fn node(session: &Session, handle: Handle) -> Result<NodeRef, Refusal> {
    session.handles.get(handle).cloned().ok_or(NO_HANDLE)
}

/// One name of a directory entry; the same rules whatever the host's file system allows.
fn check_name(name: &[u8]) -> Result<(), Refusal> {
    if name.len() > NAME_BYTES_MAX {
        return Err((libc::ENAMETOOLONG, "a name has at most 255 bytes"));
    }
    if name.is_empty() || name.contains(&0) || name.contains(&b'/') {
        return Err((
            libc::EINVAL,
            "not one name: empty, or with '/' or NUL in it",
        ));
    }
    if matches!(name, b"." | b"..") {
        return Err((libc::EINVAL, "'.' and '..' are not looked up"));
    }
    Ok(())
}
