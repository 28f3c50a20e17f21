//! Which physical page stands behind an address (`/proc/PID/pagemap`,
//! Documentation/admin-guide/mm/pagemap.rst).

use crate::ids::PAGE_SIZE_U64;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// One 64-bit record of the page map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageMapEntry(u64);

impl PageMapEntry {
    /// The page is in memory and mapped here.
    pub fn present(self) -> bool {
        self.0 >> 63 & 1 == 1
    }

    /// The page is of a file or of shared memory (bit 61); a private copy is not.
    pub fn file_backed(self) -> bool {
        self.0 >> 61 & 1 == 1
    }

    /// The number of the physical page; `None` when there is none or the kernel hides it (it shows
    /// numbers to CAP_SYS_ADMIN only).
    pub fn frame_number(self) -> Option<u64> {
        let number = self.0 & ((1 << 55) - 1);
        (self.present() && number != 0).then_some(number)
    }
}

/// The page map of one process.
#[derive(Debug)]
pub struct PageMap(File);

impl PageMap {
    /// The calling process's.
    pub fn own() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// Another process's; needs the right to trace it.
    pub fn of(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Self)
    }

    /// What is mapped at `address`.
    pub fn entry(&self, address: usize) -> io::Result<PageMapEntry> {
        let mut record = [PageMapEntry(0)];
        self.entries(address, &mut record)?;
        Ok(record[0])
    }

    /// What is mapped at the `out.len()` pages from `address`. Pages past the address space are an
    /// error (`UnexpectedEof`).
    pub fn entries(&self, address: usize, out: &mut [PageMapEntry]) -> io::Result<()> {
        let mut bytes = vec![0u8; out.len() * 8];
        self.0
            .read_exact_at(&mut bytes, address as u64 / PAGE_SIZE_U64 * 8)?;
        for (entry, record) in out.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut word = [0u8; 8];
            word.copy_from_slice(record);
            *entry = PageMapEntry(u64::from_ne_bytes(word));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_own_page_is_present() {
        let value = Box::new(7u64);
        let entry = PageMap::own()
            .unwrap()
            .entry((&raw const *value).addr())
            .unwrap();
        assert!(entry.present());
        assert!(!entry.file_backed());
    }
}
