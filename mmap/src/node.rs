//! Files and directories of an export, by handle.

use crate::client::{Client, unexpected};
use crate::error::{MmapError, Result};
use crate::file::File;
use crate::place::{Identity, Place};
use crate::quiet::Leaf;
use crate::session::{Session, ended};
use crate::stamp::SessionNo;
use copage_coherence::msg::{
    Attr, DATA_BYTES_MAX, DirReader, FileKind, Handle, NAME_BYTES_MAX, OpenHow, Reply, Request,
    StatFs,
};
use std::fmt;
use std::sync::Arc;

struct NodeInner {
    client: Client,
    /// The handle, and the session it is of. A leaf lock.
    held: Leaf<(SessionNo, Handle)>,
    attr: Attr,
    /// Where it is looked for in the next session.
    place: Arc<Place>,
}

impl Drop for NodeInner {
    fn drop(&mut self) {
        // One reply gave one reference; it goes back without waiting.
        if let Some(session) = self.client.shared().line.present() {
            let (number, node) = *self.held.lock();
            if number == session.number() {
                session.post(&Request::Forget { node, count: 1 });
            }
        }
    }
}

/// A file or directory. Clones are the same reference; when the last is dropped the daemon is told
/// to forget it (queued, never waiting). With a daemon that was started again it is found by its name.
#[derive(Clone)]
pub struct Node {
    inner: Arc<NodeInner>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("ino", &self.inner.attr.ino)
            .finish_non_exhaustive()
    }
}

/// One entry of a directory.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Pass it to [`Node::readdir_page`] to go on behind this entry.
    pub cookie: u64,
    /// Kind.
    pub kind: FileKind,
    /// Inode number on the host.
    pub ino: u64,
    /// Any bytes but `/` and NUL.
    pub name: Vec<u8>,
    /// The node, when nodes were asked for and it could be had; its [`Node::known_attr`] is fresh.
    pub node: Option<Node>,
}

/// Some entries of a directory.
#[derive(Clone, Debug)]
pub struct DirPage {
    /// The entries, in the host's order.
    pub entries: Vec<Entry>,
    /// Nothing comes behind these.
    pub end: bool,
}

impl Node {
    /// Takes over one reference to a handle of a session.
    pub(crate) fn new(
        client: Client,
        held: (SessionNo, Handle),
        attr: Attr,
        place: Arc<Place>,
    ) -> Self {
        Self {
            inner: Arc::new(NodeInner {
                client,
                held: Leaf::new(held),
                attr,
                place,
            }),
        }
    }

    /// The client.
    pub fn client(&self) -> &Client {
        &self.inner.client
    }

    pub(crate) fn place(&self) -> &Arc<Place> {
        &self.inner.place
    }

    /// What makes it the same file in the next session.
    pub(crate) fn identity(&self) -> Identity {
        Identity::from(&self.inner.attr)
    }

    /// Its handle in `session`; found again by its name in one that is new.
    pub(crate) fn handle_in(&self, session: &Session) -> Result<Handle> {
        let number = session.number();
        let (of, handle) = *self.inner.held.lock();
        if of == number {
            return Ok(handle);
        }
        let found = self.inner.place.find(session, self.identity())?;
        let there = {
            let mut held = self.inner.held.lock();
            if held.0 < number {
                *held = (number, found);
                return Ok(found);
            }
            *held
        };
        // Another thread was quicker.
        let spare = Request::Forget {
            node: found,
            count: 1,
        };
        session.post(&spare);
        // Or this session is over.
        (there.0 == number).then_some(there.1).ok_or_else(ended)
    }

    /// The attributes that came with the node; [`Node::attr`] asks for new ones.
    pub fn known_attr(&self) -> &Attr {
        &self.inner.attr
    }

    /// What it is.
    pub fn kind(&self) -> FileKind {
        self.inner.attr.kind
    }

    fn call<'a, T>(
        &self,
        request: impl Fn(Handle) -> Request<'a>,
        mut take: impl FnMut(SessionNo, Reply<'_>) -> Result<T>,
    ) -> Result<T> {
        self.inner.client.shared().in_session(|session| {
            let answer = session.call(&request(self.handle_in(session)?))?;
            take(session.number(), answer.reply()?)
        })
    }

