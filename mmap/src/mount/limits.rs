//! Every constant of the mount: unit, reason, and the bound of the kernel it respects.

use std::time::Duration;

/// How long the kernel may believe an attribute, a name, or that a name is not there, without asking:
/// what the host changes is seen this late at most. FUSE's own default.
pub(super) const TTL: Duration = Duration::from_secs(1);
/// Threads that answer the kernel. Each waits for the daemon, and that for a disk; more than the
/// cores, so that a slow disk does not stop lookups of what is known.
pub(super) const THREADS: usize = 8;
/// Threads that open files. An open fills the whole file before it is answered.
pub(super) const OPENERS: usize = 4;
/// Bytes of directory entries asked for at once: what the kernel's buffer of a readdirplus (4 KiB
/// to 128 KiB) holds at about 200 bytes an entry is asked for again and again until it is full.
pub(super) const DIR_BYTES: u32 = 8 * 1024;
/// Of the handles that the session may hold, the table keeps at most one in this many; the others
/// are for what is under way.
pub(super) const HANDLES_SHARE: usize = 2;
/// Handles kept at least, whatever the session may hold.
pub(super) const HANDLES_MIN: usize = 64;
/// Requests that the kernel may have under way in the background (readahead).
pub(super) const BACKGROUND_MAX: u16 = 64;
/// How long after a vain attempt to reach the daemon the next is made.
pub(super) const RECONNECT_PAUSE: Duration = Duration::from_millis(500);
/// How long a file on frames stays pinned after its last close: a program that is started again, and
/// the libraries that all programs have, open without asking the daemon.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// The most such files at one time, and their bytes: they count against the guest's pinned pages.
pub(super) const LINGER_FILES_MAX: usize = 64;
pub(super) const LINGER_BYTES_MAX: u64 = 64 << 20;
/// How long a pin that was refused for want of room waits for pins that were just given up: the daemon
/// asks the kernel every 50 ms whether they are really closed.
pub(super) const ROOM_PAUSE: Duration = Duration::from_millis(60);
/// How often page-cache-form files that are open are looked at for changes, while there are any.
pub(super) const CHANGES_PAUSE: Duration = Duration::from_secs(1);
/// What the kernel may read ahead of programs whose pages are copied because they cannot be executed where
/// they are. Its own 128 KiB copy 855 of the 883 pages of bash and its libraries; each request brings less
/// so, and each is a round trip.
pub(super) const SPARING_READAHEAD_BYTES: u32 = 16 << 10;
