//! Where frame files are made: files that the daemon writes and punches and that everybody else
//! can only read.
//!
//! * **Private mount** (needs CAP_SYS_ADMIN): a tmpfs of our own, attached nowhere, with
//!   `huge=never`, and a second, read-only mount of it. Descriptors opened through the second one
//!   are read-only by their mount: reopening through /proc, `mprotect`, `fchmod`, `ftruncate` are
//!   refused whoever asks.
//! * **memfd**: descriptors are opened read-only through /proc/self/fd. What keeps others from
//!   reopening them for writing is the file's mode (0755, the daemon's): nothing keeps the daemon's
//!   own user, or root.
//!
//! Neither is sealed: a seal against writing would forbid the daemon's own punch.

use super::twin;
use crate::error::GrantError;
use crate::limits::HOME_LABEL_BYTES_MAX;
use rustix::fs::{AtFlags, CWD, MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, fsconfig_create, fsconfig_reconfigure,
    fsconfig_set_string, fsmount, fsopen, fspick,
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The kind of frame files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameStore {
    /// The private mount where the privilege is there, else memfds.
    Auto,
    /// The private mount or nothing.
    PrivateMount,
    /// memfds, whatever the privilege.
    Memfd,
}

/// See the module.
pub(super) enum FrameFiles {
    Mount {
        writable: OwnedFd,
        read_only: OwnedFd,
    },
    Memfd {
        /// May be executed (vm.memfd_noexec allows it).
        executable: bool,
        /// May be written many pages at a time without huge pages getting under them.
        bulk: bool,
    },
}

/// Anything that says no memory is that to whoever asked for frames.
pub(super) fn sys(call: &'static str) -> impl Fn(Errno) -> GrantError {
    move |errno| match errno {
        Errno::NOSPC | Errno::NOMEM | Errno::DQUOT => GrantError::NoMemory(errno.into()),
        _ => GrantError::Sys {
            call,
            source: errno.into(),
        },
    }
}

impl FrameFiles {
    pub(super) fn new(store: FrameStore, size_max_bytes: Option<u64>) -> Result<Self, GrantError> {
        let limited = size_max_bytes.is_some();
        match store {
            FrameStore::PrivateMount => Self::mount(size_max_bytes),
            FrameStore::Auto => match Self::mount(size_max_bytes) {
                Err(GrantError::Sys { source, .. })
                    if matches!(
                        source.raw_os_error(),
                        Some(libc::EPERM | libc::ENOSYS | libc::EACCES | libc::EINVAL)
                    ) && !limited =>
                {
                    Self::memfd()
                }
                mounted => mounted,
            },
            FrameStore::Memfd if limited => Err(GrantError::Unsupported {
                backend: "local",
                what: "a size limit without a private mount",
            }),
            FrameStore::Memfd => Self::memfd(),
        }
    }

    fn mount(size_max_bytes: Option<u64>) -> Result<Self, GrantError> {
        let writable = tmpfs(size_max_bytes)?;
        let read_only = twin::read_only(writable.as_fd())?;
        Ok(Self::Mount {
            writable,
            read_only,
        })
    }

    /// Changes how much its files may hold; of memfds there is no bound.
    pub(super) fn set_size(&self, size_max_bytes: u64) -> Result<(), GrantError> {
        let Self::Mount { writable, .. } = self else {
            return Ok(());
        };
        set_tmpfs_size(writable, size_max_bytes)
    }

    fn memfd() -> Result<Self, GrantError> {
        let bulk = huge_policy_is_mild();
        match new_memfd("copage-probe", true) {
            Ok(_) => Ok(Self::Memfd {
                executable: true,
                bulk,
            }),
            // vm.memfd_noexec = 2.
            Err(Errno::ACCESS | Errno::PERM) => Ok(Self::Memfd {
                executable: false,
                bulk,
            }),
            Err(errno) => Err(sys("memfd_create")(errno)),
        }
    }

    /// Where files of the daemon's own can be made; `None`: memfds.
    pub(super) fn mount_of_our_own(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Mount { writable, .. } => Some(writable.as_fd()),
            Self::Memfd { .. } => None,
        }
    }

    pub(super) fn kind(&self) -> FrameStore {
        match self {
            Self::Mount { .. } => FrameStore::PrivateMount,
            Self::Memfd { .. } => FrameStore::Memfd,
        }
    }

    pub(super) fn executable(&self) -> bool {
        matches!(
            self,
            Self::Mount { .. }
                | Self::Memfd {
                    executable: true,
                    ..
                }
        )
    }

    pub(super) fn bulk(&self) -> bool {
        matches!(self, Self::Mount { .. } | Self::Memfd { bulk: true, .. })
    }

    /// The daemon's descriptor of a new, empty file, and its name.
    pub(super) fn create(&self, id: u64, label: &str) -> Result<(OwnedFd, String), GrantError> {
        let name = file_name(id, label);
        let file = match self {
            Self::Mount { writable, .. } => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
                rustix::fs::openat(writable, name.as_str(), flags, Mode::from_raw_mode(0o755))
                    .map_err(sys("open of a frame file"))?
            }
            Self::Memfd { executable, .. } => {
                let made = new_memfd(&name, *executable).map_err(sys("memfd_create"))?;
                // The file as memfd_create opened it does not count as a writer of its inode, and
                // the kernel would refuse the write lease that tells whether others have it open.
                let path = format!("/proc/self/fd/{}", made.as_raw_fd());
                rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
                    .map_err(sys("open of a frame file"))?
            }
        };
        // For programs to be run from it by anybody, whatever the umask.
        rustix::fs::fchmod(&file, Mode::from_raw_mode(0o755))
            .map_err(sys("fchmod of a frame file"))?;
        Ok((file, name))
    }

    /// A new read-only descriptor of a file.
    pub(super) fn open_read_only(
        &self,
        file: BorrowedFd<'_>,
        name: &str,
    ) -> Result<OwnedFd, GrantError> {
        // NONBLOCK: not to wait for a lease of somebody else's; it means nothing afterwards.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match self {
            Self::Mount { read_only, .. } => {
                rustix::fs::openat(read_only, name, flags | OFlags::NOFOLLOW, Mode::empty())
            }
            Self::Memfd { .. } => {
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                rustix::fs::openat(CWD, path, flags, Mode::empty())
            }
        }
        .map_err(sys("read-only open of a frame file"))
    }

    /// Removes the file's name, where it has one.
    pub(super) fn remove(&self, name: &str) -> Result<(), GrantError> {
        match self {
            Self::Mount { writable, .. } => rustix::fs::unlinkat(writable, name, AtFlags::empty())
                .map_err(sys("unlink of a frame file")),
            Self::Memfd { .. } => Ok(()),
        }
    }
}

