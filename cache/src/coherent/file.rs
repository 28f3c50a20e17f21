//! A coherent file: how it is opened, its homes and descriptors.

use super::fill::FillWant;
use super::ranges::Ranges;
use crate::cache::{Cache, now_ms};
use crate::error::CacheError;
use crate::events::{CacheEvent, FileState, OpenHow, RecallReason};
use crate::file::{CachedFile, FileKey, Home, Inner};
use crate::tree::NodeRef;
use copage_grants::{DomId, FrameNo, PageIndex, TrustClass, Where};
use parking_lot::Mutex;
use rustix::fs::{Advice, Mode, OFlags};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// What a coherent file has that does not change, and what is not under its other lock.
#[derive(Debug)]
pub(crate) struct Coherent {
    /// May the daemon write the host's file?
    pub writable: Result<(), Errno>,
    /// See [the module](super).
    pub disk: Mutex<()>,
    /// A write of the daemon's own is under way.
    pub is_writing: AtomicBool,
    /// The number of the last one that ended, of all files'.
    pub own_write: AtomicU64,
}

/// What a coherent file has under its lock.
#[derive(Debug, Default)]
pub(crate) struct Strict {
    /// Whose guests may map it now.
    pub class: TrustClass,
    /// Fills that wait for frames.
    pub fills: VecDeque<FillWant>,
    /// Copies that wait for frames, since when, in ms.
    pub copies: Vec<(PageIndex, FrameNo, u64)>,
    /// Pages with space on the host's disk.
    pub reserved: Ranges,
    /// Errors of the disk so far, each of which every session that had the file open is told once.
    pub errors: u64,
    /// The last of them.
    pub errno: i32,
    /// After such an error: the kernel takes pages for written that are not.
    pub rewrite: bool,
    /// The loop was told that the host changed the file.
    pub is_changed: bool,
    /// The loop was asked for all pages.
    pub is_emptying: bool,
    /// When the lease is tried for again and how long to wait after that, in ms.
    pub lease_retry: Option<(u64, u64)>,
}

impl CachedFile {
    /// Guests may write it, and see what others wrote.
    pub fn is_coherent(&self) -> bool {
        self.coherent.is_some()
    }
}

impl Home {
    /// Where a page that it has is.
    pub(crate) fn at(&self, page: u32) -> Where {
        self.places.get(&page).copied().unwrap_or(Where::Home)
    }

    pub(crate) fn put(&mut self, page: u32, at: Where) {
        if at == Where::Home {
            self.places.remove(&page);
        } else {
            self.places.insert(page, at);
        }
    }

    /// Is a lost frame where the page is to be?
    pub(crate) fn is_taken(&self, page: u32, to: Where) -> bool {
        let there = |(of, at): &(u32, Where)| *of == page && *at == to;
        self.lost.values().any(there)
    }

    /// The pages that several have for writing.
    fn in_common(&self) -> impl Iterator<Item = u32> + '_ {
        let places = self.places.iter();
        places.filter_map(|(page, at)| (*at == Where::Common).then_some(*page))
    }
}

impl Cache {
    /// The cached file of an inode of a coherent export, made when there is none.
    pub(crate) fn coherent_file_of(
        &self,
        key: FileKey,
        node: &NodeRef,
        class: TrustClass,
    ) -> Result<Arc<CachedFile>, CacheError> {
        // One at a time: a second descriptor would break the lease of the first.
        let _opening = self.opening.lock();
        if let Some(file) = self.files.lock().get(&key) {
            return Ok(file.clone());
        }
        let path = node.proc_path();
        let flags = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let open = |more| rustix::fs::open(&path, flags | more, Mode::empty());
        let (data, writable) = match open(OFlags::RDWR) {
            Ok(data) => (data, Ok(())),
            Err(why @ (Errno::ACCESS | Errno::ROFS | Errno::TXTBSY | Errno::PERM)) => {
                let data = open(OFlags::RDONLY).map_err(|e| CacheError::io("open", e))?;
                (data, Err(why))
            }
            Err(e) => return Err(CacheError::io("open", e)),
        };
        // Advice only: without it the kernel reads ahead what nobody asked for.
        let _ = rustix::fs::fadvise(&data, 0, None, Advice::Random);
        let coherent = Coherent {
            writable,
            disk: Mutex::default(),
            is_writing: AtomicBool::new(false),
            own_write: AtomicU64::new(0),
        };
        let id = self.new_file_id();
        let file = CachedFile::new(id, key, node.clone(), data, None, Some(coherent));
        let file = Arc::new(file);
        let mut inner = file.inner.lock();
        inner.strict.class = class;
        inner.watch = self.watches.add(&file);
        self.files.lock().insert(key, file.clone());
        drop(inner);
        Ok(file)
    }

    /// May guests of `class` map the file? A home with holes never leaves its class, so those of one class have it
    /// at a time; `None`: when its pages are out, which were asked for.
    pub(crate) fn admit_class(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
        how: OpenHow,
        class: TrustClass,
    ) -> Option<Result<(), CacheError>> {
        if !self.descriptors || how != OpenHow::Map || inner.strict.class == class {
            return Some(Ok(()));
        }
        if inner.opens.iter().any(|open| open.maps > 0) {
            return Some(Err(CacheError::OtherClass));
        }
        if inner.has_pages() {
            self.want_all_back(file, inner);
            return None;
        }
        inner.strict.class = class;
        Some(self.rehome(file, inner).map(drop))
    }

