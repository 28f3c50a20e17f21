//! Ranges of the settings: unit, reason, bound.

use std::ops::RangeInclusive;

/// The budget, in MiB. Below 4 MiB there is no room for a 2 MiB frame beside anything else; frame
/// numbers have 29 bits (`copage_grants::limits::FRAMES_MAX`), which is 2 TiB.
pub const FRAMES_MIB: RangeInclusive<u64> = 4..=2 << 20;
/// The session lease, in ms; the session machine's own bounds.
pub const LEASE_TTL_MS: RangeInclusive<u64> = copage_coherence::limits::LEASE_TTL_MS_MIN as u64
    ..=copage_coherence::limits::LEASE_TTL_MS_MAX as u64;
/// How long a guest may take over an invalidation, in ms: the same bounds as the lease, for the
/// same reasons.
pub const INVALIDATE_DEADLINE_MS: RangeInclusive<u64> = LEASE_TTL_MS;
/// How long a fault waits for a host writer, in ms. Longer than half a minute looks like a hang.
pub const HOST_SETTLE_MS: RangeInclusive<u64> = 0..=30_000;
/// Threads that read files; the cache's own bound.
pub const FILL_THREADS: RangeInclusive<u64> = 1..=copage_cache::limits::FILL_THREADS_MAX as u64;
/// The longest readahead window, in KiB: one page up to one 2 MiB unit, a power of two.
pub const READAHEAD_KIB: RangeInclusive<u64> = 4..=2048;
/// The longest file that is pinned, in MiB. 0: none is.
pub const PIN_FILE_MIB: RangeInclusive<u64> = 0..=2 << 20;
/// Grants of one session: at least one fault's worth, at most what the tables can hold.
pub const GRANTS_MAX: RangeInclusive<u64> =
    copage_cache::limits::FAULT_PAGES_MAX as u64..=copage_grants::limits::ENTRIES_MAX as u64;
/// Handles of one session: enough to walk a path of the longest allowed depth, at most a million
/// (each costs the daemon a descriptor and about 200 bytes while it is the only one for its file).
pub const HANDLES_MAX: RangeInclusive<u64> = 64..=1 << 20;
/// Files one session has open, each with up to four descriptors in the daemon; `fs.nr_open` is
/// 1,048,576 by default.
pub const FILES_MAX: RangeInclusive<u64> = 1..=1 << 18;
/// Pinned memory of one guest, in MiB. 0: mounts and programs go through the page cache.
pub const PINNED_MIB: RangeInclusive<u64> = 0..=2 << 20;
/// Frames charged to one guest, in MiB: not less than one 2 MiB unit and some.
pub const GUEST_FRAMES_MIB: RangeInclusive<u64> = 4..=2 << 20;
/// A uid; the last one means "none" to the kernel.
pub const UID: RangeInclusive<u64> = 0..=u32::MAX as u64 - 1;
/// Memory of one cache domain, in MiB. The smallest that holds a 2 MiB unit beside its records; the
/// largest whose grants, some for each of its frames, a grant table still holds.
pub const CACHE_DOMAIN_MIB: RangeInclusive<u64> = 16..=4096;
/// Sessions of one domain: each is one process, and maps 17 pages and two event channels in the
/// control domain.
pub const DOMAIN_SESSIONS_MAX: RangeInclusive<u64> = 1..=256;
/// How long what guests store stays out of the host's file, in ms. A shorter time than a disk needs
/// for some pages does nothing but write; a longer one than a minute is what fsync is for.
pub const WRITEBACK_MS: RangeInclusive<u64> = 50..=60_000;
/// The same when nothing is said, in ms.
pub const WRITEBACK_MS_DEFAULT: u32 = 1000;
/// The longest name of a domain, in bytes.
pub const DOMAIN_NAME_BYTES_MAX: usize = 64;
/// The longest name of an export, a share group or a guest, in bytes; the cache's own bound.
pub const NAME_BYTES_MAX: usize = copage_cache::limits::LABEL_BYTES_MAX;
/// The longest configuration file, in bytes: thousands of exports fit.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Exports in one configuration.
pub const EXPORTS_MAX: usize = 1024;
/// Guests in one configuration.
pub const GUESTS_MAX: usize = 4096;
/// Problems that are printed; the rest are counted.
pub const PROBLEMS_MAX: usize = 100;

const _: () = assert!(*FRAMES_MIB.end() << 8 <= copage_grants::limits::FRAMES_MAX as u64);
const _: () = assert!(*FRAMES_MIB.start() << 8 >= copage_cache::limits::FRAMES_MIN as u64);
