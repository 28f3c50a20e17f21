//! Cached files.

use crate::tree::NodeRef;

/// Names a cached file in the life of one cache; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u64);

/// One file of one share group.
#[derive(Debug)]
pub struct CachedFile {
    /// Its number.
    pub id: FileId,
    pub(crate) node: NodeRef,
}

impl CachedFile {
    /// The host's (device, inode).
    pub fn inode(&self) -> (u64, u64) {
        (self.node.dev, self.node.ino)
    }
}
