//! Opening files: on frames where it can be, else through the page cache.
//!
//! All opens that a node id has at one time are of one form and one content: the kernel wants one
//! backing file for an inode (else EBUSY), and a mapping must stay whole. When the host has changed a
//! file that is open, the kernel is answered ESTALE; it then looks the name up again, gets another
//! node id, and opens that (`LOOKUP_REVAL`, fs/namei.c).

use super::core::{Core, errno};
use super::limits::ROOM_PAUSE;
use super::link::Live;
use super::table::same_content;
use super::workers::{Change, Job};
use crate::error::MmapError;
use crate::file::File;
use crate::node::Node;
use copage_coherence::msg::{Attr, OpenHow};
use copage_grants::Version;
use crossbeam_channel::Sender;
use fuser::{BackingId, Errno, FileHandle, FopenFlags, ReplyOpen};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How an open file reaches its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// By passthrough, on the shared frames: reads, mappings and programs touch the very frames.
    Frames,
    /// Through this kernel's page cache: a copy, read by messages.
    PageCache,
    /// By messages, each read and write: files of `coherent` exports.
    Direct,
}

impl Form {
    /// The value of the attribute `user.copage.form`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Frames => "frames",
            Self::PageCache => "page-cache",
            Self::Direct => "direct",
        }
    }
}

/// What all opens of one node id share.
pub(super) struct OpenFile {
    file: File,
    /// For passthrough; `None`: page-cache form.
    backing: Option<BackingId>,
    /// Length of the content that is open, in bytes.
    bytes: u64,
    /// The session it is of.
    session: u64,
}

impl OpenFile {
    pub(super) fn form(&self) -> Form {
        if self.backing.is_some() {
            Form::Frames
        } else {
            Form::PageCache
        }
    }

    /// The number of the session it is of.
    pub(super) fn session(&self) -> u64 {
        self.session
    }

    /// The daemon may not hear of changes of it.
    pub(super) fn host_bounded(&self) -> bool {
        self.file.host_bounded()
    }

    /// Was it opened of a daemon that is not there any more?
    pub(super) fn outlived_daemon(&self) -> bool {
        self.file.is_of_earlier_session()
    }

    /// Has the daemon said that the host changed the file since it was opened? It says so of files
    /// that are pinned, not of those that are only read.
    pub(super) fn changed(&self) -> bool {
        self.file.version() != self.file.opened_version()
    }
}

#[derive(Default)]
enum State {
    #[default]
    Closed,
    /// An opener is at it; these wait too.
    Opening(Vec<ReplyOpen>),
    Open {
        file: Arc<OpenFile>,
        count: u64,
    },
    /// Closed by all, and pinned for a moment longer; with the attributes it was closed with.
    Lingering {
        file: Arc<OpenFile>,
        attr: Attr,
    },
}

/// What is kept of a node id's opens.
#[derive(Default)]
pub(super) struct Opens {
    state: State,
    /// The content of which the kernel's page cache may hold pages.
    cached: Option<Version>,
}

impl Opens {
    pub(super) fn file(&self) -> Option<&Arc<OpenFile>> {
        match &self.state {
            State::Open { file, .. } => Some(file),
            _ => None,
        }
    }

    /// Ends a file's lingering.
    pub(super) fn end_linger(&mut self) -> Option<Arc<OpenFile>> {
        match std::mem::take(&mut self.state) {
            State::Lingering { file, .. } => Some(file),
            other => {
                self.state = other;
                None
            }
        }
    }

    pub(super) fn on_frames(&self) -> Option<&OpenFile> {
        self.file()
            .map(Arc::as_ref)
            .filter(|file| file.form() == Form::Frames)
    }
}

/// Errors of a pin that mean "too large" or "no room", not "no".
pub(super) fn too_large(error: &MmapError) -> bool {
    let of_room = [
        libc::EFBIG,
        libc::EDQUOT,
        libc::ENOMEM,
        libc::ENOSPC,
        libc::EOPNOTSUPP,
    ];
    matches!(error, MmapError::Refused { .. }) && of_room.contains(&error.errno())
}

/// The daemon has no descriptors to give, of any file.
fn is_unsupported(error: &MmapError) -> bool {
    matches!(error, MmapError::Refused { errno, .. } if *errno == libc::EOPNOTSUPP)
}

impl Core {
    /// Answers an open at once if the file is open already and nothing has changed, else passes it
    /// to the openers.
    pub(super) fn open(&self, id: u64, reply: ReplyOpen, jobs: &Sender<Job>) {
        let last = self.link.last();
        let mut table = self.table.lock();
        let Some(entry) = table.get_mut(id) else {
            drop(table);
            return reply.error(Errno::ESTALE);
        };
        let mut outlived = None;
        if let State::Lingering { file, attr } = &entry.open.state {
            let now = entry.attr.as_ref();
            let same = now.is_some_and(|now| same_content(now, attr));
            if same && Self::is_current(&last, file) {
                let file = file.clone();
                answer(reply, &file, true);
                entry.open.state = State::Open { file, count: 1 };
                return;
            }
            outlived = entry.open.end_linger();
        }
        let job = match &mut entry.open.state {
            State::Opening(waiting) => return waiting.push(reply),
            State::Open { file, count }
                if file.form() == Form::Frames && Self::is_current(&last, file) =>
            {
                *count += 1;
                return answer(reply, file, true);
            }
            State::Open { .. } => Job::Again(id, reply),
            state @ (State::Closed | State::Lingering { .. }) => {
                *state = State::Opening(Vec::new());
                Job::Open(id, reply)
            }
        };
        drop(table);
        // The kernel wants no backing file of the inode left before it takes another.
        drop(outlived);
        // The openers outlive the session of the kernel, which is who called.
        let _ = jobs.send(job);
    }

