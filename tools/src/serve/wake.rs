//! Other threads wake the loop: an eventfd, written once however many call.

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// See the module.
#[derive(Debug)]
pub(super) struct Wake {
    fd: OwnedFd,
    /// The eventfd has been written and not been read.
    pending: AtomicBool,
    /// The daemon is to stop.
    stop: AtomicBool,
}

impl Wake {
    pub(super) fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            fd,
            pending: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        })
    }

    /// Wakes the loop. What the caller did before is seen by the loop after [`Self::clear`].
    pub(super) fn wake(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            // It can only fail when the count is at its end, and then the loop is awake.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// The loop is awake and will look at everything after this.
    pub(super) fn clear(&self) {
        let _ = rustix::io::read(&self.fd, &mut [0u8; 8]);
        self.pending.swap(false, Ordering::AcqRel);
    }

    /// Asks the daemon to stop.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
