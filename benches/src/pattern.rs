//! File content that can be checked: every word of it follows from its place and a seed.

/// Bytes in a cache line of every machine that this runs on.
pub const LINE_BYTES: usize = 64;
/// Words of eight bytes in a page.
pub const WORDS_PER_PAGE: u64 = 512;

/// Word `index` (8 bytes, little-endian) of the content with this seed.
pub fn word(seed: u64, index: u64) -> u64 {
    // The finalizer of splitmix64: every bit of place and seed reaches every bit of the word.
    let mut z = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `page` with page `index` of the content.
pub fn fill_page(seed: u64, index: u64, page: &mut [u8]) {
    for (i, out) in page.chunks_exact_mut(8).enumerate() {
        out.copy_from_slice(&word(seed, index * WORDS_PER_PAGE + i as u64).to_le_bytes());
    }
}

/// The wrapping sum of all words of `pages` pages from `first` on.
pub fn sum_pages(seed: u64, first: u64, pages: u64) -> u64 {
    let words = first * WORDS_PER_PAGE..(first + pages) * WORDS_PER_PAGE;
    words.fold(0, |sum, i| sum.wrapping_add(word(seed, i)))
}

/// A stream of pseudo-random numbers; the same seed gives the same stream on every side.
#[derive(Clone, Debug)]
pub struct Random {
    seed: u64,
    count: u64,
}

impl Random {
    /// A stream.
    pub fn new(seed: u64) -> Self {
        Self { seed, count: 0 }
    }

    /// A number below `bound` (not 0; the bias of bounds far below 2^64 is not measurable here).
    pub fn below(&mut self, bound: u64) -> u64 {
        self.count += 1;
        word(self.seed, self.count) % bound
    }

    /// The numbers `0..count`, each once, in random order.
    pub fn permutation(&mut self, count: u64) -> Vec<u64> {
        let mut order: Vec<u64> = (0..count).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, self.below(i as u64 + 1) as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_hold_their_words_and_sums_add_up() {
        let mut page = vec![0; 4096];
        fill_page(7, 3, &mut page);
        let sum = page.chunks_exact(8).fold(0u64, |s, w| {
            s.wrapping_add(u64::from_le_bytes(w.try_into().unwrap()))
        });
        assert_eq!(sum, sum_pages(7, 3, 1));
        assert_ne!(sum, sum_pages(8, 3, 1));
    }

    #[test]
    fn a_permutation_has_everything_once() {
        let mut order = Random::new(1).permutation(1000);
        assert_ne!(order[..10], (0..10).collect::<Vec<_>>());
        order.sort_unstable();
        assert!(order.into_iter().eq(0..1000));
    }
}
