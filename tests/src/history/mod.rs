//! What guests did to the words of a shared file, and when: made by the guests themselves, each in a log
//! of its own that outlives its process.
//!
//! What a checker concludes, it concludes from what was over before something else began. So the times in a
//! log have to say that truly: those of processes of one machine are of `CLOCK_MONOTONIC`, which is one for
//! all of them; guests on a hypervisor, whose clocks differ, need another [`Clock`].

pub mod check;
mod log;
mod record;
mod shared;
mod whole;

pub use log::{Log, log_file};
pub use record::{Memory, Plan, record};
pub use shared::SharedFile;
pub use whole::History;

use serde::{Deserialize, Serialize};

/// Something that a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Call {
    /// A plain store to a mapping.
    Store {
        /// Which page.
        page: u64,
        /// Which of its words.
        word: u64,
        /// Never used before in this file.
        value: u64,
    },
    /// A plain load from a mapping.
    Load {
        /// Which page.
        page: u64,
        /// Which of its words.
        word: u64,
    },
    /// A write by message.
    Write {
        /// Which page.
        page: u64,
        /// Which of its words.
        word: u64,
        /// Never used before in this file.
        value: u64,
    },
    /// A read by message.
    Read {
        /// Which page.
        page: u64,
        /// Which of its words.
        word: u64,
    },
    /// All that was stored is to be on the disk.
    Sync,
    /// The file gets so many pages.
    Resize {
        /// How many.
        pages: u64,
    },
}

impl Call {
    /// In one word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Store { .. } => "store",
            Self::Load { .. } => "load",
            Self::Write { .. } => "write",
            Self::Read { .. } => "read",
            Self::Sync => "sync",
            Self::Resize { .. } => "resize",
        }
    }
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Done.
    Done,
    /// What was read; `None`: the word is past the file's end.
    Value(Option<u64>),
    /// By an error: it may have been done, or not.
    Failed(i32),
}

/// One thing that a guest did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// Who: each process has a number of its own.
    pub guest: u32,
    /// What.
    pub call: Call,
    /// Not done before, in ns.
    pub begin_ns: u64,
    /// Done by then, in ns, and how; `None`: nobody knows.
    pub end: Option<(u64, Outcome)>,
}

/// What slots begin by, and what operations are stamped by.
pub trait Clock {
    /// The time, in ns: about the same for all.
    fn now_ns(&self) -> u64;
    /// Not less than any that was drawn before, by whomever. Two that one guest draws differ.
    fn stamp_ns(&self) -> u64;
}

/// That of this machine's processes.
#[derive(Clone, Copy, Debug)]
pub struct OneMachine;

impl Clock for OneMachine {
    fn now_ns(&self) -> u64 {
        now_ns()
    }

    fn stamp_ns(&self) -> u64 {
        now_ns()
    }
}

/// The time of this machine, in ns.
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // A machine that has been up for 584 years begins anew.
    (now.tv_sec as u64).wrapping_mul(1_000_000_000) + now.tv_nsec as u64
}
