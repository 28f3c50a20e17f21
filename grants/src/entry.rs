//! Grant entries, version 1, as Xen lays them out (`struct grant_entry_v1`,
//! xen/include/public/grant_table.h):
//!
//! ```text
//! byte 0      2      4              8
//!      | flags| domid|     frame    |   little-endian
//! ```
//!
//! The hypervisor changes `flags` while we look, so an entry is atomics over whatever memory holds
//! it: our own for `local`, the mapped table of a cache domain for `xen`. `flags` and `domid` are
//! one 32-bit word here, as they are for Xen when it takes an entry into use: then a revocation is
//! one compare-exchange of both.

use crate::backend::Access;
use crate::ids::DomId;
use crate::sync::{AtomicU32, Ordering};

/// `GTF_permit_access`: the domain may map the frame.
pub const GTF_PERMIT_ACCESS: u16 = 1;
/// `GTF_readonly`: for reading only.
pub const GTF_READONLY: u16 = 1 << 2;
/// `GTF_reading`: the hypervisor shows the frame mapped for reading.
pub const GTF_READING: u16 = 1 << 3;
/// `GTF_writing`: the hypervisor shows the frame mapped for writing.
pub const GTF_WRITING: u16 = 1 << 4;
/// The bits that are the hypervisor's.
pub const GTF_IN_USE: u16 = GTF_READING | GTF_WRITING;

const IN_USE_WORD: u32 = GTF_IN_USE as u32;

#[cfg(target_endian = "big")]
compile_error!("grant entries are little-endian, as are all machines that Xen runs on");

/// One entry of a grant table.
#[repr(C)]
#[cfg_attr(not(loom), derive(zerocopy::FromZeros))]
#[derive(Debug)]
pub struct Entry {
    /// `flags` below, `domid` above.
    head: AtomicU32,
    frame: AtomicU32,
}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<Entry>() == 8);
    assert!(align_of::<Entry>() == 4);
    assert!(core::mem::offset_of!(Entry, head) == 0);
    assert!(core::mem::offset_of!(Entry, frame) == 4);
};

/// An entry at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    /// `GTF_*`; 0 when the entry is free.
    pub flags: u16,
    /// Who may map.
    pub dom: DomId,
    /// What, as the table has it (Xen: the gfn).
    pub frame: u32,
}

impl EntryState {
    /// The entry grants nothing.
    pub fn is_free(self) -> bool {
        self.flags == 0
    }

    /// The hypervisor shows it mapped.
    pub fn is_mapped(self) -> bool {
        self.flags & GTF_IN_USE != 0
    }

    /// What it permits; `None` when it permits nothing, or is of a kind that we never write.
    pub fn access(self) -> Option<Access> {
        match self.flags & !GTF_IN_USE {
            f if f == GTF_PERMIT_ACCESS | GTF_READONLY => Some(Access::ReadOnly),
            GTF_PERMIT_ACCESS => Some(Access::ReadWrite),
            _ => None,
        }
    }
}

/// The bits by which an access is granted.
const fn permit(access: Access) -> u16 {
    match access {
        Access::ReadOnly => GTF_PERMIT_ACCESS | GTF_READONLY,
        Access::ReadWrite => GTF_PERMIT_ACCESS,
    }
}

/// The bits that the hypervisor sets for a domain that maps with an access.
const fn in_use(access: Access) -> u16 {
    match access {
        Access::ReadOnly => GTF_READING,
        Access::ReadWrite => GTF_READING | GTF_WRITING,
    }
}

const fn word(flags: u16, dom: DomId) -> u32 {
    flags as u32 | (dom.0 as u32) << 16
}

impl Entry {
    /// A free entry.
    pub fn new() -> Self {
        Self {
            head: AtomicU32::new(0),
            frame: AtomicU32::new(0),
        }
    }

    /// Writes a free entry. Xen's order: the frame first, then domid and flags, and whoever sees
    /// the flags sees the frame.
    ///
    /// `mapped` sets the hypervisor's bits at once: for a backend whose guests can map from this
    /// moment on without telling anybody (local).
    #[inline]
    pub fn publish(&self, dom: DomId, access: Access, frame: u32, mapped: bool) {
        let flags = permit(access) | if mapped { in_use(access) } else { 0 };
        self.frame.store(frame, Ordering::Relaxed);
        self.head.store(word(flags, dom), Ordering::Release);
    }

