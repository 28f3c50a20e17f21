//! What the command and the daemon say to each other on the admin socket.
//!
//! `<run_dir>/admin.sock` is a Unix stream socket of mode 0600; the daemon talks to its own uid and
//! to root only. Each side writes one JSON value per line: a request `{"cmd":"guests"}` is answered
//! by one reply `{"reply":"guests",…}`, in order. Unknown commands and fields are errors. Numbers of
//! pages count 4 KiB; times are in ms.

pub use super::strict_types::{LeaseHolder, LeasePage, LeasesEntry, StrictEntry, StrictRun};
use crate::config::Uuid;
use copage_grants::channel::DomainPeer;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What the administrator asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case", deny_unknown_fields)]
pub enum AdminRequest {
    /// The sessions there are. Reply: [`AdminReply::Guests`].
    Guests,
    /// The exports there are. Reply: [`AdminReply::Exports`].
    ExportList,
    /// Exports a directory until the daemon stops. Reply: [`AdminReply::Done`].
    ExportAdd(ExportEntry),
    /// Ends an export: its guests' handles go stale, its pages are taken back. Reply: Done.
    ExportRemove {
        /// Its name.
        name: String,
    },
    /// What the cache holds of one file. Reply: [`AdminReply::Pages`].
    Pages {
        /// `EXPORT/path/in/it`, or an absolute path of the host that lies below an export.
        path: PathBuf,
    },
    /// Grants, of one guest or of all. Reply: [`AdminReply::Grants`].
    Grants {
        /// A guest's name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest: Option<String>,
        /// List at most this many entries (the totals count all); nothing said: 1,000.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        entries_max: Option<u32>,
    },
    /// Who holds and awaits pages of coherent files. Reply: [`AdminReply::Leases`].
    Leases {
        /// Of this file only; as of Pages.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<PathBuf>,
        /// List at most this many pages; nothing said: 1,000.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pages_max: Option<u32>,
    },
    /// Compares ledger, grant tables and cache. Reply: [`AdminReply::Audit`].
    Audit,
    /// Reply: [`AdminReply::Stats`].
    Stats,
    /// Takes frames back now. Reply: [`AdminReply::Reclaimed`].
    Reclaim {
        /// How many, in pages.
        pages: u64,
    },
    /// Changes the budget. Frames above it are given back as fast as guests let go; memory for a larger one is
    /// made before the reply. Reply: Done.
    SetBudget {
        /// The budget, in MiB.
        frames_mib: u64,
    },
    /// Drops every page that is not granted or pinned. Reply: [`AdminReply::Reclaimed`].
    Drop,
    /// Lets a Xen domain have sessions and use exports, until the daemon stops. Reply:
    /// [`AdminReply::Attached`].
    Attach {
        /// Its name or uuid.
        domain: String,
        /// Names of exports.
        exports: Vec<String>,
    },
    /// Takes that back: from these exports, or, with none named, altogether. Its sessions are
    /// fenced. Reply: [`AdminReply::Fenced`].
    Detach {
        /// Its name or uuid, as it was attached.
        domain: String,
        /// Names of exports.
        #[serde(default)]
        exports: Vec<String>,
    },
    /// Fences all sessions of a guest. Reply: [`AdminReply::Fenced`].
    Fence {
        /// Its name.
        guest: String,
    },
    /// Stops the daemon cleanly. Reply: Done, before it stops.
    Stop,
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum AdminReply {
    /// To Guests.
    Guests {
        /// By name, then domid.
        guests: Vec<GuestEntry>,
    },
    /// To ExportList.
    Exports {
        /// By name.
        exports: Vec<ExportEntry>,
    },
    /// To Pages.
    Pages(FilePagesEntry),
    /// To Grants.
    Grants(GrantsEntry),
    /// To Leases.
    Leases(LeasesEntry),
    /// To Audit.
    Audit(AuditEntry),
    /// To Stats.
    Stats(StatsEntry),
    /// To Reclaim and Drop.
    Reclaimed {
        /// Pages taken back by the time of this reply; more may follow as guests let go.
        pages: u64,
    },
    /// To Attach.
    Attached {
        /// The guest that the domain is.
        guest: String,
    },
    /// To Fence and Detach.
    Fenced {
        /// How many sessions.
        sessions: u64,
    },
    /// It is done.
    Done,
    /// It is not.
    Error {
        /// The errno.
        errno: i32,
        /// What was wrong and what to do.
        text: String,
    },
}

/// One session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestEntry {
    /// The name that access lists know it by.
    pub name: String,
    /// Its domid, while it is connected.
    pub dom: u16,
    /// The session's epoch.
    pub epoch: u64,
    /// Its uid, as the kernel says; none of a domain's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Its process, as the kernel says; none of a domain's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// Its Xen domain, as the toolstack says; none of a process's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomainEntry>,
    /// How long it has been connected, in ms.
    pub connected_ms: u64,
    /// What is left of its lease, in ms.
    pub lease_left_ms: u64,
    /// Handles it holds.
    pub handles: u64,
    /// Open files.
    pub files: u64,
    /// Grants.
    pub grants: u64,
    /// Notices it has not acknowledged yet.
    pub recalls: u64,
    /// Requests that are being worked on.
    pub in_flight: u64,
    /// Requests so far.
    pub requests: u64,
}

