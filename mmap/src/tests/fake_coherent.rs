//! A `coherent` file of the fake daemon: its disk, its home, and this guest's arena. Other guests are what a
//! test does by itself.

use super::fake_files::{Said, Seen, State, word};
use crate::granted::standin::StandIn;
use copage_coherence::msg::{Generation, GrantedPlace, PageRange, Reply, Request};
use copage_grants::{Access, DomId, PAGE_SIZE, PageIndex, Version, pages_for};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use std::collections::{BTreeMap, HashSet};
use std::os::fd::OwnedFd;

/// See the module.
pub(super) struct Coherent {
    /// What the disk holds.
    pub(super) disk: Vec<u8>,
    /// Pages that the guest writes, and where.
    pub(super) held: BTreeMap<u64, GrantedPlace>,
    arena: OwnedFd,
    common: OwnedFd,
    serial: u32,
    /// Grant pages for writing in the common file.
    pub(super) share: bool,
    /// Refuse to grant these for writing: there is no space.
    pub(super) full: HashSet<u64>,
    pub(super) syncs: u32,
    /// How often the guest was told a place of pages that it had already.
    pub(super) again: u32,
    /// Pages in which another guest counts once, when this one gives them back, and how often it did.
    pub(super) wanted: HashSet<u64>,
    pub(super) theirs: u64,
}

fn file(bytes: u64) -> OwnedFd {
    let file = memfd_create(c"arena", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, bytes).unwrap();
    file
}

fn punch(file: &OwnedFd, page: u64) {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, flags, page * PAGE_SIZE as u64, PAGE_SIZE as u64).unwrap();
}

impl Coherent {
    /// Page by page as the fake's other files begin.
    pub(super) fn new(bytes: u64) -> Self {
        let pages = pages_for(bytes);
        let mut disk: Vec<u8> = (0..pages)
            .flat_map(|page| word(1, page).to_le_bytes().repeat(PAGE_SIZE / 8))
            .collect();
        disk.truncate(bytes as usize);
        Self {
            disk,
            held: BTreeMap::new(),
            arena: file(bytes),
            common: file(bytes),
            serial: 1,
            share: false,
            full: HashSet::new(),
            syncs: 0,
            again: 0,
            wanted: HashSet::new(),
            theirs: 0,
        }
    }

    /// Another daemon: what was in arenas is gone.
    pub(super) fn restart(&mut self) {
        self.held.clear();
        let bytes = self.disk.len() as u64;
        (self.arena, self.common) = (file(bytes), file(bytes));
    }

    /// The common file is another one from now on.
    pub(super) fn renew_common(&mut self) {
        assert!(!self.held.values().any(|at| *at != GrantedPlace::Arena));
        self.serial += 1;
        self.common = file(self.disk.len() as u64);
    }

    fn source(&self, place: GrantedPlace) -> &OwnedFd {
        match place {
            GrantedPlace::Arena => &self.arena,
            _ => &self.common,
        }
    }

    fn page(&self, page: u64) -> [u8; PAGE_SIZE] {
        let mut bytes = [0; PAGE_SIZE];
        let at = page as usize * PAGE_SIZE;
        let end = self.disk.len().min(at + PAGE_SIZE);
        bytes[..end - at].copy_from_slice(&self.disk[at..end]);
        bytes
    }

    fn put(&mut self, page: u64, bytes: &[u8; PAGE_SIZE]) {
        let at = page as usize * PAGE_SIZE;
        let end = self.disk.len().min(at + PAGE_SIZE);
        self.disk[at..end].copy_from_slice(&bytes[..end - at]);
    }

    /// Takes a page back that the guest has: it is said to be unmapped.
    fn take(&mut self, page: u64) {
        if let Some(place) = self.held.remove(&page) {
            let mut bytes = [0; PAGE_SIZE];
            let source = self.source(place);
            rustix::io::pread(source, &mut bytes[..], page * PAGE_SIZE as u64).unwrap();
            punch(source, page);
            if self.wanted.remove(&page) {
                let now = bytes[..8].try_into().map_or(0, u64::from_le_bytes);
                bytes[..8].copy_from_slice(&(now + 1).to_le_bytes());
                self.theirs += 1;
            }
            self.put(page, &bytes);
        }
    }

