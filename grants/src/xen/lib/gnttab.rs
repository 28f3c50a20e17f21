//! Pages of another domain, mapped or copied by their grants (the first half of xengnttab.h).

use super::XenError;
use super::load::{Handle, NO_LOGGER, Raw, device, library};
use super::memory::{Pages, prot};
use crate::ids::PAGE_SIZE;
use crate::volatile::{VolatileBytes, VolatileBytesMut};
use std::ffi::{c_int, c_uint};
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

library! {
    /// xengnttab.h. `evtchn_port_t` is `uint32_t` (xen/event_channel.h).
    struct Calls = "libxengnttab.so.1" {
        xengnttab_open: unsafe extern "C" fn(Raw, c_uint) -> Raw,
        xengnttab_close: unsafe extern "C" fn(Raw) -> c_int,
        xengnttab_map_domain_grant_refs:
            unsafe extern "C" fn(Raw, u32, u32, *mut u32, c_int) -> Raw,
        xengnttab_map_grant_ref_notify:
            unsafe extern "C" fn(Raw, u32, u32, c_int, u32, u32) -> Raw,
        xengnttab_unmap: unsafe extern "C" fn(Raw, Raw, u32) -> c_int,
        xengnttab_grant_copy: unsafe extern "C" fn(Raw, u32, *mut CopySegment) -> c_int,
    }
}

const DEVICE: &str = "/dev/xen/gntdev";

/// The most pages of one call; also the driver's own limit (`limit`, a parameter of the module).
const PAGES_MAX: usize = 65_536;

/// Pages copied by one call.
const COPY_BATCH: usize = 128;

/// `GNTCOPY_source_gref`: the source is a grant (xen/grant_table.h).
const GNTCOPY_SOURCE_GREF: u16 = 1;

/// `GNTST_okay` (xen/grant_table.h).
const GNTST_OKAY: i16 = 0;

/// `struct xengnttab_grant_copy_segment` (xengnttab.h), as it is when the source is a grant and the
/// destination memory of this process.
#[repr(C)]
#[derive(Clone, Copy)]
struct CopySegment {
    source: ForeignPage,
    /// `dest.virt`
    dest: *mut u8,
    len: u16,
    flags: u16,
    status: i16,
}

/// The `foreign` of `union xengnttab_copy_ptr`, which is as large as the union.
#[repr(C)]
#[derive(Clone, Copy)]
struct ForeignPage {
    gref: u32,
    offset: u16,
    domid: u16,
}

#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<CopySegment>() == 24);
    assert!(size_of::<ForeignPage>() == 8);
    assert!(core::mem::offset_of!(CopySegment, dest) == 8);
    assert!(core::mem::offset_of!(CopySegment, len) == 16);
    assert!(core::mem::offset_of!(CopySegment, status) == 20);
};

struct Opened {
    calls: &'static Calls,
    handle: Handle,
}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: the handle is open; nothing that was mapped through it is left, since that would
        // keep this alive.
        unsafe { (self.calls.xengnttab_close)(self.handle.raw()) };
    }
}

/// A handle of the driver that maps and copies granted pages.
#[derive(Clone)]
pub struct Gnttab(Arc<Opened>);

impl Gnttab {
    /// A new handle.
    pub fn open() -> Result<Self, XenError> {
        let calls = Calls::load()?;
        device(DEVICE)?;
        // SAFETY: no logger and no flags are valid arguments.
        let handle = unsafe { (calls.xengnttab_open)(NO_LOGGER, 0) };
        let handle =
            NonNull::new(handle).ok_or_else(|| XenError::opening("xengnttab_open", DEVICE))?;
        Ok(Self(Arc::new(Opened {
            calls,
            handle: Handle(handle),
        })))
    }

    /// Maps pages that `domid` granted, one behind the other. All or none: one entry that does not
    /// permit it fails the call (EINVAL; the driver tells no more).
    pub fn map(&self, domid: u16, refs: &[u32], writable: bool) -> Result<GrantMap, XenError> {
        const CALL: &str = "xengnttab_map_domain_grant_refs";
        if refs.is_empty() || refs.len() > PAGES_MAX {
            return Err(XenError::BadArgument {
                call: CALL,
                why: "1 to 65536 pages are mapped at a time",
            });
        }
        // The library only reads them, but says otherwise.
        let mut refs = refs.to_vec();
        // SAFETY: the handle is open and there are as many numbers as is said. On Linux the library
        // only makes system calls on its descriptor, so threads may do so at the same time.
        let start = unsafe {
            (self.0.calls.xengnttab_map_domain_grant_refs)(
                self.0.handle.raw(),
                refs.len() as u32,
                domid.into(),
                refs.as_mut_ptr(),
                prot(writable),
            )
        };
        self.mapped(CALL, start, refs.len(), writable)
    }

