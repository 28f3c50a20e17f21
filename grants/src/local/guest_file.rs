//! Files that guests write: for pages that one session alone writes (arenas), and for those that several do.
//!
//! Whoever has a writable descriptor can write, truncate, fill and lock the whole file:
//!
//! * nothing of it is read but pages that were placed there;
//! * it lies in a tmpfs of its own, with a limit, and the daemon's own files in others (a guest that may open
//!   files by their handles would find them beside it else);
//! * a guest in the middle of a `write` holds the inode's lock for as long as it lets a fault of its own
//!   memory wait. So nobody here takes that lock but a thread that may wait ([`super::sweeper`]): pages are
//!   written by a mapping, and the file is as long as any can be from the start.

use super::file;
use super::frames::{self, FrameStore, sys};
use super::window::Window;
use crate::error::GrantError;
use crate::ids::PAGE_SIZE_U64;
use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The length of every such file: no file is longer.
const FILE_BYTES: u64 = i64::MAX as u64 / PAGE_SIZE_U64 * PAGE_SIZE_U64;

/// Where such files of one session, or one home, are made.
pub(super) struct GuestFiles {
    /// `None`: memfds, without a limit.
    mount: Option<OwnedFd>,
    is_over: AtomicBool,
}

impl GuestFiles {
    /// All files together hold at most so many bytes; with memfds there is no limit.
    pub(super) fn new(kind: FrameStore, size_max_bytes: Option<u64>) -> Result<Self, GrantError> {
        let mount = match kind {
            FrameStore::Memfd => None,
            _ => Some(frames::tmpfs(size_max_bytes)?),
        };
        Ok(Self {
            mount,
            is_over: AtomicBool::new(false),
        })
    }

    /// Whoever had files of it is gone, and nobody else is given one.
    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

impl Drop for GuestFiles {
    /// All files are empty now; who kept a descriptor can fill it with one page at most.
    fn drop(&mut self) {
        if let Some(mount) = &self.mount
            && let Err(error) = frames::set_tmpfs_size(mount, PAGE_SIZE_U64)
        {
            tracing::warn!(%error, "an arena that has ended is still filled by its guest");
        }
    }
}

/// See the module.
pub(super) struct GuestFile {
    fd: OwnedFd,
    window: Mutex<Option<Window>>,
    files: Arc<GuestFiles>,
}

impl GuestFile {
    pub(super) fn create(files: &Arc<GuestFiles>) -> Result<Self, GrantError> {
        Ok(Self {
            fd: create(files.mount.as_ref().map(AsFd::as_fd), FILE_BYTES)?,
            window: Mutex::default(),
            files: Arc::clone(files),
        })
    }

    /// The session that it was made for is gone.
    pub(super) fn is_over(&self) -> bool {
        self.files.is_over.load(Ordering::Relaxed)
    }

    /// A writable descriptor.
    pub(super) fn descriptor(&self) -> Result<OwnedFd, GrantError> {
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        rustix::fs::open(path, flags, Mode::empty()).map_err(sys("open of an arena"))
    }

    /// Zeros where the guest took the page out, or cut the file off.
    pub(super) fn read(&self, from: u64, buf: &mut [u8]) -> Result<(), GrantError> {
        file::read(&self.fd, from, buf)
    }

    /// Writes within one page.
    pub(super) fn write(&self, from: u64, data: &[u8]) -> Result<(), GrantError> {
        let kept = &mut *self.window.lock();
        let window = match kept.take() {
            Some(window) if window.has(from) => window,
            _ => Window::over(&self.fd, from)?,
        };
        let written = window.write(from, data);
        *kept = Window::may_stay().then_some(window);
        written
    }

    /// Takes pages out. Waits for as long as a guest likes.
    pub(super) fn punch(&self, first: u64, end: u64) -> Result<(), GrantError> {
        file::punch(&self.fd, first * PAGE_SIZE_U64, end * PAGE_SIZE_U64)
    }

    /// Takes all pages out. Waits for as long as a guest likes.
    pub(super) fn empty(&self) -> Result<(), GrantError> {
        file::punch(&self.fd, 0, FILE_BYTES)
    }
}

/// A new file without a name: in `mount`, or a memfd that nobody can seal.
pub(super) fn create(mount: Option<BorrowedFd<'_>>, bytes: u64) -> Result<OwnedFd, GrantError> {
    let file = match mount {
        Some(mount) => {
            let flags = OFlags::TMPFILE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
            rustix::fs::openat(mount, ".", flags, Mode::from_raw_mode(0o600))
                .map_err(sys("open of an arena"))?
        }
        None => {
            let file = memfd().map_err(sys("memfd_create of an arena"))?;
            rustix::fs::fchmod(&file, Mode::from_raw_mode(0o600))
                .and_then(|()| rustix::fs::fcntl_add_seals(&file, SealFlags::SEAL))
                .map_err(sys("sealing of an arena"))?;
            file
        }
    };
    rustix::fs::ftruncate(&file, bytes).map_err(sys("ftruncate of an arena"))?;
    Ok(file)
}

fn memfd() -> Result<OwnedFd, Errno> {
    let name = "copage-arena";
    match rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL) {
        // Before Linux 6.3 there was no such flag.
        Err(Errno::INVAL) => {
            rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        }
        made => made,
    }
}
