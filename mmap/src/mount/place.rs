//! The directory of a mount: may one be put there, is one there, and taking it away.

use super::error::MountError;
use rustix::mount::{UnmountFlags, unmount};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the source of a copage mount begins with, in /proc/self/mountinfo.
pub(super) const SOURCE_PREFIX: &str = "copage:";

/// `dir` as the kernel names it, if a mount may be put there.
pub(super) fn check(dir: &Path, nonempty: bool) -> Result<PathBuf, MountError> {
    let at = |source: io::Error| MountError::Dir {
        dir: dir.to_path_buf(),
        source,
    };
    let full = match dir.canonicalize() {
        Ok(full) => full,
        Err(e) if is_stale(&e) => {
            return Err(MountError::Stale {
                dir: dir.to_path_buf(),
            });
        }
        Err(e) => return Err(at(e)),
    };
    match fs::metadata(&full) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return Err(MountError::NotDirectory { dir: full }),
        Err(e) if is_stale(&e) => return Err(MountError::Stale { dir: full }),
        Err(e) => return Err(at(e)),
    }
    if let Some(source_name) = copage_mount_at(&full)? {
        return Err(MountError::Mounted {
            dir: full,
            source_name,
        });
    }
    let mut entries = fs::read_dir(&full).map_err(at)?;
    if !nonempty && entries.next().is_some() {
        return Err(MountError::NotEmpty { dir: full });
    }
    Ok(full)
}

/// A FUSE mount without its process answers everything with ENOTCONN.
fn is_stale(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOTCONN)
}

/// Takes the copage mount at `dir` away, stale or not. `lazy`: out of sight now, ended with its last
/// use; without, a mount in use is [`MountError::Busy`]. One that is stale is always detached.
pub fn umount(dir: &Path, lazy: bool) -> Result<(), MountError> {
    let (full, stale) = locate(dir)?;
    if copage_mount_at(&full)?.is_none() {
        return Err(MountError::NotMounted { dir: full });
    }
    let lazy = lazy || stale;
    let mut flags = UnmountFlags::NOFOLLOW;
    flags.set(UnmountFlags::DETACH, lazy);
    match unmount(&full, flags) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::BUSY) => Err(MountError::Busy { dir: full }),
        Err(rustix::io::Errno::PERM) => umount_by_helper(&full, lazy),
        Err(e) => Err(MountError::Sys {
            call: "umount2",
            source: e.into(),
        }),
    }
}

/// `dir` as the kernel names it, also when looking at it fails because its mount is stale.
fn locate(dir: &Path) -> Result<(PathBuf, bool), MountError> {
    let at = |source: io::Error| MountError::Dir {
        dir: dir.to_path_buf(),
        source,
    };
    match dir
        .canonicalize()
        .and_then(|full| fs::metadata(&full).map(|_| full))
    {
        Ok(full) => return Ok((full, false)),
        Err(e) if is_stale(&e) => {}
        Err(e) => return Err(at(e)),
    }
    let absolute = std::path::absolute(dir).map_err(at)?;
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        return Err(at(io::ErrorKind::InvalidInput.into()));
    };
    Ok((parent.canonicalize().map_err(at)?.join(name), true))
}

