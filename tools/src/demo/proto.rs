//! What the demo tells its guests and what they answer: one JSON document a line. On a hypervisor
//! the same lines go through a pipe into the guest; the scenario does not know the difference.

use serde::{Deserialize, Serialize};

/// An order to a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Order {
    /// Begin a session.
    Connect,
    /// Map whole files of an export, shared.
    Map {
        /// The export.
        export: String,
        /// Paths below it.
        paths: Vec<String>,
    },
    /// Map whole files of the machine natively, for comparison.
    MapNative {
        /// Paths on this machine.
        paths: Vec<String>,
    },
    /// Read every mapped byte and answer with one checksum a file.
    Checksum,
    /// The physical frame under a page of the n-th mapping.
    Frame {
        /// Which mapping.
        mapping: usize,
        /// Which page.
        page: u64,
    },
    /// Read the n-th mapping (a pattern file) again and again until `Stop`, by a thread.
    Watch {
        /// Which mapping.
        mapping: usize,
        /// Pages in random order rather than one after the other.
        random: bool,
    },
    /// Map a whole file of an export that guests write, shared.
    MapWritten {
        /// The export.
        export: String,
        /// The path below it.
        path: String,
        /// To be written too.
        writable: bool,
    },
    /// Store one page of the n-th mapping: a pattern page of a version.
    Store {
        /// Which mapping.
        mapping: usize,
        /// Which page.
        page: u64,
        /// Of which version.
        version: u32,
    },
    /// Want all that was stored in the n-th mapping's file on the disk.
    Sync {
        /// Which mapping.
        mapping: usize,
    },
    /// Store 1, 2, 3, … to the first words of the n-th mapping's pages in turn until `Stop`, by a thread;
    /// each is synced before the next.
    WriteOn {
        /// Which mapping.
        mapping: usize,
    },
    /// End `Watch` or `WriteOn` and tell what came of it.
    Stop,
    /// Read one page of the n-th mapping; answers a refusal when that raises SIGBUS.
    Read {
        /// Which mapping.
        mapping: usize,
        /// Which page.
        page: u64,
    },
    /// How much the kernel's page cache holds.
    PageCache,
    /// Unmap everything and keep the session.
    Unmap,
    /// End.
    Exit,
}

/// What a guest answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "did", rename_all = "kebab-case")]
pub enum Answer {
    /// Connected.
    Connected {
        /// The domid it was given.
        domid: u16,
    },
    /// Mapped.
    Mapped {
        /// Bytes in all.
        bytes: u64,
    },
    /// Checksums, one for each mapping.
    Checksums {
        /// xxh3 of each.
        xxh3: Vec<u64>,
    },
    /// The physical frame number, if the kernel tells it (CAP_SYS_ADMIN).
    Frame {
        /// 0 means: not told.
        pfn: u64,
    },
    /// What the kernel's page cache holds.
    PageCache {
        /// In bytes, as /proc/meminfo says.
        bytes: u64,
    },
    /// What `Watch` saw.
    Watched(Watched),
    /// One page read.
    Page {
        /// Its version by the pattern; 0 for none.
        version: u32,
    },
    /// The page was stored.
    Stored {
        /// How long the first word of it took, in ns.
        ns: u64,
    },
    /// What `WriteOn` did.
    Wrote {
        /// Stores that were synced.
        acked: u64,
        /// Of these, how many when the daemon was first missed; all, if it never was.
        at_kill: u64,
        /// Stores that were not synced because the daemon was gone, and made again.
        again: u64,
    },
    /// The order was carried out and has no result.
    Done,
    /// The memory was refused (SIGBUS).
    Refused {
        /// In words.
        why: String,
    },
    /// The order failed.
    Failed {
        /// In words.
        why: String,
    },
}

/// What a watching guest saw.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Watched {
    /// Pages read and checked, word by word.
    pub pages: u64,
    /// Pages torn, zero, or another's.
    pub wrong: u64,
    /// Pages that were replaced by a newer version while they were being copied word by word: read
    /// again, and counted as wrong if they were not whole then.
    pub crossed: u64,
    /// Pages whose version was below one seen earlier of the same page.
    pub backwards: u64,
    /// The lowest version of the last pass or, for random reads, the last page.
    pub version: u32,
    /// The time to the first page with the newest version, on CLOCK_MONOTONIC, in ns.
    pub newest_seen_ns: u64,
    /// Seconds of watching.
    pub seconds: f64,
}
