//! A stand-in for hypervisor and device, of memfd pages and a table of entries: it shows the library's
//! logic, not isolation. A frame that is revoked is filled with garbage and used again soon, so that
//! whoever maps it still, or maps its number under the old meaning, reads wrong bytes.

use super::device::{Batch, Device, protection};
use crate::sys::Region;
use copage_grants::{Access, PAGE_SIZE};
use parking_lot::{Condvar, Mutex};
use rustix::fs::{MemfdFlags, memfd_create};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What fills a frame that nobody is granted.
const GARBAGE: u64 = 0xDEAD_DEAD_DEAD_DEAD;
/// Frames; small, so that they are used again.
const FRAMES: u64 = 16_384;

#[derive(Clone, Copy, Default)]
struct Entry {
    frame: u64,
    permit: bool,
    /// Not GTF_readonly.
    writable: bool,
    /// GTF_reading, counted.
    mapped: u32,
    /// Of a daemon that is gone: free when it is out of use.
    orphan: bool,
}

#[derive(Default)]
struct State {
    entries: Vec<Entry>,
    /// Last in, first out: a number is used again at once.
    free: Vec<u32>,
    used_frames: HashSet<u64>,
    next_frame: u64,
    /// (generation, page) of what is granted.
    pages: BTreeMap<(u32, u64), u32>,
    /// Batches: their refs, and whether they were mapped.
    batches: HashMap<u64, (Vec<u32>, bool)>,
    next_index: u64,
    /// As if vm or hypervisor had room for so many mapped pages.
    pages_max: Option<u64>,
    /// Fail so many maps.
    failing: u32,
    /// Entries that cannot be mapped though they are granted: of these pages.
    bad: HashSet<u64>,
    /// What guests stored, of pages that are not granted, where that is kept.
    kept: Option<HashMap<u64, Vec<u8>>>,
}

pub(crate) struct StandIn {
    frames: OwnedFd,
    movable: bool,
    state: Mutex<State>,
    /// Batches wait before they are mapped for the first time.
    held: Mutex<bool>,
    let_go: Condvar,
    pub(crate) maps: AtomicU64,
    /// Batches mapped over a range that others read.
    pub(crate) overlays: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) copies: AtomicU64,
    /// Batches that were in use although the guest had acked that they are not.
    pub(crate) lies: AtomicU64,
}

fn einval() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

/// What fills page `page` of content `generation`.
pub(crate) fn content(generation: u32, page: u64) -> u64 {
    (u64::from(generation) << 40) | (page + 1)
}

impl StandIn {
    pub(crate) const GRANTER: u16 = 9;

    /// `movable`: as in a PVH guest; else as in a PV one.
    pub(crate) fn new(movable: bool) -> Arc<Self> {
        let frames = memfd_create(c"frames", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&frames, FRAMES * PAGE_SIZE as u64).unwrap();
        Arc::new(Self {
            frames,
            movable,
            state: Mutex::default(),
            held: Mutex::new(false),
            let_go: Condvar::new(),
            maps: AtomicU64::new(0),
            overlays: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            copies: AtomicU64::new(0),
            lies: AtomicU64::new(0),
        })
    }

    fn fill(&self, frame: u64, word: u64) {
        self.put(frame, &word.to_le_bytes().repeat(PAGE_SIZE / 8));
    }

    fn put(&self, frame: u64, page: &[u8]) {
        let wrote = rustix::io::pwrite(&self.frames, page, frame * PAGE_SIZE as u64);
        assert_eq!(wrote.unwrap(), PAGE_SIZE);
    }

    /// From now on what is in a page when it is revoked is there when it is granted again.
    pub(crate) fn keep(&self) {
        self.state.lock().kept = Some(HashMap::new());
    }

    /// As another guest: changes a page, unless it is granted.
    pub(crate) fn change(&self, page: u64, change: impl FnOnce(&mut [u8])) -> bool {
        let mut state = self.state.lock();
        if state.pages.keys().any(|(_, granted)| *granted == page) {
            return false;
        }
        let first = content(1, page).to_le_bytes().repeat(PAGE_SIZE / 8);
        let kept = state.kept.get_or_insert_default();
        change(kept.entry(page).or_insert(first));
        true
    }

    /// Lets entries be mapped for writing.
    pub(crate) fn let_write(&self, refs: &[u32]) {
        let mut state = self.state.lock();
        for gref in refs {
            state.entries[*gref as usize].writable = true;
        }
    }