/// A Xen domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainEntry {
    /// Its name.
    pub name: String,
    /// Its number now.
    pub domid: u16,
    /// Its uuid.
    pub uuid: String,
}

impl From<&DomainPeer> for DomainEntry {
    fn from(domain: &DomainPeer) -> Self {
        Self {
            name: domain.name.clone(),
            domid: domain.domid,
            uuid: Uuid(domain.uuid).to_string(),
        }
    }
}

/// One export; the fields are the configuration's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportEntry {
    /// Its name.
    pub name: String,
    /// The directory on the host.
    pub path: PathBuf,
    /// `ro` or `coherent`.
    #[serde(default = "ro")]
    pub mode: String,
    /// Names of guests that may use it; `*`: all.
    #[serde(default = "everybody")]
    pub allow: Vec<String>,
    /// The share group; nothing said: a group of its own, named as the export.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Of a coherent export: how long what guests store stays out of the host's file at most, in ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writeback_ms: Option<u32>,
}

fn ro() -> String {
    "ro".to_owned()
}

fn everybody() -> Vec<String> {
    vec!["*".to_owned()]
}

/// What the cache holds of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePagesEntry {
    /// As it was asked for.
    pub path: PathBuf,
    /// The file is cached: without it the rest is empty.
    pub cached: bool,
    /// Its length, in bytes.
    pub bytes: u64,
    /// Its generation.
    pub generation: u32,
    /// Its version, `epoch.counter`.
    pub version: String,
    /// Pages in frames.
    pub resident_pages: u64,
    /// Of these, pages in 2 MiB frames.
    pub huge_pages: u64,
    /// Grants of all of them.
    pub grants: u64,
    /// Guests have it pinned (mounted or run).
    pub pinned: bool,
    /// The daemon has no kernel lease on it: changes are noticed at open and on notification only.
    pub host_bounded: bool,
    /// Frames of earlier generations that may still be mapped.
    pub quarantined_pages: u64,
    /// Runs of resident pages with the same holders (and, of a coherent file, state and version), by page; at
    /// most 10,000.
    pub runs: Vec<PageRunEntry>,
}

/// A run of resident pages that the same guests hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRunEntry {
    /// The first page.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// In 2 MiB frames.
    pub huge: bool,
    /// Who holds grants, by name (a guest that has several sessions more than once).
    pub holders: Vec<String>,
    /// Of a coherent file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strict: Option<StrictRun>,
}

/// Grants.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantsEntry {
    /// All grants of the guests that were asked for.
    pub total: u64,
    /// Of these, mapped by what the table says.
    pub mapped: u64,
    /// For each guest; one that ended or was fenced and still has entries is `(domid)`.
    pub guests: Vec<GuestGrantsEntry>,
    /// The first entries of the tables.
    pub entries: Vec<GrantLine>,
}

