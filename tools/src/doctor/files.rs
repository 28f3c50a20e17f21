//! What the file system of an export can do: kernel leases, direct reads; and how changes are noticed.

use super::{Finding, number};
use copage_grants::sys::{LeaseKind, cachestat, set_lease, set_lease_signal};
use rustix::fs::{Mode, OFlags, inotify};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Directory entries looked at in search of a file.
const ENTRIES_MAX: usize = 20_000;
/// Watches that are enough for the files that a busy daemon keeps.
const WATCHES_GOOD: u64 = 8192;
/// The kernel ends a lease by itself after so many seconds; guests are given 5 s to let go.
const LEASE_BREAK_SECONDS_GOOD: u64 = 10;

pub(super) fn all(dir: &Path) -> Vec<Finding> {
    let file = match a_file(dir) {
        Ok(file) => file,
        Err(why) => {
            let fix = "copage doctor DIR with a directory that is to be exported";
            let missing = |name| Finding::limited(name, &*why, "not tried", fix);
            return vec![
                missing("leases"),
                missing("direct reads"),
                watches(dir),
                cache_figures(None),
            ];
        }
    };
    vec![
        leases(&file),
        direct(&file),
        watches(dir),
        cache_figures(Some(&file)),
    ]
}

/// A file of a page or more below `dir`, the nearest.
fn a_file(dir: &Path) -> Result<PathBuf, String> {
    let mut todo = VecDeque::from([dir.to_owned()]);
    let mut left = ENTRIES_MAX;
    while let Some(next) = todo.pop_front() {
        let entries = match std::fs::read_dir(&next) {
            Ok(entries) => entries,
            Err(error) if next == dir => return Err(format!("{}: {error}", dir.display())),
            Err(_) => continue,
        };
        for entry in entries.flatten() {
            left = left
                .checked_sub(1)
                .ok_or_else(|| format!("no file found in {}", dir.display()))?;
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                todo.push_back(entry.path());
            } else if meta.is_file() && meta.size() >= 4096 && File::open(entry.path()).is_ok() {
                return Ok(entry.path());
            }
        }
    }
    Err(format!(
        "no file of 4 KiB that may be read in {}",
        dir.display()
    ))
}

fn leases(path: &Path) -> Finding {
    let name = "leases";
    let cost =
        "files are host-bounded: changes of the host are noticed at open and on notification only";
    let shown = path.display();
    let tried = File::open(path).and_then(|file| {
        // Should somebody write to it right now: a signal that does nothing.
        set_lease_signal(&file, libc::SIGURG)?;
        set_lease(&file, LeaseKind::Read)?;
        set_lease(&file, LeaseKind::None)
    });
    let Err(error) = tried else {
        let seconds = number("/proc/sys/fs/lease-break-time").unwrap_or(45);
        let found = format!("taken on {shown}; fs.lease-break-time = {seconds} s");
        if seconds >= LEASE_BREAK_SECONDS_GOOD {
            return Finding::have(name, found);
        }
        return Finding::limited(
            name,
            found,
            "a host's writer does not wait for guests that are slow to let go",
            "sysctl fs.lease-break-time=45, as root",
        );
    };
    let fix = match error.raw_os_error() {
        Some(libc::EACCES) => "run the daemon as root (CAP_LEASE), or export files of its own user",
        Some(libc::EAGAIN) => "nothing, if this file is open for writing: try another directory",
        Some(libc::EINVAL) if number("/proc/sys/fs/leases-enable") == Some(0) => {
            "sysctl fs.leases-enable=1, as root"
        }
        _ => "a file system with leases (ext4, xfs, btrfs, tmpfs; not nfs, fuse, some overlays)",
    };
    Finding::limited(name, format!("refused on {shown}: {error}"), cost, fix)
}

fn direct(path: &Path) -> Finding {
    let name = "direct reads";
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let shown = path.display();
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(_) => Finding::have(
            name,
            format!("O_DIRECT on {shown}: filling leaves no second copy"),
        ),
        Err(errno) => Finding::limited(
            name,
            format!("O_DIRECT on {shown}: {errno}"),
            "files are read through the page cache and dropped from it again, which is slower",
            "a file system with direct I/O (ext4, xfs, btrfs)",
        ),
    }
}

fn watches(dir: &Path) -> Finding {
    let name = "inotify";
    let user = "/proc/sys/fs/inotify/max_user_watches";
    let instances = number("/proc/sys/fs/inotify/max_user_instances").unwrap_or(0);
    let watches = number(user).unwrap_or(0);
    let found = format!("max_user_watches = {watches}, max_user_instances = {instances}");
    let cost = "changes of host-bounded files are noticed at open only";
    let tried = inotify::init(inotify::CreateFlags::CLOEXEC).and_then(|fd| {
        // The directory may be wrong; the root is there.
        let flags = inotify::WatchFlags::ATTRIB;
        inotify::add_watch(&fd, dir, flags).or_else(|_| inotify::add_watch(&fd, "/", flags))
    });
    match tried {
        Err(Errno::MFILE) => Finding::lack(
            name,
            format!("no instance left ({found})"),
            cost,
            "sysctl fs.inotify.max_user_instances=1024, as root",
        ),
        Err(errno) => {
            let fix = "sysctl fs.inotify.max_user_watches=524288, as root";
            Finding::lack(name, format!("{errno} ({found})"), cost, fix)
        }
        Ok(_) if watches < WATCHES_GOOD => Finding::limited(
            name,
            found,
            "one watch is used for each cached file; beyond them changes are noticed at open only",
            "sysctl fs.inotify.max_user_watches=524288, as root",
        ),
        Ok(_) => Finding::have(name, found),
    }
}

fn cache_figures(path: Option<&Path>) -> Finding {
    let name = "cachestat";
    let file = path.map_or_else(|| File::open("/proc/self/exe"), File::open);
    let cost = "it cannot be told what of a file is in the host's page cache: copies there are not spared or shown";
    match file.and_then(|file| cachestat(&file, 0, 0)) {
        Ok(Some(_)) => Finding::have(name, "the kernel tells what of a file is in its page cache"),
        Ok(None) => Finding::limited(
            name,
            "not on this kernel, or not of other users' files",
            cost,
            "Linux 6.5 or later; root for other users' files",
        ),
        Err(error) => Finding::limited(name, error.to_string(), cost, "Linux 6.5 or later"),
    }
}
