//! What the host's page cache holds of the exported files: what copage would better not leave there.

use crate::output::Progress;
use copage_grants::PAGE_SIZE_U64;
use copage_grants::sys::cachestat;
use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use std::fs::Metadata;
use std::path::{Path, PathBuf};

/// The deepest directory that is looked into: a bound on loops of bind mounts.
const DEPTH_MAX: usize = 128;

/// Sums over all files of all exports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct HostCache {
    /// Regular files seen.
    pub(super) files: u64,
    /// Files and directories that could not be looked at.
    pub(super) unreadable: u64,
    /// Their length.
    pub(super) file_bytes: u64,
    /// What the host's page cache holds of them.
    pub(super) cached_bytes: u64,
}

/// Walks the directories. `None`: the kernel cannot tell (before 6.5).
pub(super) fn look(roots: &[PathBuf]) -> Option<HostCache> {
    let mut sum = HostCache::default();
    let mut progress = Progress::new("looking at the host's page cache", None);
    let mut todo: Vec<(PathBuf, usize)> = roots.iter().map(|root| (root.clone(), 0)).collect();
    while let Some((dir, depth)) = todo.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else {
            sum.unreadable += 1;
            continue;
        };
        for entry in entries.flatten() {
            progress.at(sum.files);
            // Of the entry itself: links are not followed.
            let Ok(meta) = entry.metadata() else {
                sum.unreadable += 1;
                continue;
            };
            if meta.is_dir() && depth < DEPTH_MAX {
                todo.push((entry.path(), depth + 1));
            } else if meta.is_file() {
                one(&mut sum, &entry.path(), &meta)?;
            }
        }
    }
    Some(sum)
}

fn one(sum: &mut HostCache, path: &Path, meta: &Metadata) -> Option<()> {
    sum.files += 1;
    sum.file_bytes += meta.len();
    if meta.len() == 0 {
        return Some(());
    }
    // It was a regular file a moment ago; a FIFO that took its place must not make us wait.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::open(path, flags, Mode::empty()) else {
        sum.unreadable += 1;
        return Some(());
    };
    match cachestat(&file, 0, 0) {
        Ok(Some(stat)) => sum.cached_bytes += stat.cached * PAGE_SIZE_U64,
        Ok(None) => return None,
        Err(_) => sum.unreadable += 1,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cached_files_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("in")).unwrap();
        std::fs::write(dir.path().join("in/f"), vec![7; 10_000]).unwrap();
        std::fs::write(dir.path().join("empty"), "").unwrap();
        std::os::unix::fs::symlink("in/f", dir.path().join("link")).unwrap();
        let Some(seen) = look(&[dir.path().to_owned(), dir.path().join("none")]) else {
            return; // this kernel cannot tell
        };
        let wanted = HostCache {
            files: 2,
            unreadable: 1,
            file_bytes: 10_000,
            cached_bytes: 12_288,
        };
        assert_eq!(seen, wanted);
    }
}
