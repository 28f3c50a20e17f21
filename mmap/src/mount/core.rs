//! What the kernel's requests, the openers and the watcher of changes share.

use super::direct::Direct;
use super::limits::TTL;
use super::linger::Lingering;
use super::link::{Link, Live};
use super::open::Opens;
use super::table::{ROOT, Table, same_content};
use crate::error::MmapError;
use crate::node::Node;
use copage_coherence::msg::{Attr, FileKind};
use fuser::{Errno, FileAttr, FileType, INodeNo, Notifier};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub(super) struct Core {
    pub(super) link: Link,
    /// Held to look and to change, never over a request to the daemon.
    pub(super) table: Mutex<Table<Node, Opens>>,
    /// Files on frames can be had; goes to false for good when the kernel refuses one.
    pub(super) passthrough: AtomicBool,
    /// Opens in page-cache form.
    pub(super) page_cache_opens: AtomicUsize,
    /// A leaf lock, taken with the table's at most.
    pub(super) lingering: Mutex<Lingering>,
    /// The export is one that guests write; its files are opened there.
    coherent: bool,
    pub(super) direct: Direct,
    /// Set when the mount is up.
    pub(super) notifier: OnceLock<Notifier>,
}

impl Core {
    pub(super) fn new(link: Link, coherent: bool) -> Self {
        let live = link.last();
        let root = live.export.root();
        let attr = *root.known_attr();
        let table = Table::new(live.number, root, attr, live.nodes_max());
        Self {
            link,
            table: Mutex::new(table),
            passthrough: AtomicBool::new(false),
            page_cache_opens: AtomicUsize::new(0),
            lingering: Mutex::new(Lingering::default()),
            coherent,
            direct: Direct::default(),
            notifier: OnceLock::new(),
        }
    }

    /// Is the export one that guests write?
    pub(super) fn is_coherent(&self) -> bool {
        self.coherent
    }

    /// How long the kernel may believe what it was told. Of files that others write: not at all.
    pub(super) fn ttl(&self) -> Duration {
        match self.coherent {
            true => Duration::ZERO,
            false => TTL,
        }
    }

    /// A session that works, or EIO.
    pub(super) fn live(&self) -> Result<Arc<Live>, Errno> {
        let begun = |live: &Live| {
            let mut spare = Vec::new();
            self.table.lock().new_session(
                live.number,
                live.export.root(),
                live.nodes_max(),
                &mut spare,
            );
        };
        self.link.live(begun).ok_or(Errno::EIO)
    }

    /// The handle of a node id in the present session.
    fn node(&self, id: u64) -> Result<(Arc<Live>, Node), Failure> {
        let live = self.live()?;
        let route = self
            .table
            .lock()
            .route(id, live.number)
            .ok_or(Errno::ESTALE)?;
        let (_, mut node) = route.start;
        for (child, name) in route.below {
            node = node.lookup(&name).map_err(|e| match e.errno() {
                // Renamed or deleted: whoever came by a path looks again.
                libc::ENOENT | libc::ENOTDIR => Failure::Final(Errno::ESTALE),
                _ => Failure::from(e),
            })?;
            let mut spare = Vec::new();
            let mut table = self.table.lock();
            if !table.is_same_file(child, node.known_attr()) {
                return Err(Errno::ESTALE.into());
            }
            table.set_node(child, live.number, node.clone(), &mut spare);
            drop(table);
        }
        Ok((live, node))
    }

    /// Asks the daemon about a node, again when the session was lost meanwhile and another could be
    /// begun.
    pub(super) fn ask<T>(
        &self,
        id: u64,
        question: impl Fn(&Live, &Node) -> Result<T, MmapError>,
    ) -> Result<T, Errno> {
        let once = || {
            let (live, node) = self.node(id)?;
            question(&live, &node).map_err(Failure::from)
        };
        match once() {
            Err(Failure::Lost) => once().map_err(Failure::errno),
            other => other.map_err(Failure::errno),
        }
    }

    /// A lookup in session `session` gave `node`: its id and attributes for the kernel.
    pub(super) fn enter(&self, parent: u64, name: &[u8], session: u64, node: Node) -> FileAttr {
        let attr = *node.known_attr();
        let mut spare = Vec::new();
        let id = self.table.lock().enter(
            parent,
            name,
            session,
            node,
            attr,
            |entry, new| {
                entry.open.on_frames().is_some_and(|file| {
                    file.changed()
                        || entry
                            .attr
                            .as_ref()
                            .is_none_or(|old| !same_content(old, new))
                })
            },
            &mut spare,
        );
        file_attr(id, &attr)
    }

