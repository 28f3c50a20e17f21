//! Files that guests write: for pages that one session alone writes (arenas), and for those that several do.
//!
//! Whoever has a writable descriptor can write, truncate and fill the whole file. So nothing of it is read
//! but pages that were placed there, it lies in a tmpfs of its own, with a limit, and the daemon's own files
//! in others: a guest that may open files by their handles would find them beside it else.

use super::file;
use super::frames::{self, FrameStore, sys};
use crate::error::GrantError;
use crate::ids::PAGE_SIZE_U64;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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

    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
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

/// A file as long as its home, and beside it.
pub(super) struct SideFile {
    file: OwnedFd,
    /// Of guests' files.
    files: Option<Arc<GuestFiles>>,
}

impl SideFile {
    /// One that guests are given.
    pub(super) fn for_guests(files: &Arc<GuestFiles>, bytes: u64) -> Result<Self, GrantError> {
        let mount = files.mount.as_ref().map(std::os::fd::AsFd::as_fd);
        Ok(Self {
            file: create(mount, bytes)?,
            files: Some(Arc::clone(files)),
        })
    }

    /// One that only the daemon has, in `mount`.
    pub(super) fn own(mount: Option<BorrowedFd<'_>>, bytes: u64) -> Result<Self, GrantError> {
        Ok(Self {
            file: create(mount, bytes)?,
            files: None,
        })
    }

    /// The session that it was made for is gone.
    pub(super) fn is_over(&self) -> bool {
        self.files.as_ref().is_some_and(|files| files.is_over())
    }

    /// A writable descriptor.
    pub(super) fn descriptor(&self) -> Result<OwnedFd, GrantError> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        rustix::fs::open(path, flags, Mode::empty()).map_err(sys("open of an arena"))
    }

    /// Is the page at `from` in the file? (Of a guest's file that tells nothing.)
    pub(super) fn holds(&self, from: u64) -> Result<bool, GrantError> {
        Ok(file::next_data(&self.file, from)? == Some(from))
    }

    /// Zeros where the file is cut off.
    pub(super) fn read(&self, from: u64, buf: &mut [u8]) -> Result<(), GrantError> {
        file::read(&self.file, from, buf)
    }

    pub(super) fn write(&self, from: u64, data: &[u8]) -> Result<(), GrantError> {
        let mut at = from;
        let mut rest = data;
        while !rest.is_empty() {
            match rustix::io::retry_on_intr(|| rustix::io::pwrite(&self.file, rest, at)) {
                Ok(0) => return Err(sys("pwrite of an arena")(Errno::IO)),
                Ok(written) => {
                    rest = &rest[written..];
                    at += written as u64;
                }
                Err(errno) => return Err(sys("pwrite of an arena")(errno)),
            }
        }
        Ok(())
    }

    pub(super) fn punch(&self, from: u64, end: u64) -> Result<(), GrantError> {
        file::punch(&self.file, from, end)
    }

    pub(super) fn resize(&self, bytes: u64) -> Result<(), GrantError> {
        rustix::fs::ftruncate(&self.file, bytes).map_err(sys("ftruncate of an arena"))
    }
}

/// A new file without a name: in `mount`, or a memfd that nobody can seal.
fn create(mount: Option<BorrowedFd<'_>>, bytes: u64) -> Result<OwnedFd, GrantError> {
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
