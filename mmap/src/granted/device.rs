//! /dev/xen/gntdev by its ioctls (uapi xen/gntdev.h).
//!
//! libxengnttab is not used because it maps only at addresses of its own choosing, and here a batch
//! must appear over a range that others read from already.
//!
//! The device is opened read-only. The kernel then takes VM_MAYWRITE from every mapping of it, so
//! that not even mprotect(2) makes one writable: on PVH a store through a writable mapping of a
//! read-only grant does not fault, the hypervisor drops it silently. Batches for writing are of another
//! descriptor; the hypervisor refuses to map an entry for writing that is for reading. Nothing is mapped executable: a
//! jump into a granted page crashes a PVH guest, so nothing is mapped at all by a thread whose
//! personality would add PROT_EXEC.

use crate::limits::WINDOW_PAGES_MAX;
use crate::sys::{Protection, Region, read_implies_exec};
use copage_grants::{Access, PAGE_SIZE};
use rustix::fs::{Mode, OFlags};
use std::ffi::{c_int, c_ulong};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

/// A batch that was announced.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch {
    /// The kernel's index, one of those of its descriptor.
    pub(crate) index: u64,
    pub(crate) pages: usize,
    pub(crate) access: Access,
}

pub(super) fn protection(access: Access) -> Protection {
    match access {
        Access::ReadOnly => Protection::Read,
        Access::ReadWrite => Protection::ReadWrite,
    }
}

/// What maps grants: the kernel's device, or in tests a stand-in made of memfd pages.
///
/// A batch is first announced, then mapped whole, at most once, then forgotten. Its entries are in use
/// until both its memory is unmapped and it is forgotten. No call waits for the pager.
pub(crate) trait Device: Send + Sync {
    /// Names a batch of `granter`'s entries, 1 to 512, to be mapped in this way; nothing is mapped yet.
    fn announce(&self, granter: u16, refs: &[u32], access: Access) -> io::Result<Batch>;

    /// Maps a batch where the kernel likes. EINVAL: an entry is not (or no longer) for us, or not for
    /// writing, or the hypervisor can track no more mappings; nothing is mapped then.
    fn map(&self, batch: Batch) -> io::Result<Region>;

    /// Maps a batch over the pages at `at` of `region`. On error they may be unmapped.
    fn map_over(&self, batch: Batch, region: &Region, at: usize) -> io::Result<()>;

    /// Lets go of a batch.
    fn forget(&self, batch: Batch) -> io::Result<()>;

    /// Copies pages that `granter` granted into memory of our own; nothing stays mapped. EINVAL as
    /// with [`Self::map`].
    fn copy(&self, granter: u16, refs: &[u32], to: &mut [[u8; PAGE_SIZE]]) -> io::Result<()>;

    /// May the memory of a batch be moved by mremap(2)? Not in a PV guest: there the hypervisor
    /// remembers where each page table entry lies.
    fn movable(&self) -> bool;
}

/// Refs in one call.
const REFS_MAX: usize = WINDOW_PAGES_MAX as usize;

/// `struct ioctl_gntdev_grant_ref`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct GntdevRef {
    domid: u32,
    gref: u32,
}
const _: () = assert!(size_of::<GntdevRef>() == 8);

/// `struct ioctl_gntdev_map_grant_ref`, which the header ends with one ref, here with all that may be.
#[repr(C)]
struct GntdevMap {
    count: u32,
    pad: u32,
    index: u64,
    refs: [GntdevRef; REFS_MAX],
}
const _: () = assert!(std::mem::offset_of!(GntdevMap, refs) == 16);
const _: () = assert!(size_of::<GntdevMap>() == 16 + 8 * REFS_MAX);

/// `struct ioctl_gntdev_unmap_grant_ref`.
#[repr(C)]
struct GntdevUnmap {
    index: u64,
    count: u32,
    pad: u32,
}
const _: () = assert!(size_of::<GntdevUnmap>() == 16);

