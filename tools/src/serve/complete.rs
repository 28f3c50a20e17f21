//! Answers of the cache: what its threads found, passed on to who asked.

use super::coherent::StrictGranted;
use super::convert;
use super::ctx::{Ctx, Ticket, Wanted};
use super::session::{Conn, Open, Session};
use copage_cache::{CacheError, Dir, ExportId, FaultDone, MetaReply, NodeRef, OpenDone, OpenHow};
use copage_coherence::msg::{
    Attr, DirEntry, DirWriter, FileToken, Generation, Handle, OpenedFlags, Reply,
};

/// `ro` and `coherent`, as Attached says them.
const MODE_RO: u8 = 0;
const MODE_COHERENT: u8 = 1;

/// What the cache answered to a ticket.
pub(super) enum Answer {
    Meta(Result<MetaReply, CacheError>),
    Opened(Result<OpenDone, CacheError>),
    Read(Result<Vec<u8>, CacheError>),
    Faulted(Result<FaultDone, CacheError>),
    /// Pages of a coherent file.
    Granted(Box<StrictGranted>),
    /// The generation asked for is not the coherent file's newest.
    Stale,
    Wrote {
        count: u32,
        bytes: u64,
    },
    Done,
    Failed {
        errno: i32,
        text: String,
    },
}

impl Answer {
    pub(super) fn failed(errno: i32) -> Self {
        let text = match errno {
            libc::EAGAIN => "the daemon is too busy with this file; try again".to_owned(),
            libc::EDQUOT => "the guest has as many pages as it may".to_owned(),
            libc::ESTALE => "the session or the file has ended".to_owned(),
            errno => std::io::Error::from_raw_os_error(errno).to_string(),
        };
        Self::Failed { errno, text }
    }

    pub(super) fn refused(error: &CacheError) -> Self {
        Self::Failed {
            errno: error.errno(),
            text: error.to_string(),
        }
    }
}

impl Ctx {
    /// Takes the ticket of an answer. The connection is `None` when the session is gone.
    pub(super) fn complete(&mut self, conn: Option<&mut Conn>, ticket: Ticket, answer: Answer) {
        let session = conn.and_then(|conn| {
            let session = conn.session.take_if(|s| s.epoch == ticket.epoch)?;
            Some((conn, session))
        });
        let Some((conn, mut session)) = session else {
            self.too_late(ticket, answer);
            return;
        };
        session.in_flight -= 1;
        session.bytes_in_flight -= ticket.wanted.bytes();
        self.answered(conn, &mut session, ticket, answer);
        conn.session = Some(session);
    }

    /// Nobody waits any more.
    fn too_late(&mut self, ticket: Ticket, answer: Answer) {
        if let Some(left) = self.late.get_mut(&ticket.who.dom) {
            *left -= 1;
            if *left == 0 {
                self.late.remove(&ticket.who.dom);
            }
        }
        if let Answer::Opened(result) = answer {
            if let Ok(done) = result {
                self.cache.close(&done.file, done.how, ticket.who);
            }
            self.release_file(ticket.who.guest);
        }
    }

    fn release_file(&mut self, guest: u32) {
        if let Some(guest) = self.guests.get_mut(guest) {
            guest.files = guest.files.saturating_sub(1);
        }
    }

    fn answered(&mut self, conn: &mut Conn, session: &mut Session, ticket: Ticket, answer: Answer) {
        let Ticket {
            request, wanted, ..
        } = ticket;
        let error = match (wanted, answer) {
            (wanted, Answer::Meta(Ok(reply))) => {
                return self.meta(conn, session, request, wanted, reply);
            }
            (Wanted::Opened { export, write }, Answer::Opened(Ok(done))) => {
                return self.opened(conn, session, request, (export, write), done);
            }
            (Wanted::Bytes, Answer::Read(Ok(data))) => {
                return self.answer(conn, session, request, &Reply::Bytes { data: &data });
            }
            (Wanted::Fault(token), Answer::Faulted(Ok(done))) => {
                return self.faulted(conn, session, request, token, done);
            }
            (Wanted::Fault(_), Answer::Granted(granted)) => {
                return self.answer(conn, session, request, &granted.reply());
            }
            (Wanted::Fault(token), Answer::Stale) => {
                return self.stale(conn, session, request, token);
            }
            (Wanted::Wrote { .. }, Answer::Wrote { count, bytes }) => {
                return self.answer(conn, session, request, &Reply::Wrote { count, bytes });
            }
            (Wanted::Done, Answer::Done) => {
                return self.answer(conn, session, request, &Reply::Done);
            }
            (_, Answer::Failed { errno, text }) => {
                return self.refuse_with(conn, session.epoch, request, errno, &text);
            }
            (_, Answer::Opened(Err(error))) => {
                self.release_file(session.who.guest);
                error
            }
            (_, Answer::Meta(Err(e)) | Answer::Read(Err(e)) | Answer::Faulted(Err(e))) => e,
            (wanted, _) => {
                tracing::error!(?wanted, "the cache answered something else than was asked");
                CacheError::Stopped
            }
        };
        self.refuse_with(
            conn,
            session.epoch,
            request,
            error.errno(),
            &error.to_string(),
        );
    }

