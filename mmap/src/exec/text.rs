//! Where a process's text lies: on shared frames, or elsewhere.
//!
//! The answer is the kernel's: `/proc/PID/smaps` names the file behind each mapping by device and
//! inode and says how much of it is resident; a frame file is known by the descriptor that the
//! daemon gave. Physical frame numbers, for those who may see them, are `copage_grants::sys::PageMap`'s.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

use copage_grants::PAGE_SIZE_U64;

/// The longest smaps that is read, in bytes: 65,530 mappings (vm.max_map_count's default) of about
/// a KiB each.
const SMAPS_BYTES_MAX: u64 = 128 << 20;

/// Names a file as `/proc/PID/maps` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Major and minor number of its device.
    pub dev: (u32, u32),
    /// Its inode.
    pub ino: u64,
}

impl FileId {
    /// Of an open file.
    pub fn of(fd: impl AsFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(fd)?;
        Ok(Self {
            dev: (
                rustix::fs::major(stat.st_dev),
                rustix::fs::minor(stat.st_dev),
            ),
            ino: stat.st_ino,
        })
    }
}

/// One mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// May instructions be fetched from it?
    pub executable: bool,
    /// Where it begins in its file, in bytes.
    pub offset: u64,
    /// Its file; `None`: anonymous.
    pub file: Option<FileId>,
    /// The name the kernel shows.
    pub name: Vec<u8>,
    /// Resident bytes.
    pub rss_bytes: u64,
    /// Resident bytes that are the process's own copies.
    pub anonymous_bytes: u64,
}

/// The mappings of process `pid`, from its smaps.
pub fn mappings(pid: u32) -> io::Result<Vec<MapEntry>> {
    let mut text = Vec::new();
    File::open(format!("/proc/{pid}/smaps"))?
        .take(SMAPS_BYTES_MAX)
        .read_to_end(&mut text)?;
    Ok(parse_smaps(&text))
}

/// Reads the text of an smaps file. Lines that are not understood are passed over: the kernel adds
/// fields from version to version.
pub fn parse_smaps(text: &[u8]) -> Vec<MapEntry> {
    let mut entries: Vec<MapEntry> = Vec::new();
    for line in text.split(|&b| b == b'\n') {
        if let Some(entry) = parse_head(line) {
            entries.push(entry);
        } else if let Some(last) = entries.last_mut() {
            if let Some(kib) = field(line, b"Rss:") {
                last.rss_bytes = kib << 10;
            } else if let Some(kib) = field(line, b"Anonymous:") {
                last.anonymous_bytes = kib << 10;
            }
        }
    }
    entries
}

/// `start-end perms offset major:minor inode name`.
fn parse_head(line: &[u8]) -> Option<MapEntry> {
    let mut rest = line;
    let mut word = || {
        let from = rest.iter().position(|&b| b != b' ')?;
        let tail = &rest[from..];
        let to = tail.iter().position(|&b| b == b' ').unwrap_or(tail.len());
        let (word, after) = tail.split_at(to);
        rest = after;
        core::str::from_utf8(word).ok()
    };
    let (start, end) = word()?.split_once('-')?;
    let (start, end) = (hex(start)?, hex(end)?);
    let perms = word()?;
    let offset = hex(word()?)?;
    let (major, minor) = word()?.split_once(':')?;
    let dev = (
        u32::try_from(hex(major)?).ok()?,
        u32::try_from(hex(minor)?).ok()?,
    );
    let ino: u64 = word()?.parse().ok()?;
    let name = rest.trim_ascii_start().to_vec();
    Some(MapEntry {
        start,
        end,
        executable: perms.as_bytes().get(2) == Some(&b'x'),
        offset,
        file: (ino != 0).then_some(FileId { dev, ino }),
        name,
        rss_bytes: 0,
        anonymous_bytes: 0,
    })
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

/// The number of a `Name:   123 kB` line.
fn field(line: &[u8], name: &[u8]) -> Option<u64> {
    let rest = line.strip_prefix(name)?;
    let text = core::str::from_utf8(rest).ok()?;
    text.trim().strip_suffix("kB")?.trim_end().parse().ok()
}

/// Resident text of one file in one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileText {
    /// Which.
    pub id: FileId,
    /// The name the kernel shows.
    pub name: Vec<u8>,
    /// Resident executable pages that are the file's own, not copies.
    pub pages: u64,
    /// The file is one of the frame files.
    pub on_frames: bool,
}

