//! Every constant of this crate: its unit, the reason for it, and the bound of Xen or Linux that it
//! respects.

/// Entries of every table that are never used: `GNTTAB_NR_RESERVED_ENTRIES` of Xen's public
/// grant_table.h, for the toolstack, which has the first two (console and xenstore). The ledger also
/// relies on 0 never naming a grant.
pub const ENTRIES_RESERVED: u32 = 8;

/// Entries in one table of the local backend, when nothing else is asked. Memory is touched as
/// entries are used: 22 bytes for each (8 for the entry, 14 for the ledger).
pub const LOCAL_ENTRIES_DEFAULT: u32 = 1 << 22;

/// Frames that may ever be named, in frames: 2 TiB. Ledger links keep the top bit for themselves.
pub const FRAMES_MAX: u32 = 1 << 29;

/// Entries in all tables together: the same bit.
pub const ENTRIES_MAX: u32 = 1 << 30;

/// Grants one domain may hold when nobody set its limit: Xen's default for maptrack entries
/// (`max_maptrack_frames` 1024, 262,144 mapped pages).
pub const GRANTS_PER_DOMAIN_DEFAULT: u64 = 262_144;

/// Grants handled under one hold of the ledger's lock by calls that go over many of them (the end
/// of a domain, the audit, listings): some 100 us.
pub const GRANTS_PER_LOCK_HOLD: u32 = 4096;

/// Lines in one audit report.
pub const AUDIT_LINES_MAX: usize = 100;

/// Pages in one 2 MiB unit (a PMD of x86-64 and of Arm with 4 KiB pages).
pub const HUGE_PAGES: u64 = 512;

/// Connections that wait to be accepted; more are refused by the kernel (bounded by
/// `net.core.somaxconn`, 4096).
pub const LISTEN_BACKLOG: i32 = 128;

/// The longest path of a Unix socket, in bytes (`sun_path`, linux/un.h, less the NUL).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The longest label of a home, in bytes; what is longer is cut (a name in a tmpfs directory is at
/// most 255, memfd names 249).
pub const HOME_LABEL_BYTES_MAX: usize = 64;

/// Memory of one cache domain when nothing else is asked, in MiB: large enough that few are needed,
/// small enough to give back.
pub const CACHE_DOMAIN_MIB_DEFAULT: u32 = 256;

/// The least, in MiB: 2 MiB and some pages of it are not used.
pub const CACHE_DOMAIN_MIB_MIN: u32 = 16;

/// The most, in MiB: a domain's memory is in one piece below the devices' addresses at 3.75 GiB
/// (`HVM_BELOW_4G_RAM_END`, xen/hvm/e820.h).
pub const CACHE_DOMAIN_MIB_MAX: u32 = 2048;

/// Cache domains at most: each is a table, and hosts list them.
pub const CACHE_DOMAINS_MAX: u32 = 256;

/// Entries in a cache domain's table for each of its frames, when nothing else is asked: each guest
/// that maps a frame needs one.
pub const ENTRIES_PER_FRAME_DEFAULT: u32 = 4;

/// Frames of a cache domain's table at most, when nothing else is asked: 262,144 entries in 2 MiB.
pub const GRANT_FRAMES_MAX: u32 = 512;

/// How long the toolstack may take to make or end a domain, in s. In emulation it takes ten.
pub const TOOLSTACK_DEADLINE_S: u64 = 120;

/// How long an entry's number rests before it is used again, in ms: a session's term of 5 s, 1 % for
/// clocks that differ, and a little.
pub const GREF_REST_MS_DEFAULT: u64 = 5100;

/// How long the daemon waits, at most, for a page to be taken out of a guest's file before it says that the guest
/// holds it up, in ms: it takes some us, or as long as the guest likes; on a loaded machine some 10 ms.
pub const SWEEP_WAIT_MS: u64 = 200;

/// How long a page stays in a guest's file after it was taken, in ms, since many come back at once.
pub const SWEEP_REST_MS: u64 = 5;

/// Of all time, in percent, the daemon waits no more than this for guests of one class to let pages be taken out.
pub const SWEEP_WAIT_PERCENT: u32 = 2;

/// Files of guests that have ended and that one trust class may keep from being emptied; each is bounded by its
/// session's limit.
pub const ENDED_FILES_MAX: usize = 16;

/// Arenas of one session: a descriptor each.
pub const SESSION_ARENAS_MAX: usize = 512;

/// Windows on guests' files that are kept: a mapping each, of the 65,530 that a process may have
/// (`vm.max_map_count`). Beyond it each write makes its own.
pub const WINDOWS_KEPT_MAX: u32 = 8192;
