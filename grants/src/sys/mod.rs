//! Safe wrappers of the Linux calls that rustix has no safe form for. Nothing here knows of frames.

mod cachestat;
mod lease;
mod pagemap;
mod process;
mod signal;

pub use cachestat::{CacheStat, cachestat, drop_cached};
pub use lease::{LeaseKind, lease, set_lease, set_lease_signal};
pub use pagemap::{PageMap, PageMapEntry};
pub(crate) use process::write_own_memory;
pub use process::{
    has_ended, make_undumpable, peer_pidfd, raise_open_files, read_own_memory, take_inherited,
};
pub use signal::{SignalFd, SignalInfo, block_signals, lease_signal, unblock_signals};

use std::io;

/// Turns the result of a libc call that reports errors by -1 into a `Result`.
pub(crate) fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
