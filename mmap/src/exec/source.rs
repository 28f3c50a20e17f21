//! Where a program's pages come from: shared frames, or copies where frames cannot be executed.

use super::elf::{ReadAt, read_fd};
use super::error::ExecError;
use super::limits::COPY_TRIES_MAX;
use super::program::{Place, Share};
use super::resident::resident_pages;
use crate::error::MmapError;
use crate::export::Export;
use crate::file::File;
use crate::mount::same_content;
use crate::node::Node;
use crate::walk::LastLink;
use copage_coherence::msg::{DATA_BYTES_MAX, OpenHow};
use copage_grants::PAGE_SIZE_U64;
use rustix::fs::{MemfdFlags, Mode, OFlags, ResolveFlags, SealFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Where the pages of a program, its loader and its libraries come from.
#[derive(Clone, Copy, Debug)]
pub enum Text<'a> {
    /// The shared frames themselves. Refused by a daemon that has no descriptors to give (Xen).
    Frames,
    /// A mount of the export, whose root this is: this kernel's page cache reads the pages that are
    /// touched, and keeps them once for all processes that run from the same mount.
    PageCache(BorrowedFd<'a>),
    /// Whole copies of the files, for this program alone.
    Copies,
}

/// A file that can be run, or loaded by what runs. Clones are the same open file.
#[derive(Clone, Debug)]
pub struct Pinned {
    inner: Arc<(OwnedFd, Option<File>)>,
    bytes: u64,
}

impl Pinned {
    fn new(descriptor: OwnedFd, bytes: u64, file: Option<File>) -> Self {
        Self {
            inner: Arc::new((descriptor, file)),
            bytes,
        }
    }

    /// What the kernel runs: a frame file, a file of a mount, or a copy.
    pub fn descriptor(&self) -> &OwnedFd {
        &self.inner.0
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn pages(&self) -> u64 {
        self.bytes.div_ceil(PAGE_SIZE_U64)
    }

    /// How many of its pages are in this machine's memory; `None`: the kernel does not tell.
    pub(super) fn resident_pages(&self) -> io::Result<Option<u64>> {
        resident_pages(self.descriptor(), self.bytes)
    }
}

impl ReadAt for Pinned {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        read_fd(self.descriptor(), buf, offset)
    }
}

/// An export, and what becomes of its files when they are run.
pub(super) struct Source<'a> {
    pub(super) export: &'a Export,
    pub(super) text: Text<'a>,
}

impl Share for Source<'_> {
    type Node = Node;
    type File = Pinned;

    fn look(&self, path: &[u8]) -> Result<Option<Place<Node>>, ExecError> {
        match self.export.find(path, LastLink::Follow) {
            Ok(found) => {
                let attr = *found.node.known_attr();
                Ok(Some(Place {
                    node: found.node,
                    path: found.path,
                    attr,
                }))
            }
            Err(e) if matches!(e.errno(), libc::ENOENT | libc::ENOTDIR) => Ok(None),
            Err(source) => Err(share_error(path, source)),
        }
    }

    fn pin(&self, place: &Place<Node>) -> Result<Pinned, ExecError> {
        match self.text {
            Text::Frames => pin(&place.node).map_err(|source| share_error(&place.path, source)),
            Text::PageCache(root) => {
                open_below(root, &place.path).map_err(|errno| ExecError::Sys {
                    call: "opening a program's file in the private mount",
                    source: errno.into(),
                })
            }
            Text::Copies => copy(place),
        }
    }
}

fn share_error(path: &[u8], source: MmapError) -> ExecError {
    ExecError::Share {
        path: String::from_utf8_lossy(path).into_owned(),
        source,
    }
}

fn pin(node: &Node) -> Result<Pinned, MmapError> {
    let file = node.open(OpenHow::Pin)?;
    let descriptor = file.descriptor()?;
    Ok(Pinned::new(descriptor, file.len(), Some(file)))
}

/// `path` has no links in it: they were followed.
fn open_below(root: BorrowedFd<'_>, path: &[u8]) -> Result<Pinned, Errno> {
    let below = path.strip_prefix(b"/").unwrap_or(path);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let descriptor = rustix::fs::openat2(root, below, flags, Mode::empty(), resolve)?;
    let bytes = rustix::fs::fstat(&descriptor)?.st_size.unsigned_abs();
    Ok(Pinned::new(descriptor, bytes, None))
}

/// The whole file in memory of this process's own, as it was at one time.
fn copy(place: &Place<Node>) -> Result<Pinned, ExecError> {
    let of_share = |source| share_error(&place.path, source);
    for _ in 0..COPY_TRIES_MAX {
        let before = place.node.attr().map_err(of_share)?;
        let file = place.node.open(OpenHow::Read).map_err(of_share)?;
        let memory = executable_memory().map_err(|e| memory_error(e.into()))?;
        let mut buf = vec![0; DATA_BYTES_MAX as usize];
        let mut at = 0;
        loop {
            let got = file.read_at(&mut buf, at).map_err(of_share)?;
            if got == 0 {
                break;
            }
            memory.write_all_at(&buf[..got], at).map_err(memory_error)?;
            at += got as u64;
        }
        let after = place.node.attr().map_err(of_share)?;
        if same_content(&before, &after) && after.bytes == at {
            return sealed(&memory, at).map_err(|e| memory_error(e.into()));
        }
    }
    Err(ExecError::Changing {
        path: String::from_utf8_lossy(&place.path).into_owned(),
    })
}

fn memory_error(source: io::Error) -> ExecError {
    ExecError::Sys {
        call: "copying a program's file into memory",
        source,
    }
}

fn executable_memory() -> Result<std::fs::File, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let made = match rustix::fs::memfd_create("copage-exec", flags | MemfdFlags::EXEC) {
        // Kernels before 6.3 do not know the flag, and need none.
        Err(Errno::INVAL) => rustix::fs::memfd_create("copage-exec", flags),
        made => made,
    };
    made.map(Into::into)
}

/// Opened again to read: the kernel runs no file that somebody may write.
fn sealed(memory: &std::fs::File, bytes: u64) -> Result<Pinned, Errno> {
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(memory, seals)?;
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let descriptor = rustix::fs::open(path, flags, Mode::empty())?;
    Ok(Pinned::new(descriptor, bytes, None))
}
