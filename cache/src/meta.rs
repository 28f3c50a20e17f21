//! Operations on names and attributes: they may touch a disk, so they run on threads of their own.

use crate::cache::Cache;
use crate::config::ExportId;
use crate::error::CacheError;
use crate::events::CacheEvent;
use crate::tree::{Attr, Dir, NodeRef, StatFs};

/// A metadata operation for [`Cache::submit`].
#[derive(Clone, Debug)]
pub enum MetaOp {
    /// [`Cache::root`] and its attributes.
    Root {
        /// Which export.
        export: ExportId,
    },
    /// [`Cache::lookup`] and the attributes.
    Lookup {
        /// The directory.
        parent: NodeRef,
        /// One name.
        name: Vec<u8>,
    },
    /// [`Cache::attr`].
    Attr {
        /// Of what.
        node: NodeRef,
    },
    /// [`Cache::readlink`].
    Readlink {
        /// A symbolic link.
        node: NodeRef,
    },
    /// [`Cache::readdir`].
    Readdir {
        /// A directory.
        node: NodeRef,
        /// 0, or the cookie of the last entry seen.
        cookie: u64,
        /// About how many bytes of entries.
        bytes_max: u32,
        /// Look every entry up too.
        nodes: bool,
    },
    /// [`Cache::getxattr`].
    Getxattr {
        /// Of what.
        node: NodeRef,
        /// Which.
        name: Vec<u8>,
    },
    /// [`Cache::listxattr`].
    Listxattr {
        /// Of what.
        node: NodeRef,
    },
    /// [`Cache::statfs`].
    Statfs {
        /// Any node of the file system.
        node: NodeRef,
    },
}

/// What a metadata operation found.
#[derive(Clone, Debug)]
pub enum MetaReply {
    /// To Root and Lookup.
    Entry {
        /// The node.
        node: NodeRef,
        /// Its attributes.
        attr: Attr,
    },
    /// To Attr.
    Attr(Attr),
    /// To Readlink, Getxattr and Listxattr.
    Bytes(Vec<u8>),
    /// To Readdir.
    Dir(Dir),
    /// To Statfs.
    StatFs(StatFs),
}

impl Cache {
    /// Runs `op` on another thread; [`CacheEvent::Meta`] with `ticket` answers it, also when too
    /// many operations wait (EAGAIN).
    pub fn submit(&self, ticket: u64, op: MetaOp) {
        if self.meta_pool.push((ticket, op)).is_err() {
            let error = CacheError::Busy("for names and attributes");
            self.events.send(CacheEvent::Meta {
                ticket,
                result: Err(error),
            });
        }
    }

    pub(crate) fn run_meta(&self, op: MetaOp) -> Result<MetaReply, CacheError> {
        Ok(match op {
            MetaOp::Root { export } => {
                let node = self.root(export)?;
                let attr = self.attr(&node)?;
                MetaReply::Entry { node, attr }
            }
            MetaOp::Lookup { parent, name } => {
                let (node, attr) = self.lookup(&parent, &name)?;
                MetaReply::Entry { node, attr }
            }
            MetaOp::Attr { node } => MetaReply::Attr(self.attr(&node)?),
            MetaOp::Readlink { node } => MetaReply::Bytes(self.readlink(&node)?),
            MetaOp::Readdir {
                node,
                cookie,
                bytes_max,
                nodes,
            } => MetaReply::Dir(self.readdir(&node, cookie, bytes_max, nodes)?),
            MetaOp::Getxattr { node, name } => MetaReply::Bytes(self.getxattr(&node, &name)?),
            MetaOp::Listxattr { node } => MetaReply::Bytes(self.listxattr(&node)?),
            MetaOp::Statfs { node } => MetaReply::StatFs(self.statfs(&node)?),
        })
    }
}
