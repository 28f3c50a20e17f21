//! Who plays the guests: processes of this machine, or domains of a hypervisor that somebody else has
//! started. The scenario does not know the difference.

use anyhow::{Context, Result};
use serde::Deserialize;
use std::path::Path;
use std::time::Duration;

/// One guest.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The name by which the daemon knows it.
    pub name: String,
    /// What it runs on, in words: `PVH, Linux 6.12`.
    pub kind: String,
    /// The command whose input and output are those of the guest's `copage demo-agent`.
    pub agent: Vec<String>,
    /// The command that ends the whole guest at once; empty: a signal to the agent.
    #[serde(default)]
    pub kill: Vec<String>,
    /// The command that stops the whole guest; empty: as above.
    #[serde(default)]
    pub stop: Vec<String>,
    /// The command that lets it go on; empty: as above.
    #[serde(default)]
    pub resume: Vec<String>,
}

impl Part {
    /// A process of this machine, of a daemon that listens at `socket`.
    pub fn process(socket: &Path, name: &str) -> Result<Self> {
        let own = std::env::current_exe()?;
        let word = |path: &Path| {
            let word = path.to_str().map(str::to_owned);
            word.with_context(|| format!("{}: not UTF-8", path.display()))
        };
        let agent = [
            word(&own)?,
            "demo-agent".into(),
            "--connect".into(),
            word(socket)?,
            "--name".into(),
            name.into(),
        ];
        Ok(Self {
            name: name.to_owned(),
            kind: "process".into(),
            agent: agent.into(),
            kill: Vec::new(),
            stop: Vec::new(),
            resume: Vec::new(),
        })
    }
}

/// All guests of a hypervisor.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cast {
    /// The hypervisor and the control domain, in words.
    pub hypervisor: String,
    /// The guests, at least three: the last is killed, the one before it is stopped.
    pub guests: Vec<Part>,
}

impl Cast {
    /// Reads a cast from a JSON file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let cast: Self = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        anyhow::ensure!(
            cast.guests.len() >= 3,
            "{}: three guests are needed",
            path.display()
        );
        Ok(cast)
    }
}

/// How large the demo is.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// The frame budget to begin with, in MiB.
    pub frames_mib: u64,
    /// The session lease, in ms: short, so that an expiry can be watched.
    pub lease_ttl_ms: u32,
    /// At most this much of the directory's files is shared, in bytes.
    pub files_bytes_max: u64,
    /// And as many files.
    pub files_max: usize,
    /// The pattern file that is changed on the host, in pages.
    pub changed_pages: u64,
    /// The pattern file that is read at random while the budget shrinks, in pages.
    pub load_pages: u64,
    /// How long readers read before and after a change, in ms.
    pub watch_ms: u64,
    /// How long a thing may take that should take no time, in ms.
    pub soon_ms: u64,
}

impl Scale {
    /// How long a thing may take that should take no time.
    pub fn soon(&self) -> Duration {
        Duration::from_millis(self.soon_ms)
    }
}

/// On this machine.
pub const LOCAL: Scale = Scale {
    frames_mib: 256,
    lease_ttl_ms: 2000,
    files_bytes_max: 96 << 20,
    files_max: 200,
    changed_pages: 2048,
    load_pages: 16_384,
    watch_ms: 700,
    soon_ms: 5000,
};

/// Under a hypervisor, which may well be emulated.
pub const XEN: Scale = Scale {
    frames_mib: 48,
    lease_ttl_ms: 10_000,
    files_bytes_max: 12 << 20,
    files_max: 60,
    changed_pages: 256,
    load_pages: 2048,
    watch_ms: 4000,
    soon_ms: 20_000,
};
