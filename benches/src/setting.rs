//! Where a run takes place: its sizes, its directory on a real disk, what the machine allows.

use crate::files;
use crate::limits::Sizes;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// One run of the benches.
pub struct Setting {
    /// How much is done.
    pub sizes: Sizes,
    /// The file system that the test files are on, by name.
    pub filesystem: String,
    dir: TempDir,
}

impl Setting {
    /// Makes a directory below `parent` (default: the user's directory for temporary files, where
    /// that is on a disk, else /var/tmp).
    pub fn new(sizes: Sizes, parent: Option<PathBuf>) -> Result<Self> {
        let parent = match parent {
            Some(parent) => parent,
            None => {
                let usual = std::env::temp_dir();
                let on_disk = !in_memory(&files::filesystem(&usual)?);
                if on_disk {
                    usual
                } else {
                    PathBuf::from("/var/tmp")
                }
            }
        };
        let dir = tempfile::Builder::new()
            .prefix("copage-bench-")
            .tempdir_in(&parent)
            .with_context(|| format!("no directory for test files in {}", parent.display()))?;
        let filesystem = files::filesystem(dir.path())?;
        Ok(Self {
            sizes,
            filesystem,
            dir,
        })
    }

    /// Does the file system of the test files live in memory? Then `native` flatters copage's rival
    /// or copage; the head of the table says so.
    pub fn in_memory(&self) -> bool {
        in_memory(&self.filesystem)
    }

    /// A new directory of this run.
    pub fn subdir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.path().join(name);
        std::fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// `native`, with the file system's name.
    pub fn native(&self) -> String {
        format!("native {}", self.filesystem)
    }

    /// The run's own directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

fn in_memory(filesystem: &str) -> bool {
    matches!(filesystem, "tmpfs" | "ramfs" | "rootfs")
}

/// Looks every 2 ms whether something is there, for at most `limit`.
pub fn wait_for<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let begin = std::time::Instant::now();
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if begin.elapsed() > limit {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