    /// The attributes of a node. Those of a file that is open on frames are its open content's.
    pub(super) fn attr(&self, id: u64) -> Result<FileAttr, Errno> {
        let is_open = |e: &super::table::Entry<Node, Opens>| e.open.on_frames().is_some();
        let fresh = if self.link.last().is_away() && self.table.lock().get(id).is_some_and(is_open)
        {
            // Nobody who uses an open file waits for the daemon.
            Err(Errno::EIO)
        } else {
            self.ask(id, |_, node| node.attr())
        };
        let mut table = self.table.lock();
        let entry = table.get_mut(id).ok_or(Errno::ESTALE)?;
        let open_attr = entry.attr.filter(|_| entry.open.on_frames().is_some());
        let attr = match (fresh, open_attr) {
            (Ok(fresh), Some(open)) if !same_content(&fresh, &open) => Attr {
                bytes: open.bytes,
                blocks: open.blocks,
                mtime: open.mtime,
                ctime: open.ctime,
                ..fresh
            },
            (Ok(fresh), _) => {
                entry.attr = Some(fresh);
                fresh
            }
            // No daemon: what is open on frames goes on.
            (Err(_), Some(open)) => open,
            (Err(errno), None) => return Err(errno),
        };
        Ok(file_attr(id, &attr))
    }

    /// The kernel is to ask for the attributes anew and, if `data`, to drop its pages. Never called
    /// by a thread that answers the kernel: dropping waits for reads under way.
    pub(super) fn invalidate(&self, id: u64, data: bool) {
        if let Some(notifier) = self.notifier.get() {
            let offset = if data { 0 } else { -1 };
            // What fails is a node that the kernel forgot, or a mount that is over.
            if let Err(error) = notifier.inval_inode(INodeNo(id), offset, 0) {
                tracing::debug!(id, %error, "invalidating");
            }
        }
    }

    pub(super) fn passthrough(&self) -> bool {
        self.passthrough.load(Ordering::Relaxed)
    }
}

/// How a question failed.
enum Failure {
    /// With the session; another may answer it.
    Lost,
    Final(Errno),
}

impl Failure {
    fn errno(self) -> Errno {
        match self {
            Self::Lost => Errno::EIO,
            Self::Final(errno) => errno,
        }
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Final(errno)
    }
}

impl From<MmapError> for Failure {
    fn from(error: MmapError) -> Self {
        match error {
            MmapError::Lost(_) => Self::Lost,
            other => Self::Final(errno(&other)),
        }
    }
}

/// The errno that a program is shown.
pub(super) fn errno(error: &MmapError) -> Errno {
    match error {
        // ENOTCONN would look as if the mount's process were gone.
        MmapError::Lost(_) => Errno::EIO,
        other => {
            tracing::debug!(error = %other, "refused");
            Errno::from_i32(other.errno())
        }
    }
}

/// Attributes as the kernel takes them.
pub(super) fn file_attr(id: u64, attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(id),
        size: attr.bytes,
        blocks: attr.blocks,
        atime: time(attr.atime),
        mtime: time(attr.mtime),
        ctime: time(attr.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(attr.kind),
        perm: attr.perm & 0o7777,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        // Devices are never opened here, so their numbers name nothing.
        rdev: 0,
        blksize: copage_grants::PAGE_SIZE as u32,
        flags: 0,
    }
}

/// Attributes of an entry that could not be looked up: enough to show its name. They hold for no time
/// at all.
pub(super) fn unknown_attr(id: u64, kind: FileKind) -> FileAttr {
    FileAttr {
        ino: INodeNo(id),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: file_type(kind),
        perm: 0,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: copage_grants::PAGE_SIZE as u32,
        flags: 0,
    }
}

/// Pipes, sockets and devices are shown as sockets, which the kernel opens for nobody.
fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Other => FileType::Socket,
    }
}

fn time((seconds, nanoseconds): (i64, u32)) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let whole = if seconds >= 0 {
        UNIX_EPOCH.checked_add(whole)
    } else {
        UNIX_EPOCH.checked_sub(whole)
    };
    let nanoseconds = Duration::from_nanos(nanoseconds.into());
    whole
        .and_then(|t| t.checked_add(nanoseconds))
        .unwrap_or(UNIX_EPOCH)
}

/// The directory that `..` of `id` is.
pub(super) fn parent_of(table: &Table<Node, Opens>, id: u64) -> u64 {
    table.get(id).map_or(ROOT, |entry| entry.parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_and_absurd_ones_are_taken() {
        assert_eq!(
            time((-1, 500_000_000)),
            UNIX_EPOCH - Duration::from_millis(500)
        );
        assert_eq!(time((1, 1)), UNIX_EPOCH + Duration::new(1, 1));
        assert!(time((i64::MAX, 999_999_999)) > UNIX_EPOCH && time((i64::MIN, 0)) <= UNIX_EPOCH);
    }
}
