//! Nodes: files and directories held by descriptors that can do nothing but name them.

use crate::cache::Cache;
use crate::config::ExportId;
use crate::error::CacheError;
use crate::limits::{LINK_BYTES_MAX, NAME_BYTES_MAX};
use dashmap::DashMap;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

/// The kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// Anything else: shown, never opened.
    Other,
}

impl Kind {
    pub(crate) fn of(file_type: FileType) -> Self {
        match file_type {
            FileType::RegularFile => Self::Regular,
            FileType::Directory => Self::Directory,
            FileType::Symlink => Self::Symlink,
            _ => Self::Other,
        }
    }
}

/// What `stat` shows. Times are (seconds, nanoseconds) since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Kind.
    pub kind: Kind,
    /// The whole `st_mode`: for what is neither file, directory nor link it says what it is.
    pub mode: u32,
    /// Links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number on the host's file system.
    pub ino: u64,
    /// The host's device number.
    pub dev: u64,
    /// For device files.
    pub rdev: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// 512-byte blocks on the host's disk.
    pub blocks: u64,
    /// Last read.
    pub atime: (i64, u32),
    /// Last change of content.
    pub mtime: (i64, u32),
    /// Last change of anything.
    pub ctime: (i64, u32),
}

impl Attr {
    /// Permission bits, 0o7777.
    pub fn perm(&self) -> u16 {
        (self.mode & 0o7777) as u16
    }

    fn from_statx(s: &Statx) -> Self {
        Self {
            kind: Kind::of(FileType::from_raw_mode(s.stx_mode.into())),
            mode: s.stx_mode.into(),
            nlink: s.stx_nlink,
            uid: s.stx_uid,
            gid: s.stx_gid,
            ino: s.stx_ino,
            dev: rustix::fs::makedev(s.stx_dev_major, s.stx_dev_minor),
            rdev: rustix::fs::makedev(s.stx_rdev_major, s.stx_rdev_minor),
            bytes: s.stx_size,
            blocks: s.stx_blocks,
            atime: (s.stx_atime.tv_sec, s.stx_atime.tv_nsec),
            mtime: (s.stx_mtime.tv_sec, s.stx_mtime.tv_nsec),
            ctime: (s.stx_ctime.tv_sec, s.stx_ctime.tv_nsec),
        }
    }
}

/// What `statfs` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatFs {
    /// The host's file system, in bytes: all, free, free for users.
    pub bytes: (u64, u64, u64),
    /// Its inodes: all, free.
    pub inodes: (u64, u64),
    /// Longest name in bytes.
    pub name_bytes_max: u32,
}

/// A file or directory of an export: an `O_PATH` descriptor, which stays with the inode whatever
/// happens to its name. All sessions share the node of one inode.
#[derive(Debug)]
pub struct Node {
    fd: OwnedFd,
    /// The export it was found in.
    pub export: ExportId,
    /// The host's device number.
    pub dev: u64,
    /// The inode.
    pub ino: u64,
    /// What it is; an inode never changes its kind.
    pub kind: Kind,
}

/// A counted reference to a node.
pub type NodeRef = Arc<Node>;

impl Node {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The path by which the kernel opens this very inode again.
    pub(crate) fn proc_path(&self) -> String {
        proc_path(self.fd.as_fd())
    }
}

/// `/proc/self/fd/N`, which follows to the inode and to nothing else.
pub(crate) fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Nodes that somebody holds, by export and inode.
#[derive(Debug, Default)]
pub(crate) struct Nodes {
    by_inode: DashMap<(ExportId, u64, u64), Weak<Node>>,
}

impl Nodes {
    /// The node of an `O_PATH` descriptor: the one that others hold already, if there is one. While
    /// a node lives its descriptor keeps the inode, so the numbers are not used again.
    pub(crate) fn adopt(
        &self,
        export: ExportId,
        fd: OwnedFd,
    ) -> Result<(NodeRef, Attr), CacheError> {
        let attr = stat(fd.as_fd())?;
        let key = (export, attr.dev, attr.ino);
        let mut slot = self.by_inode.entry(key).or_default();
        if let Some(node) = slot.upgrade() {
            return Ok((node, attr));
        }
        let node = Arc::new(Node {
            fd,
            export,
            dev: attr.dev,
            ino: attr.ino,
            kind: attr.kind,
        });
        *slot = Arc::downgrade(&node);
        drop(slot);
        self.sweep_sometimes();
        Ok((node, attr))
    }

