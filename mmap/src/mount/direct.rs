//! Files of `coherent` exports: every read and write is a message, and this kernel keeps nothing of them
//! that others can change (FOPEN_DIRECT_IO). It refuses shared mappings of them (ENODEV): its page cache
//! would show what nobody else has, and keep what nobody else sees. Programs and private mappings go through
//! it, read anew at each mmap(2).

use super::core::{Core, errno};
use crate::error::MmapError;
use crate::file::File;
use copage_coherence::msg::OpenHow;
use fuser::{Errno, FileHandle};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One open.
struct Open {
    id: u64,
    write: bool,
    /// Another one when its session was lost and there is a new one.
    file: Mutex<File>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Direct {
    opens: Mutex<HashMap<u64, Arc<Open>>>,
    last: AtomicU64,
}

impl Core {
    fn direct_file(&self, id: u64, write: bool) -> Result<File, Errno> {
        self.ask(id, |_, node| match write {
            true => node.open_for_writing(OpenHow::Read),
            false => node.open(OpenHow::Read),
        })
    }

    /// Opens a file. The handle is never 0, which all other opens have.
    pub(super) fn open_direct(&self, id: u64, write: bool) -> Result<FileHandle, Errno> {
        let file = Mutex::new(self.direct_file(id, write)?);
        let open = Arc::new(Open { id, write, file });
        let number = self.direct.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.direct.opens.lock().insert(number, open);
        Ok(FileHandle(number))
    }

    pub(super) fn release_direct(&self, handle: FileHandle) {
        // Dropped outside the lock.
        let _ended = self.direct.opens.lock().remove(&handle.0);
    }

    fn direct_open(&self, handle: FileHandle) -> Result<Arc<Open>, Errno> {
        let opens = self.direct.opens.lock();
        opens.get(&handle.0).cloned().ok_or(Errno::EBADF)
    }

    /// Does something with an open file; once more when its session had been lost before.
    fn with_direct<T>(
        &self,
        handle: FileHandle,
        job: impl Fn(&File) -> Result<T, MmapError>,
    ) -> Result<T, Errno> {
        let open = self.direct_open(handle)?;
        let file = open.file.lock().clone();
        let lost_before = file.client().lost().is_some();
        match job(&file) {
            // Nothing was sent.
            Err(MmapError::Lost(_)) if lost_before => {
                let file = self.direct_file(open.id, open.write)?;
                *open.file.lock() = file.clone();
                job(&file).map_err(|e| errno(&e))
            }
            other => other.map_err(|e| errno(&e)),
        }
    }

    pub(super) fn read_direct(
        &self,
        handle: FileHandle,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize, Errno> {
        let buf = Mutex::new(buf);
        self.with_direct(handle, |file| file.read_at(&mut buf.lock(), offset))
    }

    /// `append`: at the end, wherever the kernel thinks that is. (Two guests that append at the same time may
    /// choose the same place.)
    pub(super) fn write_direct(
        &self,
        handle: FileHandle,
        data: &[u8],
        offset: u64,
        append: bool,
    ) -> Result<usize, Errno> {
        let offset = match append {
            true => {
                let id = self.direct_open(handle)?.id;
                self.ask(id, |_, node| node.attr())?.bytes
            }
            false => offset,
        };
        self.with_direct(handle, |file| file.write_at(data, offset))
    }

    pub(super) fn sync_direct(&self, handle: FileHandle) -> Result<(), Errno> {
        self.with_direct(handle, File::sync)
    }

    /// Gives a file another length, by an open of it or without one.
    pub(super) fn resize_direct(
        &self,
        id: u64,
        handle: Option<FileHandle>,
        bytes: u64,
    ) -> Result<(), Errno> {
        match handle.filter(|handle| handle.0 != 0) {
            Some(handle) => self.with_direct(handle, |file| file.set_len(bytes)),
            None => {
                let file = self.direct_file(id, true)?;
                file.set_len(bytes).map_err(|e| errno(&e))
            }
        }
    }
}
