//! Plain mappings of files: what a program has without this library, and what a file
//! below a copage mount is mapped with.

use copage_grants::PAGE_SIZE;
use copage_grants::volatile::{VolatileBytes, VolatileBytesMut};
use memmap2::{MmapOptions, MmapRaw, UncheckedAdvice};
use std::fs::File;
use std::io;

/// A shared mapping of a whole file, served by the kernel.
///
/// Its bytes may change under the reader, hence volatile. Whoever truncates the file makes pages of
/// it SIGBUS, as with every mapping of a file.
#[derive(Debug)]
pub struct NativeMapping {
    map: MmapRaw,
    writable: bool,
}

impl NativeMapping {
    /// Maps `file`, which must not be empty; with `populate`, all pages that the kernel can map at
    /// once are mapped before this returns (`MAP_POPULATE`).
    pub fn new(file: &File, populate: bool) -> io::Result<Self> {
        let mut options = MmapOptions::new();
        if populate {
            options.populate();
        }
        Ok(Self {
            map: options.map_raw_read_only(file)?,
            writable: false,
        })
    }

    /// Maps `file`, which must not be empty and be open for both, to be read and written.
    pub fn writable(file: &File) -> io::Result<Self> {
        Ok(Self {
            map: MmapOptions::new().map_raw(file)?,
            writable: true,
        })
    }

    /// The first `len` bytes of a file that may be longer than the address space.
    pub fn writable_part(file: &File, len: usize) -> io::Result<Self> {
        Ok(Self {
            map: MmapOptions::new().len(len).map_raw(file)?,
            writable: true,
        })
    }

    /// Where it begins: for looking its pages up in the page map.
    pub fn address(&self) -> usize {
        self.map.as_ptr().addr()
    }

    /// The bytes.
    pub fn as_volatile(&self) -> VolatileBytes<'_> {
        // SAFETY: memmap2 mapped this range readable and unmaps it when `self.map` is dropped,
        // which the borrow outlasts; `MmapRaw` makes no reference into it, nor does this type.
        unsafe { VolatileBytes::new(self.map.as_ptr(), self.map.len()) }
    }

    /// Takes the page that holds byte `offset` out of this process's page table: the next access is a fault.
    pub fn let_go(&self, offset: usize) -> io::Result<()> {
        let page = offset / PAGE_SIZE * PAGE_SIZE;
        if page >= self.map.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let len = PAGE_SIZE.min(self.map.len() - page);
        // SAFETY: the range lies within the mapping, which is a shared one of a file: its bytes are the
        // file's and stay so, and nobody has a reference into it.
        unsafe {
            self.map
                .unchecked_advise_range(UncheckedAdvice::DontNeed, page, len)
        }
    }

    /// The bytes, to be stored to as well, of a writable mapping.
    pub fn as_volatile_mut(&self) -> Option<VolatileBytesMut<'_>> {
        let map = self.writable.then_some(&self.map)?;
        // SAFETY: as in `as_volatile`; it was mapped writable.
        Some(unsafe { VolatileBytesMut::new(map.as_mut_ptr(), map.len()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_a_mapped_file_shows_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [7; 5000]).unwrap();
        for populate in [false, true] {
            let map = NativeMapping::new(&File::open(&path).unwrap(), populate).unwrap();
            let mut tail = [0; 8];
            assert_eq!(map.as_volatile().read_into(4992, &mut tail), 8);
            assert_eq!((tail, map.as_volatile().len()), ([7; 8], 5000));
            assert!(map.as_volatile_mut().is_none());
        }
        let map = NativeMapping::new(&File::open(&path).unwrap(), true).unwrap();
        map.let_go(4999).unwrap();
        assert_eq!(
            map.as_volatile().read_u64(4992),
            Some(0x0707_0707_0707_0707)
        );
        assert!(map.let_go(8192).is_err());
        let both = File::options().read(true).write(true).open(&path).unwrap();
        let map = NativeMapping::writable(&both).unwrap();
        assert!(map.as_volatile_mut().unwrap().write_u64(8, u64::MAX));
        assert_eq!(
            &std::fs::read(&path).unwrap()[7..17],
            [7, 255, 255, 255, 255, 255, 255, 255, 255, 7]
        );
    }
}
