//! Paths, resolved on the guest's side.
//!
//! The daemon is asked for one name at a time and follows nothing. Links are followed here as in a
//! chroot at the export's root: an absolute target begins at the root, `..` at the root stays there,
//! and so no path leads out of an export. At most [`LINKS_MAX`] links are followed for one path.

use crate::error::{MmapError, Result};
use crate::export::Export;
use crate::file::File;
use crate::node::Node;
use copage_coherence::msg::{FileKind, NAME_BYTES_MAX, OpenHow};

/// Symbolic links followed for one path (`MAXSYMLINKS`, linux/namei.h).
pub const LINKS_MAX: u32 = 40;
/// The longest path, in bytes, links included (`PATH_MAX`, linux/limits.h).
const PATH_BYTES_MAX: usize = 4096;

/// A tree that paths can be resolved in. The one that counts is [`Node`]'s; tests bring another.
trait Tree: Clone {
    fn kind(&self) -> FileKind;
    fn child(&self, name: &[u8]) -> Result<Self>;
    fn target(&self) -> Result<Vec<u8>>;
}

impl Tree for Node {
    fn kind(&self) -> FileKind {
        Node::kind(self)
    }
    fn child(&self, name: &[u8]) -> Result<Self> {
        self.lookup(name)
    }
    fn target(&self) -> Result<Vec<u8>> {
        self.readlink()
    }
}

/// What a path led to.
#[derive(Clone, Debug)]
pub struct Found<N = Node> {
    /// The file or directory.
    pub node: N,
    /// Its path from the export's root, without links, beginning with `/`.
    pub path: Vec<u8>,
}

/// Is a link at the end of a path followed?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastLink {
    /// Yes, as `open` and `stat` do.
    Follow,
    /// No: the link itself is meant, as `lstat` does.
    Keep,
}

impl Export {
    /// The file or directory at `path`, links followed, the last too. Absolute and relative paths
    /// are the same: both begin at the export's root. Names are any bytes.
    pub fn resolve(&self, path: impl AsRef<[u8]>) -> Result<Node> {
        Ok(self.find(path, LastLink::Follow)?.node)
    }

    /// As [`Export::resolve`], with the path that was found; `last` says whether a link at the end
    /// is followed.
    pub fn find(&self, path: impl AsRef<[u8]>, last: LastLink) -> Result<Found> {
        walk(&self.root(), path.as_ref(), last)
    }

    /// Opens the regular file at `path`.
    pub fn open(&self, path: impl AsRef<[u8]>, how: OpenHow) -> Result<File> {
        self.resolve(path)?.open(how)
    }

    /// As [`Export::open`], to write too: [`Node::open_for_writing`].
    pub fn open_for_writing(&self, path: impl AsRef<[u8]>, how: OpenHow) -> Result<File> {
        self.resolve(path)?.open_for_writing(how)
    }
}

fn error(errno: i32, path: &[u8]) -> MmapError {
    MmapError::Path {
        errno,
        text: String::from_utf8_lossy(path).into_owned(),
    }
}

/// Resolves `path` from `root`.
fn walk<N: Tree>(root: &N, path: &[u8], last: LastLink) -> Result<Found<N>> {
    if path.len() > PATH_BYTES_MAX {
        return Err(error(libc::ENAMETOOLONG, &path[..64]));
    }
    if path.contains(&0) {
        return Err(MmapError::Invalid("a path cannot hold a NUL byte".into()));
    }
    // Directories from the root to where the walk is, with their names; the root is not in it.
    let mut at: Vec<(N, Vec<u8>)> = Vec::new();
    // Names still to go, the next one last. `None` says: what came so far must be a directory.
    let mut todo: Vec<Option<Vec<u8>>> = Vec::new();
    push_names(&mut todo, path);
    let mut links = 0;
    while let Some(step) = todo.pop() {
        let here = at.last().map_or(root, |(node, _)| node);
        if here.kind() != FileKind::Directory {
            return Err(error(libc::ENOTDIR, path));
        }
        let Some(name) = step else { continue };
        match name.as_slice() {
            b"." => continue,
            b".." => {
                at.pop();
                continue;
            }
            name if name.len() > NAME_BYTES_MAX => {
                return Err(error(libc::ENAMETOOLONG, path));
            }
            _ => {}
        }
        let node = here.child(&name).map_err(|e| match e {
            // The daemon names the one name; what the caller asked for says more.
            MmapError::Refused {
                errno: errno @ (libc::ENOENT | libc::ENOTDIR),
                ..
            } => error(errno, path),
            other => other,
        })?;
        let follow = last == LastLink::Follow || !todo.is_empty();
        if node.kind() == FileKind::Symlink && follow {
            links += 1;
            if links > LINKS_MAX {
                return Err(error(libc::ELOOP, path));
            }
            let target = node.target()?;
            if target.is_empty() {
                return Err(error(libc::ENOENT, path));
            }
            let waiting: usize = todo.iter().flatten().map(|name| name.len() + 1).sum();
            if target.len() + waiting > PATH_BYTES_MAX {
                return Err(error(libc::ENAMETOOLONG, path));
            }
            if target.first() == Some(&b'/') {
                at.clear();
            }
            push_names(&mut todo, &target);
        } else {
            at.push((node, name));
        }
    }
    let mut found = Vec::new();
    for (_, name) in &at {
        found.push(b'/');
        found.extend_from_slice(name);
    }
    if found.is_empty() {
        found.push(b'/');
    }
    let node = at.pop().map_or_else(|| root.clone(), |(node, _)| node);
    Ok(Found { node, path: found })
}

