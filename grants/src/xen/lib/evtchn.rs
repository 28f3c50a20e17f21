//! Event channels (xenevtchn.h).

use super::XenError;
use super::load::{Handle, NO_LOGGER, Raw, device, library};
use rustix::fs::OFlags;
use std::ffi::{c_int, c_uint};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;

library! {
    /// xenevtchn.h. `evtchn_port_t` is `uint32_t` (xen/event_channel.h).
    struct Calls = "libxenevtchn.so.1" {
        xenevtchn_open: unsafe extern "C" fn(Raw, c_uint) -> Raw,
        xenevtchn_close: unsafe extern "C" fn(Raw) -> c_int,
        xenevtchn_fd: unsafe extern "C" fn(Raw) -> c_int,
        xenevtchn_notify: unsafe extern "C" fn(Raw, u32) -> c_int,
        xenevtchn_bind_unbound_port: unsafe extern "C" fn(Raw, u32) -> c_int,
        xenevtchn_bind_interdomain: unsafe extern "C" fn(Raw, u32, u32) -> c_int,
        xenevtchn_unbind: unsafe extern "C" fn(Raw, u32) -> c_int,
        xenevtchn_pending: unsafe extern "C" fn(Raw) -> c_int,
        xenevtchn_unmask: unsafe extern "C" fn(Raw, u32) -> c_int,
    }
}

const DEVICE: &str = "/dev/xen/evtchn";

/// A handle of the event channel driver. The ports bound through it are its own: their events make
/// its descriptor readable. Closing it unbinds them.
pub struct Evtchn {
    calls: &'static Calls,
    handle: Handle,
}

impl Evtchn {
    /// A new handle. Its descriptor is non-blocking and is closed on exec.
    pub fn open() -> Result<Self, XenError> {
        let calls = Calls::load()?;
        device(DEVICE)?;
        // SAFETY: no logger and no flags are valid arguments.
        let handle = unsafe { (calls.xenevtchn_open)(NO_LOGGER, 0) };
        let handle =
            NonNull::new(handle).ok_or_else(|| XenError::opening("xenevtchn_open", DEVICE))?;
        let evtchn = Self {
            calls,
            handle: Handle(handle),
        };
        evtchn.set_flags().map_err(|errno| XenError::Sys {
            call: "fcntl of /dev/xen/evtchn",
            source: errno.into(),
        })?;
        Ok(evtchn)
    }

    fn set_flags(&self) -> rustix::io::Result<()> {
        let flags = rustix::fs::fcntl_getfl(self)?;
        rustix::fs::fcntl_setfl(self, flags | OFlags::NONBLOCK)?;
        rustix::io::fcntl_setfd(self, rustix::io::FdFlags::CLOEXEC)
    }

    /// A new port of this domain that `domid` may bind to.
    pub fn bind_unbound(&self, domid: u16) -> Result<u32, XenError> {
        // SAFETY: the handle is open. On Linux the library only makes system calls on its
        // descriptor, for this and all functions below, so threads may do so at the same time.
        let port =
            unsafe { (self.calls.xenevtchn_bind_unbound_port)(self.handle.raw(), domid.into()) };
        port_or("xenevtchn_bind_unbound_port", port)
    }

    /// A new port of this domain, bound to a port of `domid`'s that is there for us.
    pub fn bind_interdomain(&self, domid: u16, remote_port: u32) -> Result<u32, XenError> {
        // SAFETY: as for bind_unbound.
        let port = unsafe {
            (self.calls.xenevtchn_bind_interdomain)(self.handle.raw(), domid.into(), remote_port)
        };
        port_or("xenevtchn_bind_interdomain", port)
    }

    /// Sends an event to the other end of `port`.
    pub fn notify(&self, port: u32) -> Result<(), XenError> {
        // SAFETY: as for bind_unbound.
        let result = unsafe { (self.calls.xenevtchn_notify)(self.handle.raw(), port) };
        port_or("xenevtchn_notify", result).map(drop)
    }

    /// The next port that had an event; it is masked until [`Self::unmask`]. Does not wait. EFBIG:
    /// the driver's ring overflowed, the handle is of no use any more.
    pub fn pending(&self) -> Result<Option<u32>, XenError> {
        // SAFETY: as for bind_unbound.
        let port = unsafe { (self.calls.xenevtchn_pending)(self.handle.raw()) };
        match port_or("xenevtchn_pending", port) {
            Ok(port) => Ok(Some(port)),
            Err(XenError::Sys { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Lets events of `port` come again.
    pub fn unmask(&self, port: u32) -> Result<(), XenError> {
        // SAFETY: as for bind_unbound.
        let result = unsafe { (self.calls.xenevtchn_unmask)(self.handle.raw(), port) };
        port_or("xenevtchn_unmask", result).map(drop)
    }

    /// Closes `port`.
    pub fn unbind(&self, port: u32) -> Result<(), XenError> {
        // SAFETY: as for bind_unbound.
        let result = unsafe { (self.calls.xenevtchn_unbind)(self.handle.raw(), port) };
        port_or("xenevtchn_unbind", result).map(drop)
    }
}

/// A port or 0, or an error by a number below 0.
fn port_or(call: &'static str, result: c_int) -> Result<u32, XenError> {
    u32::try_from(result).map_err(|_| XenError::last(call))
}

impl AsFd for Evtchn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the handle is open.
        let fd = unsafe { (self.calls.xenevtchn_fd)(self.handle.raw()) };
        // SAFETY: the descriptor stays open as long as the handle, which outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl Drop for Evtchn {
    fn drop(&mut self) {
        // SAFETY: the handle is open and is used no more.
        unsafe { (self.calls.xenevtchn_close)(self.handle.raw()) };
    }
}
