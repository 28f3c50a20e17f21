//! Of processes: who is at the other end, who may look into this one, how many files it may open.

use super::checked;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{DumpableBehavior, Pid, PidfdFlags, Resource, Rlimit};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Makes the calling process one that nobody without CAP_SYS_PTRACE may trace, read through /proc,
/// or take descriptors from (`pidfd_getfd`), also not its own user. An `execve` undoes it.
pub fn make_undumpable() -> io::Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// A pidfd of the process at the other end of a connected Unix socket.
///
/// The kernel's own (`SO_PEERPIDFD`, Linux 6.5), which names the process that connected and no
/// other; before that `pidfd_open(pid)`, which names whoever has the number now. An error when the
/// process is gone.
pub fn peer_pidfd(socket: impl AsFd, pid: u32) -> io::Result<OwnedFd> {
    /// include/uapi/asm-generic/socket.h
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut fd: RawFd = -1;
    let mut len = size_of::<RawFd>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, an int, to `fd`, and the length to `len`; both
    // live through the call.
    let result = checked(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    });
    match result {
        // SAFETY: the call returned a new descriptor that nobody else owns.
        Ok(_) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        Err(e) if e.raw_os_error() == Some(libc::ENOPROTOOPT) => {
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            let pid = pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
            Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
        }
        Err(e) => Err(e),
    }
}

/// Has the process that the pidfd names ended?
pub fn has_ended(pidfd: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    let now = Timespec::default();
    // Where it cannot be told it goes on.
    matches!(poll(&mut fds, Some(&now)), Ok(1))
}

/// Copies memory of the calling process at `address` into `buf` as loads would (a missing page is
/// served by its userfaultfd), but with an error, EFAULT, where a load would be a signal. Fewer bytes
/// than asked: the rest would have been the signal.
pub fn read_own_memory(address: usize, buf: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    let remote = libc::iovec {
        iov_base: std::ptr::without_provenance_mut(address),
        iov_len: buf.len(),
    };
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the kernel writes at most `iov_len` bytes to `buf`, which is borrowed for the call;
    // what `remote` names is only read, and need not be mapped.
    let read = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Copies `bytes` to memory of the calling process at `address` as stores would, but with an error, EFAULT,
/// where a store would be a signal. Fewer bytes than asked: the rest would have been the signal.
///
/// # Safety
/// What is mapped there is memory that this process may have changed under it at any time: shared with
/// processes that change it, and no Rust object.
pub(crate) unsafe fn write_own_memory(address: usize, bytes: &[u8]) -> io::Result<usize> {
    let local = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let remote = libc::iovec {
        iov_base: std::ptr::without_provenance_mut(address),
        iov_len: bytes.len(),
    };
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the kernel only reads the `iov_len` bytes of `bytes`, which is borrowed for the call; that
    // what `remote` names may be written is the caller's to promise.
    let count =
        unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Takes over a descriptor above standard error that the process was started with, as a caller names
/// it on a command line. EINVAL: it is one that this process opened itself, or was taken before.
pub fn take_inherited(number: u32) -> io::Result<OwnedFd> {
    let bad = |errno| io::Error::from_raw_os_error(errno);
    let raw = RawFd::try_from(number).map_err(|_| bad(libc::EBADF))?;
    // SAFETY: F_GETFD takes no argument, touches no memory, and answers EBADF for what is not open.
    let flags = checked(unsafe { libc::fcntl(raw, libc::F_GETFD) })?;
    if raw <= libc::STDERR_FILENO || flags & libc::FD_CLOEXEC != 0 {
        return Err(bad(libc::EINVAL));
    }
    // SAFETY: F_SETFD takes an int and touches no memory. From now on the number is not taken again.
    checked(unsafe { libc::fcntl(raw, libc::F_SETFD, flags | libc::FD_CLOEXEC) })?;
    // SAFETY: it is open. It came over an execve, since all that std and this crate open is closed by
    // one, and so has no owner here; by the flag just set it gets this one and no other.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Raises the soft limit of open files to the hard one and returns it.
pub fn raise_open_files() -> io::Result<u64> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let wanted = limit.maximum;
    if limit.current != wanted {
        rustix::process::setrlimit(
            Resource::Nofile,
            Rlimit {
                current: wanted,
                maximum: wanted,
            },
        )?;
    }
    Ok(wanted.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_pidfd_is_of_the_peer() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let fd = peer_pidfd(&a, std::process::id()).unwrap();
        let info =
            std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
        let pid = info
            .lines()
            .find_map(|line| line.strip_prefix("Pid:"))
            .unwrap();
        assert_eq!(pid.trim(), std::process::id().to_string());
    }

    #[test]
    fn own_memory_is_read_or_refused() {
        let there = [7_u8; 32];
        let mut bytes = [0; 32];
        let read = read_own_memory(there.as_ptr().addr(), &mut bytes).unwrap();
        assert_eq!((read, bytes), (32, there));
        let refused = read_own_memory(4096, &mut bytes).unwrap_err();
        assert_eq!(
            refused.raw_os_error(),
            Some(libc::EFAULT),
            "nothing is mapped there"
        );
    }

    #[test]
    fn what_was_inherited_is_taken_once() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let own = writer.as_raw_fd().unsigned_abs();
        let errno = |result: io::Result<OwnedFd>| result.unwrap_err().raw_os_error();
        assert_eq!(errno(take_inherited(own)), Some(libc::EINVAL), "our own");
        assert_eq!(errno(take_inherited(2)), Some(libc::EINVAL));
        assert_eq!(errno(take_inherited(u32::MAX)), Some(libc::EBADF));
        rustix::io::fcntl_setfd(&writer, rustix::io::FdFlags::empty()).unwrap();
        // As after an execve: nobody here owns it.
        let number = std::os::fd::IntoRawFd::into_raw_fd(writer).unsigned_abs();
        let taken = take_inherited(number).unwrap();
        assert_eq!(errno(take_inherited(number)), Some(libc::EINVAL), "taken");
        drop(taken);
    }

    #[test]
    fn the_limit_of_open_files_rises() {
        crate::testing::in_child(|| {
            let hard = raise_open_files().unwrap();
            assert_eq!(
                rustix::process::getrlimit(Resource::Nofile).current,
                Some(hard)
            );
        });
    }
}
