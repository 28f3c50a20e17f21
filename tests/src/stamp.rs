//! Numbers as they are stored to pages so that a half of one is seen.

use copage_grants::PAGE_SIZE;

/// Where in a page a number is stored first, and where then.
pub const WORDS: [usize; 2] = [0, PAGE_SIZE - 8];

/// The word that stands for a number below 2^32.
pub fn write(number: u64) -> u64 {
    number << 32 | number
}

/// The number; `None` when the word is put together from two.
pub fn read(word: u64) -> Option<u64> {
    let number = word >> 32;
    (write(number) == word).then_some(number)
}
