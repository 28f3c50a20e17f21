//! What all sessions share: the machine, the cache, tickets. Everything here runs on the
//! loop's thread.

use super::coherent::Coherent;
use super::exports::Exports;
use super::handles::Tags;
use super::identity::Guests;
use super::recalls::Recalls;
use super::session::{Conn, Open, Session};
use copage_cache::{Cache, CachedFile, ExportId, FileId, Holder};
use copage_coherence::msg::{ERROR_TEXT_BYTES_MAX, FenceReason, FileToken, Reply};
use copage_coherence::session::Event;
use copage_coherence::strict::{Input, Output, Strict};
use copage_grants::{Backend, DomId, Epoch};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What a request that the cache works on will be answered with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wanted {
    Attached,
    Entry,
    Attr,
    Bytes,
    Dir {
        bytes_max: u32,
    },
    Opened {
        export: ExportId,
        write: bool,
    },
    Fault(FileToken),
    StatFs,
    /// To a Write of so many bytes.
    Wrote {
        bytes: usize,
    },
    Done,
}

impl Wanted {
    /// What the request keeps in memory until it is answered, in bytes, as far as it is much.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Wrote { bytes } => bytes,
            _ => 0,
        }
    }
}

/// A request that the cache works on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket {
    pub conn: u64,
    pub epoch: Epoch,
    pub who: Holder,
    pub request: u64,
    pub wanted: Wanted,
}

/// A session as the hypervisor knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound {
    pub who: Holder,
    pub domid: u16,
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub connections: u64,
    pub sessions: u64,
    pub sessions_refused: u64,
    pub requests: u64,
    pub messages_bad: u64,
    pub notices: u64,
    pub fenced_lease: u64,
    pub fenced_deadline: u64,
    pub fenced_protocol: u64,
    pub fenced_removed: u64,
    pub ended: u64,
    pub rounds: u64,
}

/// See the module.
pub(super) struct Ctx {
    pub cache: Arc<Cache>,
    pub backend: Arc<dyn Backend>,
    pub machine: Strict,
    /// What the machine said and nobody did yet.
    pub actions: VecDeque<Output>,
    pub guests: Guests,
    pub exports: Exports,
    pub tags: Tags,
    pub tickets: HashMap<u64, Ticket>,
    /// Requests that the cache works on, for domids without a session any more.
    pub late: BTreeMap<DomId, usize>,
    /// Connections by domid and by epoch.
    pub by_dom: HashMap<DomId, u64>,
    pub by_epoch: HashMap<Epoch, u64>,
    /// Which domain of the hypervisor the entries of a session name, until none is left.
    pub bound: HashMap<DomId, Bound>,
    /// Who has a file open.
    pub openers: HashMap<FileId, Vec<(u64, FileToken)>>,
    pub(super) recalls: Recalls,
    pub coherent: Coherent,
    pub userfaultfd: Option<OwnedFd>,
    pub own_uid: u32,
    pub now_ms: u64,
    pub counts: Counts,
    next_number: u64,
    wire: Vec<u8>,
    out: Vec<Output>,
}

impl Ctx {
    pub(super) fn new(
        cache: Arc<Cache>,
        backend: Arc<dyn Backend>,
        machine: Strict,
        guests: Guests,
        exports: Exports,
    ) -> Self {
        Self {
            cache: cache.clone(),
            backend,
            machine,
            actions: VecDeque::new(),
            guests,
            exports,
            tags: Tags::default(),
            tickets: HashMap::new(),
            late: BTreeMap::new(),
            by_dom: HashMap::new(),
            by_epoch: HashMap::new(),
            bound: HashMap::new(),
            openers: HashMap::new(),
            recalls: Recalls::default(),
            coherent: Coherent::new(cache),
            userfaultfd: None,
            own_uid: rustix::process::geteuid().as_raw(),
            now_ms: 0,
            counts: Counts::default(),
            next_number: 0,
            wire: Vec::new(),
            out: Vec::new(),
        }
    }

    /// A number not used before: for tickets, file tokens and joins.
    pub(super) fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// Takes an event into the machine; what comes out is done by the loop.
    pub(super) fn event(&mut self, event: Event) {
        self.step(Input::Session(event));
    }

    /// Takes an input into the machine.
    pub(super) fn step(&mut self, input: Input) {
        let all = &mut self.actions;
        self.machine
            .step(self.now_ms, input, &mut self.coherent, &mut self.out);
        all.extend(self.out.drain(..));
        self.forget_ended();
    }

