//! Open files: reading by message, the pinned descriptor, and the way to a mapping.

mod inner;

pub(crate) use inner::{Content, FileInner};

use crate::client::{Client, unexpected};
use crate::error::{MmapError, Result};
use crate::mapping::{MapOptions, Mapping};
use crate::node::Node;
use crate::quiet::{Leaf, LeafGuard};
use crate::session::ended;
use copage_coherence::msg::{DATA_BYTES_MAX, Generation, OpenHow, Reply, Request};
use copage_grants::Version;
use inner::{Opened, ask_open, site_of};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// An open file. Clones are the same open; it is closed when the last clone and the last mapping
/// are dropped (queued, never waiting).
#[derive(Clone)]
pub struct File {
    inner: Arc<FileInner>,
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File")
            .field("generation", &self.generation())
            .field("writable", &self.is_writable())
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

impl File {
    pub(crate) fn open(node: &Node, how: OpenHow, write: bool) -> Result<Self> {
        let shared = node.client().shared();
        shared.in_session(|session| {
            let opened = ask_open(session, node.handle_in(session)?, how, write)?;
            let Opened {
                token,
                content,
                flags,
            } = opened;
            let opened = (session.number(), token);
            let mappable = flags.coherent && how == OpenHow::Map;
            let content = site_of(shared, content, node.identity(), mappable)
                .inspect_err(|_| session.post(&Request::Close { file: token }))?;
            // From here on the open is ended by dropping.
            let file = Self {
                inner: Arc::new(FileInner {
                    client: node.client().clone(),
                    opened: Leaf::new(opened),
                    place: Arc::clone(node.place()),
                    identity: node.identity(),
                    how,
                    write,
                    coherent: flags.coherent,
                    writes_lost: AtomicBool::new(false),
                    pinned: flags.pinned,
                    host_bounded: flags.host_bounded,
                    granted: how == OpenHow::Map && content.home.is_none(),
                    opened_version: content.version,
                    pinned_home: content.home.clone().filter(|_| how == OpenHow::Pin),
                    content: Leaf::new(content),
                    rebases: AtomicU32::new(0),
                    closed: AtomicBool::new(false),
                }),
            };
            shared.remember_file(opened, &file.inner);
            if how == OpenHow::Pin && file.inner.pinned_home.is_none() {
                return Err(MmapError::Protocol(
                    "a pinning open came without descriptor".into(),
                ));
            }
            if how == OpenHow::Pin && !flags.pinned {
                return Err(MmapError::Protocol(
                    "a pinning open came without the pin".into(),
                ));
            }
            // In the table before this is asked: who opens files again in the next session has found
            // it there, or it is opened anew here.
            if shared.line.is_live(session.number()) {
                Ok(file)
            } else {
                Err(ended())
            }
        })
    }

    pub(crate) fn inner(&self) -> &Arc<FileInner> {
        &self.inner
    }

    /// The client.
    pub fn client(&self) -> &Client {
        &self.inner.client
    }

    /// Length in bytes, as last heard from the daemon.
    pub fn len(&self) -> u64 {
        self.known().map_or(0, |content| content.bytes)
    }

    /// What is known of the content. In a forked child the lock may be held for ever, by a thread
    /// that is not there.
    fn known(&self) -> Option<LeafGuard<'_, Content>> {
        match self.inner.client.shared().line.check_process() {
            Ok(()) => Some(self.inner.content.lock()),
            Err(_) => self.inner.content.try_lock(),
        }
    }

    /// Has it no bytes?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The content that the present session sees: rises when the host changes the file, and begins anew
    /// with each daemon. [`File::version`] does not.
    pub fn generation(&self) -> Generation {
        self.known()
            .map_or(Generation(0), |content| content.stamp.generation())
    }

    /// The version of that content.
    pub fn version(&self) -> Version {
        self.known().map_or(Version(0), |content| content.version)
    }

    /// The version that was there when the file was opened: a pinned file's descriptor shows it for
    /// ever.
    pub fn opened_version(&self) -> Version {
        self.inner.opened_version
    }

    /// At open the daemon had no kernel lease on the host's file: the host's changes are noticed at
    /// open and on notification only.
    pub fn host_bounded(&self) -> bool {
        self.inner.host_bounded
    }

