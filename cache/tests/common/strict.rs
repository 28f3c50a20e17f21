//! The part of the machine that tests of coherent files need: it knows who holds which page how, asks guests
//! that obey, saves before anybody else sees a page, and takes pages back when it is asked to.

#![allow(dead_code, clippy::unwrap_used, clippy::panic, clippy::unreachable)]

use crate::common::*;
use copage_cache::*;
use copage_grants::*;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One page as the machine has it.
#[derive(Clone, Debug, Default)]
pub struct Held {
    pub readers: Vec<u16>,
    pub writers: Vec<u16>,
    pub shared: bool,
    pub dirty: bool,
}

pub struct Driver {
    pub rig: Rig,
    pub file: Arc<CachedFile>,
    pub frames: BTreeMap<u64, FrameNo>,
    pub held: BTreeMap<u64, Held>,
    /// Taken when they were wanted back.
    pub taken: u64,
    /// Pages of which a save or a copy is under way: nothing else is done with them.
    busy: BTreeSet<u64>,
    /// Frames that fenced guests may have mapped.
    lost: BTreeSet<FrameNo>,
    pub host_wants: u64,
    pub host_changed: u64,
}

pub fn coherent_rig(backend: Arc<dyn Backend>, config: CacheConfig) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    coherent_rig_in(backend, config, dir)
}

fn coherent_rig_in(backend: Arc<dyn Backend>, config: CacheConfig, dir: tempfile::TempDir) -> Rig {
    let path = dir.path().to_owned();
    let spec = ExportSpec {
        mode: ExportMode::Coherent,
        ..spec("e", path)
    };
    Rig::of(backend, config, dir, spec)
}

/// The export is not the rig's directory.
pub fn coherent_rig_at(backend: Arc<dyn Backend>, config: CacheConfig, path: &Path) -> Rig {
    let spec = ExportSpec {
        mode: ExportMode::Coherent,
        ..spec("e", path.to_owned())
    };
    Rig::of(backend, config, tempfile::tempdir().unwrap(), spec)
}

impl Driver {
    /// Guests 1 to `guests` have the file `f` open, which holds `data`. Without a lease, so that the test can look
    /// at the host's file.
    pub fn new(frames_max: u32, data: &[u8], guests: u16) -> Self {
        let config = CacheConfig {
            lease_signal: None,
            ..config(frames_max)
        };
        Self::with(coherent_rig(local(true), config), data, guests)
    }

    /// The same with leases.
    pub fn leased(frames_max: u32, data: &[u8], guests: u16) -> Self {
        Self::with(coherent_rig(local(true), config(frames_max)), data, guests)
    }

    pub fn with(mut rig: Rig, data: &[u8], guests: u16) -> Self {
        rig.write("f", data);
        let mut file = None;
        for guest in 1..=guests {
            let done = rig
                .open_to("f", OpenHow::Map, who(guest), true)
                .unwrap_or_else(|e| panic!("{e}"));
            assert!(done.state.coherent);
            file = Some(done.file);
        }
        Self::of(rig, file.unwrap())
    }

    /// Of a file that is open.
    pub fn of(rig: Rig, file: Arc<CachedFile>) -> Self {
        Self {
            rig,
            file,
            frames: BTreeMap::new(),
            held: BTreeMap::new(),
            taken: 0,
            busy: BTreeSet::new(),
            lost: BTreeSet::new(),
            host_wants: 0,
            host_changed: 0,
        }
    }

    pub fn cache(&self) -> Arc<Cache> {
        self.rig.cache.clone()
    }

    pub fn host(&self) -> Vec<u8> {
        std::fs::read(self.rig.path("f")).unwrap()
    }

    pub fn bytes(&self) -> u64 {
        self.cache().current(&self.file).bytes
    }

