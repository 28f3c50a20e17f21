//! An export mounted by a process of its own.

use crate::daemon::{Daemon, EXPORT};
use crate::role::{self, Role};
use crate::setting::{Setting, wait_for};
use anyhow::{Context, Result, bail};
use rustix::mount::UnmountFlags;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// How long mounting and unmounting may take.
const MOUNT_MAX: Duration = Duration::from_secs(10);

/// A mount; taken away when dropped.
pub struct Mounted {
    child: Child,
    dir: PathBuf,
    mounted: bool,
}

impl Mounted {
    /// Mounts the daemon's export. An error says why this machine cannot.
    pub fn start(setting: &Setting, daemon: &Daemon) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let dir = setting.subdir(&format!("mount-{}", COUNT.fetch_add(1, Ordering::Relaxed)))?;
        let outside = std::fs::metadata(&dir)?.dev();
        let child = role::command(Role::Mount)?
            .arg(daemon.socket())
            .arg(EXPORT)
            .arg(&dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("the mount's process")?;
        let mut mounted = Self {
            child,
            dir,
            mounted: false,
        };
        let up = wait_for(MOUNT_MAX, || {
            if matches!(mounted.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return Some(false);
            }
            let inside = std::fs::metadata(&mounted.dir).ok()?.dev();
            (inside != outside).then_some(true)
        });
        mounted.mounted = up == Some(true);
        if !mounted.mounted {
            let _ = mounted.child.kill();
            let mut why = String::new();
            if let Some(mut stderr) = mounted.child.stderr.take() {
                stderr.read_to_string(&mut why)?;
            }
            bail!("no mount: {}", why.trim());
        }
        Ok(mounted)
    }

    /// Where.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.mounted {
            // Where this fails the process is ended instead, which unmounts too.
            let _ = rustix::mount::unmount(&self.dir, UnmountFlags::DETACH);
        }
        if wait_for(MOUNT_MAX, || self.child.try_wait().ok().flatten()).is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