    pub(super) fn open_first(&self, id: u64, reply: ReplyOpen, changes: &Sender<Change>) {
        let result = self.ask_open(id, Some(&reply));
        let mut table = self.table.lock();
        let Some(entry) = table.get_mut(id) else {
            drop(table);
            return reply.error(Errno::ESTALE);
        };
        let waiting = match std::mem::take(&mut entry.open.state) {
            State::Opening(waiting) => waiting,
            // Only this thread ends Opening.
            other => {
                entry.open.state = other;
                Vec::new()
            }
        };
        let file = match result {
            Ok(file) => Arc::new(file),
            Err(errno) => {
                drop(table);
                for reply in waiting.into_iter().chain([reply]) {
                    reply.error(errno);
                }
                return;
            }
        };
        let grown = entry.attr.as_mut().is_some_and(|attr| {
            // The host changed the file after the kernel was told its length.
            let differs = attr.bytes != file.bytes;
            attr.bytes = file.bytes;
            differs
        });
        let keep = entry.open.keep_cache(&file);
        let count = 1 + waiting.len() as u64;
        if file.form() == Form::PageCache {
            self.page_cache_opens.fetch_add(1, Ordering::Relaxed);
        }
        entry.open.state = State::Open {
            file: file.clone(),
            count,
        };
        for reply in waiting.into_iter().chain([reply]) {
            answer(reply, &file, keep);
        }
        drop(table);
        if grown || file.form() == Form::PageCache {
            // Also wakes the watcher, which sleeps while no such file is open.
            let _ = changes.send(Change::Attributes(id));
        }
    }

    pub(super) fn open_again(&self, id: u64, reply: ReplyOpen, changes: &Sender<Change>) {
        let fresh = match self.ask(id, |live, node| Ok((live.number, node.attr()?))) {
            Ok(fresh) => fresh,
            Err(errno) => return reply.error(errno),
        };
        let (session, attr) = fresh;
        let mut table = self.table.lock();
        let Some(entry) = table.get_mut(id) else {
            drop(table);
            return reply.error(Errno::ESTALE);
        };
        match &mut entry.open.state {
            State::Opening(waiting) => waiting.push(reply),
            state @ (State::Closed | State::Lingering { .. }) => {
                let outlived = std::mem::replace(state, State::Opening(Vec::new()));
                drop(table);
                drop(outlived);
                self.open_first(id, reply, changes);
            }
            State::Open { file, count } if file.form() == Form::Frames => {
                let same = entry
                    .attr
                    .as_ref()
                    .is_some_and(|old| same_content(old, &attr));
                if same && !file.changed() {
                    *count += 1;
                    answer(reply, file, true);
                } else {
                    table.supersede(id);
                    drop(table);
                    reply.error(Errno::ESTALE);
                }
            }
            State::Open { file, count } => {
                // Page-cache form follows the file, as on any network file system.
                let keep = entry
                    .attr
                    .as_ref()
                    .is_some_and(|old| same_content(old, &attr));
                entry.attr = Some(attr);
                if file.session == session {
                    *count += 1;
                    return answer(reply, file, keep);
                }
                drop(table);
                match self.open_anew(id) {
                    Ok(Some(file)) => {
                        answer(reply, &file, false);
                        let _ = changes.send(Change::Attributes(id));
                    }
                    // Its last other open has just ended.
                    Ok(None) => reply.error(Errno::ESTALE),
                    Err(errno) => reply.error(errno),
                }
            }
        }
    }

    /// Opens a file in the present session that is open in page-cache form in a lost one, for one more
    /// open. `None`: it is no longer open.
    fn open_anew(&self, id: u64) -> Result<Option<Arc<OpenFile>>, Errno> {
        let new = Arc::new(self.ask_open(id, None)?);
        Ok(self.replace(id, new, 1))
    }

    /// A page-cache-form file whose session was lost, in the present session.
    pub(super) fn reopen(&self, id: u64) -> Result<Arc<OpenFile>, Errno> {
        let new = Arc::new(self.ask_open(id, None)?);
        self.replace(id, new, 0).ok_or(Errno::EIO)
    }

    fn replace(&self, id: u64, new: Arc<OpenFile>, more: u64) -> Option<Arc<OpenFile>> {
        let mut table = self.table.lock();
        let entry = table.get_mut(id)?;
        let _old = match &mut entry.open.state {
            State::Open { file, count } if file.form() == Form::PageCache => {
                *count += more;
                std::mem::replace(file, new.clone())
            }
            _ => return None,
        };
        entry.open.keep_cache(&new);
        drop(table);
        Some(new)
    }

