//! How many events of one domain are looked at.

use super::limits::{EVENTS_BURST, EVENTS_PER_SECOND};
use std::time::Instant;

/// A bucket that fills with time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    left: u32,
    since: Instant,
}

impl Rate {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            left: EVENTS_BURST,
            since: now,
        }
    }

    /// Takes one; `false`: there was none.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.since);
        let grown = passed.as_millis() * u128::from(EVENTS_PER_SECOND) / 1000;
        if grown > 0 {
            let grown = u32::try_from(grown).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(grown).min(EVENTS_BURST);
            self.since = now;
        }
        let some = self.left > 0;
        self.left = self.left.saturating_sub(1);
        some
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_burst_and_then_so_many_a_second() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        let taken = (0..1000).filter(|_| rate.take(start)).count();
        assert_eq!(taken, EVENTS_BURST as usize);
        // Ten seconds of a flood of one event a millisecond.
        let taken = (1..=10_000).filter(|&ms| rate.take(start + Duration::from_millis(ms)));
        let taken = taken.count();
        let most = 10 * EVENTS_PER_SECOND as usize;
        assert!((most / 2..=most).contains(&taken), "{taken}");
        // Time that goes back harms nothing.
        assert!(rate.take(start + Duration::from_secs(60)) && rate.take(start));
    }
}
