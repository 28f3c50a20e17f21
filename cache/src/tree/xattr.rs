//! Extended attributes, to read.

use super::node::NodeRef;
use crate::cache::Cache;
use crate::error::CacheError;
use crate::limits::XATTR_BYTES_MAX;
use std::ffi::CString;

/// Attributes that say something to a guest. `trusted.*` is the host administrator's own.
fn shown(name: &[u8]) -> bool {
    [&b"user."[..], b"security.", b"system.posix_acl_"]
        .iter()
        .any(|p| name.starts_with(p))
}

impl Cache {
    /// The value of one attribute; ENODATA where there is none.
    pub fn getxattr(&self, node: &NodeRef, name: &[u8]) -> Result<Vec<u8>, CacheError> {
        self.exports.check_live(node.export)?;
        if !shown(name) {
            return Err(CacheError::Io {
                what: "getxattr",
                errno: libc::ENODATA,
            });
        }
        if name.len() > 255 {
            return Err(CacheError::Io {
                what: "getxattr",
                errno: libc::ERANGE,
            });
        }
        let name = CString::new(name).map_err(|_| CacheError::BadName("it holds a NUL"))?;
        let mut value = vec![0; XATTR_BYTES_MAX];
        // Through /proc, because the kernel refuses attributes of O_PATH descriptors; the link
        // leads to this inode and no further.
        let read = rustix::fs::getxattr(node.proc_path(), &name, &mut value[..])
            .map_err(|e| CacheError::io("getxattr", e))?;
        value.truncate(read);
        value.shrink_to_fit();
        Ok(value)
    }

    /// The names, each ended by NUL.
    pub fn listxattr(&self, node: &NodeRef) -> Result<Vec<u8>, CacheError> {
        self.exports.check_live(node.export)?;
        let mut names = vec![0; XATTR_BYTES_MAX];
        let read = match rustix::fs::listxattr(node.proc_path(), &mut names[..]) {
            Ok(read) => read,
            Err(rustix::io::Errno::OPNOTSUPP) => 0,
            Err(e) => return Err(CacheError::io("listxattr", e)),
        };
        Ok(names[..read]
            .split_inclusive(|b| *b == 0)
            .filter(|name| shown(name))
            .flatten()
            .copied()
            .collect())
    }
}