    /// Grants pages as a daemon does: those that are granted keep their entries. Fewer than asked
    /// where the frames do not follow each other (as when a cache domain ends).
    /// `shown`: the number of the content.
    pub(crate) fn grant(&self, generation: u32, shown: u32, first: u64, count: usize) -> Vec<u32> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let mut refs = Vec::new();
        let mut expected = None;
        for page in first..first + count as u64 {
            let key = (generation, page);
            let gref = match state.pages.get(&key) {
                Some(gref) => {
                    let frame = state.entries[*gref as usize].frame;
                    if expected.is_some_and(|e| e != frame) {
                        break;
                    }
                    *gref
                }
                None => {
                    let mut frame = expected.unwrap_or(state.next_frame % FRAMES);
                    if expected.is_none() {
                        while state.used_frames.contains(&frame) {
                            frame = (frame + 1) % FRAMES;
                        }
                    } else if frame >= FRAMES || state.used_frames.contains(&frame) {
                        break;
                    }
                    state.used_frames.insert(frame);
                    state.next_frame = frame + 1;
                    match state.kept.as_mut().and_then(|kept| kept.remove(&page)) {
                        Some(bytes) => self.put(frame, &bytes),
                        None => self.fill(frame, content(shown, page)),
                    }
                    let gref = state.free.pop().unwrap_or_else(|| {
                        state.entries.push(Entry::default());
                        state.entries.len() as u32 - 1
                    });
                    state.entries[gref as usize] = Entry {
                        frame,
                        permit: true,
                        writable: false,
                        mapped: 0,
                        orphan: false,
                    };
                    state.pages.insert(key, gref);
                    gref
                }
            };
            expected = Some(state.entries[gref as usize].frame + 1);
            refs.push(gref);
        }
        refs
    }

    /// Revokes what is not in use.
    pub(crate) fn revoke(&self, generation: u32, first: u64, count: u64) {
        let mut state = self.state.lock();
        let state = &mut *state;
        let keys: Vec<(u32, u64)> = state
            .pages
            .range((generation, first)..(generation, first.saturating_add(count)))
            .map(|(key, _)| *key)
            .collect();
        // Backwards, so that the numbers come again in the same order.
        for key in keys.into_iter().rev() {
            let gref = state.pages[&key];
            let entry = &mut state.entries[gref as usize];
            if entry.mapped > 0 {
                continue;
            }
            if let Some(kept) = &mut state.kept {
                let mut bytes = vec![0; PAGE_SIZE];
                let at = entry.frame * PAGE_SIZE as u64;
                rustix::io::pread(&self.frames, &mut bytes, at).unwrap();
                kept.insert(key.1, bytes);
            }
            self.free(state, gref);
            state.pages.remove(&key);
        }
    }

    /// Holds batches up before they are mapped, or lets them go.
    pub(crate) fn hold(&self, held: bool) {
        *self.held.lock() = held;
        self.let_go.notify_all();
    }

    /// Another daemon: it knows none of the entries, keeps what is in use as it is, and uses the rest at
    /// once (a real one lets numbers rest for a term, which is more than a guest needs to hear of it).
    pub(crate) fn restart(&self) {
        let mut state = self.state.lock();
        let state = &mut *state;
        let refs: Vec<u32> = std::mem::take(&mut state.pages).into_values().collect();
        for gref in refs.into_iter().rev() {
            let entry = &mut state.entries[gref as usize];
            entry.permit = false;
            entry.orphan = true;
            if entry.mapped == 0 {
                self.free(state, gref);
            }
        }
    }

    fn free(&self, state: &mut State, gref: u32) {
        let frame = std::mem::take(&mut state.entries[gref as usize]).frame;
        self.fill(frame, GARBAGE);
        state.used_frames.remove(&frame);
        state.free.push(gref);
    }

    /// Entries in use that the present daemon did not grant.
    pub(crate) fn left_over(&self) -> usize {
        let state = self.state.lock();
        state.entries.iter().filter(|e| e.orphan).count()
    }

    /// The newest batch that was announced.
    pub(crate) fn newest_batch(&self) -> u64 {
        self.state.lock().next_index
    }

    /// The guest acked what was asked back when `newest` was the newest batch: what is in use
    /// nevertheless by it or an older one is a lie. (A newer one may have been granted since.)
    pub(crate) fn acked(&self, generation: u32, first: u64, count: u64, newest: u64) {
        {
            let state = self.state.lock();
            let asked: HashSet<u32> = state
                .pages
                .range((generation, first)..(generation, first.saturating_add(count)))
                .map(|(_, gref)| *gref)
                .collect();
            let old = state.batches.iter().filter(|(index, _)| **index <= newest);
            let lies = old
                .filter(|(_, (refs, mapped))| *mapped && refs.iter().any(|r| asked.contains(r)))
                .count();
            self.lies.fetch_add(lies as u64, Ordering::SeqCst);
        }
        self.revoke(generation, first, count);
    }

    /// Pages in use, counted by mapping.
    pub(crate) fn mapped(&self) -> u64 {
        let state = self.state.lock();
        state.entries.iter().map(|e| u64::from(e.mapped)).sum()
    }

    pub(crate) fn granted_pages(&self) -> usize {
        self.state.lock().pages.len()
    }

    pub(crate) fn batches(&self) -> usize {
        self.state.lock().batches.len()
    }

    pub(crate) fn fail_next(&self, maps: u32) {
        self.state.lock().failing = maps;
    }

    pub(crate) fn set_pages_max(&self, pages: u64) {
        self.state.lock().pages_max = Some(pages);
    }

    pub(crate) fn set_bad(&self, pages: impl IntoIterator<Item = u64>) {
        self.state.lock().bad = pages.into_iter().collect();
    }

    /// The frame where a batch begins, and its entries in use from here on.
    fn use_batch(&self, batch: Batch) -> io::Result<u64> {
        let Batch {
            index,
            pages,
            access,
        } = batch;
        let mut state = self.state.lock();
        let state = &mut *state;
        if state.failing > 0 {
            state.failing -= 1;
            self.refused.fetch_add(1, Ordering::SeqCst);
            return Err(einval());
        }
        let in_use: u64 = state.entries.iter().map(|e| u64::from(e.mapped)).sum();
        let full = state
            .pages_max
            .is_some_and(|max| in_use + pages as u64 > max);
        let bad: HashSet<u32> = state
            .bad
            .iter()
            .flat_map(|page| state.pages.iter().filter(move |((_, p), _)| p == page))
            .map(|(_, gref)| *gref)
            .collect();
        let (refs, mapped) = state.batches.get_mut(&index).ok_or_else(einval)?;
        assert!(
            !*mapped && refs.len() == pages,
            "a batch is mapped once, whole"
        );
        // An entry that is in use may be mapped again whatever its permission is.
        let allowed = |gref: &u32| {
            let entry = &state.entries[*gref as usize];
            let may_write = entry.writable || access == Access::ReadOnly;
            may_write && (entry.permit && !bad.contains(gref) || entry.mapped > 0)
        };
        if full || !refs.iter().all(allowed) {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return Err(einval());
        }
        let frame = state.entries[refs[0] as usize].frame;
        for (n, gref) in refs.iter().enumerate() {
            let entry = &mut state.entries[*gref as usize];
            if entry.frame != frame + n as u64 {
                // Numbers that were used again meanwhile: this device cannot show them as one, so
                // they are as good as a bad entry. (The real one would.)
                for gref in &refs[..n] {
                    state.entries[*gref as usize].mapped -= 1;
                }
                self.refused.fetch_add(1, Ordering::SeqCst);
                return Err(einval());
            }
            entry.mapped += 1;
        }
        *mapped = true;
        self.maps.fetch_add(1, Ordering::SeqCst);
        Ok(frame * PAGE_SIZE as u64)
    }
}

