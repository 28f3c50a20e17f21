//! Which frame holds which page of one home.

use copage_grants::FrameNo;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Page numbers are small integers that a guest chooses within one file it may read: collisions cost
/// it only its own time, so one multiplication is hash enough.
#[derive(Debug, Default)]
pub(crate) struct PageHasher(u64);

impl Hasher for PageHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u32(u32::from(*b));
        }
    }
    fn write_u32(&mut self, n: u32) {
        let h = (self.0 ^ u64::from(n)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = h ^ (h >> 32);
    }
}

/// Pages to frames: 9 bytes a place, three eighths of the places or more in use, so at most 28 bytes
/// a page however thinly the pages lie.
#[derive(Debug, Default)]
pub(crate) struct Index {
    frames: HashMap<u32, u32, BuildHasherDefault<PageHasher>>,
    /// Pages that fit. The map's own `capacity` is less while there are places of removed pages.
    room: usize,
}

impl Index {
    pub(crate) fn len(&self) -> usize {
        self.frames.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(crate) fn get(&self, page: u32) -> Option<FrameNo> {
        self.frames.get(&page).copied().map(FrameNo)
    }

    pub(crate) fn insert(&mut self, page: u32, frame: FrameNo) {
        self.frames.insert(page, frame.0);
        self.room = self.room.max(self.frames.capacity());
    }

    pub(crate) fn remove(&mut self, page: u32) {
        self.frames.remove(&page);
        if self.frames.len() < self.room / 8 * 3 {
            self.frames.shrink_to_fit();
            self.room = self.frames.capacity();
        }
    }

    /// All of `count` pages from `first`, or not.
    pub(crate) fn get_run(&self, first: u32, count: u32, out: &mut Vec<FrameNo>) -> bool {
        out.clear();
        for page in first..first.saturating_add(count) {
            match self.get(page) {
                Some(frame) => out.push(frame),
                None => return false,
            }
        }
        true
    }

    /// The pages of `first..end`, in order: at the cost of the smaller of range and index.
    pub(crate) fn range(&self, first: u32, end: u32) -> Vec<(u32, FrameNo)> {
        let range = first..end;
        if range.len() < self.len() {
            return range.filter_map(|p| Some((p, self.get(p)?))).collect();
        }
        let mut all = self.pages();
        all.retain(|(page, _)| range.contains(page));
        all
    }

    /// All pages, in order.
    pub(crate) fn pages(&self) -> Vec<(u32, FrameNo)> {
        let mut all: Vec<_> = self.frames.iter().map(|(p, f)| (*p, FrameNo(*f))).collect();
        all.sort_unstable_by_key(|(page, _)| *page);
        all
    }

    pub(crate) fn frames(&self) -> impl Iterator<Item = FrameNo> + '_ {
        self.frames.values().copied().map(FrameNo)
    }

    pub(crate) fn bytes(&self) -> u64 {
        // hashbrown: a power of two of places, 7/8 of them usable, with one byte of control each.
        (self.room as u64 * 8 / 7) * 9
    }
}

/// Calls `run(first page, frames)` for each run of neighbouring pages of `pages`, which are in order.
pub(crate) fn each_run<E>(
    pages: &[(u32, FrameNo)],
    mut run: impl FnMut(u32, &[FrameNo]) -> Result<(), E>,
) -> Result<(), E> {
    let mut frames = Vec::new();
    let mut rest = pages;
    while let Some((first, _)) = rest.first().copied() {
        frames.clear();
        frames.extend(
            rest.iter()
                .enumerate()
                .take_while(|(n, (page, _))| *page as usize == first as usize + n)
                .map(|(_, (_, frame))| *frame),
        );
        rest = &rest[frames.len()..];
        run(first, &frames)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_at_gaps() {
        let pages: Vec<_> = [3, 4, 9, 10, 11].map(|p| (p, FrameNo(p))).to_vec();
        let mut seen = Vec::new();
        each_run(&pages, |first, frames| {
            seen.push((first, frames.len()));
            Ok::<_, ()>(())
        })
        .unwrap();
        assert_eq!(seen, [(3, 2), (9, 3)]);
    }

    #[test]
    fn the_index_costs_at_most_28_bytes_a_page() {
        let mut index = Index::default();
        for n in 0..20_000 {
            index.insert(n * 97, FrameNo(n));
            assert!(index.len() < 64 || index.bytes() <= 28 * index.len() as u64);
        }
        for n in 0..19_900 {
            index.remove(n * 97);
            assert!(index.bytes() <= 28 * index.len() as u64 + 64, "{n}");
        }
    }
}
