//! Typed errors that keep their numbers.

use crate::ids::{DomId, FrameNo, HomeId};

/// What a backend can refuse. After any error the ledger and the tables are as before the call
/// unless the call's documentation says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// The backend cannot do this here.
    #[error("{what} is not supported by the {backend} backend here")]
    Unsupported {
        /// The backend's name.
        backend: &'static str,
        /// What was asked.
        what: &'static str,
    },
    /// A domain's limit of grants.
    #[error("{dom} would hold {wanted} grants and may hold {grants_max}")]
    GrantsOverLimit {
        /// Who.
        dom: DomId,
        /// What it would have had.
        wanted: u64,
        /// Its limit.
        grants_max: u64,
    },
    /// All entries of all tables are in use.
    #[error("the grant table is full: all {entries} entries are in use")]
    TableFull {
        /// Entries in all.
        entries: u64,
    },
    /// A frame was to be emptied that somebody still holds.
    #[error("frame {0:?} is still granted")]
    StillGranted(FrameNo),
    /// No such home (any more).
    #[error("there is no home {0:?}")]
    NoSuchHome(HomeId),
    /// A range that does not fit its home, or buffers of the wrong length.
    #[error("{0}")]
    BadRange(String),
    /// Pages beside the ones concerned were lost with them (they had to be moved, and there was no
    /// memory to put them back): none of the range is there any more.
    #[error("pages {first} to {} of a home are lost: {cause}", .first + .count - 1)]
    PagesLost {
        /// The first page of the range.
        first: u64,
        /// Pages in it.
        count: u64,
        /// Why they could not be put back.
        #[source]
        cause: Box<GrantError>,
    },
    /// The machine has no memory left for frames (a full tmpfs, ENOSPC or ENOMEM).
    #[error("no memory for frames: {0}")]
    NoMemory(#[source] std::io::Error),
    /// A cache domain cannot be made, used or ended (xen).
    #[error("cache domain {name}: {why}")]
    CacheDomain {
        /// Its name.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// A call to Xen failed, or there is no Xen here.
    #[error(transparent)]
    Xen(#[from] crate::xen::XenError),
    /// A system call failed.
    #[error("{call}: {source}")]
    Sys {
        /// The call, with what it was for.
        call: &'static str,
        /// Its error.
        #[source]
        source: std::io::Error,
    },
}

impl GrantError {
    /// The nearest errno, for a guest that asked.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Unsupported { .. } => libc::EOPNOTSUPP,
            Self::GrantsOverLimit { .. } => libc::EDQUOT,
            Self::TableFull { .. } | Self::NoMemory(_) => libc::ENOMEM,
            Self::StillGranted(_) => libc::EBUSY,
            Self::NoSuchHome(_) => libc::ESTALE,
            Self::BadRange(_) => libc::EINVAL,
            Self::CacheDomain { .. } => libc::EIO,
            Self::Xen(source) => source.errno(),
            Self::PagesLost { cause, .. } => cause.errno(),
            Self::Sys { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}
