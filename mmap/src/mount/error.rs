//! Why a mount, or its end, is refused.

use crate::error::MmapError;
use std::io;
use std::path::PathBuf;

/// What mounting and unmounting can refuse, each in words for the user who asked.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The daemon could not be reached, or refused.
    #[error(transparent)]
    Share(#[from] MmapError),
    /// The export is of a mode that this mount would lie about.
    #[error("the export {export} is of a mode that cannot be used in this way by this version")]
    Mode {
        /// Its name.
        export: String,
    },
    /// `/dev/fuse` is not there.
    #[error("this machine has no FUSE: load it (modprobe fuse), or give the container /dev/fuse")]
    NoFuse {
        /// What opening it gave.
        #[source]
        source: io::Error,
    },
    /// `/dev/fuse` is there, for others.
    #[error("you may not open /dev/fuse (distributions give it mode 0666)")]
    NoDevice {
        /// What opening it gave.
        #[source]
        source: io::Error,
    },
    /// Neither the right to mount nor a helper that has it.
    #[error(
        "mounting needs root, or fusermount3 (package fuse3) for other users, or a user namespace \
         (unshare -rm)"
    )]
    NoRight {
        /// What mounting gave.
        #[source]
        source: io::Error,
    },
    /// The directory is not there, or cannot be looked at.
    #[error("{} cannot be used", dir.display())]
    Dir {
        /// Which.
        dir: PathBuf,
        /// What looking at it gave.
        #[source]
        source: io::Error,
    },
    /// Not a directory.
    #[error("{} is not a directory", dir.display())]
    NotDirectory {
        /// Which.
        dir: PathBuf,
    },
    /// It has entries, which the mount would hide.
    #[error("{} is not empty: the mount would hide what is in it (--nonempty allows it)", dir.display())]
    NotEmpty {
        /// Which.
        dir: PathBuf,
    },
    /// A copage mount is there already.
    #[error("{} is a mount of {source_name} already", dir.display())]
    Mounted {
        /// Which.
        dir: PathBuf,
        /// The mount's source.
        source_name: String,
    },
    /// A mount is there whose process is gone.
    #[error(
        "{} is a stale mount: the process that served it is gone. `copage umount {}` removes it",
        dir.display(), dir.display()
    )]
    Stale {
        /// Which.
        dir: PathBuf,
    },
    /// There is no copage mount.
    #[error("{} is not a copage mount", dir.display())]
    NotMounted {
        /// Which.
        dir: PathBuf,
    },
    /// Programs use it.
    #[error(
        "{} is in use: end what runs from it or has files open in it, or detach it (--lazy): it is \
         out of sight then and ends with its last use",
        dir.display()
    )]
    Busy {
        /// Which.
        dir: PathBuf,
    },
    /// A system call failed.
    #[error("{call}")]
    Sys {
        /// The call, with what it was for.
        call: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
}