/// Resident text of one process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextReport {
    /// Executable pages that lie on shared frames.
    pub on_frames_pages: u64,
    /// Executable pages of other files (vdso, libraries opened by name on this machine).
    pub elsewhere_pages: u64,
    /// Executable pages that are the process's own: copies, or made at run time.
    pub own_pages: u64,
    /// By file, most pages first.
    pub files: Vec<FileText>,
}

impl TextReport {
    /// Counts the executable resident pages of `entries`; `frames` are the frame files.
    pub fn count(entries: &[MapEntry], frames: &HashSet<FileId>) -> Self {
        let mut report = Self::default();
        let mut files: BTreeMap<FileId, FileText> = BTreeMap::new();
        for entry in entries.iter().filter(|e| e.executable) {
            let own = entry.anonymous_bytes / PAGE_SIZE_U64;
            let resident = entry.rss_bytes / PAGE_SIZE_U64;
            let shared = resident.saturating_sub(own);
            report.own_pages += own;
            let Some(id) = entry.file else {
                report.elsewhere_pages += shared;
                continue;
            };
            let on_frames = frames.contains(&id);
            if on_frames {
                report.on_frames_pages += shared;
            } else {
                report.elsewhere_pages += shared;
            }
            files
                .entry(id)
                .or_insert_with(|| FileText {
                    id,
                    name: entry.name.clone(),
                    pages: 0,
                    on_frames,
                })
                .pages += shared;
        }
        report.files = files.into_values().collect();
        report.files.sort_by_key(|f| core::cmp::Reverse(f.pages));
        report
    }

    /// Of the running process `pid`.
    pub fn of(pid: u32, frames: &HashSet<FileId>) -> io::Result<Self> {
        Ok(Self::count(&mappings(pid)?, frames))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &[u8] = b"\
00400000-00452000 r-xp 00001000 08:02 173521      /usr/bin/a prog\n\
Size:                328 kB\n\
KernelPageSize:        4 kB\n\
Rss:                 100 kB\n\
Anonymous:             8 kB\n\
VmFlags: rd ex mr mw me dw\n\
00651000-00652000 r--p 00051000 08:02 173521      /usr/bin/a prog\n\
Rss:                   4 kB\n\
Anonymous:             4 kB\n\
7f0000000000-7f0000021000 r-xp 00000000 00:2a 77  /home-3 (deleted)\n\
Rss:                 132 kB\n\
Anonymous:             0 kB\n\
7ffd0a1e2000-7ffd0a1e4000 r-xp 00000000 00:00 0   [vdso]\n\
Rss:                   4 kB\n";

    #[test]
    fn smaps_are_read_and_text_is_counted() {
        let entries = parse_smaps(SMAPS);
        assert_eq!(entries.len(), 4);
        assert_eq!(entries[0].name, b"/usr/bin/a prog");
        assert_eq!(entries[0].offset, 0x1000);
        assert!(!entries[1].executable);
        let frames = HashSet::from([FileId {
            dev: (0, 0x2a),
            ino: 77,
        }]);
        let report = TextReport::count(&entries, &frames);
        assert_eq!(report.on_frames_pages, 33);
        assert_eq!(report.elsewhere_pages, 23 + 1);
        assert_eq!(report.own_pages, 2);
        assert_eq!(report.files[0].pages, 33);
        assert!(report.files[0].on_frames);
    }

    #[test]
    fn garbage_gives_nothing() {
        assert!(parse_smaps(b"").is_empty());
        assert!(parse_smaps(b"Rss: 4 kB\nzz-zz r-xp\n1-2 r-xp 0 0:0\n\xff\xfe").is_empty());
    }

    #[test]
    fn own_text_is_found_under_the_own_program_file() {
        let exe = FileId::of(File::open("/proc/self/exe").unwrap()).unwrap();
        let entries = mappings(std::process::id()).unwrap();
        // The device is compared too: on a file system whose maps show another device than stat
        // does (btrfs) this says nothing; frame files are on tmpfs, where both are equal.
        if entries.iter().any(|e| e.file == Some(exe)) {
            let report = TextReport::count(&entries, &HashSet::from([exe]));
            assert!(report.on_frames_pages > 0);
        }
    }
}
