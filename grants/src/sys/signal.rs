//! Signals as something to read: blocked in the process, taken from a `signalfd(2)`.

use super::checked;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The signal by which lease breaks are reported: a real-time one, so that each break queues an
/// entry of its own with the descriptor's number. When the queue is full (RLIMIT_SIGPENDING) the
/// kernel sends SIGIO instead: block that too, and on it look at every lease.
pub fn lease_signal() -> i32 {
    libc::SIGRTMIN() + 1
}

fn signal_set(signals: &[i32]) -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset writes a whole sigset_t to where the pointer shows, which is ours.
    checked(unsafe { libc::sigemptyset(set.as_mut_ptr()) })?;
    // SAFETY: sigemptyset succeeded and so has initialised it.
    let mut set = unsafe { set.assume_init() };
    for &signal in signals {
        // SAFETY: the set is initialised and ours; a bad number is answered by EINVAL.
        checked(unsafe { libc::sigaddset(&raw mut set, signal) })?;
    }
    Ok(set)
}

/// Blocks `signals` in the calling thread; threads started afterwards inherit that. Call it before
/// the first thread is started: a signal sent to the process goes to any thread that does not
/// block it.
pub fn block_signals(signals: &[i32]) -> io::Result<()> {
    change_mask(libc::SIG_BLOCK, signals)
}

/// Takes the block of `signals` away in the calling thread. A program that is started inherits the
/// mask: between fork and exec this may be called, which takes no lock and allocates nothing.
pub fn unblock_signals(signals: &[i32]) -> io::Result<()> {
    change_mask(libc::SIG_UNBLOCK, signals)
}

fn change_mask(how: i32, signals: &[i32]) -> io::Result<()> {
    let set = signal_set(signals)?;
    // SAFETY: the set is initialised, the old mask is not wanted (a null pointer is allowed).
    let errno = unsafe { libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut()) };
    if errno == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(errno))
    }
}

/// One signal that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalInfo {
    /// Which.
    pub signal: i32,
    /// For lease breaks and other descriptor events: the descriptor's number. It may have been
    /// closed, and given to something else, since.
    pub fd: RawFd,
    /// Who sent it, when a process did.
    pub pid: u32,
}

/// Reads signals that are blocked. Non-blocking; poll it for reading.
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Blocks `signals` as [`block_signals`] does and reads them from now on.
    pub fn new(signals: &[i32]) -> io::Result<Self> {
        block_signals(signals)?;
        let set = signal_set(signals)?;
        // SAFETY: -1 asks for a new descriptor; the set is initialised and only read.
        let fd = checked(unsafe {
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        })?;
        // SAFETY: the call returned a new descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The next signal, `None` when there is none now.
    pub fn read(&self) -> io::Result<Option<SignalInfo>> {
        const INFO_BYTES: usize = size_of::<libc::signalfd_siginfo>();
        let mut bytes = [0u8; INFO_BYTES];
        match rustix::io::read(&self.0, &mut bytes) {
            Ok(INFO_BYTES) => {}
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(rustix::io::Errno::INTR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
        // struct signalfd_siginfo (linux/signalfd.h): ssi_signo, ssi_errno, ssi_code, ssi_pid,
        // ssi_uid, ssi_fd, each four bytes.
        let word = |at: usize| {
            i32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Ok(Some(SignalInfo {
            signal: word(0),
            pid: word(12).unsigned_abs(),
            fd: word(20),
        }))
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for SignalFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{LeaseKind, set_lease, set_lease_signal};
    use super::*;
    use std::fs::File;
    use std::mem::offset_of;

    // What `read` takes the fields from.
    const _: () = assert!(offset_of!(libc::signalfd_siginfo, ssi_signo) == 0);
    const _: () = assert!(offset_of!(libc::signalfd_siginfo, ssi_pid) == 12);
    const _: () = assert!(offset_of!(libc::signalfd_siginfo, ssi_fd) == 20);

    /// A signal to the process may go to any thread of the test harness, so this takes the lease in
    /// a process of its own.
    #[test]
    fn a_lease_break_is_read_with_its_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"x").unwrap();
        crate::testing::in_child(|| {
            let signals = SignalFd::new(&[lease_signal(), libc::SIGIO]).unwrap();
            let file = File::open(&path).unwrap();
            set_lease_signal(&file, lease_signal()).unwrap();
            set_lease(&file, LeaseKind::Read).unwrap();
            assert_eq!(signals.read().unwrap(), None);
            let opened = rustix::fs::open(
                &path,
                rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK,
                rustix::fs::Mode::empty(),
            );
            assert_eq!(opened.unwrap_err(), rustix::io::Errno::AGAIN);
            let info = signals.read().unwrap().unwrap();
            assert_eq!((info.signal, info.fd), (lease_signal(), file.as_raw_fd()));
        });
    }
}
