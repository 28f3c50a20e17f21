//! What an open file and its mappings share, through one session after the other.

use crate::client::{Client, unexpected};
use crate::error::{MmapError, Result};
use crate::place::{Identity, Place};
use crate::quiet::Leaf;
use crate::rebase::rebase;
use crate::session::{Session, ended};
use crate::shared::Shared;
use crate::site::Site;
use crate::stamp::{SessionNo, Stamp};
use copage_coherence::msg::{FileToken, Handle, OpenHow, OpenedFlags, Reply, Request};
use copage_grants::Version;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// The file's content as this client knows it.
#[derive(Clone)]
pub(crate) struct Content {
    pub(crate) stamp: Stamp,
    pub(crate) version: Version,
    /// Length in bytes.
    pub(crate) bytes: u64,
    /// The home's descriptor; one open file for all mappings of the generation, so that the kernel
    /// can join their parts again. `None`: not for mapping, the pages come as grants, or nobody
    /// vouches for any.
    pub(crate) home: Option<Arc<OwnedFd>>,
    /// Of a `coherent` file that may be mapped.
    pub(crate) site: Option<Arc<Site>>,
}

/// What an open file and its mappings share.
pub(crate) struct FileInner {
    pub(crate) client: Client,
    /// The last session it was opened in, and its token there. A leaf lock.
    pub(super) opened: Leaf<(SessionNo, FileToken)>,
    /// Where it is looked for in the next session, and what it must be.
    pub(super) place: Arc<Place>,
    pub(super) identity: Identity,
    pub(super) how: OpenHow,
    /// Opened to write too.
    pub(super) write: bool,
    pub(super) coherent: bool,
    /// Stores that no Sync covered went with the session they were of; told by the next one.
    pub(super) writes_lost: AtomicBool,
    pub(super) pinned: bool,
    pub(super) host_bounded: bool,
    /// Opened to map, without a descriptor: the pages come as grants.
    pub(super) granted: bool,
    /// The version that was opened.
    pub(super) opened_version: Version,
    /// The home that was pinned. A newer content has another home, whose pages need not be there.
    pub(super) pinned_home: Option<Arc<OwnedFd>>,
    /// Held only to look or to replace; mappings are entered in the table under it.
    pub(crate) content: Leaf<Content>,
    /// Rebases queued and not done. While it is not zero the pager lets faults of this file lie:
    /// who brings it down wakes them all.
    pub(crate) rebases: AtomicU32,
    pub(super) closed: AtomicBool,
}

/// What the daemon said to Open.
pub(super) struct Opened {
    pub(super) token: FileToken,
    pub(super) content: Content,
    pub(super) flags: OpenedFlags,
}

pub(super) fn ask_open(
    session: &Session,
    node: Handle,
    how: OpenHow,
    write: bool,
) -> Result<Opened> {
    let answer = session.call(&Request::Open { node, how, write })?;
    match answer.reply()? {
        Reply::Opened {
            file,
            generation,
            version,
            bytes,
            flags,
        } => Ok(Opened {
            token: file,
            content: Content {
                stamp: Stamp::new(session.number(), generation),
                version,
                bytes,
                home: answer.fd.map(Arc::new),
                site: None,
            },
            flags,
        }),
        other => Err(unexpected("Opened", &other)),
    }
}

pub(super) fn site_of(
    shared: &Shared,
    content: Content,
    identity: Identity,
    mappable: bool,
) -> Result<Content> {
    let session = content.stamp.session();
    let site = match mappable {
        true => Some(
            shared
                .sites
                .lock()
                .of(content.home.as_deref(), session, identity)?,
        ),
        false => None,
    };
    Ok(Content { site, ..content })
}

impl FileInner {
    /// Do its pages come as grants?
    pub(crate) fn granted(&self) -> bool {
        self.granted
    }

    /// Is it of a `coherent` export?
    pub(crate) fn coherent(&self) -> bool {
        self.coherent
    }

    /// Does the daemon count which pages are mapped here? Then the pager alone asks for them and says that
    /// they are unmapped.
    pub(crate) fn is_counted(&self) -> bool {
        self.granted || self.coherent
    }