    /// A new home, when nothing is in the old one any more: `generation` rises, and who had the old one can reach
    /// nothing that comes. Also adopts what the host has made of the file.
    pub fn strict_rehome(&self, file: &Arc<CachedFile>) -> Result<FileState, CacheError> {
        self.rehome(file, &mut file.inner.lock())
    }

    fn rehome(&self, file: &Arc<CachedFile>, inner: &mut Inner) -> Result<FileState, CacheError> {
        if inner.dead {
            return Err(CacheError::Withdrawn);
        }
        if let Some(home) = inner.live.as_mut() {
            self.lose_from(home, 0);
        }
        if inner.has_pages() {
            return Err(CacheError::Busy("for this file's pages"));
        }
        self.retire(file, inner, RecallReason::Changed, now_ms());
        self.begin_generation(file, inner)?;
        inner.strict.is_changed = false;
        inner.strict.reserved = Ranges::default();
        self.look_at(file, inner);
        Ok(inner.state)
    }

    /// A descriptor by which `dom` reaches what it may write of the file's newest home.
    pub fn arena(&self, file: &Arc<CachedFile>, dom: DomId) -> Result<OwnedFd, CacheError> {
        let mut inner = file.inner.lock();
        let home = inner.live.as_mut().ok_or(CacheError::Changing)?;
        let fd = self.backend.arena(home.id, dom)?;
        home.arenas.insert(dom);
        Ok(fd)
    }

    /// The same for what several write, with the serial by which [`super::StrictGrant`] names it.
    pub fn common(&self, file: &Arc<CachedFile>) -> Result<(u32, OwnedFd), CacheError> {
        let mut inner = file.inner.lock();
        let home = inner.live.as_mut().ok_or(CacheError::Changing)?;
        let (serial, fd) = self.backend.common(home.id)?;
        home.common_serial = Some(serial);
        Ok((serial, fd))
    }

    /// May pages be put into the common file? Not while somebody who is gone may store there. When all that was
    /// in it is out, there is another one.
    pub fn strict_can_share(&self, file: &Arc<CachedFile>) -> bool {
        let mut inner = file.inner.lock();
        let Some(home) = inner.live.as_mut() else {
            return false;
        };
        if !home.common_stale {
            return true;
        }
        let lost = home.lost.values().any(|(_, at)| *at == Where::Common);
        if lost || home.in_common().next().is_some() {
            return false;
        }
        match self.backend.renew_common(home.id) {
            Ok(()) => {
                home.common_serial = None;
                home.common_stale = false;
                true
            }
            Err(error) => {
                tracing::warn!(%error, "a common file could not be replaced");
                false
            }
        }
    }

    /// Somebody who is gone may have the common file mapped: all that is in it is wanted back, after which it is
    /// replaced.
    pub(crate) fn outdate_common(&self, file: &Arc<CachedFile>, home: &mut Home) {
        if !std::mem::replace(&mut home.common_stale, true) {
            let pages: Vec<u32> = home.in_common().collect();
            self.send_want_back(file, &pages);
        }
    }

    /// `dom` has the file open no more: its arenas go, but for those in which lost frames are.
    pub(crate) fn end_arenas(&self, inner: &mut Inner, dom: DomId) {
        if !self.descriptors || inner.may_hold_grants(dom) {
            return;
        }
        for home in inner.live.iter_mut().chain(&mut inner.old) {
            let its = |at: &Where| *at == Where::Arena(dom);
            let lost = home.lost.values().any(|(_, at)| its(at));
            let is_in = || lost || home.places.values().any(its);
            if !home.arenas.contains(&dom) || is_in() {
                continue;
            }
            match self.backend.end_arena(home.id, dom) {
                Ok(()) => {
                    home.arenas.remove(&dom);
                }
                Err(error) => tracing::warn!(%dom, %error, "an arena could not be ended"),
            }
        }
    }

    /// The export was removed, or nobody can find the file: it goes when its pages are out.
    pub(crate) fn leave(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        if inner.has_pages() {
            self.want_all_back(file, inner);
        } else {
            self.settle_idle(file, inner);
        }
    }

    pub(crate) fn want_all_back(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        if std::mem::replace(&mut inner.strict.is_emptying, true) {
            return;
        }
        let Some(home) = inner.live.as_ref() else {
            return;
        };
        let pages: Vec<u32> = home.index.pages().into_iter().map(|(p, _)| p).collect();
        self.send_want_back(file, &pages);
    }

    pub(crate) fn tell_changed(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        inner.state.host_bounded = true;
        if !std::mem::replace(&mut inner.strict.is_changed, true) {
            self.events
                .send(CacheEvent::HostChanged { file: file.clone() });
        }
    }
}

impl Inner {
    /// Pages are there, or on their way.
    pub(crate) fn has_pages(&self) -> bool {
        let live = |home: &Home| !home.index.is_empty() || home.busy > 0;
        self.live.as_ref().is_some_and(live)
    }
}
