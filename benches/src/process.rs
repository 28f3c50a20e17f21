//! What the kernel counts for processes and threads (proc_pid_stat(5), proc_pid_status(5)).

use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    fs::read_to_string(path).with_context(|| format!("{}", path.display()))
}

/// Page faults so far: (minor, major).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    minor: u64,
    major: u64,
}

impl Faults {
    fn from_stat(stat: &str, minor_field: usize) -> Option<Self> {
        // The name in parentheses may hold anything: fields are counted from behind it, where the
        // state is field 3.
        let rest = stat.get(stat.rfind(')')? + 1..)?;
        let field = |n: usize| rest.split_whitespace().nth(n - 3)?.parse().ok();
        Some(Self {
            minor: field(minor_field)?,
            major: field(minor_field + 2)?,
        })
    }

    /// Of the calling thread.
    pub fn of_thread() -> Result<Self> {
        Self::from_stat(&read("/proc/thread-self/stat")?, 10).context("/proc/thread-self/stat")
    }

    /// Of the children of this process that were waited for.
    pub fn of_children() -> Result<Self> {
        Self::from_stat(&read("/proc/self/stat")?, 11).context("/proc/self/stat")
    }

    /// Those since `earlier`: (minor, major).
    pub fn since(self, earlier: Self) -> (u64, u64) {
        (
            self.minor.saturating_sub(earlier.minor),
            self.major.saturating_sub(earlier.major),
        )
    }
}

/// Memory of one process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Anonymous (`RssAnon`).
    pub anonymous: u64,
    /// Mapped from files, the program's own text among them (`RssFile`).
    pub file: u64,
    /// Page tables (`VmPTE`).
    pub page_tables: u64,
}

impl Memory {
    /// Of `pid` now.
    pub fn of(pid: u32) -> Result<Self> {
        let status = read(format!("/proc/{pid}/status"))?;
        Ok(Self {
            anonymous: kib(&status, "RssAnon:") * 1024,
            file: kib(&status, "RssFile:") * 1024,
            page_tables: kib(&status, "VmPTE:") * 1024,
        })
    }
}

/// Bytes of this process's mappings between `start` and `end` that are mapped by 2 MiB
/// (proc_pid_smaps(5)).
pub fn mapped_huge(start: usize, end: usize) -> Result<u64> {
    let (mut sum, mut inside) = (0, false);
    for line in read("/proc/self/smaps")?.lines() {
        let head = line.split_once(' ').map_or("", |(range, _)| range);
        let address = |text| usize::from_str_radix(text, 16).ok();
        if let Some((from, to)) = head.split_once('-')
            && let (Some(from), Some(to)) = (address(from), address(to))
        {
            inside = from < end && start < to;
        } else if inside {
            sum += (kib(line, "FilePmdMapped:") + kib(line, "ShmemPmdMapped:")) * 1024;
        }
    }
    Ok(sum)
}

/// Voluntary context switches of all threads of `pid` so far: each is a thread that went to sleep.
pub fn sleeps(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        sum += kib(
            &read(task?.path().join("status"))?,
            "voluntary_ctxt_switches:",
        );
    }
    Ok(sum)
}

/// CPU time of `pid` so far, in clock ticks (user and system).
pub fn cpu_ticks(pid: u32) -> Result<u64> {
    let stat = read(format!("/proc/{pid}/stat"))?;
    let rest = stat
        .rfind(')')
        .and_then(|at| stat.get(at + 1..))
        .unwrap_or_default();
    Ok(rest
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|f| f.parse::<u64>().ok())
        .sum())
}

/// CPU time of all threads of `pid` so far, in seconds, as the scheduler counts it.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = read(task?.path().join("schedstat"))?;
        let ran = stat
            .split_whitespace()
            .next()
            .and_then(|ns| ns.parse().ok());
        sum += ran.unwrap_or(0_u64);
    }
    Ok(sum as f64 * 1e-9)
}

fn kib(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_behind_the_name() {
        let stat = "1 (a) b) S 2 3 4 5 6 7 80 90 100 110 12 13";
        let own = Faults::from_stat(stat, 10).unwrap();
        assert_eq!(
            own,
            Faults {
                minor: 80,
                major: 100
            }
        );
        assert_eq!(
            Faults::from_stat(stat, 11),
            Some(Faults {
                minor: 90,
                major: 110
            })
        );
        assert_eq!(own.since(own), (0, 0));
    }

    #[test]
    fn own_numbers_are_there() {
        let pid = std::process::id();
        let memory = Memory::of(pid).unwrap();
        assert!(memory.anonymous > 0 && memory.page_tables > 0);
        assert!(sleeps(pid).is_ok() && cpu_ticks(pid).is_ok() && Faults::of_thread().is_ok());
    }
}
