//! A ring's memory and events as Xen gives them.

use crate::channel::{RingEvents, RingMemory};
use crate::volatile::VolatileBytesMut;
use crate::xen::lib::{Evtchn, GrantMap, SharedPages, XenError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Memory that is ours to write: `new` has looked.
fn writable<'m>(bytes: Option<VolatileBytesMut<'m>>) -> VolatileBytesMut<'m> {
    bytes.unwrap_or_else(|| {
        let nothing = std::ptr::NonNull::<u64>::dangling().as_ptr().cast::<u8>();
        // SAFETY: no bytes at an address that is not null.
        unsafe { VolatileBytesMut::new(nothing, 0) }
    })
}

/// The guest's end: pages of its own that it granted.
pub(super) struct GuestMemory {
    pub index: SharedPages,
    pub bytes: SharedPages,
}

impl RingMemory for GuestMemory {
    fn index(&self) -> VolatileBytesMut<'_> {
        writable(self.index.bytes_mut())
    }

    fn bytes(&self) -> VolatileBytesMut<'_> {
        writable(self.bytes.bytes_mut())
    }
}

/// One session of a domain, counted until its ring is unmapped.
#[derive(Debug)]
pub(super) struct Slot(Arc<AtomicU32>);

impl Slot {
    /// Counts one more, if there are fewer than `most`.
    pub(super) fn take(count: &Arc<AtomicU32>, most: u32) -> Option<Self> {
        let more = |count| (count < most).then_some(count + 1);
        let taken = count.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        taken.is_ok().then(|| Self(Arc::clone(count)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The daemon's end: pages of the guest that it mapped.
pub(super) struct DaemonMemory {
    pub index: GrantMap,
    pub bytes: GrantMap,
    /// Given back after both are unmapped.
    pub _slot: Slot,
}

impl RingMemory for DaemonMemory {
    fn index(&self) -> VolatileBytesMut<'_> {
        writable(self.index.bytes_mut())
    }

    fn bytes(&self) -> VolatileBytesMut<'_> {
        writable(self.bytes.bytes_mut())
    }
}

/// One port, in a handle of its own, so that it has a descriptor of its own.
pub(super) struct Port {
    evtchn: Evtchn,
    port: u32,
}

impl Port {
    /// A port that the daemon may bind to.
    pub(super) fn unbound(domid: u16) -> Result<Self, XenError> {
        let evtchn = Evtchn::open()?;
        let port = evtchn.bind_unbound(domid)?;
        Ok(Self { evtchn, port })
    }

    /// A port bound to the guest's.
    pub(super) fn bound(domid: u16, remote_port: u32) -> Result<Self, XenError> {
        let evtchn = Evtchn::open()?;
        let port = evtchn.bind_interdomain(domid, remote_port)?;
        Ok(Self { evtchn, port })
    }

    pub(super) fn number(&self) -> u32 {
        self.port
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.evtchn.as_fd()
    }

    /// Takes its event and lets the next one come: until then it stays masked, however often the
    /// other end rings.
    pub(super) fn take(&self) -> io::Result<bool> {
        let error = |e: XenError| io::Error::from_raw_os_error(e.errno());
        let pending = self.evtchn.pending().map_err(error)?;
        if let Some(port) = pending {
            self.evtchn.unmask(port).map_err(error)?;
        }
        Ok(pending.is_some())
    }

    pub(super) fn notify(&self) {
        if let Err(error) = self.evtchn.notify(self.port) {
            // The other end is gone, and the ring says so or will.
            tracing::debug!(%error, port = self.port, "an event could not be sent");
        }
    }
}

/// Both ports of a ring. Messages come, and room for ours is told, by the port of each direction.
pub(super) struct Ports {
    /// Of the direction that this end receives.
    pub receives: Port,
    /// Of the direction that this end sends.
    pub sends: Port,
}

impl RingEvents for Ports {
    fn read_fd(&self) -> BorrowedFd<'_> {
        self.receives.fd()
    }

    fn write_fd(&self) -> BorrowedFd<'_> {
        self.sends.fd()
    }

    fn take_read(&self) -> io::Result<bool> {
        self.receives.take()
    }

    fn take_write(&self) -> io::Result<bool> {
        self.sends.take()
    }

    fn notify_messages(&self) {
        self.sends.notify();
    }

    fn notify_room(&self) {
        self.receives.notify();
    }
}