    /// What the file holds by now, the guest's stores included.
    pub(super) fn now(&self) -> Vec<u8> {
        let mut now = self.disk.clone();
        for (page, place) in &self.held {
            let at = *page as usize * PAGE_SIZE;
            let end = now.len().min(at + PAGE_SIZE);
            let source = self.source(*place);
            rustix::io::pread(source, &mut now[at..end], at as u64).unwrap();
        }
        now
    }
}

impl State {
    fn coherent(&mut self) -> &mut Coherent {
        self.coherent.as_mut().expect("a coherent file")
    }

    /// As another guest: changes a page that this one does not write. Its readers lose it first.
    pub(super) fn change_page(&mut self, page: u64, change: impl FnOnce(&mut [u8; PAGE_SIZE])) {
        self.homes[&self.newest].punch(page, 1);
        let coherent = self.coherent();
        assert!(!coherent.held.contains_key(&page));
        let mut bytes = coherent.page(page);
        change(&mut bytes);
        coherent.put(page, &bytes);
    }

    /// Takes a page that this guest writes by force.
    pub(super) fn tear_out(&mut self, page: u64) {
        self.coherent().take(page);
    }

    /// Was the page asked back, and not all of the answers came?
    fn is_asked_back(&self, page: u64) -> bool {
        let asks = |&(generation, first, count, _): &(u32, u64, u64, u64)| {
            generation == self.newest && (first..first.saturating_add(count)).contains(&page)
        };
        self.recalls.values().any(asks)
    }

    /// Is it a fault for a page that is asked back? No such page is given to anybody until then.
    pub(super) fn is_leaving(&self, request: &Request<'_>) -> bool {
        let Request::Fault {
            range, generation, ..
        } = *request
        else {
            return false;
        };
        let first = range.first.0;
        self.coherent.is_some()
            && generation.0 == self.newest
            && (first..first + u64::from(range.count)).any(|page| self.is_asked_back(page))
    }

    /// Pages that were asked back are said to be unmapped.
    pub(super) fn given_back(&mut self, generation: u32, first: u64, count: u64) {
        if self.coherent.is_none() || self.standin.is_some() || generation != self.newest {
            return;
        }
        let pages = pages_for(self.coherent().disk.len() as u64);
        for page in first..first.saturating_add(count).min(pages) {
            if !self.is_asked_back(page) {
                self.coherent().take(page);
            }
        }
    }

    /// Gives the file another length.
    pub(super) fn resize(&mut self, bytes: u64) {
        let newest = self.newest;
        if let Some(home) = self.homes.get_mut(&newest) {
            home.resize(bytes);
        }
        let coherent = self.coherent();
        coherent.disk.resize(bytes as usize, 0);
        ftruncate(&coherent.arena, bytes).unwrap();
        ftruncate(&coherent.common, bytes).unwrap();
    }

    fn grant(&mut self, range: PageRange, generation: Generation, access: Access) -> Said {
        let error = |errno, text: &'static [u8]| Some((Reply::Error { errno, text }, None));
        let (first, pages) = (range.first.0, pages_for(self.coherent().disk.len() as u64));
        let end = (first + u64::from(range.count.min(self.grant_max))).min(pages);
        if first >= end {
            return error(libc::EINVAL, b"past the end of the file");
        }
        if let Some(standin) = &self.standin {
            let refs = standin.grant(self.newest, self.content(), first, (end - first) as usize);
            if access == Access::ReadWrite {
                standin.let_write(&refs);
            }
            let bytes: Vec<u8> = refs.iter().flat_map(|r| r.to_le_bytes()).collect();
            let granted = Reply::Granted {
                generation,
                range: PageRange {
                    first: PageIndex(first),
                    count: refs.len() as u32,
                },
                granter: DomId(StandIn::GRANTER),
                refs: bytes.leak(),
                access,
                place: GrantedPlace::Home,
                version: Version(1),
            };
            return Some((granted, None));
        }
        let coherent = self.coherent();
        if access == Access::ReadWrite && (first..end).any(|page| coherent.full.contains(&page)) {
            return error(libc::ENOSPC, b"no space");
        }
        let place = match (coherent.held.get(&first), access, coherent.share) {
            (Some(place), _, _) => *place,
            (None, Access::ReadOnly, _) => GrantedPlace::Home,
            (None, Access::ReadWrite, false) => GrantedPlace::Arena,
            (None, Access::ReadWrite, true) => GrantedPlace::Common {
                serial: coherent.serial,
            },
        };
        let mut page = first;
        while page < end {
            let coherent = self.coherent.as_mut().unwrap();
            match (coherent.held.get(&page), place) {
                (Some(at), place) if *at == place => coherent.again += 1,
                (Some(_), _) => break,
                (None, GrantedPlace::Home) => {
                    let bytes = coherent.page(page);
                    self.homes[&self.newest].put(page, &bytes);
                }
                // For reading, behind one that it has for writing.
                (None, _) if access == Access::ReadOnly => break,
                (None, place) => {
                    let bytes = coherent.page(page);
                    let wrote =
                        rustix::io::pwrite(coherent.source(place), &bytes, page * PAGE_SIZE as u64);
                    assert!(wrote.is_ok());
                    coherent.held.insert(page, place);
                    self.homes[&self.newest].punch(page, 1);
                }
            }
            page += 1;
        }
        let access = match place {
            GrantedPlace::Home => Access::ReadOnly,
            _ => Access::ReadWrite,
        };
        let granted = Reply::Granted {
            generation,
            range: PageRange {
                first: PageIndex(first),
                count: (page - first) as u32,
            },
            granter: DomId(0),
            refs: &[],
            access,
            place,
            version: Version(1),
        };
        Some((granted, None))
    }

