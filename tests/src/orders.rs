//! What a test says to a guest process and what it answers: one JSON document a line.

use crate::history::Plan;
use serde::{Deserialize, Serialize};

/// An order to a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Order {
    /// Begin a session.
    Connect {
        /// The daemon's socket.
        socket: String,
        /// The name to say; empty: whatever the credentials say.
        name: String,
        /// `best`, `user-mode-only` or `none`.
        userfault: String,
        /// How long to look for a daemon that is gone, in ms; 0: not at all.
        reconnect_ms: u32,
    },
    /// Map a whole file; mappings are numbered from 0.
    Map {
        /// The export.
        export: String,
        /// Below it.
        path: String,
        /// A private mapping.
        private: bool,
    },
    /// Pin a whole file and map its descriptor plainly; a mapping like the others.
    Pin {
        /// The export.
        export: String,
        /// Below it.
        path: String,
    },
    /// Read one page by plain loads. SIGBUS ends the process.
    Load {
        /// Which mapping.
        mapping: usize,
        /// Which page.
        page: u64,
    },
    /// Read one page by process_vm_readv: what would be SIGBUS for a load is an error here.
    Probe {
        /// Which mapping.
        mapping: usize,
        /// Which page.
        page: u64,
    },
    /// Store to one page through /proc/self/mem, which the kernel lets a process do to its own
    /// private mappings, read-only ones too.
    Poke {
        /// Which mapping.
        mapping: usize,
        /// Which page.
        page: u64,
    },
    /// Bring pages.
    Populate {
        /// Which mapping.
        mapping: usize,
        /// The first page.
        first: u64,
        /// How many.
        count: u64,
    },
    /// Read all mappings (pattern files) again and again in a thread until `Stop`.
    Watch {
        /// Runs of this many pages one after the other, each run at a random place.
        run_pages: u64,
    },
    /// What the thread has seen so far, without stopping it.
    Look,
    /// End `Watch` and tell what it saw.
    Stop,
    /// Read a file by messages.
    Read {
        /// The export.
        export: String,
        /// Below it.
        path: String,
        /// From where.
        offset: u64,
        /// How much.
        len: usize,
    },
    /// Compares an export's file, byte by byte, with a file of this machine.
    Compare {
        /// Which mapping.
        mapping: usize,
        /// The other file.
        with: String,
    },
    /// Opens a file and keeps it; files are numbered from 0.
    Open {
        /// The export.
        export: String,
        /// Below it.
        path: String,
        /// To map it, else to use it by messages only.
        map: bool,
        /// For writing too.
        write: bool,
    },
    /// Maps all of an open file, shared; a mapping like the others.
    MapFile {
        /// Which file.
        file: usize,
        /// For stores that everybody sees.
        writable: bool,
        /// How much, in bytes, whatever its length is; 0: its length.
        len: u64,
    },
    /// Reads by messages.
    ReadAt {
        /// Which file.
        file: usize,
        /// From where.
        offset: u64,
        /// How much.
        len: usize,
    },
    /// Writes by messages.
    WriteAt {
        /// Which file.
        file: usize,
        /// Where.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// Gives a file another length.
    SetLen {
        /// Which file.
        file: usize,
        /// In bytes.
        bytes: u64,
    },
    /// Puts a file on the disk.
    Sync {
        /// Which file.
        file: usize,
    },
    /// Lets go of an open file.
    Close {
        /// Which file.
        file: usize,
    },
    /// Loads one word. SIGBUS ends the process unless it is only probed, by process_vm_readv.
    LoadWord {
        /// Which mapping.
        mapping: usize,
        /// Where, in bytes: a multiple of 8.
        offset: u64,
        /// An error in place of SIGBUS.
        probe: bool,
    },
    /// Stores one word, plainly: SIGBUS ends the process.
    StoreWord {
        /// Which mapping.
        mapping: usize,
        /// Where, in bytes: a multiple of 8.
        offset: u64,
        /// The word.
        value: u64,
    },
    /// Counts in a word that nobody else stores to: each time it must hold what was stored last.
    Count {
        /// Which mapping.
        mapping: usize,
        /// Where, in bytes: a multiple of 8.
        offset: u64,
        /// How often; 0: in a thread, until `StopCounting`.
        times: u64,
    },
    /// Load words that others only let rise, in a thread until `StopCounting`, which answers how often one of
    /// them had risen. None may go back.
    Follow {
        /// Which mapping.
        mapping: usize,
        /// Where, in bytes: multiples of 8.
        offsets: Vec<u64>,
    },
    /// Store 1, 2, 3, … in a thread until `StopCounting`: each to the first word, then to the last, of the next
    /// of some pages, as [`crate::stamp`] writes them.
    Stamp {
        /// Which mapping.
        mapping: usize,
        /// How many pages.
        pages: u64,
    },
    /// Ends the thread that was begun last; answered by the last word stored.
    StopCounting,
    /// What the mapping shows now.
    Generation {
        /// Which mapping.
        mapping: usize,
    },
    /// Why the last access to the mapping that was SIGBUS was; answered by `Lost`.
    LastError {
        /// Which mapping.
        mapping: usize,
    },
    /// Do things to a file of a coherent export as planned, and write down what.
    Record {
        /// The export.
        export: String,
        /// Below it.
        path: String,
        /// What.
        plan: Plan,
        /// The file to write it down in.
        log: String,
    },
    /// Unmap everything and keep the session.
    Unmap,
    /// Why the session is lost, if it is.
    Lost,
    /// How often a daemon was found again.
    Reconnects,
    /// Ends the session.
    Disconnect,
}

