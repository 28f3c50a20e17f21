//! Stores that were acknowledged: 1, 2, 3, … to the first words of a file's pages in turn.

use copage_grants::PAGE_SIZE;

/// The first store that is not in a file of `pages` pages, nor a later one to the same page, when all up to
/// `acked` were acknowledged; and what is there, `None` past the file's end.
pub fn missing(file: &[u8], pages: u64, acked: u64) -> Option<(u64, Option<u64>)> {
    let last = (1..=acked).rev().take(pages as usize);
    last.map(|n| (n, word(file, n % pages)))
        .find(|(n, found)| !found.is_some_and(|found| found >= *n && found % pages == n % pages))
}

/// The first word of a page.
fn word(file: &[u8], page: u64) -> Option<u64> {
    let bytes = file.get(page as usize * PAGE_SIZE..)?;
    Some(u64::from_ne_bytes(*bytes.first_chunk()?))
}
