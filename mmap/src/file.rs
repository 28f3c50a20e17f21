//! Open files: reading by message, the pinned descriptor, and the way to a mapping.

use crate::client::{Client, unexpected};
use crate::error::{MmapError, Result};
use crate::mapping::{MapOptions, Mapping};
use crate::node::Node;
use crate::quiet::{Leaf, LeafGuard};
use copage_coherence::msg::{DATA_BYTES_MAX, FileToken, Generation, OpenHow, Reply, Request};
use copage_grants::Version;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// The file's content as this session knows it.
#[derive(Clone)]
pub(crate) struct Content {
    pub(crate) generation: Generation,
    pub(crate) version: Version,
    /// Length in bytes.
    pub(crate) bytes: u64,
    /// The home's descriptor; one open file for all mappings of the generation, so that the kernel
    /// can join their parts again. `None`: not for mapping, or the pages come as grants.
    pub(crate) home: Option<Arc<OwnedFd>>,
}

/// What an open file and its mappings share.
pub(crate) struct FileInner {
    pub(crate) client: Client,
    pub(crate) token: FileToken,
    how: OpenHow,
    pinned: bool,
    host_bounded: bool,
    /// Opened to map, without a descriptor: the pages come as grants.
    granted: bool,
    /// The version that was opened.
    opened_version: Version,
    /// The home that was pinned. A newer content has another home, whose pages need not be there.
    pinned_home: Option<Arc<OwnedFd>>,
    /// Held only to look or to replace; mappings are entered in the table under it.
    pub(crate) content: Leaf<Content>,
    /// Rebases queued and not done. While it is not zero the pager lets faults of this file lie:
    /// who brings it down wakes them all.
    pub(crate) rebases: AtomicU32,
    closed: AtomicBool,
}

impl FileInner {
    /// Do its pages come as grants?
    pub(crate) fn granted(&self) -> bool {
        self.granted
    }

    /// What it was opened for.
    pub(crate) fn how(&self) -> OpenHow {
        self.how
    }
}

impl Drop for FileInner {
    fn drop(&mut self) {
        let shared = self.client.shared();
        shared.forget_file(self.token);
        if !self.closed.load(Ordering::Relaxed) {
            // The reply, Done, is for nobody.
            shared.session.post(&Request::Close { file: self.token });
        }
    }
}

/// An open file. Clones are the same open; it is closed when the last clone and the last mapping
/// are dropped (queued, never waiting).
#[derive(Clone)]
pub struct File {
    inner: Arc<FileInner>,
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File")
            .field("token", &self.inner.token)
            .field("generation", &self.generation())
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

impl File {
    pub(crate) fn open(node: &Node, how: OpenHow) -> Result<Self> {
        let client = node.client().clone();
        let request = Request::Open {
            node: node.handle(),
            how,
        };
        let answer = client.shared().session.call(&request)?;
        let (token, content, flags) = match answer.reply()? {
            Reply::Opened {
                file,
                generation,
                version,
                bytes,
                flags,
            } => (
                file,
                Content {
                    generation,
                    version,
                    bytes,
                    home: None,
                },
                flags,
            ),
            other => return Err(unexpected("Opened", &other)),
        };
        let home = answer.fd.map(Arc::new);
        // From here on the open is ended by dropping.
        let file = Self {
            inner: Arc::new(FileInner {
                client: client.clone(),
                token,
                how,
                pinned: flags.pinned,
                host_bounded: flags.host_bounded,
                granted: how == OpenHow::Map && home.is_none(),
                opened_version: content.version,
                pinned_home: home.clone().filter(|_| how == OpenHow::Pin),
                content: Leaf::new(Content { home, ..content }),
                rebases: AtomicU32::new(0),
                closed: AtomicBool::new(false),
            }),
        };
        client.shared().remember_file(token, &file.inner);
        let has_home = file.inner.content.lock().home.is_some();
        if how == OpenHow::Pin && !has_home {
            return Err(MmapError::Protocol(
                "a pinning open came without descriptor".into(),
            ));
        }
        if how == OpenHow::Pin && !flags.pinned {
            return Err(MmapError::Protocol(
                "a pinning open came without the pin".into(),
            ));
        }
        Ok(file)
    }

    pub(crate) fn inner(&self) -> &Arc<FileInner> {
        &self.inner
    }

    /// The session.
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
        match self.inner.client.shared().session.check_process() {
            Ok(()) => Some(self.inner.content.lock()),
            Err(_) => self.inner.content.try_lock(),
        }
    }

    /// Has it no bytes?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The content that this session sees: rises when the host changes the file.
    pub fn generation(&self) -> Generation {
        self.known()
            .map_or(Generation(0), |content| content.generation)
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
            let Some(at) = offset.checked_add(done as u64) else {
                break;
            };
            let wanted = rest.len().min(DATA_BYTES_MAX as usize);
            let request = Request::Read {
                file: self.inner.token,
                offset: at,
                // At most DATA_BYTES_MAX, see above.
                len: wanted as u32,
            };
            let answer = self.inner.client.shared().session.call(&request)?;
            let got = match answer.reply()? {
                Reply::Bytes { data } if data.len() <= wanted => {
                    rest[..data.len()].copy_from_slice(data);
                    data.len()
                }
                Reply::Bytes { .. } => {
                    return Err(MmapError::Protocol(
                        "more bytes came than were asked for".into(),
                    ));
                }
                other => return Err(unexpected("Bytes", &other)),
            };
            done += got;
            if got < wanted {
                break;
            }
        }
        Ok(done)
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
        self.inner.client.shared().session.check_process()?;
        let home = self.inner.pinned_home.as_ref();
        let home = home.ok_or_else(|| MmapError::Protocol("a pinned file without home".into()))?;
        rustix::io::fcntl_dupfd_cloexec(home.as_fd(), 3)
            .map_err(|e| MmapError::sys("fcntl(F_DUPFD_CLOEXEC)", &e.into()))
    }

    /// Closes the file and waits until the daemon has done so, unless a clone or a mapping still
    /// uses it: then the last of them closes it.
    pub fn close(self) -> Result<()> {
        if Arc::strong_count(&self.inner) > 1 {
            return Ok(());
        }
        self.inner.closed.store(true, Ordering::Relaxed);
        let answer = self.inner.client.shared().session.call(&Request::Close {
            file: self.inner.token,
        })?;
        match answer.reply()? {
            Reply::Done => Ok(()),
            other => Err(unexpected("Done", &other)),
        }
    }
}