    /// The entry `name` of this directory: one name, any bytes but `/` and NUL, not `.` or `..`.
    /// Links are not followed.
    pub fn lookup(&self, name: &[u8]) -> Result<Self> {
        if name.len() > NAME_BYTES_MAX {
            let text = format!("a name of {} bytes", name.len());
            return Err(MmapError::Path {
                errno: libc::ENAMETOOLONG,
                text,
            });
        }
        if name.is_empty()
            || name == b"."
            || name == b".."
            || name.iter().any(|b| b"/\0".contains(b))
        {
            let name = String::from_utf8_lossy(name);
            return Err(MmapError::Invalid(format!(
                "{name:?} is not the name of one entry"
            )));
        }
        self.call(
            |parent| Request::Lookup { parent, name },
            |number, reply| match reply {
                Reply::Entry { node, attr } => Ok(self.below((number, node), attr, name)),
                other => Err(unexpected("Entry", &other)),
            },
        )
    }

    fn below(&self, held: (SessionNo, Handle), attr: Attr, name: &[u8]) -> Self {
        let place = self.inner.place.below(name);
        Self::new(self.inner.client.clone(), held, attr, place)
    }

    /// Its attributes now.
    pub fn attr(&self) -> Result<Attr> {
        self.call(
            |node| Request::Getattr { node },
            |_, reply| match reply {
                Reply::Attr { attr } => Ok(attr),
                other => Err(unexpected("Attr", &other)),
            },
        )
    }

    fn bytes<'a>(&self, request: impl Fn(Handle) -> Request<'a>) -> Result<Vec<u8>> {
        self.call(request, |_, reply| match reply {
            Reply::Bytes { data } => Ok(data.to_vec()),
            other => Err(unexpected("Bytes", &other)),
        })
    }

    /// Where this symbolic link points.
    pub fn readlink(&self) -> Result<Vec<u8>> {
        self.bytes(|node| Request::Readlink { node })
    }

    /// The value of one extended attribute.
    pub fn getxattr(&self, name: &[u8]) -> Result<Vec<u8>> {
        self.bytes(|node| Request::Getxattr { node, name })
    }

    /// The names of the extended attributes.
    pub fn listxattr(&self) -> Result<Vec<Vec<u8>>> {
        let names = self.bytes(|node| Request::Listxattr { node })?;
        Ok(names
            .split(|&b| b == 0)
            .filter(|n| !n.is_empty())
            .map(<[u8]>::to_vec)
            .collect())
    }

    /// Sizes and quotas of the export.
    pub fn statfs(&self) -> Result<StatFs> {
        self.call(
            |node| Request::Statfs { node },
            |_, reply| match reply {
                Reply::StatFs(statfs) => Ok(statfs),
                other => Err(unexpected("StatFs", &other)),
            },
        )
    }

    /// Some entries of this directory, behind `cookie` (0: from the start), at most `bytes_max`
    /// bytes of them as they are encoded; with a node for each (but `.` and `..`) when `nodes`.
    pub fn readdir_page(&self, cookie: u64, bytes_max: u32, nodes: bool) -> Result<DirPage> {
        let request = |node| Request::Readdir {
            node,
            cookie,
            bytes_max: bytes_max.min(DATA_BYTES_MAX),
            handles: nodes,
        };
        self.call(request, |number, reply| match reply {
            Reply::Dir { end, entries } => {
                // Nodes are made before any error is returned, so that none leaks.
                let mut page = DirPage {
                    entries: Vec::new(),
                    end,
                };
                for entry in DirReader::new(entries) {
                    let entry = entry?;
                    page.entries.push(Entry {
                        cookie: entry.cookie,
                        kind: entry.kind,
                        ino: entry.ino,
                        name: entry.name.to_vec(),
                        node: entry
                            .node
                            .map(|(node, attr)| self.below((number, node), attr, entry.name)),
                    });
                }
                Ok(page)
            }
            other => Err(unexpected("Dir", &other)),
        })
    }

    /// All entries of this directory but `.` and `..`, without nodes.
    pub fn readdir(&self) -> Result<Vec<Entry>> {
        let mut all = Vec::new();
        let mut cookie = 0;
        loop {
            let page = self.readdir_page(cookie, DATA_BYTES_MAX, false)?;
            let Some(last) = page.entries.last() else {
                break;
            };
            cookie = last.cookie;
            all.extend(
                page.entries
                    .into_iter()
                    .filter(|e| e.name != b"." && e.name != b".."),
            );
            if page.end {
                break;
            }
        }
        Ok(all)
    }

    /// Opens this regular file. `Map` to map it, `Read` to read it only; `Pin` to have every page
    /// there for a plain descriptor, answered when they all are.
    pub fn open(&self, how: OpenHow) -> Result<File> {
        File::open(self, how, false)
    }

    /// As [`Node::open`], to write too: a file of a `coherent` export, with `Map` or `Read` (by messages
    /// only). EROFS of exports that nobody may write.
    pub fn open_for_writing(&self, how: OpenHow) -> Result<File> {
        File::open(self, how, true)
    }
}
