//! A mount without a place: nobody comes to it but by its descriptor and what is opened from there.
//!
//! Programs run from it in a guest whose pages cannot be executed where they are: the kernel's page
//! cache reads what is touched of them, and keeps it once for all processes.

use super::core::Core;
use super::error::MountError;
use super::limits::SPARING_READAHEAD_BYTES;
use super::link::Target;
use super::place::source_name;
use super::server::{Prepared, Server, device};
use super::{acl, config};
use fuser::Session;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Such a mount; everything in it goes through this kernel's page cache. It ends when this is dropped
/// and nobody has anything of it open or mapped.
pub struct Detached {
    root: OwnedFd,
    core: Arc<Core>,
    server: Server,
}

impl fmt::Debug for Detached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { root, server, .. } = self;
        f.debug_struct("Detached")
            .field("root", root)
            .field("server", server)
            .finish_non_exhaustive()
    }
}

impl Detached {
    /// Mounts. Needs the right to (CAP_SYS_ADMIN).
    pub fn new(target: &Target) -> Result<Self, MountError> {
        let device = device()?;
        let prepared = Prepared::new(target.clone(), false, Some(SPARING_READAHEAD_BYTES), false)?;
        let root = mount(&device, &target.export)?;
        let config = config(&target.export, true, false);
        let session = Session::from_fd(prepared.file_system(), device.into(), acl(true), config);
        let session = session.map_err(|source| MountError::Sys {
            call: "beginning with FUSE",
            source,
        })?;
        Ok(Self {
            root,
            core: prepared.core().clone(),
            server: prepared.serve(session)?,
        })
    }

    /// Its root directory.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Has anybody a file of it open or mapped?
    pub fn in_use(&self) -> bool {
        self.core.page_cache_opens.load(Ordering::Relaxed) > 0
    }

    /// Readable when it is over, as by an administrator who aborts it.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.server.ended.as_fd()
    }

    /// Lets go of it and waits for its last use elsewhere.
    pub fn end(self) -> io::Result<()> {
        let Self { root, server, .. } = self;
        drop(root);
        server.join()
    }
}

fn mount(device: &File, export: &str) -> Result<OwnedFd, MountError> {
    let sys = |call: &'static str| {
        move |errno: Errno| match errno {
            Errno::PERM => MountError::NoRight {
                source: errno.into(),
            },
            _ => MountError::Sys {
                call,
                source: errno.into(),
            },
        }
    };
    let fs = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(sys("fsopen(fuse)"))?;
    let user = rustix::process::geteuid().as_raw().to_string();
    let group = rustix::process::getegid().as_raw().to_string();
    for (key, value) in [
        ("source", source_name(export)),
        ("subtype", "copage".into()),
        ("fd", device.as_raw_fd().to_string()),
        ("rootmode", "40000".into()),
        ("user_id", user),
        ("group_id", group),
    ] {
        fsconfig_set_string(fs.as_fd(), key, value).map_err(sys("fsconfig(fuse)"))?;
    }
    // Programs may change their user.
    for flag in ["ro", "default_permissions", "allow_other"] {
        fsconfig_set_flag(fs.as_fd(), flag).map_err(sys("fsconfig(fuse)"))?;
    }
    fsconfig_create(fs.as_fd()).map_err(sys("fsconfig(create)"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_RDONLY;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(sys("fsmount"))
}
