//! What a process may: watch others end, open files, have memory.

use super::Finding;
use crate::config::Config;
use crate::output::bytes;
use copage_grants::sys::peer_pidfd;
use rustix::process::{Resource, getrlimit};
use std::os::unix::net::UnixStream;

/// Open files that are enough for what a configuration allows one guest, by default.
const FILES_GOOD: u64 = 65_536;
/// Open files below which hardly anything can be shared.
const FILES_NEEDED: u64 = 1024;

pub(super) fn all() -> Vec<Finding> {
    vec![pidfd(), open_files(), memory()]
}

fn pidfd() -> Finding {
    let name = "pidfd";
    let cost = "the daemon could not see a guest end";
    let fix = "Linux 5.3 or later, and a seccomp filter that lets pidfd_open through";
    match UnixStream::pair().and_then(|(ours, _theirs)| peer_pidfd(&ours, std::process::id())) {
        Ok(_) => Finding::have(name, "of the process at the other end of a socket").needed(),
        Err(error) => Finding::lack(name, error.to_string(), cost, fix).needed(),
    }
}

fn open_files() -> Finding {
    let name = "open files";
    let limit = getrlimit(Resource::Nofile);
    let shown = |limit: Option<u64>| limit.map_or("no limit".to_owned(), |n| n.to_string());
    let found = format!(
        "RLIMIT_NOFILE {}, can be raised to {}",
        shown(limit.current),
        shown(limit.maximum)
    );
    let cost = "each cached file takes four descriptors of the daemon: fewer files are kept";
    let fix = "ulimit -Hn 1048576, LimitNOFILE= in a systemd unit, or /etc/security/limits.conf";
    match limit.maximum {
        Some(n) if n < FILES_NEEDED => Finding::lack(name, found, cost, fix).needed(),
        Some(n) if n < FILES_GOOD => Finding::limited(name, found, cost, fix),
        _ => Finding::have(name, found),
    }
}

/// A line of /proc/meminfo, in bytes.
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn memory() -> Finding {
    let name = "memory";
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let budget = Config::default().frames_mib << 20;
    let Some(available) = meminfo(&text, "MemAvailable") else {
        let fix = "mount /proc";
        return Finding::limited(
            name,
            "/proc/meminfo does not tell",
            "it was not looked at",
            fix,
        );
    };
    let found = format!(
        "{} available; the default budget is {}",
        bytes(available),
        bytes(budget)
    );
    if available >= budget {
        return Finding::have(name, found);
    }
    // Half of what there is, in whole MiB: frames are not swapped out while guests read them.
    let half = (available >> 21).max(4);
    let fix = format!("copage serve --frames-mib {half}, or frames_mib = {half}");
    Finding::limited(name, found, "the default budget does not fit", &fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       1000 kB\nMemAvailable:    500 kB\nMemAvailableX: 1 kB\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(512_000));
        assert_eq!(meminfo(text, "MemFree"), None);
        assert_eq!(meminfo("MemFree: x kB", "MemFree"), None);
    }
}