    /// The answer to what is different of a `coherent` file; `None`: nothing is.
    pub(super) fn handle_coherent(&mut self, request: &Request<'_>) -> Option<Said> {
        self.coherent.as_ref()?;
        let plain = |reply| Some(Some((reply, None)));
        match *request {
            Request::Fault {
                generation,
                range,
                access,
                hint,
                ..
            } if generation.0 == self.newest && !self.stuck => {
                let first = range.first.0;
                if (first..first + u64::from(range.count)).any(|page| self.bad.contains(&page)) {
                    return None;
                }
                self.seen.push(Seen::Fault {
                    generation: generation.0,
                    first,
                    count: range.count,
                    hint,
                });
                Some(self.grant(range, generation, access))
            }
            // Of an older content nothing is held.
            Request::Unmapped {
                generation, range, ..
            } if self.standin.is_none() && generation.0 == self.newest => {
                let pages = pages_for(self.coherent().disk.len() as u64);
                let end = range.first.0 + u64::from(range.count);
                for page in range.first.0..end.min(pages) {
                    // Who was asked for it says so by its Ack.
                    if !self.is_asked_back(page) {
                        self.coherent().take(page);
                    }
                }
                None
            }
            Request::Read { offset, len, .. } => {
                let now = self.coherent().now();
                let from = now.len().min(offset as usize);
                let end = now.len().min(offset as usize + len as usize);
                let data = now[from..end].to_vec();
                plain(Reply::Bytes { data: data.leak() })
            }
            Request::Write { offset, data, .. } => {
                let (from, end) = (offset as usize, offset as usize + data.len());
                if end > self.coherent().disk.len() {
                    self.resize(end as u64);
                }
                for (at, byte) in (from..end).zip(data) {
                    let page = (at / PAGE_SIZE) as u64;
                    match self.coherent().held.get(&page).copied() {
                        Some(place) => {
                            let source = self.coherent().source(place);
                            rustix::io::pwrite(source, &[*byte], at as u64).unwrap();
                        }
                        None => self.change_page(page, |bytes| bytes[at % PAGE_SIZE] = *byte),
                    }
                }
                plain(Reply::Wrote {
                    count: data.len() as u32,
                    bytes: self.coherent().disk.len() as u64,
                })
            }
            Request::Truncate { bytes, .. } => {
                self.resize(bytes);
                plain(Reply::Done)
            }
            Request::Sync { .. } => {
                self.coherent().syncs += 1;
                plain(Reply::Done)
            }
            Request::Arena { common, .. } => {
                let coherent = self.coherent();
                let (serial, file) = match common {
                    true => (coherent.serial, &coherent.common),
                    false => (0, &coherent.arena),
                };
                let file = file.try_clone().unwrap();
                Some(Some((Reply::Arena { serial }, Some(file))))
            }
            _ => None,
        }
    }
}