fn umount_by_helper(dir: &Path, lazy: bool) -> Result<(), MountError> {
    let mut command = Command::new("fusermount3");
    command.arg("-u").arg("-q");
    if lazy {
        command.arg("-z");
    }
    let output = command.arg("--").arg(dir).stdin(Stdio::null()).output();
    let output = output.map_err(|source| MountError::NoRight { source })?;
    if output.status.success() {
        return Ok(());
    }
    if !lazy && copage_mount_at(dir)?.is_some() {
        // It says no more than that it did not work; a mount of one's own that is not busy works.
        return Err(MountError::Busy {
            dir: dir.to_path_buf(),
        });
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(MountError::Sys {
        call: "fusermount3 -u",
        source: io::Error::other(text),
    })
}

/// The source of the copage mount at `dir`, if the topmost mount there is one.
fn copage_mount_at(dir: &Path) -> Result<Option<String>, MountError> {
    let text = fs::read("/proc/self/mountinfo").map_err(|source| MountError::Sys {
        call: "reading /proc/self/mountinfo",
        source,
    })?;
    Ok(find_mount(&text, dir))
}

/// The last line for `dir` counts: it is the mount on top.
fn find_mount(mountinfo: &[u8], dir: &Path) -> Option<String> {
    let mut found = None;
    for line in mountinfo.split(|&b| b == b'\n') {
        // id parent major:minor root DIR options [tags…] - type SOURCE options (proc(5))
        let mut words = line.split(|&b| b == b' ');
        let Some(at) = words.by_ref().nth(4) else {
            continue;
        };
        if unescape(at) != dir.as_os_str() {
            continue;
        }
        let mut words = words.skip_while(|word| *word != b"-").skip(1);
        let (kind, source) = (
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
        );
        let source = unescape(source).to_string_lossy().into_owned();
        let ours = kind.starts_with(b"fuse") && source.starts_with(SOURCE_PREFIX);
        found = ours.then_some(source);
    }
    found
}

/// mountinfo writes blank, tab, newline and backslash as `\ooo`.
fn unescape(word: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'\\'
            && let Some(&[a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7']) = tail.first_chunk()
        {
            out.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
            rest = &tail[3..];
        } else {
            out.push(byte);
        }
    }
    OsString::from_vec(out)
}

/// A name fit for a mount's source: mount helpers split at commas.
pub(super) fn source_name(export: &str) -> String {
    let clean: String = export
        .chars()
        .map(|c| {
            if c == ',' || c == '\\' || c.is_control() {
                '_'
            } else {
                c
            }
        })
        .collect();
    format!("{SOURCE_PREFIX}{clean}")
}

/// Is there a program `name` in PATH?
pub(super) fn in_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(OsStr::from_bytes(name.as_bytes())).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &[u8] = b"\
22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw\n\
40 22 0:40 / /mnt/a\\040b ro,nosuid shared:7 master:2 - fuse.copage copage:libs ro,user_id=0\n\
41 22 0:41 / /mnt/over ro - fuse copage:libs ro\n\
42 41 0:42 / /mnt/over rw - tmpfs tmpfs rw\n\
broken\n";

    #[test]
    fn mounts_are_found_by_directory_the_topmost_counts() {
        assert_eq!(
            find_mount(INFO, Path::new("/mnt/a b")).as_deref(),
            Some("copage:libs")
        );
        assert_eq!(find_mount(INFO, Path::new("/mnt/over")), None);
        assert_eq!(find_mount(INFO, Path::new("/")), None);
        assert_eq!(find_mount(INFO, Path::new("/elsewhere")), None);
    }

    #[test]
    fn unsuitable_directories_are_refused_with_their_reason() {
        let dir = tempfile::tempdir().unwrap();
        let none = dir.path().join("none");
        assert!(matches!(check(&none, false), Err(MountError::Dir { .. })));
        assert!(check(dir.path(), false).is_ok());
        let file = dir.path().join("file");
        fs::write(&file, b"").unwrap();
        assert!(matches!(
            check(&file, false),
            Err(MountError::NotDirectory { .. })
        ));
        assert!(matches!(
            check(dir.path(), false),
            Err(MountError::NotEmpty { .. })
        ));
        assert!(check(dir.path(), true).is_ok());
        assert!(matches!(
            umount(dir.path(), false),
            Err(MountError::NotMounted { .. })
        ));
        assert!(matches!(umount(&none, false), Err(MountError::Dir { .. })));
    }

    #[test]
    fn source_names_hold_nothing_that_splits_options() {
        assert_eq!(source_name("a,b\\c\nd"), "copage:a_b_c_d");
    }
}
