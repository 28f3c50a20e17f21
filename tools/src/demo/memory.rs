//! What things cost in memory, as the kernel counts it.

use crate::admin::stats::Memory;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// What processes hold of their own: anonymous memory and page tables, in bytes. They are started, not
/// forked, so that none of it is shared.
pub fn own_bytes(pids: impl IntoIterator<Item = u32>) -> u64 {
    pids.into_iter()
        .map(Memory::of)
        .flat_map(|memory| [memory.rss_anon_bytes, memory.page_tables_bytes])
        .flatten()
        .sum()
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
    fn own_memory_is_told_and_of_nobody_there_is_none() {
        assert!(own_bytes([std::process::id()]) > 0);
        assert_eq!(own_bytes([u32::MAX]), 0);
    }
}
