//! Kernel leases on files (`fcntl(2)`, `F_SETLEASE`).
//!
//! A read lease tells the holder when somebody opens the file for writing or truncates it; a write
//! lease is granted only while nobody else has the file open or mapped, so that asking for one
//! answers that question.

use super::checked;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// A lease, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseKind {
    /// `F_RDLCK`: broken when somebody opens for writing or truncates. Only on a read-only
    /// descriptor, and only while nobody has the file open or mapped for writing.
    Read,
    /// `F_WRLCK`: broken by any open. Only while no other open file of the inode exists.
    Write,
    /// `F_UNLCK`.
    None,
}

impl LeaseKind {
    fn raw(self) -> libc::c_int {
        match self {
            Self::Read => libc::F_RDLCK,
            Self::Write => libc::F_WRLCK,
            Self::None => libc::F_UNLCK,
        }
    }
}

/// Takes, changes or (with [`LeaseKind::None`]) gives up the lease on `fd`'s open file.
///
/// `WouldBlock` (EAGAIN): somebody has the file open in a way that forbids it. EACCES: the file is
/// another user's and the process has no CAP_LEASE. EINVAL: the file system has no leases, or the
/// descriptor is open for writing and a read lease was wanted.
///
/// Until [`set_lease_signal`] chose another one, the kernel reports a break by SIGIO, which ends a
/// process that does not expect it. Giving up a lease undoes that choice: make it again each time
/// before a lease is taken.
pub fn set_lease(fd: impl AsFd, kind: LeaseKind) -> io::Result<()> {
    // SAFETY: F_SETLEASE takes an int by value and touches no memory of ours; the descriptor is
    // open for the length of the borrow.
    checked(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETLEASE, kind.raw()) })?;
    Ok(())
}

/// The lease held on `fd`'s open file; while it is being broken, what it must come down to.
pub fn lease(fd: impl AsFd) -> io::Result<LeaseKind> {
    // SAFETY: F_GETLEASE takes no argument; the descriptor is open for the length of the borrow.
    let raw = checked(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GETLEASE) })?;
    Ok(if raw == libc::F_RDLCK {
        LeaseKind::Read
    } else if raw == libc::F_WRLCK {
        LeaseKind::Write
    } else {
        LeaseKind::None
    })
}

/// Chooses the signal that reports a break of the next lease on `fd`; it then carries the
/// descriptor's number. [`LeaseKind::None`] undoes it.
pub fn set_lease_signal(fd: impl AsFd, signal: i32) -> io::Result<()> {
    /// include/uapi/asm-generic/fcntl.h; libc does not name it on every target.
    const F_SETSIG: libc::c_int = 10;
    // SAFETY: F_SETSIG takes an int by value and touches no memory of ours; the descriptor is open
    // for the length of the borrow.
    checked(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_SETSIG, signal) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_write_lease_needs_to_be_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let own = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        set_lease_signal(&own, libc::SIGURG).unwrap();
        let other = File::open(&path).unwrap();
        assert_eq!(
            set_lease(&own, LeaseKind::Write).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        drop(other);
        set_lease(&own, LeaseKind::Write).unwrap();
        assert_eq!(lease(&own).unwrap(), LeaseKind::Write);
        set_lease(&own, LeaseKind::None).unwrap();
        assert_eq!(lease(&own).unwrap(), LeaseKind::None);
    }

    #[test]
    fn a_read_lease_is_refused_beside_a_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let writer = File::create(&path).unwrap();
        let reader = File::open(&path).unwrap();
        assert!(set_lease(&reader, LeaseKind::Read).is_err());
        drop(writer);
        set_lease_signal(&reader, libc::SIGURG).unwrap();
        set_lease(&reader, LeaseKind::Read).unwrap();
        assert_eq!(lease(&reader).unwrap(), LeaseKind::Read);
    }
}
