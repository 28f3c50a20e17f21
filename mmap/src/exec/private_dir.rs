//! A directory that only this user can enter, gone when dropped.

use super::error::ExecError;
use rustix::rand::{GetRandomFlags, getrandom};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

/// How many random names are tried.
const TRIES_MAX: u32 = 16;

#[derive(Debug)]
pub(super) struct PrivateDir {
    path: PathBuf,
}

impl PrivateDir {
    pub(super) fn new() -> Result<Self, ExecError> {
        let sys = |source| ExecError::Sys {
            call: "making a private directory for links",
            source,
        };
        // The loader's lists are separated by `:` and `;`: no such name can be told to it.
        let clean = |dir: &Path| {
            !dir.as_os_str()
                .as_bytes()
                .iter()
                .any(|b| b":; \t\n".contains(b))
        };
        let base = Some(std::env::temp_dir()).filter(|d| d.is_absolute() && clean(d));
        let base = base.unwrap_or_else(|| "/tmp".into());
        for _ in 0..TRIES_MAX {
            let mut random = [0u8; 8];
            getrandom(&mut random, GetRandomFlags::empty()).map_err(|e| sys(e.into()))?;
            let path = base.join(format!("copage-exec-{:016x}", u64::from_ne_bytes(random)));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(sys(e)),
            }
        }
        Err(sys(io::ErrorKind::AlreadyExists.into()))
    }

    /// Makes `dir/name` a link to `target`, `dir` too if it is not there.
    pub(super) fn link(&self, dir: &str, name: &[u8], target: &Path) -> Result<PathBuf, ExecError> {
        let sys = |source| ExecError::Sys {
            call: "making a link to a descriptor",
            source,
        };
        let dir = self.dir(dir)?;
        let path = dir.join(OsStr::from_bytes(name));
        symlink(target, &path).map_err(sys)?;
        Ok(path)
    }

    /// Makes the directory `dir` if it is not there.
    pub(super) fn dir(&self, dir: &str) -> Result<PathBuf, ExecError> {
        let sys = |source| ExecError::Sys {
            call: "making a private directory for links",
            source,
        };
        let path = self.path.join(dir);
        DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(&path)
            .map_err(sys)?;
        Ok(path)
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        // Only links and directories are in it. What cannot be removed is for the cleaner of /tmp.
        let _ = fs::remove_dir_all(&self.path);
    }
}