/// `struct gntdev_grant_copy_segment` with `source.foreign` and `dest.virt`.
#[repr(C)]
#[derive(Clone, Copy)]
struct CopySegment {
    source_ref: u32,
    source_offset: u16,
    source_domid: u16,
    dest_virt: u64,
    len: u16,
    flags: u16,
    status: i16,
}
const _: () = assert!(size_of::<CopySegment>() == 24);
/// `GNTCOPY_source_gref`, xen/interface/grant_table.h.
const COPY_SOURCE_GREF: u16 = 1;
/// `GNTST_okay`.
const STATUS_OKAY: i16 = 0;

/// `struct ioctl_gntdev_grant_copy`.
#[repr(C)]
struct GntdevCopy {
    count: u32,
    segments: u64,
}
const _: () = assert!(size_of::<GntdevCopy>() == 16);

/// `_IOC(_IOC_NONE, 'G', nr, size)`, asm-generic/ioctl.h; `size` is the header's struct.
const fn ioc(nr: u64, size: u64) -> u64 {
    (size << 16) | ((b'G' as u64) << 8) | nr
}
/// `IOCTL_GNTDEV_MAP_GRANT_REF`
const MAP_GRANT_REF: u64 = ioc(0, 24);
/// `IOCTL_GNTDEV_UNMAP_GRANT_REF`
const UNMAP_GRANT_REF: u64 = ioc(1, size_of::<GntdevUnmap>() as u64);
/// `IOCTL_GNTDEV_GRANT_COPY`
const GRANT_COPY: u64 = ioc(8, size_of::<GntdevCopy>() as u64);
const _: () = assert!(MAP_GRANT_REF == 0x0018_4700 && UNMAP_GRANT_REF == 0x0010_4701);
const _: () = assert!(GRANT_COPY == 0x0010_4708);

/// The kernel's device.
pub(crate) struct Gntdev {
    fd: OwnedFd,
    /// Opened for writing too, from the first batch on that wants it.
    writing: OnceLock<OwnedFd>,
    movable: bool,
}

const PATH: &str = "/dev/xen/gntdev";

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

impl Gntdev {
    /// The error is the text for who wants to map.
    pub(crate) fn open() -> Result<Self, String> {
        if read_implies_exec() {
            return Err(
                "this process maps everything readable as executable (READ_IMPLIES_EXEC): \
                 a jump into a granted page would crash the guest; start it without"
                    .into(),
            );
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(PATH, flags, Mode::empty()).map_err(|e| match e {
            rustix::io::Errno::NOENT => {
                format!("there is no {PATH}: no Xen guest, or its module xen-gntdev is not loaded")
            }
            e => format!("{PATH}: {e}"),
        })?;
        // What cannot be told is taken for PV, where nothing may be moved.
        let kind = std::fs::read_to_string("/sys/hypervisor/guest_type").unwrap_or_default();
        let movable = matches!(kind.trim(), "PVH" | "HVM");
        Ok(Self {
            fd,
            writing: OnceLock::new(),
            movable,
        })
    }

    /// The descriptor for batches that are mapped in this way.
    fn fd(&self, access: Access) -> io::Result<BorrowedFd<'_>> {
        if access == Access::ReadOnly {
            return Ok(self.fd.as_fd());
        }
        if self.writing.get().is_none() {
            let flags = OFlags::RDWR | OFlags::CLOEXEC;
            let opened = rustix::fs::open(PATH, flags, Mode::empty())?;
            // Another thread's, if it was quicker.
            let _ = self.writing.set(opened);
        }
        self.writing.get().map(AsFd::as_fd).ok_or_else(invalid)
    }