/// Grants of one session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestGrantsEntry {
    /// Its guest's name.
    pub guest: String,
    /// Its domid.
    pub dom: u16,
    /// Its grants.
    pub grants: u64,
    /// Of these, mapped.
    pub mapped: u64,
}

/// One entry of a grant table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantLine {
    /// Whose.
    pub guest: String,
    /// Its domid.
    pub dom: u16,
    /// The table.
    pub table: u16,
    /// The cache domain whose table it is; none on local.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granter: Option<u16>,
    /// The entry.
    pub gref: u32,
    /// The frame.
    pub frame: u32,
    /// It may write.
    pub writable: bool,
    /// It is mapped, or may be.
    pub mapped: bool,
}

/// What an audit found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditEntry {
    /// Everything agrees.
    pub ok: bool,
    /// What was compared, and how much of it.
    pub checks: Vec<AuditCheck>,
    /// How long it took, in ms.
    pub took_ms: u64,
}

/// One comparison of an audit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditCheck {
    /// What was compared with what.
    pub name: String,
    /// How many things were compared.
    pub checked: u64,
    /// What differs, one line each, at most a hundred.
    pub differences: Vec<String>,
}

/// Numbers of the daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatsEntry {
    /// `local` or `xen`.
    pub backend: String,
    /// Pages can be taken back by force.
    pub force: bool,
    /// The daemon's epoch: the upper half of every version.
    pub epoch: u32,
    /// How long it has run, in ms.
    pub uptime_ms: u64,
    /// The daemon's process.
    pub pid: u32,
    /// The budget, in frames.
    pub frames_max: u64,
    /// Frames that hold pages, those in quarantine included.
    pub frames_used: u64,
    /// Frames that may still be mapped by somebody who should not.
    pub frames_quarantined: u64,
    /// Frames pinned by mounts and programs.
    pub frames_pinned: u64,
    /// Frames that are parts of 2 MiB frames.
    pub frames_huge: u64,
    /// Grants.
    pub grants: u64,
    /// Cached files.
    pub files: u64,
    /// Sessions.
    pub sessions: u64,
    /// What was counted since the start, by name; names end with their unit where they have one.
    pub counters: BTreeMap<String, u64>,
    /// Files of coherent exports.
    #[serde(default)]
    pub strict: Box<StrictEntry>,
    /// The Xen side, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xen: Option<XenEntry>,
    /// What guests are charged with, by name; those that are charged with nothing are left out.
    #[serde(default)]
    pub charges: Vec<ChargesEntry>,
}

/// The Xen side of the daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct XenEntry {
    /// The domains that hold the frames.
    pub cache_domains: Vec<CacheDomainEntry>,
    /// What was counted of the control channel since the start.
    pub channel: ChannelEntry,
}

/// A cache domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheDomainEntry {
    /// Its grant table, as `grants` calls it.
    pub table: u16,
    /// Its domid.
    pub domid: u16,
    /// Entries of its grant table that are in use, or were a moment ago and rest.
    pub entries_used: u64,
    /// Entries that its grant table has for guests.
    #[serde(default)]
    pub entries_max: u64,
    /// Frames in it.
    #[serde(default)]
    pub frames: u64,
    /// Those of them that hold something or may be mapped.
    #[serde(default)]
    pub frames_used: u64,
    /// The budget does not need it: it is emptied, and ended when nothing is in it.
    #[serde(default)]
    pub draining: bool,
}

/// Counts of the control channel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelEntry {
    /// Attached domains that there are now.
    pub domains_now: u64,
    /// Sessions accepted.
    pub accepted: u64,
    /// Sessions refused.
    pub refused: u64,
    /// Changes of xenstore that were looked at.
    pub store_events: u64,
    /// Times that a domain changed its nodes too often and was not listened to for a while.
    pub floods: u64,
}

/// What one guest is charged with, over all its sessions, those that ended included.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChargesEntry {
    /// Its name.
    pub guest: String,
    /// Frames charged to it.
    pub frames: u64,
    /// Pages it has pinned.
    pub pinned_pages: u64,
    /// Quarantined pages that it is the cause of.
    pub quarantined_pages: u64,
}
