//! Which of the machine's own files the demo shares.

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;
use std::fs;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Directories looked through below the export, libraries first.
const LIBRARY_DIRS: [&str; 5] = [
    "lib/x86_64-linux-gnu",
    "lib/aarch64-linux-gnu",
    "lib64",
    "lib",
    "",
];
/// Programs that most machines have.
const PROGRAMS: [&str; 6] = ["bash", "ls", "sort", "tar", "sed", "grep"];
/// Directories visited at most when the export has another layout.
const DIRS_MAX: usize = 400;

/// One file of the demo.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// Below the export's root.
    pub path: String,
    /// On the host.
    pub host: PathBuf,
    /// Length in bytes.
    pub bytes: u64,
}

/// Chooses readable regular files below `root`: programs, then the largest files of the library
/// directories, `bytes_max` bytes and `files_max` files at most.
pub fn choose(root: &Path, bytes_max: u64, files_max: usize) -> Result<Vec<Chosen>> {
    let root = fs::canonicalize(root).with_context(|| format!("{}", root.display()))?;
    if !root.is_dir() {
        bail!(
            "{} is not a directory: give a directory with files to share",
            root.display()
        );
    }
    let mut candidates = Vec::new();
    for program in PROGRAMS {
        candidates.extend(candidate(&root, &root.join("bin").join(program)));
    }
    for dir in LIBRARY_DIRS {
        let mut found = below(&root, &root.join(dir));
        found.sort_by_key(|file| std::cmp::Reverse(file.bytes));
        candidates.extend(found);
        if candidates.iter().map(|file| file.bytes).sum::<u64>() > 2 * bytes_max {
            break;
        }
    }
    let mut chosen: Vec<Chosen> = Vec::new();
    let mut bytes = 0;
    for file in candidates {
        let fits = chosen.len() < files_max && bytes + file.bytes <= bytes_max;
        if fits && chosen.iter().all(|other| other.host != file.host) {
            bytes += file.bytes;
            chosen.push(file);
        }
    }
    if chosen.is_empty() {
        bail!(
            "no readable regular file below {}: give a directory with files to share",
            root.display()
        );
    }
    Ok(chosen)
}

/// The regular files below `dir`, without following links or crossing file systems.
fn below(root: &Path, dir: &Path) -> Vec<Chosen> {
    let Ok(dev) = fs::metadata(dir).map(|meta| meta.dev()) else {
        return Vec::new();
    };
    let mut dirs = vec![dir.to_path_buf()];
    let mut files = Vec::new();
    let mut visited = 0;
    while let Some(dir) = dirs.pop() {
        visited += 1;
        let Ok(entries) = fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries.flatten() {
            let Ok(kind) = entry.file_type() else {
                continue;
            };
            if kind.is_file() {
                files.extend(candidate(root, &entry.path()));
            } else if kind.is_dir() && visited + dirs.len() < DIRS_MAX {
                let same = entry.metadata().is_ok_and(|meta| meta.dev() == dev);
                if same {
                    dirs.push(entry.path());
                }
            }
        }
    }
    files
}

/// The file behind `path` when it is regular, readable, not empty and below `root`.
fn candidate(root: &Path, path: &Path) -> Option<Chosen> {
    let host = fs::canonicalize(path).ok()?;
    let below = host.strip_prefix(root).ok()?.to_str()?.to_owned();
    let meta = fs::symlink_metadata(&host).ok()?;
    let plain = meta.is_file() && meta.len() > 0 && meta.dev() == fs::metadata(root).ok()?.dev();
    let nonblock = i32::try_from(OFlags::NONBLOCK.bits()).ok()?;
    let readable = plain
        && fs::File::options()
            .read(true)
            .custom_flags(nonblock)
            .open(&host)
            .is_ok();
    readable.then_some(Chosen {
        path: below,
        bytes: meta.len(),
        host,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_out_of_the_tree_empty_files_and_what_is_too_much_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        fs::write(outside.path(), b"outside").unwrap();
        fs::create_dir_all(dir.path().join("lib/deep")).unwrap();
        fs::write(dir.path().join("lib/empty"), b"").unwrap();
        fs::write(dir.path().join("lib/deep/a"), vec![1; 3000]).unwrap();
        fs::write(dir.path().join("lib/big"), vec![1; 90_000]).unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("lib/link")).unwrap();
        let names = |bytes_max| {
            let mut names: Vec<_> = choose(dir.path(), bytes_max, 10)
                .unwrap()
                .into_iter()
                .map(|f| f.path)
                .collect();
            names.sort();
            names
        };
        assert_eq!(names(1 << 20), ["lib/big", "lib/deep/a"]);
        assert_eq!(names(10_000), ["lib/deep/a"]);
        assert!(
            choose(&dir.path().join("lib/big"), 1, 1).is_err(),
            "a file is no directory"
        );
        assert!(choose(&dir.path().join("none"), 1, 1).is_err());
    }
}
