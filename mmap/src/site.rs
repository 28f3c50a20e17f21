//! A `coherent` file as one session has it, however often it is open here: where its pages for writing are
//! mapped from, and which of them are mapped.
//!
//! The daemon knows a session's pages, not its opens: what is asked back is asked of the session, and what
//! the session says to be unmapped must be so in every mapping of every open.

use crate::client::unexpected;
use crate::error::{MmapError, Result};
use crate::place::Identity;
use crate::quiet::Leaf;
use crate::session::Session;
use crate::stamp::SessionNo;
use copage_coherence::msg::{FileToken, GrantedPlace, Reply, Request};
use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};

/// What tells one such file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    /// Its home, as the kernel numbers it.
    Home(u64, u64),
    /// What the daemon says of it. Two files of one host's file in two exports are taken for one: more is
    /// unmapped then than must be, and less is said to be.
    Granted(SessionNo, (u64, u64)),
}

#[derive(Default)]
struct Held {
    /// Pages that are mapped for writing, and in how many mappings.
    pages: HashMap<u64, u32>,
    /// How often pages were mapped for writing.
    mapped: u64,
    /// There may be stores of ours that no Sync has covered.
    stored: bool,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Site {
    arena: Leaf<Option<Arc<OwnedFd>>>,
    /// With its serial.
    common: Leaf<Option<(u32, Arc<OwnedFd>)>>,
    /// A leaf lock.
    held: Leaf<Held>,
}

/// What was mapped for writing when a Sync was sent.
pub(crate) struct Before {
    idle: bool,
    mapped: u64,
}

impl Site {
    /// The file that pages granted at `place` are mapped from; asked for where it is not known yet. `None`:
    /// they are in the home. Not from the pager.
    pub(crate) fn source(
        &self,
        session: &Session,
        token: FileToken,
        place: GrantedPlace,
    ) -> Result<Option<Arc<OwnedFd>>> {
        let known = match place {
            GrantedPlace::Home => return Ok(None),
            GrantedPlace::Arena => self.arena.lock().clone(),
            GrantedPlace::Common { serial } => {
                let common = self.common.lock();
                let same = common.as_ref().filter(|(of, _)| *of == serial);
                same.map(|(_, file)| Arc::clone(file))
            }
        };
        if known.is_some() {
            return Ok(known);
        }
        let common = matches!(place, GrantedPlace::Common { .. });
        let answer = session.call(&Request::Arena {
            file: token,
            common,
        })?;
        let serial = match answer.reply()? {
            Reply::Arena { serial } => serial,
            other => return Err(unexpected("Arena", &other)),
        };
        let none = || MmapError::Protocol("an arena came without its descriptor".into());
        let file = Arc::new(answer.fd.ok_or_else(none)?);
        match place {
            GrantedPlace::Common { serial: wanted } => {
                *self.common.lock() = Some((serial, Arc::clone(&file)));
                // Replaced meanwhile: what was granted is of no use, and is asked for again.
                Ok((serial == wanted).then_some(file))
            }
            _ => {
                *self.arena.lock() = Some(Arc::clone(&file));
                Ok(Some(file))
            }
        }
    }

    /// Pages were mapped for writing in one mapping.
    pub(crate) fn hold(&self, pages: impl Iterator<Item = u64>) {
        let mut held = self.held.lock();
        for page in pages {
            *held.pages.entry(page).or_default() += 1;
        }
        held.mapped += 1;
        held.stored = true;
    }

    /// They are not mapped there any more.
    pub(crate) fn let_go(&self, pages: impl Iterator<Item = u64>) {
        let mut held = self.held.lock();
        for page in pages {
            if let Some(count) = held.pages.get_mut(&page) {
                *count -= 1;
                if *count == 0 {
                    held.pages.remove(&page);
                }
            }
        }
    }

    /// The runs of `first..end` that no mapping has for writing.
    pub(crate) fn free_runs(&self, first: u64, end: u64) -> Vec<(u64, u64)> {
        let held = self.held.lock();
        if held.pages.is_empty() {
            return vec![(first, end)];
        }
        let mut taken: Vec<u64> = held.pages.keys().copied().collect();
        taken.retain(|page| (first..end).contains(page));
        taken.sort_unstable();
        let mut runs = Vec::new();
        let mut at = first;
        for page in taken {
            if at < page {
                runs.push((at, page));
            }
            at = page + 1;
        }
        if at < end {
            runs.push((at, end));
        }
        runs
    }

