//! What Xen's libraries and devices refuse.

use std::io;

/// Why something of Xen's could not be had or done.
#[derive(Debug, thiserror::Error)]
pub enum XenError {
    /// A library or a device is not there: this machine is no Xen host or guest, or lacks a package
    /// or a kernel module.
    #[error("no Xen here: {what}: {why}")]
    Missing {
        /// The library's soname or the device's path.
        what: &'static str,
        /// What looking for it gave.
        why: String,
    },
    /// A call failed.
    #[error("{call}: {source}")]
    Sys {
        /// The library's function, or the system call.
        call: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// An argument that no call could take: a string with a NUL in it, no pages, too many.
    #[error("{call}: {why}")]
    BadArgument {
        /// The library's function.
        call: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
}

impl XenError {
    /// The nearest errno.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Missing { .. } => libc::ENODEV,
            Self::Sys { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Self::BadArgument { .. } => libc::EINVAL,
        }
    }

    /// The error of a library function that has just failed.
    pub(super) fn last(call: &'static str) -> Self {
        Self::Sys {
            call,
            source: io::Error::last_os_error(),
        }
    }

    /// The same of one that opens a device: whether the device is there at all.
    pub(super) fn opening(call: &'static str, device: &'static str) -> Self {
        let source = io::Error::last_os_error();
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Self::Missing {
                what: device,
                why: source.to_string(),
            },
            _ => Self::Sys { call, source },
        }
    }
}
