//! Every constant of this crate, with its unit and its reason.

/// Pages in the unit that a processor can map at once: 2 MiB of 4 KiB pages (x86-64 and AArch64
/// with 4 KiB granule).
pub const HUGE_PAGES: u32 = 512;
/// Most pages in one fill: one 2 MiB unit, so that a unit is filled by one read, and so that a long
/// fill gives way to others every 2 MiB.
pub const FILL_PAGES_MAX: u32 = HUGE_PAGES;
/// Most pages one fault may ask for (the protocol's `FAULT_PAGES_MAX`).
pub const FAULT_PAGES_MAX: u32 = 512;
/// Most bytes one read may ask for (the protocol's `DATA_BYTES_MAX`).
pub const READ_BYTES_MAX: u32 = 128 * 1024;
/// Longest name of a directory entry, in bytes (`NAME_MAX`, linux/limits.h).
pub const NAME_BYTES_MAX: usize = 255;
/// Longest name of an export or share group, in bytes (the protocol's `LABEL_BYTES_MAX`).
pub const LABEL_BYTES_MAX: usize = 64;
/// Longest extended attribute and longest list of their names, in bytes (`XATTR_SIZE_MAX` and
/// `XATTR_LIST_MAX`, linux/limits.h, are both 65,536).
pub const XATTR_BYTES_MAX: usize = 65_536;
/// Longest target of a symbolic link, in bytes (`PATH_MAX`, linux/limits.h).
pub const LINK_BYTES_MAX: usize = 4096;
/// Longest cached file, in pages: page numbers are kept in 32 bits (16 TiB).
pub const FILE_PAGES_MAX: u64 = u32::MAX as u64;
/// Most frames of one cache: frame numbers are kept in 32 bits, with one value for "none".
pub const FRAMES_MAX: u32 = u32::MAX - 1;
/// Fewest frames a cache works with: one batch of reclaim beside one fill of some size.
pub const FRAMES_MIN: u32 = 64;
/// Frames given back in one go when memory is short: few enough that nobody waits long for it, so
/// many that the search and the locks are paid once for all of them.
pub const RECLAIM_BATCH: u32 = 64;
/// Frames asked back of one guest in one go: each may be a question of its own, and who has too many
/// to answer is taken for dead.
pub const RECALL_PAGES_MAX: u32 = 512;
/// Frames of banks that are to go, asked back in one go: nobody waits for them, so guests are not to be busy
/// with nothing else.
pub const LEAVING_PAGES_MAX: u32 = 128;
/// Frames the watermark is at most: one fill and one batch.
pub const WATERMARK_FRAMES_MAX: u32 = 1024;
/// The watermark is the budget divided by this.
pub const WATERMARK_DIVISOR: u32 = 64;
/// Readahead takes at most the budget divided by this, so that one reader cannot sweep it clean.
pub const READAHEAD_DIVISOR: u32 = 8;

/// Sequences whose window has grown to this many pages have the next window read ahead.
pub const READ_AHEAD_PAGES_MIN: u32 = 64;

/// Fills of one file under way beyond which nothing is read ahead.
pub const READ_AHEAD_FLIGHTS_MAX: usize = 2;
/// Pinned and quarantined frames may be all of the budget but this share of it (1/8): faults of
/// others need something to turn over.
pub const PIN_RESERVE_DIVISOR: u32 = 8;
/// How often a pinned open starts anew because the file changed under it.
pub const PIN_TRIES_MAX: u32 = 3;
/// Metadata operations waiting at one time, over all sessions; more are refused with EAGAIN.
pub const META_WAITING_MAX: usize = 65_536;
/// Threads for metadata. Two, so that one slow directory does not stop the others.
pub const META_THREADS: usize = 2;
/// Threads for fills at most.
pub const FILL_THREADS_MAX: usize = 64;
/// Requests (faults, reads, pinned opens) waiting on one file; more are refused with EAGAIN. Every
/// session is bounded by itself too.
pub const FILE_WAITERS_MAX: usize = 4096;
/// Files kept although nobody has them open. Each costs four descriptors and one inotify watch.
pub const FILES_IDLE_MAX: usize = 512;
/// Generations a file may go through by changes seen during its own fills, before such a
/// host-bounded file's pages are served as they are read.
pub const CHURN_MAX: u32 = 3;
/// Notifications of the host's changes taken in one go; the rest is taken the next time.
pub const HOST_EVENTS_MAX: usize = 4096;
/// Homes of ended generations of one file above which the next generation waits a little, so that
/// guests that move on slowly, or never, cannot pile them up (each has two descriptors).
pub const OLD_HOMES_MAX: usize = 32;
/// How long the next generation waits then, in ms.
pub const OLD_HOMES_PAUSE_MS: u64 = 100;
/// Homes of ended generations of one file above which it is not pinned any more.
pub const OLD_HOMES_PINNED_MAX: usize = 1024;
/// While retired homes wait for their users, the kernel is asked about them this often, in ms.
pub const DRAIN_POLL_MS: u64 = 50;
/// At most, when the answer has long been the same, in ms.
pub const DRAIN_POLL_MS_MAX: u64 = 2000;
/// Ranges of one file that guests say they unmapped and whose entries are looked at again, because the
/// guest's kernel unmaps a little later; of what is more, the entries stay until they are recalled.
pub const UNMAPPING_MAX: usize = 64;
/// Threads that write pages to the host's files: two, so that one slow file does not stop the others.
pub const SAVE_THREADS: usize = 2;
/// Threads that wait for disks (`fdatasync`).
pub const SYNC_THREADS: usize = 2;
/// Pages of coherent files that are wanted back in one event.
pub const WANT_BACK_PAGES_MAX: usize = 256;
/// Pages of coherent files wanted back at a time where others can be taken by force: two batches.
pub const WANT_BACK_MAX: u32 = 2 * RECLAIM_BATCH;
/// The longest pause between tries for a lease, in ms; after it only a notification leads to one more.
pub const LEASE_PAUSE_MS_MAX: u64 = 3200;
/// Jobs that wait for frames are looked at this often although nothing was told, in ms.
pub const PARKED_POLL_MS: u64 = 20;
/// Pauses between tries to make 2 MiB of pages huge, in ms.
pub const HUGE_PAUSES_MS: [u64; 4] = [1, 2, 4, 8];
/// Refusals in a row after which each unit is tried once only.
pub const HUGE_REFUSALS_MAX: u64 = 16;
/// Lines in an audit report.
pub const AUDIT_LINES_MAX: usize = 100;
/// Bytes of one entry of a directory beside its name, on the wire, for dividing listings.
pub const DIR_ENTRY_BYTES: usize = 32;
/// More bytes of an entry with its handle and attributes.
pub const DIR_NODE_BYTES: usize = 144;

const _: () = assert!(FILL_PAGES_MAX >= FAULT_PAGES_MAX);
const _: () = assert!(RECLAIM_BATCH <= FRAMES_MIN);
const _: () = assert!(READ_BYTES_MAX as u64 / 4096 < FILL_PAGES_MAX as u64);
