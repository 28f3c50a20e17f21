//! Memory and grant tables of other domains, for the control domain (xenforeignmemory.h).

use super::XenError;
use super::load::{Handle, NO_LOGGER, Raw, device, library};
use super::memory::{Pages, prot};
use crate::entry::{Entry, EntryMemory};
use crate::ids::PAGE_SIZE;
use crate::volatile::{VolatileBytes, VolatileBytesMut};
use std::ffi::{c_int, c_uint, c_ulong};
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

library! {
    /// xenforeignmemory.h. `xen_pfn_t` is `unsigned long` on x86-64 and `uint64_t` on Arm64
    /// (xen/arch-x86/xen.h, xen/arch-arm.h); `domid_t` is `uint16_t` (xen/xen.h).
    struct Calls = "libxenforeignmemory.so.1" {
        xenforeignmemory_open: unsafe extern "C" fn(Raw, c_uint) -> Raw,
        xenforeignmemory_close: unsafe extern "C" fn(Raw) -> c_int,
        xenforeignmemory_map:
            unsafe extern "C" fn(Raw, u32, c_int, usize, *const u64, *mut c_int) -> Raw,
        xenforeignmemory_unmap: unsafe extern "C" fn(Raw, Raw, usize) -> c_int,
        xenforeignmemory_map_resource: unsafe extern "C" fn(
            Raw, u16, c_uint, c_uint, c_ulong, c_ulong, *mut Raw, c_int, c_int,
        ) -> Raw,
        xenforeignmemory_unmap_resource: unsafe extern "C" fn(Raw, Raw) -> c_int,
        xenforeignmemory_resource_size:
            unsafe extern "C" fn(Raw, u16, c_uint, c_uint, *mut usize) -> c_int,
    }
}

#[cfg(not(target_pointer_width = "64"))]
compile_error!("xen_pfn_t is taken to have 64 bits");

const DEVICE: &str = "/dev/xen/privcmd";

/// `XENMEM_resource_grant_table` (xen/memory.h).
const RESOURCE_GRANT_TABLE: c_uint = 1;
/// `XENMEM_resource_grant_table_id_shared` (xen/memory.h): the entries, not the status frames.
const RESOURCE_GRANT_TABLE_SHARED: c_uint = 0;

struct Opened {
    calls: &'static Calls,
    handle: Handle,
}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: the handle is open; nothing that was mapped through it is left, since that would
        // keep this alive.
        unsafe { (self.calls.xenforeignmemory_close)(self.handle.raw()) };
    }
}

/// A handle of the driver through which the control domain reaches other domains.
#[derive(Clone)]
pub struct ForeignMemory(Arc<Opened>);

impl ForeignMemory {
    /// A new handle.
    pub fn open() -> Result<Self, XenError> {
        let calls = Calls::load()?;
        device(DEVICE)?;
        // SAFETY: no logger and no flags are valid arguments.
        let handle = unsafe { (calls.xenforeignmemory_open)(NO_LOGGER, 0) };
        let handle = NonNull::new(handle)
            .ok_or_else(|| XenError::opening("xenforeignmemory_open", DEVICE))?;
        Ok(Self(Arc::new(Opened {
            calls,
            handle: Handle(handle),
        })))
    }

    /// Maps pages of `domid`'s memory, for reading and writing, one behind the other. All or none:
    /// a frame that is not there fails the call with its own error.
    pub fn map(&self, domid: u16, gfns: &[u64]) -> Result<ForeignMap, XenError> {
        const CALL: &str = "xenforeignmemory_map";
        if gfns.is_empty() {
            return Err(XenError::BadArgument {
                call: CALL,
                why: "there is nothing to map",
            });
        }
        let mut errors: Vec<c_int> = vec![0; gfns.len()];
        // SAFETY: the handle is open; there are as many frame numbers, and places for errors, as is
        // said. On Linux the library only makes system calls on its descriptor, so threads may do
        // so at the same time.
        let start = unsafe {
            (self.0.calls.xenforeignmemory_map)(
                self.0.handle.raw(),
                domid.into(),
                prot(true),
                gfns.len(),
                gfns.as_ptr(),
                errors.as_mut_ptr(),
            )
        };
        // SAFETY: not null, it is as many pages, mapped for reading and writing (those without an
        // error of their own; with one, nobody gets to see them) until they are unmapped, and new.
        let pages = unsafe { Pages::new(start, gfns.len(), true) };
        let map = ForeignMap {
            pages: pages.ok_or_else(|| XenError::last(CALL))?,
            opened: Arc::clone(&self.0),
        };
        match errors.into_iter().find(|&error| error != 0) {
            None => Ok(map),
            Some(error) => Err(XenError::Sys {
                call: CALL,
                source: io::Error::from_raw_os_error(error.saturating_abs()),
            }),
        }
    }

