//! Waiting for what must happen, with an end.

use std::time::{Duration, Instant};

/// Calls `look` until it finds something; panics after `at_most`.
pub fn some<T>(at_most: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < at_most, "waited {at_most:?} for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Calls `look` until it is true; panics after `at_most`. How long it took.
pub fn until(at_most: Duration, what: &str, mut look: impl FnMut() -> bool) -> Duration {
    let begin = Instant::now();
    some(at_most, what, || look().then_some(()));
    begin.elapsed()
}
