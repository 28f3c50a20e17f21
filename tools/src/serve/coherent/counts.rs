//! What is counted for `copage stats`.

use super::super::admin_types::StrictEntry;
use super::Coherent;

/// Upper bounds of the classes of waits, in ms; the last class has none. A page that nobody else has is
/// granted within the first.
const WAIT_CLASSES_MS: [u64; 12] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];

/// Counts since the start.
#[derive(Clone, Debug, Default)]
pub(in crate::serve) struct StrictCounts {
    /// As `copage stats` tells them; waits and what is there now are put in when it asks.
    pub told: StrictEntry,
    /// Faults for writing by how long they waited.
    waits: [u64; WAIT_CLASSES_MS.len() + 1],
}

impl StrictCounts {
    pub(super) fn waited(&mut self, wait_ms: u64) {
        let class = WAIT_CLASSES_MS.partition_point(|&upto_ms| upto_ms < wait_ms);
        if let Some(count) = self.waits.get_mut(class) {
            *count += 1;
        }
    }

    /// The wait that so many thousandths of the faults for writing did not exceed, in ms, as the bound of
    /// its class; longer ones than the last bound are told as twice that.
    fn wait_ms(&self, permille: u64) -> u64 {
        let all: u64 = self.waits.iter().sum();
        let mut left = all.saturating_mul(permille).div_ceil(1000);
        for (class, &count) in self.waits.iter().enumerate() {
            left = left.saturating_sub(count);
            if left == 0 && (all > 0) {
                return WAIT_CLASSES_MS.get(class).copied().unwrap_or(10_000);
            }
        }
        0
    }
}

impl Coherent {
    /// All of it.
    pub(in crate::serve) fn entry(&self) -> Box<StrictEntry> {
        let counts = &self.counts;
        Box::new(StrictEntry {
            write_wait_p50_ms: counts.wait_ms(500),
            write_wait_p99_ms: counts.wait_ms(990),
            now_files: self.files.len() as u64,
            now_works: self.works.len() as u64,
            ..counts.told
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_told_by_class() {
        let mut counts = StrictCounts::default();
        assert_eq!(counts.wait_ms(500), 0);
        for _ in 0..98 {
            counts.waited(0);
        }
        counts.waited(7);
        counts.waited(60_000);
        assert_eq!(counts.wait_ms(500), 1);
        assert_eq!(counts.wait_ms(990), 10);
        assert_eq!(counts.wait_ms(1000), 10_000);
    }
}
