//! Reading mapped bytes, the same way on every side, and what must come out.

use crate::pattern::{self, LINE_BYTES, WORDS_PER_PAGE};
use anyhow::{Result, ensure};
use copage_grants::PAGE_SIZE;
use copage_grants::volatile::VolatileBytes;

/// Adds up the first words of these cache lines.
pub fn sum_lines(bytes: VolatileBytes<'_>, lines: &[u32]) -> u64 {
    lines.iter().fold(0, |sum, &line| {
        sum.wrapping_add(read_word(bytes, line as usize * LINE_BYTES))
    })
}

/// What [`sum_lines`] must give.
pub fn expected_lines(seed: u64, lines: &[u32]) -> u64 {
    let words_per_line = (LINE_BYTES / 8) as u64;
    lines.iter().fold(0, |sum, &line| {
        sum.wrapping_add(pattern::word(seed, u64::from(line) * words_per_line))
    })
}

/// Adds up all words, page by page.
pub fn sum_all(bytes: VolatileBytes<'_>) -> u64 {
    let mut page = [0; PAGE_SIZE];
    (0..bytes.len().div_ceil(PAGE_SIZE)).fold(0, |sum, index| {
        // Copied first: checking bounds word by word would cost more than the memory does.
        let got = bytes.read_into(index * PAGE_SIZE, &mut page);
        page[..got].chunks_exact(8).fold(sum, |sum: u64, word| {
            // A chunk of eight always fits; the compiler sees it too.
            word.first_chunk()
                .map_or(sum, |word| sum.wrapping_add(u64::from_le_bytes(*word)))
        })
    })
}

/// Touches these pages: adds up their first words.
pub fn touch(bytes: VolatileBytes<'_>, pages: impl IntoIterator<Item = u64>) -> u64 {
    pages.into_iter().fold(0, |sum, page| {
        sum.wrapping_add(read_word(bytes, page as usize * PAGE_SIZE))
    })
}

/// What [`touch`] must give.
pub fn expected_touch(seed: u64, pages: impl IntoIterator<Item = u64>) -> u64 {
    pages.into_iter().fold(0, |sum, page| {
        sum.wrapping_add(pattern::word(seed, page * WORDS_PER_PAGE))
    })
}

/// The word at byte `offset`; the caller keeps inside the mapping, outside is 0 and so a wrong sum.
#[inline]
pub fn read_word(bytes: VolatileBytes<'_>, offset: usize) -> u64 {
    bytes.read_u64(offset).unwrap_or(0)
}

/// Wrong bytes are the one thing that makes a bench fail.
pub fn check(what: &str, got: u64, expected: u64) -> Result<()> {
    ensure!(
        got == expected,
        "WRONG BYTES: {what}: sum {got:#x}, expected {expected:#x}"
    );
    Ok(())
}