/// A tmpfs that is attached nowhere.
pub(super) fn tmpfs(size_max_bytes: Option<u64>) -> Result<OwnedFd, GrantError> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(sys("fsopen(tmpfs)"))?;
    let set = |key: &'static str, value: &str| {
        fsconfig_set_string(fs.as_fd(), key, value).map_err(sys("fsconfig(tmpfs)"))
    };
    set("mode", "0700")?;
    // Frames are bounded by the budget, not by half the machine's memory, which is the default.
    set("size", &size_max_bytes.unwrap_or(0).to_string())?;
    set("nr_inodes", "0")?;
    // Kernels without huge pages do not know the option, and need none.
    match fsconfig_set_string(fs.as_fd(), "huge", "never") {
        Ok(()) | Err(Errno::INVAL) => {}
        Err(errno) => return Err(sys("fsconfig(huge=never)")(errno)),
    }
    fsconfig_create(fs.as_fd()).map_err(sys("fsconfig(create)"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(sys("fsmount"))
}

/// Changes how much the files of a tmpfs may hold.
pub(super) fn set_tmpfs_size(mount: &OwnedFd, size_max_bytes: u64) -> Result<(), GrantError> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let fs = fspick(mount, "", flags).map_err(sys("fspick(tmpfs)"))?;
    fsconfig_set_string(fs.as_fd(), "size", size_max_bytes.to_string())
        .map_err(sys("fsconfig(tmpfs size)"))?;
    fsconfig_reconfigure(fs.as_fd()).map_err(sys("fsconfig(reconfigure)"))
}

/// Unique by `id`; the label is for people who look at /proc/PID/maps.
fn file_name(id: u64, label: &str) -> String {
    let mut name = format!("copage-{id}-");
    let plain = label.chars().map(|c| {
        if c.is_ascii_graphic() && c != '/' {
            c
        } else {
            '_'
        }
    });
    name.extend(plain.take(HOME_LABEL_BYTES_MAX));
    name
}

fn new_memfd(name: &str, executable: bool) -> Result<OwnedFd, Errno> {
    if executable {
        match rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::EXEC) {
            // Before Linux 6.3 there was no such flag, and every memfd was executable.
            Err(Errno::INVAL) => {}
            made => return made,
        }
        return rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC);
    }
    rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL)
}

/// With these settings the kernel puts no huge pages under a memfd unasked, however much is
/// written at a time.
fn huge_policy_is_mild() -> bool {
    match std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled") {
        Ok(policy) => ["[never]", "[deny]", "[advise]"]
            .iter()
            .any(|mild| policy.contains(mild)),
        // A kernel without huge pages.
        Err(_) => true,
    }
}