    /// All pages are there and stay until the file is closed (`OpenHow::Pin`).
    pub fn pinned(&self) -> bool {
        self.inner.pinned
    }

    /// Copies bytes from `offset` on; fewer than asked only at the end of the file. Never SIGBUS.
    /// Large reads are several messages: when the host changes the file between them, what is read
    /// is of two versions.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            let rest = &mut buf[done..];
            let Some(offset) = offset.checked_add(done as u64) else {
                break;
            };
            let wanted = rest.len().min(DATA_BYTES_MAX as usize);
            let got = self.inner.client.shared().in_session(|session| {
                let request = Request::Read {
                    file: self.inner.token(session)?,
                    offset,
                    // At most DATA_BYTES_MAX, see above.
                    len: wanted as u32,
                };
                let answer = session.call(&request)?;
                match answer.reply()? {
                    Reply::Bytes { data } if data.len() <= wanted => {
                        rest[..data.len()].copy_from_slice(data);
                        Ok(data.len())
                    }
                    Reply::Bytes { .. } => Err(MmapError::Protocol(
                        "more bytes came than were asked for".into(),
                    )),
                    other => Err(unexpected("Bytes", &other)),
                }
            })?;
            done += got;
            if got < wanted {
                break;
            }
        }
        Ok(done)
    }

    /// Was it opened in a session before the present one? What a pinned file's descriptor shows is then
    /// not what the daemon has now, and frames of a daemon that is gone.
    pub fn is_of_earlier_session(&self) -> bool {
        let line = &self.inner.client.shared().line;
        line.present()
            .is_none_or(|session| self.inner.token_in(session.number()).is_none())
    }

    /// Was it opened for writing?
    pub fn is_writable(&self) -> bool {
        self.inner.write
    }

    /// Is it of a `coherent` export: what anybody stores, everybody sees?
    pub fn is_coherent(&self) -> bool {
        self.inner.coherent
    }

    /// Maps a range of the file, opened with `OpenHow::Map`.
    pub fn map(&self, options: &MapOptions) -> Result<Mapping> {
        Mapping::new(self, options)
    }

    /// A descriptor of a pinned file that plain `mmap`, `read`, `execve` and FUSE passthrough
    /// accept and that nobody can make writable. The pages stay only while this open lives.
    ///
    /// Refused for other opens: their files have holes that read as zeros without a pager.
    pub fn descriptor(&self) -> Result<OwnedFd> {
        if self.inner.how != OpenHow::Pin {
            return Err(MmapError::Access(
                "only a pinned file has a descriptor to give (open it with OpenHow::Pin)".into(),
            ));
        }
        self.inner.client.shared().line.check_process()?;
        let home = self.inner.pinned_home.as_ref();
        let home = home.ok_or_else(|| MmapError::Protocol("a pinned file without home".into()))?;
        rustix::io::fcntl_dupfd_cloexec(home.as_fd(), 3)
            .map_err(|e| MmapError::sys("fcntl(F_DUPFD_CLOEXEC)", &e.into()))
    }

    /// Does no clone, mapping or thread of the library use it too?
    pub(crate) fn is_last(&self) -> bool {
        Arc::strong_count(&self.inner) == 1
    }

    /// Closes the file and waits until the daemon has done so, unless a clone or a mapping still
    /// uses it: then the last of them closes it.
    pub fn close(self) -> Result<()> {
        if !self.is_last() {
            return Ok(());
        }
        let line = &self.inner.client.shared().line;
        line.check_process()?;
        // With a session every open of it ends.
        let ended = || line.lost().map_or(Ok(()), |why| Err(MmapError::Lost(why)));
        let Some(session) = line.present() else {
            return ended();
        };
        let Some(file) = self.inner.token_in(session.number()) else {
            return Ok(());
        };
        self.inner.closed.store(true, Ordering::Relaxed);
        match session.call(&Request::Close { file }) {
            Err(MmapError::Lost(_)) => ended(),
            answer => match answer?.reply()? {
                Reply::Done => Ok(()),
                other => Err(unexpected("Done", &other)),
            },
        }
    }
}
