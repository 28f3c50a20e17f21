//! Pages that can be checked without knowing what was written: every word of a page follows from
//! the page's index and the version of the file, so a page that is torn, zero, stale or another
//! page's tells on itself.

use copage_grants::PAGE_SIZE;

/// What a page turned out to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent {
    /// Every word is of this version and of the page that was asked for.
    Whole(u32),
    /// The first words are of one version, all others of a later one: no page that ever was, but what
    /// a copy shows that was under way, word by word, as a whole page took the other's place.
    Crossed {
        /// Of the first words.
        old: u32,
        /// Of the last.
        new: u32,
    },
    /// Anything else: torn between versions, zeros, or another page.
    Wrong,
}

/// Fills `page` (one page long) with version `version` of page `index`.
pub fn fill(page: &mut [u8], index: u64, version: u32) {
    for (i, word) in page.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&word_at(index, version, i as u64).to_le_bytes());
    }
}

/// The whole of a file of `pages` pages.
pub fn file(pages: u64, version: u32) -> Vec<u8> {
    let mut bytes = vec![0; pages as usize * PAGE_SIZE];
    for (index, page) in bytes.chunks_exact_mut(PAGE_SIZE).enumerate() {
        fill(page, index as u64, version);
    }
    bytes
}

/// Checks every word of `page`, a copy made from its first word to its last of page `index`.
pub fn check(page: &[u8], index: u64) -> PageContent {
    let version_of = |word: Option<&[u8]>| {
        word.and_then(|word| Some((u64::from_le_bytes(*word.first_chunk()?) >> 32) as u32))
    };
    let old = version_of(page.get(..8)).unwrap_or(0);
    let new = version_of(page.len().checked_sub(8).and_then(|last| page.get(last..))).unwrap_or(0);
    let mut version = old;
    let right = page.chunks_exact(8).enumerate().all(|(i, word)| {
        if version != new && word != word_at(index, version, i as u64).to_le_bytes() {
            version = new;
        }
        word == word_at(index, version, i as u64).to_le_bytes()
    });
    match (right, old, new) {
        (true, old, new) if old == new && old != 0 => PageContent::Whole(old),
        (true, old, new) if 0 < old && old < new => PageContent::Crossed { old, new },
        _ => PageContent::Wrong,
    }
}

/// The version stands in the upper half of each word, a mix of page and place in the lower.
fn word_at(index: u64, version: u32, place: u64) -> u64 {
    let place =
        (index << 9 | place).wrapping_add(u64::from(version).wrapping_mul(0xd6e8_feb8_6659_fd93));
    let mixed = place.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    u64::from(version) << 32 | (mixed >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_wrong_page_is_told() {
        let mut page = vec![0; PAGE_SIZE];
        assert_eq!(check(&page, 0), PageContent::Wrong, "zeros");
        fill(&mut page, 7, 3);
        assert_eq!(check(&page, 7), PageContent::Whole(3));
        assert_eq!(check(&page, 8), PageContent::Wrong, "another page");
        let mut newer = vec![0; PAGE_SIZE];
        fill(&mut newer, 7, 4);
        page[2048..].copy_from_slice(&newer[2048..]);
        assert_eq!(check(&page, 7), PageContent::Crossed { old: 3, new: 4 });
        newer[2048..].copy_from_slice(&page[..2048]);
        assert_eq!(
            check(&newer, 7),
            PageContent::Wrong,
            "words in the wrong place"
        );
        fill(&mut page, 7, 4);
        fill(&mut newer, 7, 3);
        page[2048..].copy_from_slice(&newer[2048..]);
        assert_eq!(check(&page, 7), PageContent::Wrong, "new before old");
        fill(&mut page, 7, 3);
        fill(&mut newer, 7, 4);
        page[1024..2048].copy_from_slice(&newer[1024..2048]);
        assert_eq!(check(&page, 7), PageContent::Wrong, "torn in the middle");
        fill(&mut page, 7, 3);
        page[4095] ^= 1;
        assert_eq!(check(&page, 7), PageContent::Wrong, "one bit");
    }
}
