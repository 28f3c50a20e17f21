//! Listings of directories, in batches that go on where the last one ended.

use super::node::{Attr, Kind, NodeRef, check_name, open_component, proc_path};
use crate::cache::Cache;
use crate::error::CacheError;
use crate::limits::{DIR_ENTRY_BYTES, DIR_NODE_BYTES};
use rustix::fs::{Mode, OFlags, RawDir, SeekFrom};
use std::mem::MaybeUninit;

/// Bytes of `getdents` buffer: the longest entry is 280 bytes, and batches of the protocol's size
/// (128 KiB) are reached in a few calls.
const GETDENTS_BYTES: usize = 16 * 1024;

/// One entry.
#[derive(Clone, Debug)]
pub struct DirItem {
    /// Goes on behind this entry when passed to the next call.
    pub cookie: u64,
    /// What it is.
    pub kind: Kind,
    /// Its inode.
    pub ino: u64,
    /// Its name.
    pub name: Vec<u8>,
    /// The node and its attributes: when asked for, for all but `.` and `..`, where they could be had.
    pub node: Option<(NodeRef, Attr)>,
}

/// A batch of entries.
#[derive(Clone, Debug, Default)]
pub struct Dir {
    /// Nothing comes behind these.
    pub end: bool,
    /// The entries.
    pub items: Vec<DirItem>,
}

impl Cache {
    /// Entries of a directory behind `cookie` (0: from the start), about `bytes_max` bytes of them
    /// as they go over the wire, and at least one if there is any. Cookies are those of the host's
    /// file system: they stay good while entries come and go, across sessions and daemons.
    pub fn readdir(
        &self,
        node: &NodeRef,
        cookie: u64,
        bytes_max: u32,
        nodes: bool,
    ) -> Result<Dir, CacheError> {
        self.exports.check_live(node.export)?;
        if node.kind != Kind::Directory {
            return Err(CacheError::NotDirectory);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(proc_path(node.fd()), flags, Mode::empty())
            .map_err(|e| CacheError::io("open directory", e))?;
        if cookie != 0 {
            let bad = CacheError::Io {
                what: "no such place in the directory",
                errno: libc::EINVAL,
            };
            // Cookies of some file systems (ext4) use bit 63: lseek takes them as they are.
            rustix::fs::seek(&fd, SeekFrom::Start(cookie)).map_err(|_| bad)?;
        }
        let mut buffer = [MaybeUninit::uninit(); GETDENTS_BYTES];
        let mut raw = RawDir::new(&fd, &mut buffer);
        let mut dir = Dir::default();
        let mut bytes = 0;
        loop {
            let entry = match raw.next() {
                None => {
                    dir.end = true;
                    return Ok(dir);
                }
                Some(Err(rustix::io::Errno::INTR)) => continue,
                Some(Err(e)) => return Err(CacheError::io("read directory", e)),
                Some(Ok(entry)) => entry,
            };
            let name = entry.file_name().to_bytes();
            bytes += DIR_ENTRY_BYTES + name.len() + if nodes { DIR_NODE_BYTES } else { 0 };
            if bytes > bytes_max as usize && !dir.items.is_empty() {
                return Ok(dir);
            }
            let mut item = DirItem {
                cookie: entry.next_entry_cookie(),
                kind: Kind::of(entry.file_type()),
                ino: entry.ino(),
                name: name.to_vec(),
                node: None,
            };
            let unknown_kind = entry.file_type() == rustix::fs::FileType::Unknown;
            if (nodes || unknown_kind) && name != b"." && name != b".." {
                // Gone meanwhile, or a mount point: listed without a node.
                let found = check_name(name)
                    .and_then(|name| open_component(node.fd(), &name))
                    .and_then(|fd| self.nodes.adopt(node.export, fd));
                if let Ok((child, attr)) = found {
                    item.kind = attr.kind;
                    item.node = nodes.then_some((child, attr));
                }
            }
            dir.items.push(item);
        }
    }
}