    /// Frees the entry unless it is in use, in one step, so that nobody can begin to use it between
    /// the look and the change. `false`: it is mapped and stays as it was.
    #[inline]
    pub fn revoke(&self) -> bool {
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            if head & IN_USE_WORD != 0 {
                return false;
            }
            // Acquire: what the grantee did before it unmapped comes before the frame is used
            // again. Release: what we did with the entry so far stays before its end.
            match self
                .head
                .compare_exchange_weak(head, 0, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => return true,
                Err(now) => head = now,
            }
        }
    }

    /// Permits nothing more and leaves what is mapped: with the last unmap the entry is free. Until then the
    /// hypervisor lets only the domain that maps it map it again; nobody who gets that domain's number
    /// after its end.
    pub fn withdraw(&self) {
        let permits = u32::from(GTF_PERMIT_ACCESS | GTF_READONLY);
        self.head.fetch_and(!permits, Ordering::AcqRel);
    }

    /// Frees the entry, in use or not, where nobody can use it any more: the grantee is dead or its
    /// mappings are gone, and whoever set the bits (a hypervisor, or the daemon in its place) does
    /// so no more. Hence no compare-exchange: there is nobody to race with.
    #[inline]
    pub fn end(&self) {
        // The orders are those of revoke.
        let _ = self.head.load(Ordering::Acquire);
        self.head.store(0, Ordering::Release);
    }

    /// The entry now.
    pub fn state(&self) -> EntryState {
        let head = self.head.load(Ordering::Acquire);
        EntryState {
            // Truncation is the point: the halves of the word.
            flags: (head & 0xffff) as u16,
            dom: DomId((head >> 16) as u16),
            frame: self.frame.load(Ordering::Relaxed),
        }
    }

    /// The hypervisor's part, where the daemon stands in for it: the domain maps what it was
    /// granted.
    pub fn set_mapped(&self, access: Access) {
        let bits = in_use(access).into();
        // Mostly it is so already, and looking is cheaper than writing.
        if self.head.load(Ordering::Relaxed) & bits != bits {
            self.head.fetch_or(bits, Ordering::Relaxed);
        }
    }

    /// The hypervisor's part, where the daemon stands in for it: the last mapping is gone.
    pub fn clear_mapped(&self) {
        self.head.fetch_and(!IN_USE_WORD, Ordering::Release);
    }

    /// The hypervisor's part in full, as Xen's map operation does it: takes the entry into use for
    /// `dom` if it permits `access`, and gives the frame. For tests of the granter's side.
    pub fn map(&self, dom: DomId, access: Access) -> Option<u32> {
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            let flags = (head & 0xffff) as u16;
            let permitted = flags & GTF_PERMIT_ACCESS != 0
                && (access == Access::ReadOnly || flags & GTF_READONLY == 0);
            if !permitted || head >> 16 != u32::from(dom.0) {
                return None;
            }
            let used = head | u32::from(in_use(access));
            match self
                .head
                .compare_exchange_weak(head, used, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return Some(self.frame.load(Ordering::Relaxed)),
                Err(now) => head = now,
            }
        }
    }
}

impl Default for Entry {
    fn default() -> Self {
        Self::new()
    }
}

/// Memory that holds a table.
pub trait EntryMemory: Send + Sync {
    /// All its entries, the reserved ones included.
    fn entries(&self) -> &[Entry];
}

/// A table in the process's own memory; pages of it are touched when first used.
#[derive(Debug)]
pub struct OwnEntries(Box<[Entry]>);

impl OwnEntries {
    /// A table of `entries` free entries; `None` when there is no memory for it.
    pub fn new(entries: u32) -> Option<Self> {
        #[cfg(not(loom))]
        let memory = <[Entry] as zerocopy::FromZeros>::new_box_zeroed_with_elems(entries as usize);
        #[cfg(loom)]
        let memory = Ok::<_, ()>((0..entries).map(|_| Entry::new()).collect());
        memory.ok().map(Self)
    }
}

impl EntryMemory for OwnEntries {
    #[inline]
    fn entries(&self) -> &[Entry] {
        &self.0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use zerocopy::transmute_ref;

    fn bytes(entry: &Entry) -> [u8; 8] {
        let words: [u32; 2] = [
            entry.head.load(Ordering::Relaxed),
            entry.frame.load(Ordering::Relaxed),
        ];
        let bytes: &[u8; 8] = transmute_ref!(&words);
        *bytes
    }

    #[test]
    fn the_bytes_are_xens() {
        let entry = Entry::new();
        entry.publish(DomId(0x0102), Access::ReadOnly, 0x0a0b_0c0d, false);
        assert_eq!(bytes(&entry), [0x05, 0, 0x02, 0x01, 0x0d, 0x0c, 0x0b, 0x0a]);
        assert!(entry.revoke());
        entry.publish(DomId(7), Access::ReadWrite, 1, true);
        assert_eq!(bytes(&entry)[0], 0x19);
    }

    #[test]
    fn what_is_mapped_is_not_revoked() {
        let entry = Entry::new();
        entry.publish(DomId(3), Access::ReadOnly, 9, false);
        assert_eq!(entry.map(DomId(4), Access::ReadOnly), None);
        assert_eq!(entry.map(DomId(3), Access::ReadWrite), None);
        assert_eq!(entry.map(DomId(3), Access::ReadOnly), Some(9));
        assert!(!entry.revoke());
        assert_eq!(entry.state().access(), Some(Access::ReadOnly));
        entry.clear_mapped();
        assert!(entry.revoke());
        assert!(entry.state().is_free());
        assert_eq!(entry.map(DomId(3), Access::ReadOnly), None);
    }
}
