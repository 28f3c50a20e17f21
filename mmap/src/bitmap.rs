//! A set of pages of one mapping. Memory is taken by the part that is used: a mapping nobody stores
//! to costs nothing.

/// Pages in one chunk: 4 KiB of bits.
const CHUNK_PAGES: usize = 32_768;
const WORDS: usize = CHUNK_PAGES / 64;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Bitmap {
    pages: usize,
    count: u64,
    chunks: Vec<Option<Box<[u64; WORDS]>>>,
}

impl Bitmap {
    /// An empty set of pages below `pages`.
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            pages,
            count: 0,
            chunks: Vec::new(),
        }
    }

    /// How many are in it.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    pub(crate) fn get(&self, page: usize) -> bool {
        match self.chunks.get(page / CHUNK_PAGES) {
            Some(Some(words)) => words[page % CHUNK_PAGES / 64] & (1 << (page % 64)) != 0,
            _ => false,
        }
    }

    /// Adds a page; one past the end is nothing.
    pub(crate) fn set(&mut self, page: usize) {
        if page >= self.pages || self.get(page) {
            return;
        }
        let chunk = page / CHUNK_PAGES;
        if self.chunks.len() <= chunk {
            self.chunks.resize_with(chunk + 1, || None);
        }
        let words = self.chunks[chunk].get_or_insert_with(|| Box::new([0; WORDS]));
        words[page % CHUNK_PAGES / 64] |= 1 << (page % 64);
        self.count += 1;
    }

    /// Takes a page out.
    pub(crate) fn unset(&mut self, page: usize) {
        if !self.get(page) {
            return;
        }
        if let Some(Some(words)) = self.chunks.get_mut(page / CHUNK_PAGES) {
            words[page % CHUNK_PAGES / 64] &= !(1 << (page % 64));
            self.count -= 1;
        }
    }

    /// The first page at or behind `page`, below `end`, that is in the set (or not), else `end`.
    fn next(&self, mut page: usize, end: usize, set: bool) -> usize {
        while page < end {
            let Some(Some(words)) = self.chunks.get(page / CHUNK_PAGES) else {
                if !set {
                    return page;
                }
                page = (page / CHUNK_PAGES + 1) * CHUNK_PAGES;
                continue;
            };
            let word = words[page % CHUNK_PAGES / 64];
            let word = if set { word } else { !word } & (u64::MAX << (page % 64));
            if word != 0 {
                return (page / 64 * 64 + word.trailing_zeros() as usize).min(end);
            }
            page = (page / 64 + 1) * 64;
        }
        end
    }

    /// The runs `(first, count)` of pages in `first..end` that are not in the set, in order.
    pub(crate) fn clear_runs(&self, first: usize, end: usize) -> Vec<(usize, usize)> {
        self.runs(first, end, false)
    }

    /// The runs `(first, count)` of pages in `first..end` that are in the set, in order.
    pub(crate) fn set_runs(&self, first: usize, end: usize) -> Vec<(usize, usize)> {
        if self.count == 0 {
            return Vec::new();
        }
        self.runs(first, end, true)
    }

    fn runs(&self, first: usize, end: usize, set: bool) -> Vec<(usize, usize)> {
        let end = end.min(self.pages);
        let mut runs = Vec::new();
        let mut at = self.next(first, end, set);
        while at < end {
            let until = self.next(at, end, !set);
            runs.push((at, until - at));
            at = self.next(until, end, set);
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_what_is_not_in_the_set() {
        let pages = CHUNK_PAGES * 3 + 100;
        let mut map = Bitmap::new(pages);
        assert_eq!(map.clear_runs(0, pages), [(0, pages)]);
        for page in [
            0,
            1,
            63,
            64,
            CHUNK_PAGES,
            CHUNK_PAGES * 2 + 5,
            pages - 1,
            pages,
        ] {
            map.set(page);
        }
        assert_eq!(map.count(), 7);
        let mut model = Vec::new();
        let mut page = 0;
        while page < pages {
            let start = page;
            while page < pages && !map.get(page) {
                page += 1;
            }
            if page > start {
                model.push((start, page - start));
            }
            page += 1;
        }
        assert_eq!(map.clear_runs(0, usize::MAX), model);
        assert_eq!(map.clear_runs(1, 64), [(2, 61)]);
        assert!(map.clear_runs(0, 2).is_empty());
        assert_eq!(map.set_runs(1, 64), [(1, 1), (63, 1)]);
        assert_eq!(map.set_runs(63, usize::MAX).first(), Some(&(63, 2)));
        for page in [0, 1, 63, 64, CHUNK_PAGES, CHUNK_PAGES * 2 + 5] {
            map.unset(page);
            map.unset(page);
        }
        assert_eq!(map.count(), 1);
        assert_eq!(map.set_runs(0, pages), [(pages - 1, 1)]);
        map.unset(pages - 1);
        assert_eq!(map.set_runs(0, pages), []);
        assert_eq!(map.clear_runs(0, pages), [(0, pages)]);
    }
}