impl Device for StandIn {
    fn announce(&self, granter: u16, refs: &[u32], access: Access) -> io::Result<Batch> {
        assert_eq!(granter, Self::GRANTER);
        let mut state = self.state.lock();
        state.next_index += 1;
        let index = state.next_index;
        state.batches.insert(index, (refs.to_vec(), false));
        Ok(Batch {
            index,
            pages: refs.len(),
            access,
        })
    }

    fn map(&self, batch: Batch) -> io::Result<Region> {
        {
            let mut held = self.held.lock();
            while *held {
                self.let_go.wait(&mut held);
            }
        }
        let offset = self.use_batch(batch)?;
        let bytes = batch.pages * PAGE_SIZE;
        Region::shared(self.frames.as_fd(), offset, bytes, protection(batch.access))
    }

    fn map_over(&self, batch: Batch, region: &Region, at: usize) -> io::Result<()> {
        let offset = self.use_batch(batch)?;
        self.overlays.fetch_add(1, Ordering::SeqCst);
        let from = (self.frames.as_fd(), offset);
        let bytes = batch.pages * PAGE_SIZE;
        region.overlay(at, bytes, from, protection(batch.access))
    }

    fn forget(&self, batch: Batch) -> io::Result<()> {
        let Batch { index, pages, .. } = batch;
        let mut state = self.state.lock();
        let state = &mut *state;
        let (refs, mapped) = state.batches.remove(&index).ok_or_else(einval)?;
        assert_eq!(refs.len(), pages, "a batch is let go of whole");
        for gref in refs.into_iter().filter(|_| mapped) {
            let entry = &mut state.entries[gref as usize];
            entry.mapped -= 1;
            if entry.orphan && entry.mapped == 0 {
                self.free(state, gref);
            }
        }
        Ok(())
    }

    fn copy(&self, granter: u16, refs: &[u32], to: &mut [[u8; PAGE_SIZE]]) -> io::Result<()> {
        assert_eq!((granter, refs.len()), (Self::GRANTER, to.len()));
        let mut state = self.state.lock();
        if state.failing > 0 {
            state.failing -= 1;
            return Err(einval());
        }
        self.copies.fetch_add(1, Ordering::SeqCst);
        for (gref, page) in refs.iter().zip(to) {
            let entry = state.entries[*gref as usize];
            if !entry.permit {
                return Err(einval());
            }
            let at = entry.frame * PAGE_SIZE as u64;
            assert_eq!(
                rustix::io::pread(&self.frames, &mut page[..], at).unwrap(),
                PAGE_SIZE
            );
        }
        Ok(())
    }

    fn movable(&self) -> bool {
        self.movable
    }
}
