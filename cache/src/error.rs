//! What the cache refuses, typed, with the errno for the guest that asked.

use copage_grants::{DomId, GrantError};
use std::sync::Arc;

/// Why something was refused or failed. Cloned to each of several who waited for the same page.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CacheError {
    /// A system call on the host's files failed.
    #[error("{what}: {}", std::io::Error::from_raw_os_error(*errno))]
    Io {
        /// What was tried.
        what: &'static str,
        /// The errno.
        errno: i32,
    },
    /// A name that no directory entry can have, or that would lead elsewhere.
    #[error("the name is refused: {0}")]
    BadName(&'static str),
    /// A range outside its file, or empty, or too long.
    #[error("{0}")]
    BadRange(&'static str),
    /// Not a regular file: shown, never opened.
    #[error("not a regular file")]
    NotRegular,
    /// A directory where a file was wanted.
    #[error("is a directory")]
    IsDirectory,
    /// A file where a directory was wanted.
    #[error("not a directory")]
    NotDirectory,
    /// A file that nobody writes was to be written.
    #[error("the export is read-only")]
    ReadOnlyExport,
    /// A coherent file is mapped by guests of one user at a time (backends with descriptors).
    #[error("guests of another user have this file open")]
    OtherClass,
    /// The export was removed, or the file withdrawn.
    #[error("the export is not offered any more")]
    Withdrawn,
    /// The caller has not opened the file (any more).
    #[error("{0} does not have this file open")]
    NotOpen(DomId),
    /// That generation's home is gone or was never.
    #[error("generation {0} of the file is gone")]
    GenerationGone(u32),
    /// An export's directory cannot be had.
    #[error("export {name}: {path}: {why}")]
    BadExport {
        /// The export.
        name: String,
        /// Its directory.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// No export of that number.
    #[error("there is no such export")]
    NoSuchExport,
    /// The file is longer than a pinned open takes; open it through the page cache.
    #[error("the file has {pages} pages and at most {pages_max} are pinned for one file")]
    PinTooLarge {
        /// The file's length in pages.
        pages: u64,
        /// The limit.
        pages_max: u64,
    },
    /// The guest's limit of pinned pages (quarantined ones included); open it through the page cache.
    #[error("the guest would have {wanted} pages pinned and may have {pages_max}")]
    PinOverLimit {
        /// What it would have.
        wanted: u64,
        /// Its limit.
        pages_max: u64,
    },
    /// The whole budget has no room for one more pinned file; open it through the page cache.
    #[error("{wanted} pages would be pinned in a budget of {frames_max} frames")]
    PinNoRoom {
        /// What would be pinned.
        wanted: u64,
        /// The budget.
        frames_max: u32,
    },
    /// Guests get no descriptors here that map a whole file; open it through the page cache.
    #[error("nothing is pinned here: guests map page by page")]
    PinNoDescriptor,
    /// The file changed each time it was read for a pinned open.
    #[error("the file keeps changing on the host")]
    Changing,
    /// The guest's limit of frames, and nothing of its own can be given back.
    #[error("the guest has {frames} frames and may have {frames_max}")]
    FramesOverLimit {
        /// What it has.
        frames: u64,
        /// Its limit.
        frames_max: u64,
    },
    /// Every frame is pinned or quarantined.
    #[error("no frame can be freed: all of the budget is pinned or quarantined")]
    NoFrames,
    /// Too much is waiting already.
    #[error("too many requests are waiting: {0}")]
    Busy(&'static str),
    /// The budget asked for is less than what is pinned or quarantined.
    #[error("{held} frames are pinned or quarantined, a budget of {asked} cannot be kept")]
    BudgetBelowPinned {
        /// Pinned and quarantined.
        held: u32,
        /// Asked for.
        asked: u32,
    },
    /// The budget asked for is out of bounds.
    #[error("the budget must be {min} to {max} frames")]
    BudgetOutOfBounds {
        /// The least.
        min: u32,
        /// The most that can be named.
        max: u32,
    },
    /// A setting that makes no sense.
    #[error("configuration: {0}")]
    BadConfig(String),
    /// The cache is being shut down.
    #[error("the daemon stops")]
    Stopped,
    /// The guest was fenced or ended while it waited.
    #[error("the session has ended")]
    SessionEnded,
    /// The backend refused.
    #[error(transparent)]
    Grant(Arc<GrantError>),
}

impl CacheError {
    /// The nearest errno, for a guest that asked.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Io { errno, .. } => *errno,
            Self::BadName(_) | Self::BadConfig(_) | Self::BadExport { .. } => libc::EINVAL,
            Self::BudgetBelowPinned { .. } | Self::BudgetOutOfBounds { .. } => libc::EINVAL,
            Self::BadRange(_) => libc::ERANGE,
            Self::NotRegular | Self::OtherClass => libc::EACCES,
            Self::ReadOnlyExport => libc::EROFS,
            Self::IsDirectory => libc::EISDIR,
            Self::NotDirectory => libc::ENOTDIR,
            Self::Withdrawn | Self::GenerationGone(_) => libc::ESTALE,
            Self::NotOpen(_) => libc::EBADF,
            Self::NoSuchExport => libc::ENOENT,
            Self::PinTooLarge { .. } => libc::EFBIG,
            Self::PinOverLimit { .. } | Self::FramesOverLimit { .. } => libc::EDQUOT,
            Self::PinNoRoom { .. } | Self::NoFrames => libc::ENOMEM,
            Self::PinNoDescriptor => libc::EOPNOTSUPP,
            Self::Changing | Self::Busy(_) => libc::EAGAIN,
            Self::Stopped | Self::SessionEnded => libc::ESHUTDOWN,
            Self::Grant(e) => e.errno(),
        }
    }

    /// A pinned open was refused for lack of room: the same file opens through the page cache.
    pub fn is_pin_refusal(&self) -> bool {
        match self {
            Self::PinTooLarge { .. } | Self::PinOverLimit { .. } | Self::PinNoRoom { .. } => true,
            Self::PinNoDescriptor => true,
            Self::Changing | Self::NoFrames | Self::FramesOverLimit { .. } => true,
            Self::Grant(e) => matches!(
                **e,
                GrantError::GrantsOverLimit { .. }
                    | GrantError::TableFull { .. }
                    | GrantError::NoMemory(_)
            ),
            _ => false,
        }
    }

    pub(crate) fn io(what: &'static str, errno: rustix::io::Errno) -> Self {
        Self::Io {
            what,
            errno: errno.raw_os_error(),
        }
    }
}

impl From<GrantError> for CacheError {
    fn from(e: GrantError) -> Self {
        Self::Grant(Arc::new(e))
    }
}
