//! A second mount of a mount that is attached nowhere: the same files, read-only.

use super::frames::sys;
use crate::error::GrantError;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount_change, move_mount,
    open_tree,
};
use rustix::thread::UnshareFlags;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// A directory that is everywhere; only a thread that ends at once sees it covered.
const SOME_DIRECTORY: &str = "/proc";

/// The read-only twin of `mount`, attached nowhere either.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN.
pub(super) fn read_only(mount: BorrowedFd<'_>) -> Result<OwnedFd, GrantError> {
    let twin = match clone(mount) {
        // Before Linux 6.15 only what is attached in the caller's mount namespace can be cloned.
        Err(Errno::INVAL) => clone_in_namespace(mount)?,
        cloned => cloned.map_err(sys("open_tree"))?,
    };
    set_read_only(&twin).map_err(|source| GrantError::Sys {
        call: "mount_setattr(read-only)",
        source,
    })?;
    Ok(twin)
}

fn clone(mount: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(mount, "", flags)
}

/// Clones it where it is attached: in a mount namespace that only one thread is in, which ends with
/// it. Both mounts live on, attached nowhere, by their descriptors.
fn clone_in_namespace(mount: BorrowedFd<'_>) -> Result<OwnedFd, GrantError> {
    let attach_and_clone = || {
        // SAFETY: of the flags only CLONE_FILES could take a descriptor from under somebody who
        // thinks to own it. This thread gets a mount namespace and a working directory of its own.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
            .map_err(sys("unshare(CLONE_NEWNS)"))?;
        // What is mounted here is not to be seen in the namespace that this is a copy of.
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).map_err(sys("mount(MS_PRIVATE)"))?;
        let from = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(mount, "", CWD, SOME_DIRECTORY, from).map_err(sys("move_mount"))?;
        clone(mount).map_err(sys("open_tree"))
    };
    std::thread::scope(|scope| scope.spawn(attach_and_clone).join()).unwrap_or_else(|_| {
        Err(GrantError::Unsupported {
            backend: "local",
            what: "a private mount",
        })
    })
}

/// `mount_setattr(2)` with `MOUNT_ATTR_RDONLY`.
fn set_read_only(mount: &OwnedFd) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: MountAttrFlags::MOUNT_ATTR_RDONLY.bits().into(),
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty C string, `attributes` has the kernel's layout and the size that
    // is passed with it; both live through the call, which writes to neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags, openat};
    use rustix::mount::{FsMountFlags, FsOpenFlags, fsconfig_create, fsmount, fsopen};
    use std::os::fd::AsFd;

    /// On a new kernel too, which would not need it. Cannot show what an old one does.
    #[test]
    fn local_a_twin_by_way_of_a_namespace_reads_what_the_first_writes() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        fsconfig_create(fs.as_fd()).unwrap();
        let attributes = MountAttrFlags::empty();
        let mount = fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).unwrap();
        let before = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let twin = clone_in_namespace(mount.as_fd()).unwrap();
        set_read_only(&twin).unwrap();
        let mode = Mode::from_raw_mode(0o600);
        let create = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = openat(&mount, "f", create, mode).unwrap();
        rustix::io::write(&file, b"seen").unwrap();
        let read = openat(&twin, "f", OFlags::RDONLY | OFlags::CLOEXEC, mode).unwrap();
        let mut seen = [0; 8];
        assert_eq!(rustix::io::read(&read, &mut seen[..]).unwrap(), 4);
        assert_eq!(&seen[..4], b"seen");
        let refused = openat(&twin, "f", OFlags::RDWR | OFlags::CLOEXEC, mode);
        assert_eq!(refused.unwrap_err(), Errno::ROFS);
        rustix::fs::unlinkat(&mount, "f", rustix::fs::AtFlags::empty()).unwrap();
        let after = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert_eq!(before, after, "nobody else sees the mount");
    }
}