    /// The first event that `pick` wants; what else comes meanwhile is served.
    pub fn wait_for<T>(&mut self, what: &str, mut pick: impl FnMut(&CacheEvent) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            let found = self
                .rig
                .strict
                .iter()
                .enumerate()
                .find_map(|(n, e)| Some((n, pick(e)?)));
            if let Some((n, value)) = found {
                self.rig.strict.remove(n);
                return value;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "no {what}");
            self.serve();
            self.rig.pump(Duration::from_millis(2));
        }
    }

    /// Pages that are wanted back are taken, as far as they can be.
    pub fn serve(&mut self) {
        let busy = !self.busy.is_empty();
        let is_ask = |e: &CacheEvent| match e {
            CacheEvent::WantBack { .. } => true,
            CacheEvent::HostWants { .. } | CacheEvent::HostChanged { .. } => !busy,
            _ => false,
        };
        while let Some(n) = self.rig.strict.iter().position(is_ask) {
            match self.rig.strict.remove(n) {
                CacheEvent::WantBack { pages, .. } => {
                    // Taking one saves it, which may bring more to serve.
                    for page in pages {
                        if self.busy.contains(&page.0) {
                            self.cache().strict_keep(&self.file, page);
                        } else {
                            self.take(page.0);
                            self.taken += 1;
                        }
                    }
                }
                CacheEvent::HostWants { file } => {
                    self.host_wants += 1;
                    self.take_from(0);
                    self.cache().strict_let_host_in(&file);
                }
                CacheEvent::HostChanged { file } => {
                    self.host_changed += 1;
                    self.take_from(0);
                    let until = Instant::now() + Duration::from_secs(10);
                    // What was being filled is there a moment later: the daemon tries again too.
                    while let Err(error) = self.cache().strict_rehome(&file) {
                        assert!(Instant::now() < until, "{error}");
                        self.rig.pump(Duration::from_millis(1));
                        self.take_from(0);
                    }
                }
                _ => unreachable!(),
            }
        }
    }

    /// A process of the host does something, beside the daemon.
    pub fn beside<T: Send>(&mut self, change: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(change);
            while !thread.is_finished() {
                self.rig.break_leases();
                self.rig.pump(Duration::from_millis(1));
                self.serve();
            }
            thread.join().unwrap()
        })
    }

    /// Until the cache is as it should be.
    pub fn until(&mut self, what: &str, is: impl Fn(&FileState) -> bool) {
        let start = Instant::now();
        while !is(&self.cache().current(&self.file)) {
            assert!(start.elapsed() < Duration::from_secs(20), "{what}");
            self.rig.pump(Duration::from_millis(2));
            self.serve();
        }
    }

    pub fn placed(&mut self, page: u64) -> Result<FrameNo, CacheError> {
        self.wait_for("Placed", |event| match event {
            CacheEvent::Placed {
                page: of, result, ..
            } if of.0 == page => Some(result.clone()),
            _ => None,
        })
    }

    /// The page's frame, filled when there is none.
    pub fn frame(&mut self, page: u64) -> Result<FrameNo, CacheError> {
        if let Some(frame) = self.frames.get(&page) {
            return Ok(*frame);
        }
        self.cache().strict_fill(&self.file, PageIndex(page), 1);
        let frame = self.placed(page)?;
        assert!(self.frames.insert(page, frame).is_none());
        Ok(frame)
    }

    pub fn save(&mut self, page: u64) -> Result<(), CacheError> {
        let frame = self.frames[&page];
        let version = Version(77 + page);
        self.cache()
            .strict_save(&self.file, PageIndex(page), frame, version);
        self.busy.insert(page);
        let saved = self.wait_for("Saved", |event| match event {
            CacheEvent::Saved {
                page: of,
                version: v,
                result,
                ..
            } if of.0 == page && *v == version => Some(result.clone()),
            _ => None,
        });
        self.busy.remove(&page);
        saved
    }

    /// All who hold the page let go, as guests do that obey; a dirty page is saved.
    pub fn let_go(&mut self, page: u64) {
        let Some(frame) = self.frames.get(&page).copied() else {
            return;
        };
        let held = self.held.remove(&page).unwrap_or_default();
        let cache = self.cache();
        let index = PageIndex(page);
        for guest in held.readers.iter().chain(&held.writers) {
            let dom = DomId(*guest);
            cache.strict_unmapped(dom, &self.file, index, frame);
            assert!(cache.strict_revoke(dom, &self.file, index, frame));
        }
        if held.dirty {
            self.save(page).unwrap();
        }
    }

    pub fn take(&mut self, page: u64) {
        self.let_go(page);
        if let Some(frame) = self.frames.remove(&page)
            && !self.lost.contains(&frame)
        {
            self.cache().strict_free(frame);
        }
    }

    pub fn take_from(&mut self, page: u64) {
        let pages: Vec<u64> = self.frames.range(page..).map(|(p, _)| *p).collect();
        pages.into_iter().for_each(|page| self.take(page));
    }

    pub fn grant(
        &mut self,
        guest: u16,
        page: u64,
        access: Access,
        shared: bool,
    ) -> Result<StrictGrant, CacheError> {
        let frame = self.frame(page)?;
        let held = self.held.entry(page).or_default().clone();
        let own = held.writers.contains(&guest);
        let others = held.writers.iter().any(|g| *g != guest);
        let stands = match access {
            Access::ReadOnly => others,
            Access::ReadWrite => {
                let moves = shared && !held.shared && !held.writers.is_empty();
                !held.readers.is_empty() || others && !shared || moves
            }
        };
        if stands {
            self.let_go(page);
        }
        let shared = shared || own && held.shared;
        let granted = self.cache().strict_grant(
            who(guest),
            &self.file,
            PageIndex(page),
            frame,
            access,
            shared,
        )?;
        let held = self.held.entry(page).or_default();
        match access {
            Access::ReadOnly if own => {}
            Access::ReadOnly if held.readers.contains(&guest) => {}
            Access::ReadOnly => held.readers.push(guest),
            Access::ReadWrite => {
                if !held.writers.contains(&guest) {
                    held.writers.push(guest);
                }
                held.dirty = true;
                held.shared = shared;
            }
        }
        Ok(granted)
    }

    fn descriptor(&self, guest: u16, at: Where) -> std::fs::File {
        let cache = self.cache();
        let generation = cache.current(&self.file).generation;
        let fd = match at {
            Where::Home => cache.descriptor(&self.file, generation),
            Where::Arena(dom) => cache.arena(&self.file, dom),
            Where::Common => cache.common(&self.file).map(|(_, fd)| fd),
            Where::Spare => panic!("guest {guest} was granted a page of nobody"),
        };
        std::fs::File::from(fd.unwrap())
    }

    /// A guest stores to a page that it is granted for that.
    pub fn store(
        &mut self,
        guest: u16,
        page: u64,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), CacheError> {
        let granted = self.grant(guest, page, Access::ReadWrite, false)?;
        self.store_at(guest, granted.at, page, offset, bytes);
        Ok(())
    }

    pub fn store_at(&self, guest: u16, at: Where, page: u64, offset: usize, bytes: &[u8]) {
        assert!(matches!(at, Where::Arena(_) | Where::Common));
        let file = self.descriptor(guest, at);
        file.write_all_at(bytes, page * PAGE as u64 + offset as u64)
            .unwrap();
    }

    /// What a guest loads from a page that it is granted for that.
    pub fn load(&mut self, guest: u16, page: u64) -> Result<Vec<u8>, CacheError> {
        let granted = self.grant(guest, page, Access::ReadOnly, false)?;
        let mut buf = vec![0; PAGE];
        let file = self.descriptor(guest, granted.at);
        let got = file.read_at(&mut buf, page * PAGE as u64).unwrap();
        buf.truncate(got);
        Ok(buf)
    }

    pub fn sync(&mut self, who: Option<u16>, durable: bool) -> Result<(), CacheError> {
        let ticket = self.rig.ticket();
        let dirty = self.held.iter().filter(|(_, held)| held.dirty);
        let pages = dirty
            .filter_map(|(page, _)| Some((PageIndex(*page), *self.frames.get(page)?)))
            .collect();
        self.cache()
            .strict_sync(ticket, &self.file, who.map(DomId), pages, durable);
        self.synced(ticket)
    }

    pub fn synced(&mut self, ticket: u64) -> Result<(), CacheError> {
        self.wait_for("Synced", |event| match event {
            CacheEvent::Synced {
                ticket: of, result, ..
            } if *of == ticket => Some(result.clone()),
            _ => None,
        })
    }

    /// A session misses its term: what it has is seized, its pages get other frames where that is not to be had,
    /// and the file another home.
    pub fn fence(&mut self, guest: u16) {
        let cache = self.cache();
        let dom = DomId(guest);
        let pages: Vec<u64> = self.held.keys().copied().collect();
        for page in pages {
            let Some(held) = self.held.get_mut(&page) else {
                continue;
            };
            let writes = held.writers.contains(&guest);
            if !writes && !held.readers.contains(&guest) {
                continue;
            }
            held.readers.retain(|g| *g != guest);
            held.writers.retain(|g| *g != guest);
            let frame = self.frames[&page];
            if cache.strict_seize(dom, &self.file, PageIndex(page), frame) {
                continue;
            }
            self.lost.insert(frame);
            if !writes {
                continue;
            }
            self.busy.insert(page);
            let dirty = std::mem::take(&mut held.dirty);
            self.let_go(page);
            cache.strict_copy(&self.file, PageIndex(page), frame);
            let copy = self.placed(page).unwrap();
            if copy == frame {
                self.lost.remove(&frame);
            }
            self.frames.insert(page, copy);
            if dirty {
                self.save(page).unwrap();
            }
            self.busy.remove(&page);
        }
        cache.guest_fenced(who(guest));
        self.take_from(0);
        cache.strict_rehome(&self.file).unwrap();
    }

    /// The only one that was fenced exists no more.
    pub fn end(&mut self, guest: u16) {
        let cache = self.cache();
        cache.guest_ended(who(guest));
        for frame in std::mem::take(&mut self.lost) {
            assert!(cache.strict_drained(DomId(guest), frame, false));
            cache.strict_free(frame);
        }
    }

    pub fn reserve(&mut self, page: u64, count: u32) -> Result<(), CacheError> {
        let ticket = self.rig.ticket();
        let cache = self.cache();
        if let Some(known) = cache.strict_reserve(ticket, &self.file, PageIndex(page), count) {
            return known;
        }
        self.wait_for("Reserved", |event| match event {
            CacheEvent::Reserved {
                ticket: of, result, ..
            } if *of == ticket => Some(result.clone()),
            _ => None,
        })
    }

    pub fn resize(&mut self, bytes: u64) -> Result<FileState, CacheError> {
        self.take_from(bytes.min(self.bytes()) / PAGE as u64);
        let ticket = self.rig.ticket();
        self.cache().strict_resize(ticket, &self.file, bytes);
        self.wait_for("Resized", |event| match event {
            CacheEvent::Resized {
                ticket: of, result, ..
            } if *of == ticket => Some(result.clone()),
            _ => None,
        })
    }
}