/// What a guest answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "did", rename_all = "kebab-case")]
pub enum Answer {
    /// Connected.
    Connected {
        /// The domid.
        dom: u16,
        /// The epoch.
        epoch: u64,
        /// The name by which the daemon knows it.
        name: String,
        /// Frames cannot be written by this guest.
        read_only_enforced: bool,
        /// Faults of the kernel are served too.
        full: bool,
    },
    /// Mapped.
    Mapped {
        /// Its number.
        mapping: usize,
        /// Its length in bytes.
        bytes: u64,
    },
    /// One page: its version by the pattern, `None` when it is not whole.
    Page {
        /// The version.
        version: Option<u32>,
        /// All of it is zero.
        zero: bool,
    },
    /// What `Watch` has seen.
    Watched(Watched),
    /// Bytes read.
    Bytes {
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Opened.
    Opened {
        /// Its number.
        file: usize,
        /// Its length in bytes.
        bytes: u64,
    },
    /// A word.
    Word {
        /// It.
        value: u64,
    },
    /// Written.
    Wrote {
        /// How many bytes.
        bytes: usize,
    },
    /// Bytes compared.
    Compared {
        /// How many.
        bytes: u64,
        /// Where the first difference is.
        differs_at: Option<u64>,
    },
    /// What the mapping shows.
    Generation {
        /// The generation.
        generation: u32,
        /// The file's length, in bytes, as last heard.
        bytes: u64,
        /// Without kernel lease at open.
        host_bounded: bool,
    },
    /// Why the session is lost.
    Lost {
        /// In words; `None`: it is not.
        why: Option<String>,
    },
    /// What was planned is done.
    Recorded {
        /// How many things that were.
        ops: u64,
    },
    /// Daemons found again.
    Reconnects {
        /// How many.
        count: u64,
    },
    /// Done.
    Done,
    /// It failed.
    Failed {
        /// The errno.
        errno: i32,
        /// In words.
        why: String,
    },
}

/// What a watching guest saw.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Watched {
    /// Pages read, every word checked.
    pub pages: u64,
    /// Pages torn, zero, or another's.
    pub wrong: u64,
    /// Pages whose version was below one seen earlier of the same page.
    pub backwards: u64,
    /// The newest version seen.
    pub newest: u32,
    /// The lowest version of the last pass over each page, of pages seen at all.
    pub oldest: u32,
    /// The longest that one run took, in ms.
    pub slowest_ms: u64,
    /// The first wrong page.
    pub first_wrong: Option<WrongPage>,
}

/// What a wrong page looked like.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct WrongPage {
    /// Which page of which mapping.
    pub page: (usize, u64),
    /// How many of its 512 words are zero.
    pub zero_words: usize,
    /// The versions that its first and last words name.
    pub versions: (u32, u32),
    /// The version that was seen there before.
    pub before: u32,
}

impl Watched {
    /// Sums what two guests saw.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            pages: self.pages + other.pages,
            wrong: self.wrong + other.wrong,
            backwards: self.backwards + other.backwards,
            newest: self.newest.max(other.newest),
            oldest: self.oldest.min(other.oldest),
            first_wrong: self.first_wrong.or(other.first_wrong),
            slowest_ms: self.slowest_ms.max(other.slowest_ms),
        }
    }
}
