//! A set of pages as runs.

use std::collections::BTreeMap;

/// Runs kept of one file: guests choose where they are, so their number is bounded. What is forgotten is
/// asked for again.
const RUNS_MAX: usize = 1024;

/// First page to end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ranges(BTreeMap<u32, u32>);

impl Ranges {
    pub(crate) fn contains(&self, first: u32, end: u32) -> bool {
        let run = self.0.range(..=first).next_back();
        run.is_some_and(|(_, run_end)| *run_end >= end)
    }

    pub(crate) fn insert(&mut self, mut first: u32, mut end: u32) {
        if self.0.len() >= RUNS_MAX {
            self.0.clear();
        }
        while let Some((&at, &run_end)) = self.0.range(..=end).next_back() {
            if run_end < first {
                break;
            }
            self.0.remove(&at);
            first = first.min(at);
            end = end.max(run_end);
        }
        self.0.insert(first, end);
    }

    /// Forgets pages from `page` on.
    pub(crate) fn cut(&mut self, page: u32) {
        self.0.split_off(&page);
        if let Some((_, end)) = self.0.iter_mut().next_back() {
            *end = (*end).min(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_and_are_cut() {
        let mut ranges = Ranges::default();
        ranges.insert(4, 8);
        ranges.insert(12, 16);
        assert!(ranges.contains(5, 8) && !ranges.contains(5, 9) && !ranges.contains(3, 5));
        ranges.insert(8, 12);
        assert!(ranges.contains(4, 16));
        assert_eq!(ranges.0.len(), 1);
        ranges.insert(0, 20);
        assert!(ranges.contains(0, 20) && ranges.0.len() == 1);
        ranges.cut(6);
        assert!(ranges.contains(0, 6) && !ranges.contains(0, 7));
    }

    #[test]
    fn they_are_bounded() {
        let mut ranges = Ranges::default();
        for page in 0..10_000 {
            ranges.insert(page * 2, page * 2 + 1);
            assert!(ranges.0.len() <= RUNS_MAX);
            assert!(ranges.contains(page * 2, page * 2 + 1));
        }
    }
}
