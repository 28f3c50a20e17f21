//! Pages of this domain granted to another (the second half of xengnttab.h).

use super::XenError;
use super::load::{Handle, NO_LOGGER, Raw, device, library};
use super::memory::Pages;
use crate::volatile::{VolatileBytes, VolatileBytesMut};
use std::ffi::{c_int, c_uint};
use std::ptr::NonNull;
use std::sync::Arc;

library! {
    /// xengnttab.h. `evtchn_port_t` is `uint32_t` (xen/event_channel.h).
    struct Calls = "libxengnttab.so.1" {
        xengntshr_open: unsafe extern "C" fn(Raw, c_uint) -> Raw,
        xengntshr_close: unsafe extern "C" fn(Raw) -> c_int,
        xengntshr_share_pages: unsafe extern "C" fn(Raw, u32, c_int, *mut u32, c_int) -> Raw,
        xengntshr_share_page_notify:
            unsafe extern "C" fn(Raw, u32, *mut u32, c_int, u32, u32) -> Raw,
        xengntshr_unshare: unsafe extern "C" fn(Raw, Raw, u32) -> c_int,
    }
}

const DEVICE: &str = "/dev/xen/gntalloc";

/// The most pages of one call; the driver has a limit of its own for all (`limit`, a parameter of
/// the module, 1024 by default).
const PAGES_MAX: usize = 1024;

struct Opened {
    calls: &'static Calls,
    handle: Handle,
}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: the handle is open; nothing that was shared through it is left, since that would
        // keep this alive.
        unsafe { (self.calls.xengntshr_close)(self.handle.raw()) };
    }
}

/// A handle of the driver that grants pages of this domain.
#[derive(Clone)]
pub struct GrantShare(Arc<Opened>);

impl GrantShare {
    /// A new handle.
    pub fn open() -> Result<Self, XenError> {
        let calls = Calls::load()?;
        device(DEVICE)?;
        // SAFETY: no logger and no flags are valid arguments.
        let handle = unsafe { (calls.xengntshr_open)(NO_LOGGER, 0) };
        let handle =
            NonNull::new(handle).ok_or_else(|| XenError::opening("xengntshr_open", DEVICE))?;
        Ok(Self(Arc::new(Opened {
            calls,
            handle: Handle(handle),
        })))
    }

    /// New pages of zeros, granted to `domid`, for writing too with `writable`.
    pub fn share(&self, domid: u16, pages: usize, writable: bool) -> Result<SharedPages, XenError> {
        const CALL: &str = "xengntshr_share_pages";
        let count = c_int::try_from(pages)
            .ok()
            .filter(|_| (1..=PAGES_MAX).contains(&pages))
            .ok_or(XenError::BadArgument {
                call: CALL,
                why: "1 to 1024 pages are shared at a time",
            })?;
        let mut refs = vec![0; pages];
        // SAFETY: the handle is open, and there is room for one number a page. On Linux the library
        // only makes system calls on its descriptor, so threads may do so at the same time.
        let start = unsafe {
            (self.0.calls.xengntshr_share_pages)(
                self.0.handle.raw(),
                domid.into(),
                count,
                refs.as_mut_ptr(),
                writable.into(),
            )
        };
        self.shared(CALL, start, refs)
    }

    /// One such page. When this process ends, however it does, the kernel clears the byte at
    /// `clear_offset` and notifies `port`, a port of this domain.
    pub fn share_notifying(
        &self,
        domid: u16,
        writable: bool,
        clear_offset: u32,
        port: u32,
    ) -> Result<SharedPages, XenError> {
        const CALL: &str = "xengntshr_share_page_notify";
        let mut refs = vec![0];
        // SAFETY: as for share; the kernel checks offset and port.
        let start = unsafe {
            (self.0.calls.xengntshr_share_page_notify)(
                self.0.handle.raw(),
                domid.into(),
                refs.as_mut_ptr(),
                writable.into(),
                clear_offset,
                port,
            )
        };
        self.shared(CALL, start, refs)
    }

    fn shared(
        &self,
        call: &'static str,
        start: Raw,
        refs: Vec<u32>,
    ) -> Result<SharedPages, XenError> {
        // SAFETY: not null, it is as many pages as there are numbers, mapped for reading and
        // writing (for us always) until they are unshared, and new.
        let pages = unsafe { Pages::new(start, refs.len(), true) };
        Ok(SharedPages {
            pages: pages.ok_or_else(|| XenError::last(call))?,
            refs,
            opened: Arc::clone(&self.0),
        })
    }
}

/// Pages of this domain that another may map. Ends with this value, for us; a domain that has them
/// mapped keeps them until it unmaps.
pub struct SharedPages {
    pages: Pages,
    refs: Vec<u32>,
    opened: Arc<Opened>,
}

impl SharedPages {
    /// The pages' entries in this domain's grant table, in order.
    pub fn refs(&self) -> &[u32] {
        &self.refs
    }

    /// What is in them.
    pub fn bytes(&self) -> VolatileBytes<'_> {
        self.pages.bytes()
    }

    /// The same, for writing. (Never `None`.)
    pub fn bytes_mut(&self) -> Option<VolatileBytesMut<'_>> {
        self.pages.bytes_mut()
    }
}

impl Drop for SharedPages {
    fn drop(&mut self) {
        let Opened { calls, handle } = &*self.opened;
        // SAFETY: mapped by this handle, this long, and used no more: all views borrow `self`.
        unsafe {
            (calls.xengntshr_unshare)(handle.raw(), self.pages.raw(), self.pages.count() as u32)
        };
    }
}
