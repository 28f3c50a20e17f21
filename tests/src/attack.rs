//! What a guest may try so as to write to frames that it was granted for reading.

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

/// One attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    /// What was tried.
    pub what: String,
    /// The errno of the refusal; `None`: it was not refused.
    pub refused: Option<i32>,
}

fn tried<T>(what: &str, result: std::io::Result<T>) -> Tried {
    let refused = result.err().map(|e| e.raw_os_error().unwrap_or(libc::EIO));
    Tried {
        what: what.to_owned(),
        refused,
    }
}

/// Attacks a home's descriptor by everything that would write through it or make it writable.
///
/// mprotect is not here (it would take unsafe code): the backend's own tests have it.
pub fn descriptor(fd: &(impl AsFd + AsRawFd)) -> Vec<Tried> {
    let own_name = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let reopen = |flags| {
        let opened = rustix::fs::open(&own_name, flags | OFlags::CLOEXEC, Mode::empty());
        opened.map_err(std::io::Error::from)
    };
    let errno = std::io::Error::from;
    let mut all = vec![
        tried("write", rustix::io::pwrite(fd, b"x", 0).map_err(errno)),
        tried("reopen for writing", reopen(OFlags::WRONLY)),
        tried("reopen for reading and writing", reopen(OFlags::RDWR)),
        tried(
            "reopen for reading, truncating",
            reopen(OFlags::RDONLY | OFlags::TRUNC),
        ),
        tried("ftruncate", rustix::fs::ftruncate(fd, 0).map_err(errno)),
        tried(
            "fchmod",
            rustix::fs::fchmod(fd, Mode::from_raw_mode(0o777)).map_err(errno),
        ),
        tried(
            "fallocate",
            rustix::fs::fallocate(
                fd,
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
                0,
                4096,
            )
            .map_err(errno),
        ),
        tried(
            "shared writable mapping",
            memmap2::MmapOptions::new()
                .len(4096)
                .map_raw(fd.as_raw_fd()),
        ),
        tried(
            "truncate by name",
            std::fs::File::options()
                .write(true)
                .truncate(true)
                .open(&own_name),
        ),
        tried(
            "chmod by name",
            std::fs::set_permissions(
                &own_name,
                std::os::unix::fs::PermissionsExt::from_mode(0o777),
            ),
        ),
    ];
    // A reopened descriptor for reading may be had; it must be as weak as the first.
    if let Ok(again) = reopen(OFlags::RDONLY) {
        all.push(tried(
            "write to a reopened one",
            rustix::io::pwrite(&again, b"x", 0).map_err(errno),
        ));
        all.push(tried(
            "writable mapping of a reopened one",
            memmap2::MmapOptions::new()
                .len(4096)
                .map_raw(again.as_raw_fd()),
        ));
    }
    all
}

/// Attacks a process, the daemon: its memory, its descriptors, its names for them.
pub fn process(pid: u32) -> Vec<Tried> {
    let open = |name: &str, write: bool| {
        let path = format!("/proc/{pid}/{name}");
        std::fs::File::options().read(true).write(write).open(path)
    };
    let taken = || {
        let raw = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        let raw = raw.ok_or_else(|| std::io::Error::from_raw_os_error(libc::ESRCH))?;
        let flags = rustix::process::PidfdFlags::empty();
        let pidfd = rustix::process::pidfd_open(raw, flags)?;
        // Descriptors are numbered from 0: any one would do.
        for number in 0..64 {
            let flags = rustix::process::PidfdGetfdFlags::empty();
            match rustix::process::pidfd_getfd(&pidfd, number, flags) {
                Ok(fd) => return Ok(fd),
                Err(rustix::io::Errno::BADF) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(std::io::Error::from_raw_os_error(libc::EBADF))
    };
    vec![
        tried(
            "its memory, for reading (ptrace's check)",
            open("mem", false),
        ),
        tried(
            "its memory, for writing (ptrace's check)",
            open("mem", true),
        ),
        tried(
            "its mappings by name",
            std::fs::read_dir(Path::new(&format!("/proc/{pid}/map_files"))),
        ),
        tried(
            "its descriptors by name",
            std::fs::read_dir(Path::new(&format!("/proc/{pid}/fd"))),
        ),
        tried("its descriptors by pidfd_getfd", taken()),
    ]
}