    /// # Safety
    /// `T` must be what uapi xen/gntdev.h gives for `request`, and what it points to must live.
    unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: u64, argument: &mut T) -> io::Result<()> {
        let pointer: *mut T = argument;
        // SAFETY: `pointer` is a live, exclusive `T` for the whole call, which is what the kernel
        // reads and writes for `request` (this function's contract).
        let result: c_int = unsafe { libc::ioctl(fd.as_raw_fd(), request as c_ulong, pointer) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

impl Device for Gntdev {
    fn announce(&self, granter: u16, refs: &[u32], access: Access) -> io::Result<Batch> {
        let fd = self.fd(access)?;
        if refs.is_empty() || refs.len() > REFS_MAX {
            return Err(invalid());
        }
        let mut argument = Box::new(GntdevMap {
            // At most REFS_MAX, see above.
            count: refs.len() as u32,
            pad: 0,
            index: 0,
            refs: [GntdevRef::default(); REFS_MAX],
        });
        for (to, gref) in argument.refs.iter_mut().zip(refs) {
            *to = GntdevRef {
                domid: granter.into(),
                gref: *gref,
            };
        }
        // SAFETY: MAP_GRANT_REF takes `struct ioctl_gntdev_map_grant_ref` with `count` refs.
        unsafe { Self::ioctl(fd, MAP_GRANT_REF, &mut *argument) }?;
        Ok(Batch {
            index: argument.index,
            pages: refs.len(),
            access,
        })
    }

    fn map(&self, batch: Batch) -> io::Result<Region> {
        if read_implies_exec() {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
        let fd = self.fd(batch.access)?;
        let bytes = batch.pages * PAGE_SIZE;
        Region::shared(fd, batch.index, bytes, protection(batch.access))
    }

    fn map_over(&self, batch: Batch, region: &Region, at: usize) -> io::Result<()> {
        if read_implies_exec() {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
        let from = (self.fd(batch.access)?, batch.index);
        let bytes = batch.pages * PAGE_SIZE;
        region.overlay(at, bytes, from, protection(batch.access))
    }

    fn forget(&self, batch: Batch) -> io::Result<()> {
        let fd = self.fd(batch.access)?;
        let mut argument = GntdevUnmap {
            index: batch.index,
            count: u32::try_from(batch.pages).map_err(|_| invalid())?,
            pad: 0,
        };
        // SAFETY: UNMAP_GRANT_REF takes `struct ioctl_gntdev_unmap_grant_ref`.
        unsafe { Self::ioctl(fd, UNMAP_GRANT_REF, &mut argument) }
    }

    fn copy(&self, granter: u16, refs: &[u32], to: &mut [[u8; PAGE_SIZE]]) -> io::Result<()> {
        if refs.len() != to.len() || refs.is_empty() || refs.len() > REFS_MAX {
            return Err(invalid());
        }
        let mut segments: Vec<CopySegment> = refs
            .iter()
            .zip(to.iter_mut())
            .map(|(gref, page)| CopySegment {
                source_ref: *gref,
                source_offset: 0,
                source_domid: granter,
                dest_virt: page.as_mut_ptr().expose_provenance() as u64,
                len: PAGE_SIZE as u16,
                flags: COPY_SOURCE_GREF,
                status: STATUS_OKAY,
            })
            .collect();
        let mut argument = GntdevCopy {
            // At most REFS_MAX, see above.
            count: segments.len() as u32,
            segments: segments.as_mut_ptr().expose_provenance() as u64,
        };
        let fd = self.fd.as_fd();
        // SAFETY: GRANT_COPY takes `struct ioctl_gntdev_grant_copy`; `segments` are `count` structs of
        // the header's, each with a page of `to`, exclusively ours, to be written.
        unsafe { Self::ioctl(fd, GRANT_COPY, &mut argument) }?;
        if segments.iter().all(|s| s.status == STATUS_OKAY) {
            Ok(())
        } else {
            Err(invalid())
        }
    }

    fn movable(&self) -> bool {
        self.movable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_a_thread_whose_memory_is_all_executable_maps_nothing() {
        let thread = std::thread::spawn(|| {
            // SAFETY: the personality is this thread's alone, which ends here.
            let before = unsafe { libc::personality(0x0400000) };
            assert!(before >= 0 && read_implies_exec());
            Gntdev::open().err()
        });
        let text = thread.join().unwrap().unwrap();
        assert!(text.contains("READ_IMPLIES_EXEC"), "{text}");
        assert!(!read_implies_exec());
    }

    /// Shows the error's words only: this machine has no Xen.
    #[test]
    fn local_without_xen_the_device_says_what_is_missing() {
        if std::path::Path::new(PATH).exists() {
            eprintln!("not shown here: {PATH} exists");
            return;
        }
        let Err(text) = Gntdev::open() else {
            panic!("it was opened")
        };
        assert!(text.contains(PATH), "{text}");
    }
}
