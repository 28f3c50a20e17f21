//! The daemon's hold on one frame file.
//!
//! Two answers of the kernel rest on who has the inode open, and count the daemon too:
//!
//! * a program runs from a file only while nobody has it open for writing (ETXTBSY else), so a file
//!   that programs are to run from is let go of: [`Handle::rest`]. While one runs it cannot be had
//!   back, and no page taken out: for others that is never done;
//! * a write lease is granted only to the one open file there is, so the daemon has at most one at
//!   any time. A path descriptor does not count and brings the file back when it is written again.

use super::frames::{FrameFiles, sys};
use crate::error::GrantError;
use crate::sys::{LeaseKind, set_lease, set_lease_signal};
use parking_lot::RwLock;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

/// See the module.
pub(super) struct Handle {
    files: Arc<FrameFiles>,
    name: String,
    path: OwnedFd,
    writer: RwLock<Option<Arc<OwnedFd>>>,
}

/// Never waits: a guest of the daemon's own user may hold a lease on the file.
fn reopen(fd: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    rustix::fs::open(
        path,
        flags | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
}

impl Handle {
    /// A new file of `bytes` bytes, without pages.
    pub(super) fn create(
        files: &Arc<FrameFiles>,
        id: u64,
        label: &str,
        bytes: u64,
    ) -> Result<Self, GrantError> {
        let (writer, name) = files.create(id, label)?;
        let made = rustix::fs::ftruncate(&writer, bytes)
            .and_then(|()| reopen(&writer, OFlags::PATH))
            .map_err(sys("ftruncate of a frame file"));
        match made {
            Ok(path) => Ok(Self {
                files: Arc::clone(files),
                name,
                path,
                writer: RwLock::new(Some(Arc::new(writer))),
            }),
            Err(e) => {
                // The first error is the one to tell.
                let _ = files.remove(&name);
                Err(e)
            }
        }
    }

    /// The file, open for writing from now on. ETXTBSY while a program runs from it.
    pub(super) fn writer(&self) -> Result<Arc<OwnedFd>, GrantError> {
        if let Some(writer) = &*self.writer.read() {
            return Ok(Arc::clone(writer));
        }
        let mut slot = self.writer.write();
        if let Some(writer) = &*slot {
            return Ok(Arc::clone(writer));
        }
        let writer = reopen(&self.path, OFlags::RDWR).map_err(sys("open of a frame file"))?;
        Ok(Arc::clone(slot.insert(Arc::new(writer))))
    }

    /// The file, open for reading at least, for one use.
    pub(super) fn reader(&self) -> Result<Arc<OwnedFd>, GrantError> {
        match &*self.writer.read() {
            Some(writer) => Ok(Arc::clone(writer)),
            None => reopen(&self.path, OFlags::RDONLY)
                .map(Arc::new)
                .map_err(sys("open of a frame file")),
        }
    }

    /// Lets go of the file until it is written again. Whoever calls sees to it that nobody uses
    /// what `writer` or `reader` gave.
    pub(super) fn rest(&self) {
        *self.writer.write() = None;
    }

    /// Does anybody else have the file open, mapped or running? Whoever calls sees to it that
    /// nobody uses what `writer` or `reader` gave, and that there is one such call at a time (two
    /// would take each other's lease away). When nobody has it the file is open for writing again.
    pub(super) fn in_use(&self) -> Result<bool, GrantError> {
        if self.is_shared()? {
            return Ok(true);
        }
        if self.writer.read().is_some() {
            return Ok(false);
        }
        // Whoever kept a path descriptor may have begun to run it since.
        let shared = match self.writer() {
            Err(GrantError::Sys { source, .. }) => match source.kind() {
                io::ErrorKind::ExecutableFileBusy | io::ErrorKind::WouldBlock => Ok(true),
                _ => Err(GrantError::Sys {
                    call: "open of a frame file",
                    source,
                }),
            },
            Err(error) => Err(error),
            Ok(_) => self.is_shared(),
        }?;
        if shared {
            self.rest();
        }
        Ok(shared)
    }

    /// The kernel's answer for the one open file that we have.
    fn is_shared(&self) -> Result<bool, GrantError> {
        let lease = |call| move |source| GrantError::Sys { call, source };
        let file = match self.reader() {
            // A lease of somebody else's.
            Err(GrantError::Sys { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                return Ok(true);
            }
            file => file?,
        };
        // Somebody who kept a path descriptor may open the file while we hold the lease, and the
        // kernel then tells us by a signal: one that a process need not expect, SIGIO would end it.
        // Giving up a lease resets the choice, so it is made every time.
        set_lease_signal(&file, libc::SIGURG).map_err(lease("F_SETSIG"))?;
        match set_lease(&file, LeaseKind::Write) {
            Ok(()) => {
                set_lease(&file, LeaseKind::None).map_err(lease("F_SETLEASE(F_UNLCK)"))?;
                Ok(false)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(true),
            Err(e) => Err(lease("F_SETLEASE(F_WRLCK)")(e)),
        }
    }

    /// A descriptor for guests.
    pub(super) fn read_only(&self) -> Result<OwnedFd, GrantError> {
        self.files.open_read_only(self.path.as_fd(), &self.name)
    }

    /// Empties the file for good and removes its name.
    pub(super) fn end(&self) -> Result<(), GrantError> {
        rustix::fs::ftruncate(&*self.writer()?, 0).map_err(sys("ftruncate of a frame file"))?;
        self.files.remove(&self.name)
    }
}
