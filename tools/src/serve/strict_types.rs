//! What the admin socket says of coherent files.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Pages of coherent files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeasesEntry {
    /// By file, then page.
    pub pages: Vec<LeasePage>,
    /// There are more than were asked for.
    pub more: bool,
}

/// A page of a coherent file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeasePage {
    /// The host's file.
    pub file: PathBuf,
    /// Which page of it.
    pub page: u64,
    /// `away`, `free`, `shared`, `exclusive`, `shared-rw`.
    pub state: String,
    /// Which content.
    pub version: String,
    /// Somebody could write since it was last filled or saved.
    pub dirty: bool,
    /// `filling`, `saving`.
    pub work: Option<String>,
    /// Who has it.
    pub holders: Vec<LeaseHolder>,
    /// Who waits for it, in order: guests and how (`web:rw`), `(daemon)`, `(take)`.
    pub waiting: Vec<String>,
    /// How long ago a session last got it, in ms.
    pub since_ms: u64,
}

/// What a run of pages of a coherent file has in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StrictRun {
    /// As of [`LeasePage`].
    pub state: String,
    /// Which content.
    pub version: String,
    /// Somebody could write since it was last filled or saved.
    pub dirty: bool,
    /// Those of the holders that may write.
    pub writers: Vec<String>,
}

/// Who has a page of a coherent file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseHolder {
    /// The guest's name.
    pub guest: String,
    /// Its session.
    pub epoch: u64,
    /// It may write.
    pub writable: bool,
    /// It was asked for the page and has not let go yet.
    pub leaving: bool,
}

/// What was counted of the pages of coherent files since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StrictEntry {
    /// Pages granted for reading.
    pub granted_read: u64,
    /// Pages granted to one for writing: unshares.
    pub granted_write: u64,
    /// Pages granted to several for writing.
    pub granted_shared: u64,
    /// Pages that sessions were asked for.
    pub recalls: u64,
    /// Pages filled.
    pub fills: u64,
    /// Pages moved out of frames that sessions which are gone may have mapped.
    pub copies: u64,
    /// Pages saved because their writer let go.
    pub saves: u64,
    /// Saves that the disk refused.
    pub saves_failed: u64,
    /// Syncs that guests asked for.
    pub syncs: u64,
    /// Syncs by the clock.
    pub writebacks: u64,
    /// Writes by message.
    pub writes: u64,
    /// Changes of a file's length.
    pub resizes: u64,
    /// New homes, because a session was fenced or the host changed the file.
    pub rehomes: u64,
    /// Times that a process of the host was let in.
    pub hosts_let_in: u64,
    /// What half of the faults for writing did not wait longer than, in ms: the bound of a class.
    pub write_wait_p50_ms: u64,
    /// The same of 99 in 100.
    pub write_wait_p99_ms: u64,
    /// Coherent files that are open or have pages in frames.
    pub now_files: u64,
    /// Requests that wait for pages.
    pub now_works: u64,
}
