//! Plain read-only mappings of files: what a program has without this library, and what a file
//! below a copage mount is mapped with.

use copage_grants::volatile::VolatileBytes;
use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::io;

/// A shared read-only mapping of a whole file, served by the kernel.
///
/// Its bytes may change under the reader, hence volatile. Whoever truncates the file makes pages of
/// it SIGBUS, as with every mapping of a file.
#[derive(Debug)]
pub struct NativeMapping {
    map: MmapRaw,
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
        }
    }
}
