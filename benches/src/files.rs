//! Test files on a real disk's file system, warm or cold in the page cache, and reading them.

use crate::pattern;
use anyhow::{Context, Result, bail, ensure};
use copage_grants::PAGE_SIZE;
use rustix::fs::OFlags;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A file whose every word is known.
#[derive(Clone, Debug)]
pub struct TestFile {
    /// Where.
    pub path: PathBuf,
    /// Its length in pages.
    pub pages: u64,
    /// Of its content.
    pub seed: u64,
}

impl TestFile {
    /// Writes `pages` pages and waits until the disk has them.
    pub fn make(dir: &Path, name: &str, pages: u64, seed: u64) -> Result<Self> {
        let path = dir.join(name);
        let file = File::create(&path).with_context(|| format!("{}", path.display()))?;
        let mut out = BufWriter::with_capacity(1 << 20, &file);
        let mut page = vec![0; PAGE_SIZE];
        for index in 0..pages {
            pattern::fill_page(seed, index, &mut page);
            out.write_all(&page)?;
        }
        out.flush()?;
        drop(out);
        file.sync_all()?;
        Ok(Self { path, pages, seed })
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE as u64
    }

    /// The name in its directory.
    pub fn name(&self) -> &str {
        self.path
            .file_name()
            .and_then(|n| n.to_str())
            .unwrap_or_default()
    }

    /// The sum of all words.
    pub fn sum(&self) -> u64 {
        pattern::sum_pages(self.seed, 0, self.pages)
    }
}

/// Takes a file out of the page cache (it must not be dirty, mapped or locked).
pub fn chill(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("{}", path.display()))?;
    // Pages that another CPU still holds in a batch survive the first round.
    for _ in 0..10 {
        copage_grants::sys::drop_cached(&file, 0, 0)?;
        match copage_grants::sys::cachestat(&file, 0, 0)? {
            Some(stat) if stat.cached > 0 => file.sync_all()?,
            _ => return Ok(()),
        }
    }
    Ok(())
}

/// Brings a file into the page cache as any reader would: cold, then read from its start.
pub fn warm(path: &Path) -> Result<()> {
    let mut file = File::open(path).with_context(|| format!("{}", path.display()))?;
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

/// Bytes of a file in the page cache; `None` where the kernel does not tell.
pub fn cached_bytes(path: &Path) -> Result<Option<u64>> {
    let stat = copage_grants::sys::cachestat(File::open(path)?, 0, 0)?;
    Ok(stat.map(|s| s.cached * PAGE_SIZE as u64))
}

/// How a baseline reads the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadKind {
    /// `O_DIRECT`, as the daemon fills.
    Direct,
    /// `pread` through the page cache, which keeps a second copy of everything.
    Buffered,
}

/// Reads pages of one file into a buffer of its own.
pub struct PageReader {
    file: File,
    buffer: Vec<u8>,
    /// Where in `buffer` an aligned page begins.
    start: usize,
}

impl PageReader {
    /// Up to `pages_max` pages at once.
    pub fn open(path: &Path, kind: ReadKind, pages_max: usize) -> Result<Self> {
        let mut options = File::options();
        options.read(true);
        if kind == ReadKind::Direct {
            options.custom_flags(i32::try_from(OFlags::DIRECT.bits())?);
        }
        let file = options
            .open(path)
            .with_context(|| format!("{} ({kind:?})", path.display()))?;
        let buffer = vec![0; (pages_max + 1) * PAGE_SIZE];
        let start = buffer.as_ptr().align_offset(PAGE_SIZE);
        ensure!(start < PAGE_SIZE, "a buffer that cannot be aligned");
        Ok(Self {
            file,
            buffer,
            start,
        })
    }

    /// Pages `first..first + count`, all of which the file must hold.
    pub fn read(&mut self, first: u64, count: usize) -> Result<&[u8]> {
        let range = self.start..self.start + count * PAGE_SIZE;
        let into = self
            .buffer
            .get_mut(range)
            .context("more pages than the buffer holds")?;
        let got = self.file.read_at(into, first * PAGE_SIZE as u64)?;
        if got != into.len() {
            bail!("a short read: {got} of {} bytes", into.len());
        }
        Ok(into)
    }
}

/// The file system that holds `path`, by its name in /proc/self/mountinfo (proc_pid_mountinfo(5)).
pub fn filesystem(path: &Path) -> Result<String> {
    let path = path.canonicalize()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mut best = (0, String::from("unknown"));
    for line in mounts.lines() {
        let point = line.split(' ').nth(4).unwrap_or_default();
        let kind = line
            .split(" - ")
            .nth(1)
            .and_then(|s| s.split(' ').next())
            .unwrap_or_default();
        // Later lines lie over earlier ones.
        if path.starts_with(point) && point.len() >= best.0 {
            best = (point.len(), kind.to_owned());
        }
    }
    Ok(best.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_read_give_the_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let file = TestFile::make(dir.path(), "f", 5, 9).unwrap();
        for kind in [ReadKind::Direct, ReadKind::Buffered] {
            let Ok(mut reader) = PageReader::open(&file.path, kind, 4) else {
                continue; // a tmpfs that refuses O_DIRECT
            };
            let sum = reader
                .read(1, 4)
                .unwrap()
                .chunks_exact(8)
                .fold(0u64, |s, w| {
                    s.wrapping_add(u64::from_le_bytes(w.try_into().unwrap()))
                });
            assert_eq!(sum, pattern::sum_pages(9, 1, 4));
            assert!(reader.read(3, 3).is_err(), "past the end");
            assert!(reader.read(0, 5).is_err(), "more than the buffer");
        }
    }

    #[test]
    fn file_systems_have_names() {
        assert_eq!(filesystem(Path::new("/proc/self")).unwrap(), "proc");
    }
}