    /// How many frames `domid`'s grant table may have (`max_grant_frames`).
    pub fn grant_table_frames(&self, domid: u16) -> Result<u32, XenError> {
        const CALL: &str = "xenforeignmemory_resource_size(grant table)";
        let mut bytes = 0;
        // SAFETY: the handle is open, `bytes` is where the size goes.
        let result = unsafe {
            (self.0.calls.xenforeignmemory_resource_size)(
                self.0.handle.raw(),
                domid,
                RESOURCE_GRANT_TABLE,
                RESOURCE_GRANT_TABLE_SHARED,
                &raw mut bytes,
            )
        };
        if result != 0 {
            return Err(XenError::last(CALL));
        }
        u32::try_from(bytes / PAGE_SIZE).map_err(|_| XenError::BadArgument {
            call: CALL,
            why: "the table is too large",
        })
    }

    /// Maps the first `frames` frames of `domid`'s grant table, which grows to as many. 512 entries
    /// of version 1 are in each.
    pub fn grant_table(&self, domid: u16, frames: u32) -> Result<GrantTableMap, XenError> {
        const CALL: &str = "xenforeignmemory_map_resource(grant table)";
        let mut start: Raw = std::ptr::null_mut();
        // SAFETY: the handle is open, `start` is where the address goes; at any address, no flags.
        let resource = unsafe {
            (self.0.calls.xenforeignmemory_map_resource)(
                self.0.handle.raw(),
                domid,
                RESOURCE_GRANT_TABLE,
                RESOURCE_GRANT_TABLE_SHARED,
                0,
                frames.into(),
                &raw mut start,
                prot(true),
                0,
            )
        };
        let resource = NonNull::new(resource).ok_or_else(|| XenError::last(CALL))?;
        Ok(GrantTableMap {
            resource: Handle(resource),
            start: Handle(NonNull::new(start).ok_or_else(|| XenError::last(CALL))?),
            entries: frames as usize * (PAGE_SIZE / size_of::<Entry>()),
            opened: Arc::clone(&self.0),
        })
    }
}

/// Memory of another domain. Unmapped when dropped.
pub struct ForeignMap {
    pages: Pages,
    opened: Arc<Opened>,
}

impl ForeignMap {
    /// How many pages.
    pub fn pages(&self) -> usize {
        self.pages.count()
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

impl Drop for ForeignMap {
    fn drop(&mut self) {
        let Opened { calls, handle } = &*self.opened;
        // SAFETY: mapped by this handle, this long, and used no more: all views borrow `self`.
        unsafe {
            (calls.xenforeignmemory_unmap)(handle.raw(), self.pages.raw(), self.pages.count())
        };
    }
}

/// The grant table of another domain. Unmapped when dropped; the entries stay as they are.
pub struct GrantTableMap {
    resource: Handle,
    start: Handle,
    entries: usize,
    opened: Arc<Opened>,
}

impl EntryMemory for GrantTableMap {
    #[inline]
    fn entries(&self) -> &[Entry] {
        // SAFETY: so many entries are mapped for reading and writing as long as `self` lives, on
        // whole pages and so aligned. An entry is atomics, which the hypervisor and we change with
        // atomic accesses; every value is valid.
        unsafe { std::slice::from_raw_parts(self.start.raw().cast::<Entry>(), self.entries) }
    }
}

impl Drop for GrantTableMap {
    fn drop(&mut self) {
        let Opened { calls, handle } = &*self.opened;
        // SAFETY: mapped by this handle and used no more: all references to entries borrow `self`.
        unsafe { (calls.xenforeignmemory_unmap_resource)(handle.raw(), self.resource.raw()) };
    }
}