    /// May it be stored to?
    pub(crate) fn writes(&self) -> bool {
        self.write
    }

    /// A content as it comes from the daemon of a session, with its site.
    pub(crate) fn with_site(&self, shared: &Shared, content: Content) -> Result<Content> {
        site_of(
            shared,
            content,
            self.identity,
            self.coherent && self.how == OpenHow::Map,
        )
    }

    /// It has another content from now on.
    pub(crate) fn note_successor(&self, old: &Content, new: &Content) {
        if let (Some(old_site), Some(new_site)) = (&old.site, &new.site)
            && !Arc::ptr_eq(old_site, new_site)
            && old_site.succeeded_by(new_site, old.stamp.session() == new.stamp.session())
        {
            self.writes_lost.store(true, Ordering::SeqCst);
        }
    }

    /// Is this its site?
    pub(crate) fn is_at(&self, site: &Arc<Site>) -> bool {
        let content = self.content.lock();
        content
            .site
            .as_ref()
            .is_some_and(|own| Arc::ptr_eq(own, site))
    }

    /// Were stores lost since this was asked?
    pub(crate) fn take_lost(&self) -> bool {
        self.writes_lost.swap(false, Ordering::SeqCst)
    }

    /// What it was opened for.
    pub(crate) fn how(&self) -> OpenHow {
        self.how
    }

    /// Its token in a session, if it is open there.
    pub(crate) fn token_in(&self, session: SessionNo) -> Option<FileToken> {
        let (of, token) = *self.opened.lock();
        (of == session).then_some(token)
    }

    /// Its token in the session that serves; opened again there if need be.
    pub(crate) fn token(self: &Arc<Self>, session: &Session) -> Result<FileToken> {
        if let Some(token) = self.token_in(session.number()) {
            return Ok(token);
        }
        let shared = self.client.shared();
        if let Some(content) = self.open_again(shared, session)? {
            rebase(shared, self, content);
        }
        self.token_in(session.number()).ok_or_else(ended)
    }

    /// Opens it in a session that is new: it must be the same file. What it holds now, to be shown to
    /// its mappings; `None`: nothing is to be shown (another thread opened it, or it is pinned, and
    /// what was pinned stays).
    pub(crate) fn open_again(
        self: &Arc<Self>,
        shared: &Shared,
        session: &Session,
    ) -> Result<Option<Content>> {
        let number = session.number();
        let node = self.place.find(session, self.identity)?;
        // What was pinned lives on in its descriptor; pinned once more it would be there twice.
        let how = match self.how {
            OpenHow::Pin => OpenHow::Read,
            how => how,
        };
        let opened = ask_open(session, node, how, self.write);
        session.post(&Request::Forget { node, count: 1 });
        let Opened {
            token,
            content,
            flags,
        } = opened?;
        let close = || session.post(&Request::Close { file: token });
        let content = self.with_site(shared, content).inspect_err(|_| close())?;
        let other_way = content.home.is_none() != self.granted;
        if self.how == OpenHow::Map && (other_way || flags.coherent != self.coherent) {
            close();
            return Err(MmapError::Protocol(
                "the daemon shares files in another way than the one before it".into(),
            ));
        }
        shared.remember_file((number, token), self);
        let before = {
            let mut opened = self.opened.lock();
            if opened.0 < number {
                Ok(std::mem::replace(&mut *opened, (number, token)))
            } else {
                Err(opened.0)
            }
        };
        match before {
            Ok(before) => {
                shared.forget_file(before);
                Ok((self.how != OpenHow::Pin).then_some(content))
            }
            Err(of) => {
                shared.forget_file((number, token));
                close();
                if of == number { Ok(None) } else { Err(ended()) }
            }
        }
    }
}

impl Drop for FileInner {
    fn drop(&mut self) {
        let shared = self.client.shared();
        if let Some(session) = shared.line.present()
            && let Some(token) = self.token_in(session.number())
            && !self.closed.load(Ordering::Relaxed)
        {
            // The reply, Done, is for nobody.
            session.post(&Request::Close { file: token });
        }
        if shared.line.check_process().is_ok() {
            shared.forget_file(*self.opened.lock());
        }
    }
}