    /// Entries of nodes that nobody holds go when they are many against those in use.
    fn sweep_sometimes(&self) {
        let entries = self.by_inode.len();
        if entries >= 1024 && entries.is_power_of_two() {
            self.by_inode.retain(|_, node| node.strong_count() > 0);
        }
    }

    pub(crate) fn live(&self) -> u64 {
        self.by_inode
            .iter()
            .filter(|e| e.value().strong_count() > 0)
            .count() as u64
    }
}

pub(crate) fn stat(fd: BorrowedFd<'_>) -> Result<Attr, CacheError> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::statx(fd, c"", flags, StatxFlags::BASIC_STATS)
        .map(|s| Attr::from_statx(&s))
        .map_err(|e| CacheError::io("stat", e))
}

/// One component, or why not.
pub(crate) fn check_name(name: &[u8]) -> Result<CString, CacheError> {
    if name.is_empty() {
        return Err(CacheError::BadName("it is empty"));
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(CacheError::Io {
            what: "a name has at most 255 bytes",
            errno: libc::ENAMETOOLONG,
        });
    }
    if name == b"." || name == b".." {
        return Err(CacheError::BadName(
            "'.' and '..' are resolved by the guest",
        ));
    }
    if name.contains(&b'/') {
        return Err(CacheError::BadName(
            "it holds a '/': one component at a time",
        ));
    }
    CString::new(name).map_err(|_| CacheError::BadName("it holds a NUL"))
}

/// Opens one component below `dir` to name it: never through a symbolic link, never out of `dir`,
/// never into another mount.
pub(crate) fn open_component(dir: BorrowedFd<'_>, name: &CString) -> Result<OwnedFd, CacheError> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    loop {
        match rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve) {
            Ok(fd) => return Ok(fd),
            // EAGAIN: a rename somewhere raced with the check of BENEATH; the kernel asks to retry.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::XDEV) => {
                return Err(CacheError::Io {
                    what: "another file system is mounted there, which is not part of the export",
                    errno: libc::EXDEV,
                });
            }
            Err(e) => return Err(CacheError::io("lookup", e)),
        }
    }
}

impl Cache {
    /// The root directory of an export.
    pub fn root(&self, export: ExportId) -> Result<NodeRef, CacheError> {
        self.exports.root(export)
    }

    /// One name in a directory, with its attributes.
    pub fn lookup(&self, parent: &NodeRef, name: &[u8]) -> Result<(NodeRef, Attr), CacheError> {
        self.exports.check_live(parent.export)?;
        let name = check_name(name)?;
        if parent.kind != Kind::Directory {
            return Err(CacheError::NotDirectory);
        }
        let fd = open_component(parent.fd(), &name)?;
        self.nodes.adopt(parent.export, fd)
    }

    /// The attributes of a node, from the host's file system.
    pub fn attr(&self, node: &NodeRef) -> Result<Attr, CacheError> {
        self.exports.check_live(node.export)?;
        stat(node.fd())
    }

    /// The target of a symbolic link, which the daemon itself never follows.
    pub fn readlink(&self, node: &NodeRef) -> Result<Vec<u8>, CacheError> {
        self.exports.check_live(node.export)?;
        if node.kind != Kind::Symlink {
            return Err(CacheError::Io {
                what: "not a symbolic link",
                errno: libc::EINVAL,
            });
        }
        rustix::fs::readlinkat(node.fd(), c"", Vec::with_capacity(LINK_BYTES_MAX))
            .map(CString::into_bytes)
            .map_err(|e| CacheError::io("readlink", e))
    }

    /// Sizes of the file system that holds a node.
    pub fn statfs(&self, node: &NodeRef) -> Result<StatFs, CacheError> {
        self.exports.check_live(node.export)?;
        let s = rustix::fs::fstatvfs(node.fd()).map_err(|e| CacheError::io("statfs", e))?;
        let unit = s.f_frsize;
        Ok(StatFs {
            bytes: (
                s.f_blocks.saturating_mul(unit),
                s.f_bfree.saturating_mul(unit),
                s.f_bavail.saturating_mul(unit),
            ),
            inodes: (s.f_files, s.f_ffree),
            name_bytes_max: s.f_namemax.try_into().unwrap_or(NAME_BYTES_MAX as u32),
        })
    }
}
