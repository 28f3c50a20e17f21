//! Where a node was found, by names: in the next session it is looked for there again.

use crate::client::unexpected;
use crate::error::{MmapError, Result};
use crate::session::Session;
use copage_coherence::msg::{Attr, FileKind, Handle, Reply, Request};
use std::sync::Arc;

/// The export, and the names below it.
#[derive(Debug)]
pub(crate) struct Place {
    /// `None`: the root of the export that `name` names.
    parent: Option<Arc<Self>>,
    name: Box<[u8]>,
}

/// What says that two nodes are one file: the host's numbers. (One that was deleted and whose number
/// another file was given counts as that file, changed.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    kind: FileKind,
    dev: u64,
    ino: u64,
}

impl Identity {
    /// The host's device and inode numbers.
    pub(crate) fn numbers(self) -> (u64, u64) {
        (self.dev, self.ino)
    }
}

impl From<&Attr> for Identity {
    fn from(attr: &Attr) -> Self {
        Self {
            kind: attr.kind,
            dev: attr.dev,
            ino: attr.ino,
        }
    }
}

/// One reference to a node in a session, given back when dropped unless it is kept.
struct Held<'a> {
    session: &'a Session,
    handle: Option<Handle>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(node) = self.handle {
            self.session.post(&Request::Forget { node, count: 1 });
        }
    }
}

impl Place {
    pub(crate) fn root(export: &[u8]) -> Arc<Self> {
        Arc::new(Self {
            parent: None,
            name: export.into(),
        })
    }

    pub(crate) fn below(self: &Arc<Self>, name: &[u8]) -> Arc<Self> {
        Arc::new(Self {
            parent: Some(Arc::clone(self)),
            name: name.into(),
        })
    }

    /// The export's name, then those below it.
    fn names(&self) -> Vec<&[u8]> {
        let mut names: Vec<&[u8]> = Vec::new();
        let mut at = Some(self);
        while let Some(place) = at {
            names.push(&place.name);
            at = place.parent.as_deref();
        }
        names.reverse();
        names
    }

    fn stale(&self) -> MmapError {
        let path = String::from_utf8_lossy(&self.names().join(&b'/')).into_owned();
        MmapError::Stale { path }
    }

    /// The node that is there now: one reference, if it is the file that `wanted` says.
    pub(crate) fn find(&self, session: &Session, wanted: Identity) -> Result<Handle> {
        let found = self.walk(session).map_err(|error| match error {
            MmapError::Refused {
                errno: libc::ENOENT | libc::ENOTDIR,
                ..
            } => self.stale(),
            other => other,
        });
        let (mut held, attr) = found?;
        // An export is what its name says, whichever directory the administrator put there.
        if self.parent.is_some() && Identity::from(&attr) != wanted {
            return Err(self.stale());
        }
        held.handle.take().ok_or_else(|| self.stale())
    }

    fn walk<'a>(&self, session: &'a Session) -> Result<(Held<'a>, Attr)> {
        let names = self.names();
        let answer = session.call(&Request::Attach { export: names[0] })?;
        let (root, mut attr) = match answer.reply()? {
            Reply::Attached { root, attr, .. } => (root, attr),
            other => return Err(unexpected("Attached", &other)),
        };
        let mut held = Held {
            session,
            handle: Some(root),
        };
        let mut parent = root;
        for name in &names[1..] {
            let answer = session.call(&Request::Lookup { parent, name })?;
            let node = match answer.reply()? {
                Reply::Entry { node, attr: of_it } => {
                    attr = of_it;
                    node
                }
                other => return Err(unexpected("Entry", &other)),
            };
            // The one above is given back here.
            held = Held {
                session,
                handle: Some(node),
            };
            parent = node;
        }
        Ok((held, attr))
    }
}