    /// Begins a request that the cache answers later; the number is for the cache.
    pub(super) fn ticket(
        &mut self,
        conn: u64,
        session: &mut Session,
        request: u64,
        wanted: Wanted,
    ) -> u64 {
        let number = self.number();
        session.in_flight += 1;
        session.bytes_in_flight += wanted.bytes();
        let ticket = Ticket {
            conn,
            epoch: session.epoch,
            who: session.who,
            request,
            wanted,
        };
        self.tickets.insert(number, ticket);
        number
    }

    /// Sends a reply, with a descriptor beside it. Before Welcome the epoch is 0.
    pub(super) fn answer_with(
        &mut self,
        conn: &mut Conn,
        epoch: Epoch,
        request: u64,
        reply: &Reply<'_>,
        fd: Option<OwnedFd>,
    ) {
        if let Err(error) = reply.encode(request, epoch, &mut self.wire) {
            // A file system's answer that the protocol cannot carry.
            tracing::warn!(%error, "a reply could not be put into a message");
            self.refuse_with(
                conn,
                epoch,
                request,
                libc::EOVERFLOW,
                "the answer fits no message",
            );
            return;
        }
        conn.send(&self.wire, fd);
    }

    /// Sends an error.
    pub(super) fn refuse_with(
        &mut self,
        conn: &mut Conn,
        epoch: Epoch,
        request: u64,
        errno: i32,
        text: &str,
    ) {
        let mut end = text.len().min(ERROR_TEXT_BYTES_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        // An errno outside the protocol's range would be a fault of ours: EIO says so.
        let errno = if (1..=4095).contains(&errno) {
            errno
        } else {
            libc::EIO
        };
        let reply = Reply::Error {
            errno,
            text: &text.as_bytes()[..end],
        };
        match reply.encode(request, epoch, &mut self.wire) {
            Ok(()) => conn.send(&self.wire, None),
            // Only a request numbered 0 cannot be answered, and none is that wants an answer.
            Err(error) => tracing::error!(%error, "an error could not be put into a message"),
        }
    }

    /// Sends an error with the epoch that the connection has.
    pub(super) fn refuse(&mut self, conn: &mut Conn, request: u64, errno: i32, text: &str) {
        let epoch = conn.session.as_ref().map_or(Epoch(0), |s| s.epoch);
        self.refuse_with(conn, epoch, request, errno, text);
    }

    /// Sends a notice.
    pub(super) fn notify(
        &mut self,
        conn: &mut Conn,
        epoch: Epoch,
        notice: &copage_coherence::msg::Notice,
        fd: Option<OwnedFd>,
    ) {
        self.counts.notices += 1;
        match notice.encode(epoch, &mut self.wire) {
            Ok(()) => conn.send(&self.wire, fd),
            // Ranges come from the cache and are good.
            Err(error) => tracing::error!(%error, "a notice could not be put into a message"),
        }
    }

    /// The newest content of a file and, for opens that map it and where there are any, its
    /// descriptor.
    pub(super) fn newest(
        &self,
        file: &Arc<CachedFile>,
    ) -> Result<(copage_cache::FileState, Option<OwnedFd>), copage_cache::CacheError> {
        if !self.backend.capabilities().descriptors {
            return Ok((self.cache.current(file), None));
        }
        // A file that changes between the two calls has a newer state in the second round.
        let mut last = None;
        for _ in 0..3 {
            let state = self.cache.current(file);
            match self.cache.descriptor(file, state.generation) {
                Ok(fd) => return Ok((state, Some(fd))),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or(copage_cache::CacheError::Changing))
    }

    /// Takes an open out of a session's table: the caller has told the cache.
    pub(super) fn forget_open(&mut self, conn: u64, guest: u32, token: FileToken, open: &Open) {
        if let Some(all) = self.openers.get_mut(&open.file.id) {
            all.retain(|&(c, t)| (c, t) != (conn, token));
            if all.is_empty() {
                self.openers.remove(&open.file.id);
            }
        }
        if let Some(guest) = self.guests.get_mut(guest) {
            guest.files = guest.files.saturating_sub(1);
        }
    }

    /// Fences the session of a connection.
    pub(super) fn fence(&mut self, epoch: Epoch, reason: FenceReason) {
        self.event(Event::Fence { epoch, reason });
    }
}