/// Puts the names of `path` on `todo`, the first name last.
fn push_names(todo: &mut Vec<Option<Vec<u8>>>, path: &[u8]) {
    if path.ends_with(b"/") {
        todo.push(None);
    }
    let names = path.split(|&b| b == b'/').filter(|name| !name.is_empty());
    todo.extend(names.rev().map(|name| Some(name.to_vec())));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::rc::Rc;

    #[derive(Clone, Debug)]
    enum Toy {
        Dir(Rc<BTreeMap<Vec<u8>, Toy>>),
        File(u32),
        Link(Vec<u8>),
    }

    impl Tree for Toy {
        fn kind(&self) -> FileKind {
            match self {
                Toy::Dir(_) => FileKind::Directory,
                Toy::File(_) => FileKind::Regular,
                Toy::Link(_) => FileKind::Symlink,
            }
        }
        fn child(&self, name: &[u8]) -> Result<Self> {
            assert!(!name.is_empty() && name != b"." && name != b"..");
            let none = || MmapError::Refused {
                errno: libc::ENOENT,
                text: "none".into(),
            };
            match self {
                Toy::Dir(entries) => entries.get(name).cloned().ok_or_else(none),
                _ => panic!("the walk asked a file for a name"),
            }
        }
        fn target(&self) -> Result<Vec<u8>> {
            match self {
                Toy::Link(target) => Ok(target.clone()),
                _ => panic!("the walk read what is no link"),
            }
        }
    }

    fn dir<const N: usize>(entries: [(&[u8], Toy); N]) -> Toy {
        Toy::Dir(Rc::new(
            entries.into_iter().map(|(n, t)| (n.to_vec(), t)).collect(),
        ))
    }

    fn link(target: &[u8]) -> Toy {
        Toy::Link(target.to_vec())
    }

    fn tree() -> Toy {
        dir([
            (b"lib", link(b"usr/lib")),
            (b"self", link(b"self")),
            (b"abs", link(b"/usr/lib/libc")),
            (b"out", link(b"../../../usr/./lib//libc")),
            (b"slash", link(b"usr/lib/")),
            (b"file/", Toy::File(9)),
            (b"f", Toy::File(1)),
            (b"tofile", link(b"f/")),
            (b"empty", link(b"")),
            (
                b"usr",
                dir([(
                    b"lib",
                    dir([
                        (b"libc", Toy::File(2)),
                        (b"\xff\xfe", Toy::File(3)),
                        (b"up", link(b"../..")),
                    ]),
                )]),
            ),
        ])
    }

    fn go(path: &[u8]) -> std::result::Result<(Vec<u8>, u32), i32> {
        match walk(&tree(), path, LastLink::Follow) {
            Ok(Found {
                node: Toy::File(n),
                path,
            }) => Ok((path, n)),
            Ok(Found { path, .. }) => Ok((path, 0)),
            Err(e) => Err(e.errno()),
        }
    }

    #[test]
    fn links_are_followed_from_the_exports_root() {
        let libc = Ok((b"/usr/lib/libc".to_vec(), 2));
        for path in [
            &b"/usr/lib/libc"[..],
            b"usr/lib/libc",
            b"//usr/./lib/../lib/libc",
            b"lib/libc",
            b"abs",
            b"out",
            b"slash/libc",
            b"usr/lib/up/lib/libc",
            b"../../abs",
        ] {
            assert_eq!(go(path), libc, "{}", String::from_utf8_lossy(path));
        }
        assert_eq!(go(b"/lib/\xff\xfe"), Ok((b"/usr/lib/\xff\xfe".to_vec(), 3)));
        for root in [
            &b"/"[..],
            b"",
            b".",
            b"..",
            b"../..",
            b"usr/lib/up",
            b"usr/..",
        ] {
            assert_eq!(go(root), Ok((b"/".to_vec(), 0)));
        }
    }

    #[test]
    fn what_leads_nowhere_has_its_errno() {
        assert_eq!(go(b"nothing"), Err(libc::ENOENT));
        assert_eq!(go(b"usr/nothing/x"), Err(libc::ENOENT));
        assert_eq!(go(b"empty"), Err(libc::ENOENT));
        assert_eq!(go(b"self"), Err(libc::ELOOP));
        for path in [&b"f/x"[..], b"f/", b"f/.", b"f/..", b"tofile", b"abs/"] {
            assert_eq!(
                go(path),
                Err(libc::ENOTDIR),
                "{}",
                String::from_utf8_lossy(path)
            );
        }
        assert_eq!(go(&[b'x'; 256]), Err(libc::ENAMETOOLONG));
        assert_eq!(go(&[b'/'; 5000]), Err(libc::ENAMETOOLONG));
        assert_eq!(go(b"a\0b"), Err(libc::EINVAL));
    }

    #[test]
    fn a_link_at_the_end_can_be_kept() {
        let found = walk(&tree(), b"lib", LastLink::Keep).unwrap();
        assert!(matches!(found.node, Toy::Link(_)));
        assert_eq!(found.path, b"/lib");
        let found = walk(&tree(), b"lib/", LastLink::Keep).unwrap();
        assert_eq!(found.path, b"/usr/lib");
    }

    #[test]
    fn links_that_grow_are_stopped() {
        let long = [b"a/".repeat(1000), b"grow/".repeat(300)].concat();
        let tree = dir([(b"grow", Toy::Link(long)), (b"a", link(b"."))]);
        let errno = walk(&tree, b"grow", LastLink::Follow).unwrap_err().errno();
        assert!(errno == libc::ELOOP || errno == libc::ENAMETOOLONG);
    }
}
