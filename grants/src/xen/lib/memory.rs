//! Pages that a library mapped into this process.

use crate::ids::PAGE_SIZE;
use crate::volatile::{VolatileBytes, VolatileBytesMut};
use std::ptr::NonNull;

/// Where mapped pages are. Whoever owns this unmaps them.
pub(super) struct Pages {
    start: NonNull<u8>,
    pages: usize,
    writable: bool,
}

// SAFETY: an address and a length; the memory is shared with other domains anyway and is reached
// by volatile accesses only.
unsafe impl Send for Pages {}
// SAFETY: as for Send.
unsafe impl Sync for Pages {}

impl Pages {
    /// `pages` pages from `start`; `None` for a null pointer.
    ///
    /// # Safety
    /// Unless null, all of them are mapped for reading, and with `writable` for writing, until the
    /// owner unmaps them, and no Rust reference points into them.
    pub(super) unsafe fn new(
        start: super::load::Raw,
        pages: usize,
        writable: bool,
    ) -> Option<Self> {
        Some(Self {
            start: NonNull::new(start.cast())?,
            pages,
            writable,
        })
    }

    pub(super) fn count(&self) -> usize {
        self.pages
    }

    pub(super) fn raw(&self) -> super::load::Raw {
        self.start.as_ptr().cast()
    }

    pub(super) fn bytes(&self) -> VolatileBytes<'_> {
        // SAFETY: mapped for reading as long as `self` is borrowed, as `new`'s caller promised.
        unsafe { VolatileBytes::new(self.start.as_ptr(), self.pages * PAGE_SIZE) }
    }

    pub(super) fn bytes_mut(&self) -> Option<VolatileBytesMut<'_>> {
        self.writable.then(|| {
            // SAFETY: mapped for writing as long as `self` is borrowed, as `new`'s caller promised.
            unsafe { VolatileBytesMut::new(self.start.as_ptr(), self.pages * PAGE_SIZE) }
        })
    }
}

/// `PROT_*` (sys/mman.h).
pub(super) fn prot(writable: bool) -> libc::c_int {
    if writable {
        libc::PROT_READ | libc::PROT_WRITE
    } else {
        libc::PROT_READ
    }
}
