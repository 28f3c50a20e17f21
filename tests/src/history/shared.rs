//! A file of a coherent export as a guest has it: mapped, and by messages.

use super::Memory;
use copage_grants::volatile::{VolatileBytes, VolatileBytesMut};
use copage_mmap::{File, Mapping, MmapError};

/// See the module.
pub struct SharedFile {
    file: File,
    mapping: Mapping,
}

impl SharedFile {
    /// A file that was opened for writing, and a writable mapping of all of it.
    pub const fn new(file: File, mapping: Mapping) -> Self {
        Self { file, mapping }
    }

    fn bytes(&self) -> VolatileBytes<'_> {
        self.mapping.as_volatile()
    }

    fn bytes_mut(&self) -> Option<VolatileBytesMut<'_>> {
        self.mapping.as_volatile_mut()
    }
}

fn errno(error: MmapError) -> i32 {
    error.errno()
}

impl Memory for SharedFile {
    fn load(&self, offset: u64) -> Result<u64, i32> {
        self.bytes().read_u64(offset as usize).ok_or(libc::EFAULT)
    }

    fn store(&self, offset: u64, value: u64) -> Result<(), i32> {
        let bytes = self.bytes_mut().ok_or(libc::EACCES)?;
        match bytes.write_u64(offset as usize, value) {
            true => Ok(()),
            false => Err(libc::EFAULT),
        }
    }

    fn read(&self, offset: u64) -> Result<Option<u64>, i32> {
        let mut word = [0; 8];
        match self.file.read_at(&mut word, offset).map_err(errno)? {
            0 => Ok(None),
            8 => Ok(Some(u64::from_le_bytes(word))),
            _ => Err(libc::EIO),
        }
    }

    fn write(&self, offset: u64, value: u64) -> Result<(), i32> {
        match self.file.write_at(&value.to_le_bytes(), offset) {
            Ok(8) => Ok(()),
            Ok(_) => Err(libc::EIO),
            Err(error) => Err(errno(error)),
        }
    }

    fn sync(&self) -> Result<(), i32> {
        self.file.sync().map_err(errno)
    }

    fn resize(&self, bytes: u64) -> Result<(), i32> {
        self.file.set_len(bytes).map_err(errno)
    }

    fn reconnects(&self) -> u64 {
        self.file.client().reconnects()
    }
}
