//! All that the threads of one client share.

use crate::connect::Dialer;
use crate::error::{MmapError, Result};
use crate::file::FileInner;
use crate::granted::{Granted, Opener};
use crate::line::Line;
use crate::mapped::Mapped;
use crate::pager::space::Space;
use crate::pager::told::Told;
use crate::pager::worker::Job;
use crate::quiet::Leaf;
use crate::session::Session;
use crate::site::{Site, Sites};
use crate::stamp::SessionNo;
use crate::uffd::Uffd;
use copage_coherence::msg::{FileToken, OpenHow};
use crossbeam_channel::Sender;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock, Weak};

/// See the module.
pub(crate) struct Shared {
    pub(crate) line: Line,
    /// How the daemon is found again; `None`: not at all.
    pub(crate) dialer: Option<Dialer>,
    /// The userfaultfd of this client, or why there is none.
    pub(crate) uffd: std::result::Result<Uffd, String>,
    /// The mappings by address. A leaf lock: nothing is called under it.
    pub(crate) space: Leaf<Space>,
    /// The `coherent` files that are open to be mapped. A leaf lock.
    pub(crate) sites: Leaf<Sites>,
    /// Open files by their last session and token, for notices. A leaf lock.
    files: Leaf<HashMap<(SessionNo, FileToken), Weak<FileInner>>>,
    /// To the worker thread.
    pub(crate) jobs: Sender<Job>,
    /// An empty file: what pages that are SIGBUS are mapped from.
    pub(crate) empty: OwnedFd,
    /// To the pager, which is woken when it is idle.
    told: Sender<Told>,
    opener: Opener,
    /// What granted files are mapped with, from the first of them on.
    granted: OnceLock<std::result::Result<Granted, String>>,
}

/// What a client begins with besides its first session.
pub(crate) struct Parts {
    pub(crate) dialer: Option<Dialer>,
    pub(crate) uffd: std::result::Result<Uffd, String>,
    pub(crate) jobs: Sender<Job>,
    pub(crate) told: Sender<Told>,
    pub(crate) empty: OwnedFd,
    pub(crate) opener: Opener,
}

impl Shared {
    /// The mappings of one `coherent` file, of all its opens. A file's content is looked at without the table's
    /// lock: who enters a mapping takes the two the other way round.
    pub(crate) fn of_site(&self, site: &Arc<Site>) -> Vec<Arc<Mapped>> {
        let all = self.space.lock().all();
        all.into_iter().filter(|m| m.file().is_at(site)).collect()
    }

    pub(crate) fn new(line: Line, parts: Parts) -> Self {
        Self {
            line,
            dialer: parts.dialer,
            uffd: parts.uffd,
            space: Leaf::new(Space::default()),
            sites: Leaf::default(),
            files: Leaf::new(HashMap::new()),
            jobs: parts.jobs,
            empty: parts.empty,
            told: parts.told,
            opener: parts.opener,
            granted: OnceLock::new(),
        }
    }

    /// Asks in the session that serves, and again in the next one when that ended before the answer
    /// came: whoever calls sees a delay. Whatever is asked for must be of the session that is given.
    pub(crate) fn in_session<T>(
        &self,
        mut ask: impl FnMut(&Arc<Session>) -> Result<T>,
    ) -> Result<T> {
        loop {
            // The line knows of a session's end before anybody who asks in it does.
            match ask(&self.line.session()?) {
                Err(MmapError::Lost(_)) => {}
                other => return other,
            }
        }
    }

    /// Waits until the worker has done what it was told to do by now.
    pub(crate) fn settle(&self) -> Result<()> {
        let (tell, told) = crossbeam_channel::bounded(1);
        let _ = self.jobs.send(Job::Again(tell));
        told.recv().map(|_| ()).map_err(|_| self.line.lost_error())
    }

    /// Hands something to the pager. Never waits, never fails: a pager that has ended has nobody to
    /// tell.
    pub(crate) fn tell(&self, told: Told) {
        if self.told.send(told).is_ok() {
            self.line.common.wake.signal();
        }
    }

    /// What granted files are mapped with, or the error that says why they cannot be.
    pub(crate) fn granted(&self) -> Result<&Granted> {
        let granted = self
            .granted
            .get_or_init(|| (self.opener)().map(Granted::new));
        granted
            .as_ref()
            .map_err(|why| MmapError::NoGrants(why.clone()))
    }

    pub(crate) fn remember_file(&self, opened: (SessionNo, FileToken), file: &Arc<FileInner>) {
        self.files.lock().insert(opened, Arc::downgrade(file));
    }

    /// Called as a file is dropped, in a forked child too.
    pub(crate) fn forget_file(&self, opened: (SessionNo, FileToken)) {
        if self.line.check_process().is_ok() {
            self.files.lock().remove(&opened);
        }
    }

    pub(crate) fn file(&self, session: SessionNo, token: FileToken) -> Option<Arc<FileInner>> {
        let files = self.files.lock();
        files.get(&(session, token)).and_then(Weak::upgrade)
    }

    /// The files that are open to be mapped, in whichever session.
    pub(crate) fn mappable_files(&self) -> Vec<Arc<FileInner>> {
        let all: Vec<Arc<FileInner>> = {
            let files = self.files.lock();
            files.values().filter_map(Weak::upgrade).collect()
        };
        // Dropping the others may take the lock.
        let mut mappable: Vec<_> = all
            .into_iter()
            .filter(|file| file.how() == OpenHow::Map)
            .collect();
        // One that is just being opened again may be there twice.
        mappable.sort_by_key(Arc::as_ptr);
        mappable.dedup_by(|a, b| Arc::ptr_eq(a, b));
        mappable
    }

    /// The userfaultfd, or the error that says why there is none.
    pub(crate) fn uffd(&self) -> Result<&Uffd> {
        self.uffd
            .as_ref()
            .map_err(|why| MmapError::NoUserfaultfd(why.clone()))
    }
}