    /// Maps one page. When it is unmapped, also because this process ended, the kernel clears the
    /// byte at `clear_offset` (only of a writable mapping) and notifies `port`, a port of this
    /// domain.
    pub fn map_notifying(
        &self,
        domid: u16,
        gref: u32,
        writable: bool,
        clear_offset: u32,
        port: u32,
    ) -> Result<GrantMap, XenError> {
        const CALL: &str = "xengnttab_map_grant_ref_notify";
        // SAFETY: as for map; the kernel checks offset and port.
        let start = unsafe {
            (self.0.calls.xengnttab_map_grant_ref_notify)(
                self.0.handle.raw(),
                domid.into(),
                gref,
                prot(writable),
                clear_offset,
                port,
            )
        };
        self.mapped(CALL, start, 1, writable)
    }

    fn mapped(
        &self,
        call: &'static str,
        start: Raw,
        count: usize,
        writable: bool,
    ) -> Result<GrantMap, XenError> {
        // SAFETY: not null, it is `count` pages, mapped as asked until they are unmapped, and new.
        let pages = unsafe { Pages::new(start, count, writable) };
        Ok(GrantMap {
            pages: pages.ok_or_else(|| XenError::last(call))?,
            opened: Arc::clone(&self.0),
        })
    }

    /// Copies a page that `domid` granted; nothing stays mapped.
    pub fn copy_from(
        &self,
        domid: u16,
        gref: u32,
        dest: &mut [u8; PAGE_SIZE],
    ) -> Result<(), XenError> {
        self.copy_pages(domid, &[gref], dest)
    }

    /// Copies pages that `domid` granted into `dest`, which is as many pages long. On error `dest`
    /// holds some of them.
    pub fn copy_pages(&self, domid: u16, refs: &[u32], dest: &mut [u8]) -> Result<(), XenError> {
        const CALL: &str = "xengnttab_grant_copy";
        if dest.len() != refs.len() * PAGE_SIZE {
            return Err(XenError::BadArgument {
                call: CALL,
                why: "the destination has a page for each grant",
            });
        }
        for (refs, dest) in refs
            .chunks(COPY_BATCH)
            .zip(dest.chunks_mut(COPY_BATCH * PAGE_SIZE))
        {
            let mut segments: Vec<CopySegment> = refs
                .iter()
                .zip(dest.chunks_exact_mut(PAGE_SIZE))
                .map(|(&gref, page)| CopySegment {
                    source: ForeignPage {
                        gref,
                        offset: 0,
                        domid,
                    },
                    dest: page.as_mut_ptr(),
                    len: PAGE_SIZE as u16,
                    flags: GNTCOPY_SOURCE_GREF,
                    status: GNTST_OKAY,
                })
                .collect();
            // SAFETY: the handle is open; each segment's destination is one page of `dest`, which
            // is borrowed for writing meanwhile.
            let result = unsafe {
                (self.0.calls.xengnttab_grant_copy)(
                    self.0.handle.raw(),
                    segments.len() as u32,
                    segments.as_mut_ptr(),
                )
            };
            if result != 0 {
                return Err(XenError::last(CALL));
            }
            if segments.iter().any(|segment| segment.status != GNTST_OKAY) {
                return Err(XenError::Sys {
                    call: CALL,
                    source: io::Error::from_raw_os_error(libc::EINVAL),
                });
            }
        }
        Ok(())
    }
}

/// Pages of another domain. Unmapped when dropped.
pub struct GrantMap {
    pages: Pages,
    opened: Arc<Opened>,
}

impl GrantMap {
    /// What is in them.
    pub fn bytes(&self) -> VolatileBytes<'_> {
        self.pages.bytes()
    }

    /// The same for writing; `None` of pages mapped for reading.
    pub fn bytes_mut(&self) -> Option<VolatileBytesMut<'_>> {
        self.pages.bytes_mut()
    }
}

impl Drop for GrantMap {
    fn drop(&mut self) {
        let Opened { calls, handle } = &*self.opened;
        // SAFETY: mapped by this handle, this long, and used no more: all views borrow `self`.
        unsafe {
            (calls.xengnttab_unmap)(handle.raw(), self.pages.raw(), self.pages.count() as u32)
        };
    }
}
