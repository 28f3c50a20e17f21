//! Directories to export, with pattern files in them, and a host that changes them.

use copage::demo::pattern;
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A directory of its own for one test: removed when dropped.
pub struct Tree {
    dir: TempDir,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// An empty one, with directories `export` and `other` in it, open to every user.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("copage-")
            .tempdir()
            .expect("a directory");
        let tree = Self { dir };
        for name in ["export", "other"] {
            std::fs::create_dir(tree.at(name)).expect("a directory");
        }
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(tree.root(), mode).expect("its mode");
        tree
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    /// A path in it.
    pub fn at(&self, path: &str) -> PathBuf {
        self.root().join(path)
    }

    /// A path in the exported directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root().join("export").join(name)
    }

    /// Writes a pattern file of version 1 into the exported directory.
    pub fn pattern(&self, name: &str, pages: u64) -> PathBuf {
        let path = self.file(name);
        std::fs::write(&path, pattern::file(pages, 1)).expect("a pattern file");
        path
    }
}

/// Rewrites a pattern file in place, page by page, as a host program would: readers of the host see
/// a mix of both versions meanwhile.
pub fn rewrite_in_place(path: &Path, pages: u64, version: u32) {
    let file = std::fs::File::options()
        .write(true)
        .open(path)
        .expect("the host can write");
    let mut page = [0; PAGE_SIZE];
    for index in 0..pages {
        pattern::fill(&mut page, index, version);
        file.write_all_at(&page, index * PAGE_SIZE_U64)
            .expect("the host can write");
    }
}

/// Replaces a pattern file by a new one of the same name, as editors and packagers do.
pub fn replace(path: &Path, pages: u64, version: u32) {
    let part = path.with_extension("part");
    std::fs::write(&part, pattern::file(pages, version)).expect("the host can write");
    std::fs::rename(&part, path).expect("the host can rename");
}