    /// Before a Sync is sent.
    pub(crate) fn before_sync(&self) -> Before {
        let held = self.held.lock();
        Before {
            idle: held.pages.is_empty(),
            mapped: held.mapped,
        }
    }

    /// A Sync was answered: whatever nobody could store to since it was sent is on the disk.
    pub(crate) fn synced(&self, before: &Before) {
        let mut held = self.held.lock();
        if before.idle && held.mapped == before.mapped {
            held.stored = false;
        }
    }

    /// Its file has another site from now on. `same_session`: all was given back before. Is what was
    /// stored lost?
    pub(crate) fn succeeded_by(&self, next: &Self, same_session: bool) -> bool {
        let (stored, holding) = {
            let held = self.held.lock();
            (held.stored, !held.pages.is_empty())
        };
        let lost = stored && (holding || !same_session);
        if stored && same_session {
            next.held.lock().stored = true;
        }
        lost
    }
}

/// Pages that are mapped for writing as long as this lives.
pub(crate) struct Hold {
    site: Arc<Site>,
    pages: Range<u64>,
}

impl Hold {
    pub(crate) fn new(site: &Arc<Site>, pages: Range<u64>) -> Self {
        site.hold(pages.clone());
        Self {
            site: Arc::clone(site),
            pages,
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.site.let_go(self.pages.clone());
    }
}

/// All of a client.
#[derive(Default)]
pub(crate) struct Sites(HashMap<Key, Weak<Site>>);

impl Sites {
    /// The site of a file: of its home, else of what the daemon of a session calls it.
    pub(crate) fn of(
        &mut self,
        home: Option<&OwnedFd>,
        session: SessionNo,
        identity: Identity,
    ) -> Result<Arc<Site>> {
        let key = match home {
            Some(home) => {
                let stat = rustix::fs::fstat(home.as_fd());
                let stat = stat.map_err(|e| MmapError::sys("fstat of a home", &e.into()))?;
                Key::Home(stat.st_dev, stat.st_ino)
            }
            None => Key::Granted(session, identity.numbers()),
        };
        if let Some(site) = self.0.get(&key).and_then(Weak::upgrade) {
            return Ok(site);
        }
        self.0.retain(|_, site| site.strong_count() > 0);
        let site = Arc::<Site>::default();
        self.0.insert(key, Arc::downgrade(&site));
        Ok(site)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_free_when_the_last_mapping_lets_go() {
        let site = Site::default();
        site.hold([3, 4].into_iter());
        site.hold([4].into_iter());
        assert_eq!(site.free_runs(0, 6), [(0, 3), (5, 6)]);
        site.let_go([3, 4].into_iter());
        assert_eq!(site.free_runs(0, 6), [(0, 4), (5, 6)]);
        assert_eq!(site.free_runs(4, 5), []);
        site.let_go([4].into_iter());
        assert_eq!(site.free_runs(0, 6), [(0, 6)]);
    }

    #[test]
    fn stores_are_lost_with_their_session_unless_a_sync_covered_them() {
        let lost = |site: &Site, same| site.succeeded_by(&Site::default(), same);
        let site = Site::default();
        assert!(!lost(&site, false));
        site.hold([1].into_iter());
        let before = site.before_sync();
        site.synced(&before);
        assert!(lost(&site, true) && lost(&site, false), "still held");
        site.let_go([1].into_iter());
        assert!(!lost(&site, true) && lost(&site, false));
        let before = site.before_sync();
        site.hold([1].into_iter());
        site.let_go([1].into_iter());
        site.synced(&before);
        assert!(lost(&site, false), "stored to while it was synced");
        let before = site.before_sync();
        site.synced(&before);
        assert!(!lost(&site, false));
        site.hold([1].into_iter());
        site.let_go([1].into_iter());
        let next = Site::default();
        assert!(!site.succeeded_by(&next, true));
        assert!(lost(&next, false), "not on the disk for certain");
    }
}
