//! The daemon's directory: one daemon in it at a time, and the epoch that rises from one to the next.

use super::clock::epoch_seconds;
use rustix::fs::{FlockOperation, flock};
use std::fs::{File, Metadata};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Name of the socket for guests.
pub const GUEST_SOCKET: &str = "guest.sock";
/// Name of the socket for the administrator.
pub const ADMIN_SOCKET: &str = "admin.sock";
const LOCK_FILE: &str = "daemon.lock";

/// A directory held by this daemon until it is dropped.
#[derive(Debug)]
pub(super) struct RunDir {
    path: PathBuf,
    /// Held, not read: closing it ends the lock. The file stays, with the epoch in it.
    lock: File,
    /// This daemon's epoch: above that of every daemon that was here before.
    pub epoch: u32,
    /// A daemon was here before and may have left sessions behind: how long these may go on, in ms. 0: there
    /// was none, or it had no session when it stopped.
    pub left_ms: u32,
}

/// Why the directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Another daemon is alive in it.
    #[error("a daemon (process {pid}) is running in {}; stop it or choose another --run-dir", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// Its process, as it wrote it down.
        pid: String,
    },
    /// Others could put a lock or sockets of their own in it.
    #[error("{}: {why}; choose another --run-dir", path.display())]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The directory or its lock file cannot be made.
    #[error("{}: {source}", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl RunDir {
    /// `term_ms`: how long this daemon's sessions go on without it.
    pub(super) fn claim(path: &Path, term_ms: u32) -> Result<Self, RunDirError> {
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| RunDirError::Io { path, source }
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(path)
            .map_err(fail(path))?;
        check_owner(path, &std::fs::metadata(path).map_err(fail(path))?)?;
        let lock_path = path.join(LOCK_FILE);
        let mut lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(fail(&lock_path))?;
        let locked = flock(&lock, FlockOperation::NonBlockingLockExclusive);
        let mut text = String::new();
        // What cannot be read says nothing; it is written anew below.
        let _ = (&mut lock).take(64).read_to_string(&mut text);
        let mut words = text.split_whitespace();
        let (pid, last) = (words.next().unwrap_or("unknown"), words.next());
        match locked {
            Ok(()) => {}
            Err(rustix::io::Errno::AGAIN) => {
                return Err(RunDirError::InUse {
                    path: path.to_owned(),
                    pid: pid.to_owned(),
                });
            }
            Err(errno) => return Err(fail(&lock_path)(errno.into())),
        }
        let last: u32 = last.and_then(|word| word.parse().ok()).unwrap_or(0);
        let left_ms = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        let epoch = epoch_seconds().max(last.saturating_add(1));
        // In one write of one length, over what was there: a daemon that is killed here leaves the old
        // epoch or the new one, never none.
        write(&mut lock, epoch, term_ms).map_err(fail(&lock_path))?;
        Ok(Self {
            path: path.to_owned(),
            lock,
            epoch,
            left_ms,
        })
    }

    /// This daemon stops and leaves no session behind: the next needs to wait for nobody.
    pub(super) fn leave_nobody(&mut self) {
        if let Err(error) = write(&mut self.lock, self.epoch, 0) {
            tracing::warn!(%error, "the next daemon will wait for sessions that there are not");
        }
    }

    pub(super) fn guest_socket(&self) -> PathBuf {
        self.path.join(GUEST_SOCKET)
    }

    pub(super) fn admin_socket(&self) -> PathBuf {
        self.path.join(ADMIN_SOCKET)
    }
}

/// What the next daemon reads.
fn write(lock: &mut File, epoch: u32, term_ms: u32) -> io::Result<()> {
    let line = format!("{:<10} {epoch:>10} {term_ms:>10}\n", std::process::id());
    lock.rewind()?;
    lock.write_all(line.as_bytes())?;
    lock.set_len(line.len() as u64)
}

/// The directory may have been there: it must be this user's, and nobody else may write to it.
fn check_owner(path: &Path, found: &Metadata) -> Result<(), RunDirError> {
    let own = rustix::process::geteuid().as_raw();
    let why = if found.uid() != own {
        format!("it belongs to uid {}, not to uid {own}", found.uid())
    } else if found.mode() & 0o022 != 0 {
        format!("others may write to it (mode {:o})", found.mode() & 0o7777)
    } else {
        return Ok(());
    };
    Err(RunDirError::NotOurs {
        path: path.to_owned(),
        why,
    })
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // The guests' socket goes with its listener. The lock is still held here.
        let _ = rustix::fs::unlink(self.admin_socket());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_daemon_at_a_time_and_epochs_rise() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let first = RunDir::claim(&path, 5000).unwrap();
        let error = RunDir::claim(&path, 5000).unwrap_err();
        assert!(
            error.to_string().contains(&std::process::id().to_string()),
            "{error}"
        );
        let epoch = first.epoch;
        drop(first);
        let second = RunDir::claim(&path, 5000).unwrap();
        assert!(second.epoch > epoch);
        // The first was killed, as far as it is known.
        assert_eq!(second.left_ms, 5000);
        let epoch = second.epoch;
        drop(second);
        let mut third = RunDir::claim(&path, 100).unwrap();
        third.leave_nobody();
        drop(third);
        assert_eq!(RunDir::claim(&path, 100).unwrap().left_ms, 0);
        // A clock that was set back, and a line as earlier daemons wrote it.
        let ahead = epoch + 1_000_000;
        std::fs::write(path.join(LOCK_FILE), format!("1 {ahead}\n")).unwrap();
        assert_eq!(RunDir::claim(&path, 5000).unwrap().epoch, ahead + 1);
        assert_eq!(RunDir::claim(&path, 5000).unwrap().epoch, ahead + 2);
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        std::fs::create_dir(&path).unwrap();
        for mode in [0o777, 0o1777, 0o775, 0o757] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = RunDir::claim(&path, 5000).unwrap_err();
            assert!(matches!(error, RunDirError::NotOurs { .. }), "{error}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(61_001), None).unwrap();
            let error = RunDir::claim(&path, 5000).unwrap_err();
            assert!(error.to_string().contains("61001"), "{error}");
            std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        }
        assert!(RunDir::claim(&path, 5000).is_ok());
    }
}
