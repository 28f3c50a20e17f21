//! The daemon's clock.

use rustix::time::{ClockId, clock_gettime};

/// CLOCK_BOOTTIME in ms: it also runs while the machine sleeps, as every lease does.
pub(super) fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    // Neither is ever negative on this clock.
    let ms = now
        .tv_sec
        .saturating_mul(1000)
        .saturating_add(now.tv_nsec / 1_000_000);
    u64::try_from(ms).unwrap_or(0)
}

/// CLOCK_REALTIME in seconds, as an epoch that rises from one daemon to the next; 32 bits last
/// until 2106.
pub(super) fn epoch_seconds() -> u32 {
    u32::try_from(clock_gettime(ClockId::Realtime).tv_sec)
        .unwrap_or(1)
        .max(1)
}
