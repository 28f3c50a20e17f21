//! Typed errors that keep their numbers.

use copage_coherence::msg::{DecodeError, EncodeError, FenceReason};
use std::fmt;
use std::io;

/// The result of everything the guest library does.
pub type Result<T> = std::result::Result<T, MmapError>;

/// Why a client is lost. From then on every call fails with it, and every access to every mapping
/// is SIGBUS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LostWhy {
    /// The daemon fenced this session.
    Fenced(FenceReason),
    /// The daemon said that it stops, and none came back in time.
    Stopped,
    /// The channel broke: the daemon died, and none came back in time.
    HungUp,
    /// The lease ran out by this side's clock (the process was stopped, or the daemon did not
    /// answer a renewal in time).
    LeaseExpired,
    /// The daemon said something that no daemon of this version says, or read nothing for so long
    /// that the queue to it is full.
    Protocol(String),
    /// A system call that the session cannot do without failed.
    Sys {
        /// The call, with what it was for.
        call: &'static str,
        /// Its errno.
        errno: i32,
    },
    /// A bug in this library.
    Internal,
    /// The last user of the session let go of it, or closed it.
    Closed,
}

impl fmt::Display for LostWhy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fenced(FenceReason::LeaseExpired) => {
                f.write_str("fenced by the daemon: the session lease was not renewed in time")
            }
            Self::Fenced(FenceReason::DeadlineMissed) => {
                f.write_str("fenced by the daemon: an invalidate was not answered in time")
            }
            Self::Fenced(FenceReason::Protocol) => {
                f.write_str("fenced by the daemon: the protocol or a limit was broken")
            }
            Self::Fenced(FenceReason::Removed) => {
                f.write_str("fenced by the daemon: the administrator took the access away")
            }
            Self::Stopped => f.write_str("the daemon has stopped"),
            Self::HungUp => f.write_str("the daemon is gone"),
            Self::LeaseExpired => f.write_str("the session lease ran out without an answer"),
            Self::Protocol(text) => write!(f, "protocol error: {text}"),
            Self::Sys { call, errno } => {
                write!(f, "{call}: {}", io::Error::from_raw_os_error(*errno))
            }
            Self::Internal => f.write_str("internal error"),
            Self::Closed => f.write_str("the session was closed"),
        }
    }
}

/// What the guest library can refuse.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MmapError {
    /// The daemon refused a request.
    #[error("{text}")]
    Refused {
        /// Its errno.
        errno: i32,
        /// Its words: what was wrong and what to do.
        text: String,
    },
    /// The client is lost; connect again.
    #[error("session lost: {0}")]
    Lost(LostWhy),
    /// Called in a forked child. A session and its mappings belong to the process that connected;
    /// the child must connect by itself.
    #[error("this session belongs to the process that connected; connect again in the child")]
    Forked,
    /// A system call failed.
    #[error("{call}: {}", io::Error::from_raw_os_error(*errno))]
    Sys {
        /// The call, with what it was for.
        call: &'static str,
        /// Its errno.
        errno: i32,
    },
    /// An argument that means nothing: EINVAL.
    #[error("{0}")]
    Invalid(String),
    /// Writing to what cannot be written: EACCES.
    #[error("{0}")]
    Access(String),
    /// A path that names nothing as it stands (resolved by this side): the errno says which.
    #[error("{text}: {}", io::Error::from_raw_os_error(*errno))]
    Path {
        /// ENOENT, ENOTDIR, ELOOP or ENAMETOOLONG.
        errno: i32,
        /// Which path.
        text: String,
    },
    /// What was open is not there any more, or another file is there by its name: found out when the
    /// daemon had been started again. Open it anew.
    #[error("{path} is not the file any more that it was before the daemon was started again")]
    Stale {
        /// Export and path, as it was found.
        path: String,
    },
    /// Stores through mappings of the file that no `sync` had covered were of a daemon that is gone, and
    /// may be lost: EIO. Said once.
    #[error("stores since the last sync may be lost: the daemon that had them is gone")]
    WritesLost,
    /// The daemon was gone before it answered what would change a file: EIO.
    #[error("the daemon was gone before it answered: whether the file was changed is not known")]
    Unanswered,
    /// This machine has no usable userfaultfd: mapping is not possible, reading is.
    #[error("no userfaultfd: {0}")]
    NoUserfaultfd(String),
    /// The daemon shares this file by grants, and this machine cannot map them: reading works.
    #[error("no grants: {0}")]
    NoGrants(String),
    /// The daemon answered what does not fit the request, or cannot be decoded.
    #[error("protocol error: {0}")]
    Protocol(String),
}

impl MmapError {
    /// The nearest errno.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Refused { errno, .. } | Self::Sys { errno, .. } | Self::Path { errno, .. } => {
                *errno
            }
            Self::Lost(LostWhy::Fenced(FenceReason::Removed)) => libc::EACCES,
            Self::Lost(_) => libc::ENOTCONN,
            Self::Forked => libc::ECHILD,
            Self::Invalid(_) => libc::EINVAL,
            Self::Access(_) => libc::EACCES,
            Self::Stale { .. } => libc::ESTALE,
            Self::NoUserfaultfd(_) | Self::NoGrants(_) => libc::EOPNOTSUPP,
            Self::WritesLost | Self::Unanswered => libc::EIO,
            Self::Protocol(_) => libc::EPROTO,
        }
    }

    /// The error of a system call that has just failed.
    pub(crate) fn sys(call: &'static str, error: &io::Error) -> Self {
        Self::Sys {
            call,
            errno: error.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

impl From<MmapError> for io::Error {
    fn from(error: MmapError) -> Self {
        // The kind comes from the errno, the words from the error itself.
        let kind = io::Error::from_raw_os_error(error.errno()).kind();
        io::Error::new(kind, error)
    }
}

impl From<DecodeError> for MmapError {
    fn from(error: DecodeError) -> Self {
        Self::Protocol(error.to_string())
    }
}

impl From<EncodeError> for MmapError {
    fn from(error: EncodeError) -> Self {
        // What cannot be encoded came from the caller: a name too long, a number out of range.
        Self::Invalid(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_keep_their_numbers() {
        let refused = MmapError::Refused {
            errno: libc::EDQUOT,
            text: "too many".into(),
        };
        assert_eq!(refused.errno(), libc::EDQUOT);
        let io: io::Error = MmapError::Path {
            errno: libc::ENOENT,
            text: "/x".into(),
        }
        .into();
        assert_eq!(io.kind(), io::ErrorKind::NotFound);
        assert_eq!(MmapError::Lost(LostWhy::HungUp).errno(), libc::ENOTCONN);
    }
}