    fn meta(
        &mut self,
        conn: &mut Conn,
        session: &mut Session,
        request: u64,
        wanted: Wanted,
        found: MetaReply,
    ) {
        match (wanted, found) {
            (Wanted::Attached, MetaReply::Entry { node, attr }) => {
                let mode = if self.exports.is_coherent(node.export) {
                    MODE_COHERENT
                } else {
                    MODE_RO
                };
                let Some(root) = self.handle(conn, session, request, node) else {
                    return;
                };
                let attr = convert::attr(&attr);
                self.answer(
                    conn,
                    session,
                    request,
                    &Reply::Attached { root, attr, mode },
                );
            }
            (Wanted::Entry, MetaReply::Entry { node, attr }) => {
                let Some(node) = self.handle(conn, session, request, node) else {
                    return;
                };
                let attr = convert::attr(&attr);
                self.answer(conn, session, request, &Reply::Entry { node, attr });
            }
            (Wanted::Attr, MetaReply::Attr(attr)) => {
                let attr = convert::attr(&attr);
                self.answer(conn, session, request, &Reply::Attr { attr });
            }
            (Wanted::Bytes, MetaReply::Bytes(data)) => {
                self.answer(conn, session, request, &Reply::Bytes { data: &data });
            }
            (Wanted::Dir { bytes_max }, MetaReply::Dir(dir)) => {
                self.directory(conn, session, request, bytes_max, dir);
            }
            (Wanted::StatFs, MetaReply::StatFs(stat)) => {
                let stat = Reply::StatFs(convert::statfs(&stat));
                self.answer(conn, session, request, &stat);
            }
            (wanted, _) => {
                tracing::error!(?wanted, "the cache answered something else than was asked");
                let text = "the daemon mixed up its answers";
                self.refuse_with(conn, session.epoch, request, libc::EIO, text);
            }
        }
    }

    /// A handle for a node, if the guest may have one more.
    fn new_handle(&mut self, session: &mut Session, node: NodeRef) -> Option<Handle> {
        let guest = self.guests.get_mut(session.who.guest)?;
        let is_new = session.handles.is_new(&node);
        if is_new && guest.handles >= guest.limits.handles_max as usize {
            return None;
        }
        let handle = session.handles.insert(node, &mut self.tags).ok()?;
        guest.handles += usize::from(is_new);
        Some(handle)
    }

    /// The same, refusing the request when not.
    fn handle(
        &mut self,
        conn: &mut Conn,
        session: &mut Session,
        request: u64,
        node: NodeRef,
    ) -> Option<Handle> {
        let handle = self.new_handle(session, node);
        if handle.is_none() {
            let text = "the guest has as many handles as it may (handles_max)";
            self.refuse_with(conn, session.epoch, request, libc::ENFILE, text);
        }
        handle
    }

    fn directory(
        &mut self,
        conn: &mut Conn,
        session: &mut Session,
        request: u64,
        bytes_max: u32,
        dir: Dir,
    ) {
        let mut writer = DirWriter::new(bytes_max);
        let mut end = dir.end;
        for item in dir.items {
            // The room is looked at first: no reference may be counted that is not sent.
            if !writer.has_room(item.name.len(), item.node.is_some()) {
                end = false;
                break;
            }
            let node: Option<(Handle, Attr)> = item.node.and_then(|(node, attr)| {
                let handle = self.new_handle(session, node)?;
                Some((handle, convert::attr(&attr)))
            });
            let entry = DirEntry {
                cookie: item.cookie,
                kind: convert::kind(item.kind),
                ino: item.ino,
                node,
                name: &item.name,
            };
            if let Err(error) = writer.push(&entry) {
                // A name that the protocol cannot carry is left out; the rest is shown.
                tracing::warn!(%error, "an entry was left out of a directory");
            }
        }
        if writer.is_empty() && !end {
            let text = "no entry fits this many bytes";
            self.refuse_with(conn, session.epoch, request, libc::EINVAL, text);
            return;
        }
        let entries = writer.finish();
        self.answer(
            conn,
            session,
            request,
            &Reply::Dir {
                end,
                entries: &entries,
            },
        );
    }

    fn opened(
        &mut self,
        conn: &mut Conn,
        session: &mut Session,
        request: u64,
        (export, write): (ExportId, bool),
        done: OpenDone,
    ) {
        let OpenDone { file, state, how } = done;
        let descriptors = self.backend.capabilities().descriptors;
        let found = match how {
            OpenHow::Map | OpenHow::Pin if descriptors => {
                match self.cache.descriptor(&file, state.generation) {
                    Ok(fd) => Some((state, Some(fd))),
                    // It changed since it was opened: a mapping takes the newest content.
                    Err(_) if how == OpenHow::Map => self.newest(&file).ok(),
                    Err(_) => None,
                }
            }
            // Frames are granted one by one, as they are faulted in.
            OpenHow::Read | OpenHow::Map | OpenHow::Pin => Some((state, None)),
        };
        let Some((state, fd)) = found else {
            self.cache.close(&file, how, session.who);
            self.release_file(session.who.guest);
            let text = "the file changed while it was opened; try again";
            self.refuse_with(conn, session.epoch, request, libc::EAGAIN, text);
            return;
        };
        let token = FileToken(self.number());
        let flags = OpenedFlags {
            descriptor: fd.is_some(),
            pinned: how == OpenHow::Pin,
            host_bounded: state.host_bounded,
            coherent: file.is_coherent(),
        };
        self.openers
            .entry(file.id)
            .or_default()
            .push((conn.id, token));
        if file.is_coherent() {
            let writeback_ms = self.exports.writeback_ms(export);
            self.know_file(&file, writeback_ms);
        }
        let open = Open {
            file,
            how,
            asked: Vec::new(),
            rebase: None,
            rebase_again: false,
            withdrawn: false,
            writes: write,
            length_due: false,
        };
        session.files.insert(token, open);
        let reply = Reply::Opened {
            file: token,
            generation: Generation(state.generation),
            version: state.version,
            bytes: state.bytes,
            flags,
        };
        self.answer_with(conn, session.epoch, request, &reply, fd);
    }
}