    /// Opens the file of `id`: on frames when `reply` can register a backing file and it fits, else
    /// in page-cache form.
    fn ask_open(&self, id: u64, reply: Option<&ReplyOpen>) -> Result<OpenFile, Errno> {
        if let Some(reply) = reply.filter(|_| self.passthrough()) {
            let pinned = self.ask(id, |live, node| match self.pin(node) {
                Ok(file) => {
                    let descriptor = file.descriptor()?;
                    Ok(Some((file, descriptor, live.number)))
                }
                Err(e) if is_unsupported(&e) => {
                    tracing::info!(reason = %e, "everything is opened through the page cache");
                    self.passthrough.store(false, Ordering::Relaxed);
                    Ok(None)
                }
                Err(e) if too_large(&e) => {
                    tracing::info!(reason = %e, "opened through the page cache");
                    Ok(None)
                }
                Err(e) => Err(e),
            })?;
            if let Some((file, descriptor, session)) = pinned {
                // Of the content that was pinned; the session may know of a newer one already.
                let bytes = rustix::fs::fstat(&descriptor)
                    .map_or_else(|_| file.len(), |stat| stat.st_size.unsigned_abs());
                match reply.open_backing(descriptor.as_fd()) {
                    Ok(backing) => return Ok(OpenFile::new(file, Some(backing), bytes, session)),
                    Err(error) => {
                        tracing::warn!(%error, "the kernel takes no backing file: page cache from now on");
                        self.passthrough.store(false, Ordering::Relaxed);
                    }
                }
            }
        }
        self.ask(id, |live: &Live, node: &Node| {
            let file = node.open(OpenHow::Read)?;
            let bytes = file.len();
            Ok(OpenFile::new(file, None, bytes, live.number))
        })
    }

    /// Opens a file pinned; what lingers makes room for it.
    fn pin(&self, node: &Node) -> Result<File, MmapError> {
        match node.open(OpenHow::Pin) {
            Err(e) if too_large(&e) && e.errno() != libc::EFBIG && self.end_lingering(true) > 0 => {
                std::thread::sleep(ROOM_PAUSE);
                node.open(OpenHow::Pin)
            }
            other => other,
        }
    }

    /// One open less.
    pub(super) fn release(&self, id: u64, changes: &Sender<Change>) {
        let last = self.link.last();
        let gone = {
            let mut table = self.table.lock();
            let Some(entry) = table.get_mut(id) else {
                return;
            };
            let State::Open { count, file } = &mut entry.open.state else {
                return;
            };
            *count = count.saturating_sub(1);
            if *count > 0 {
                return;
            }
            if file.form() == Form::PageCache {
                self.page_cache_opens.fetch_sub(1, Ordering::Relaxed);
            }
            let lingers = file.form() == Form::Frames && Self::is_current(&last, file);
            match (lingers, entry.attr) {
                (true, Some(attr)) => {
                    let file = file.clone();
                    self.lingering.lock().push(id, file.bytes);
                    entry.open.state = State::Lingering { file, attr };
                    None
                }
                _ => Some(std::mem::take(&mut entry.open.state)),
            }
        };
        if gone.is_none() {
            // To the watcher, which ends it in time.
            let _ = changes.send(Change::Lingers);
        }
    }

    /// Bytes of a file that is open in page-cache form.
    pub(super) fn read(&self, id: u64, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let file = self
            .table
            .lock()
            .get(id)
            .and_then(|e| e.open.file().cloned());
        let file = file.ok_or(Errno::EBADF)?;
        match file.file.read_at(buf, offset) {
            Err(MmapError::Lost(_)) if file.form() == Form::PageCache => {
                let file = self.reopen(id)?;
                file.file.read_at(buf, offset).map_err(|e| errno(&e))
            }
            other => other.map_err(|e| errno(&e)),
        }
    }
}

impl OpenFile {
    fn new(file: File, backing: Option<BackingId>, bytes: u64, session: u64) -> Self {
        Self {
            file,
            backing,
            bytes,
            session,
        }
    }
}

impl Opens {
    /// May the kernel keep the pages it has of this file? Remembers whose it may have from now on.
    fn keep_cache(&mut self, file: &OpenFile) -> bool {
        match file.form() {
            Form::Frames => true,
            Form::PageCache | Form::Direct => {
                let version = file.file.version();
                self.cached.replace(version) == Some(version)
            }
        }
    }
}

fn answer(reply: ReplyOpen, file: &OpenFile, keep_cache: bool) {
    // Files are known by their node id: no handle is needed. Closing flushes nothing.
    match &file.backing {
        Some(backing) => {
            reply.opened_passthrough(FileHandle(0), FopenFlags::FOPEN_NOFLUSH, backing);
        }
        None => {
            let mut flags = FopenFlags::FOPEN_NOFLUSH;
            flags.set(FopenFlags::FOPEN_KEEP_CACHE, keep_cache);
            reply.opened(FileHandle(0), flags);
        }
    }
}
