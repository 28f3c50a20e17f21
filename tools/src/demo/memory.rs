//! What things cost in memory, as the kernel counts it.

use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// What some processes hold besides file pages, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Anonymous memory, shared pages divided among their holders (`Pss_Anon`).
    pub anonymous_bytes: u64,
    /// Page tables (`VmPTE`).
    pub page_table_bytes: u64,
}

impl ProcessMemory {
    /// Of one process (proc_pid_smaps_rollup(5), proc_pid_status(5)).
    pub fn of(pid: u32) -> Result<Self> {
        let read = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            fs::read_to_string(&path).with_context(|| path)
        };
        Ok(Self {
            anonymous_bytes: field_bytes(&read("smaps_rollup")?, "Pss_Anon:"),
            page_table_bytes: field_bytes(&read("status")?, "VmPTE:"),
        })
    }

    /// Of several, summed.
    pub fn of_all(pids: impl IntoIterator<Item = u32>) -> Result<Self> {
        let mut sum = Self::default();
        for pid in pids {
            let one = Self::of(pid)?;
            sum.anonymous_bytes += one.anonymous_bytes;
            sum.page_table_bytes += one.page_table_bytes;
        }
        Ok(sum)
    }

    /// Both together.
    pub fn bytes(self) -> u64 {
        self.anonymous_bytes + self.page_table_bytes
    }
}

/// The number in kB behind `name`, in bytes; 0 where there is none.
fn field_bytes(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

/// Bytes of these files in the host's page cache (cachestat(2), Linux 6.5); `None` where the kernel
/// does not tell.
pub fn page_cache_bytes<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<Option<u64>> {
    let mut sum = 0;
    for path in paths {
        let file = fs::File::open(path).with_context(|| format!("{}", path.display()))?;
        match copage_grants::sys::cachestat(&file, 0, 0)? {
            Some(stat) => sum += stat.cached * copage_grants::PAGE_SIZE_U64,
            None => return Ok(None),
        }
    }
    Ok(Some(sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_and_missing_ones_are_nothing() {
        let text = "Rss:  100 kB\nPss_Anon:            12 kB\n";
        assert_eq!(field_bytes(text, "Pss_Anon:"), 12 * 1024);
        assert_eq!(field_bytes(text, "Pss:"), 0);
        let own = ProcessMemory::of(std::process::id()).unwrap();
        assert!(own.anonymous_bytes > 0 && own.page_table_bytes > 0);
    }
}
