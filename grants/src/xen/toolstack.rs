//! Making, finding and ending cache domains through the host's toolstack.
//!
//! `xl` is a program with a stable command line; the library below it changes its interface with every
//! Xen. The domains' names are looked up in the xenstore, where a guest cannot write them.

use super::XenError;
use super::config::XenConfig;
use super::lib::{Hypfs, Store};
use super::stub;
use crate::error::GrantError;
use crate::limits::TOOLSTACK_DEADLINE_S;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The hypervisor's bound on `max_grant_frames` of new domains.
const GRANT_FRAMES_PARAM: &str = "/params/gnttab_max_frames";

/// The end of the toolstack's complaints is told, so many characters.
const COMPLAINT_CHARS_MAX: usize = 600;

pub(super) struct Toolstack {
    xl: PathBuf,
    run_dir: PathBuf,
    prefix: String,
    store: Store,
}

fn sys(call: &'static str) -> impl FnOnce(io::Error) -> GrantError {
    move |source| GrantError::Sys { call, source }
}

impl Toolstack {
    pub(super) fn new(config: &XenConfig) -> Result<Self, GrantError> {
        let prefix = &config.name_prefix;
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if prefix.is_empty() || prefix.len() > 32 || !prefix.chars().all(plain) {
            return Err(GrantError::BadRange(format!(
                "cache domains cannot be called {prefix:?}: 1 to 32 letters, digits, '-', '_'"
            )));
        }
        fs::create_dir_all(&config.run_dir).map_err(sys("making the directory for domains"))?;
        Ok(Self {
            xl: config.xl.clone(),
            run_dir: config.run_dir.clone(),
            prefix: prefix.clone(),
            store: Store::open()?,
        })
    }

    pub(super) fn name(&self, number: u32) -> String {
        format!("{}-{number}", self.prefix)
    }

    fn name_of(&self, domid: u16) -> Result<Option<String>, XenError> {
        let name = self.store.read(&format!("/local/domain/{domid}/name"))?;
        Ok(name.map(|name| String::from_utf8_lossy(&name).into_owned()))
    }

    /// The cache domains there are: their numbers and domids.
    pub(super) fn find(&self) -> Result<BTreeMap<u32, u16>, GrantError> {
        let mut found = BTreeMap::new();
        for id in self.store.list("/local/domain")? {
            let Ok(domid) = id.parse::<u16>() else {
                continue;
            };
            let Some(name) = self.name_of(domid)? else {
                continue;
            };
            let number = name
                .strip_prefix(&self.prefix)
                .and_then(|rest| rest.strip_prefix('-')?.parse().ok());
            if let Some(number) = number.filter(|&number| self.name(number) == name) {
                found.insert(number, domid);
            }
        }
        Ok(found)
    }

    /// Sees to it that domains may have grant tables of `frames` frames. `false`: whether they may is not
    /// known (perhaps it was said on Xen's command line: making a domain will tell).
    pub(super) fn allow_grant_frames(&self, frames: u32) -> Result<bool, GrantError> {
        let read = Hypfs::open().and_then(|hypfs| Ok((hypfs.read(GRANT_FRAMES_PARAM)?, hypfs)));
        let (now, hypfs) = match read {
            Ok(read) => read,
            Err(error) => {
                tracing::warn!(%error, "the hypervisor does not tell how large grant tables may be");
                return Ok(false);
            }
        };
        if now.trim().parse::<u32>().is_ok_and(|now| now >= frames) {
            return Ok(true);
        }
        hypfs
            .write(GRANT_FRAMES_PARAM, &frames.to_string())
            .map(|()| true)
            .map_err(|error| GrantError::CacheDomain {
                name: self.prefix.clone(),
                why: format!(
                    "grant tables may have {} frames, {frames} are needed, and raising that failed \
                     ({error}): add gnttab_max_frames={frames} to Xen's command line",
                    now.trim()
                ),
            })
    }

    /// Makes a domain, paused for ever.
    pub(super) fn create(
        &self,
        number: u32,
        mib: u32,
        grant_frames: u32,
    ) -> Result<u16, GrantError> {
        let name = self.name(number);
        let kernel = self.run_dir.join("cache-domain.elf");
        let text = domain_config(&name, &kernel, mib, grant_frames);
        let path = self.run_dir.join(format!("{name}.cfg"));
        fs::write(&kernel, stub::elf()).map_err(sys("writing the cache domains' kernel"))?;
        fs::write(&path, text).map_err(sys("writing a cache domain's configuration"))?;
        // -e: no process of xl's stays to watch it.
        let path = path.to_string_lossy();
        self.run(&name, &["create", "-q", "-p", "-e", &path])?;
        self.find()?
            .remove(&number)
            .ok_or_else(|| GrantError::CacheDomain {
                name,
                why: "it was made and is not in the xenstore".to_owned(),
            })
    }

    /// Ends a cache domain. What others have mapped of it stays until they unmap it.
    pub(super) fn destroy(&self, number: u32, domid: u16) -> Result<(), GrantError> {
        let name = self.name(number);
        // Domids are used again.
        if self.name_of(domid)?.as_deref() != Some(&name) {
            return Ok(());
        }
        self.run(&name, &["destroy", &domid.to_string()])
    }

    /// Waits until no `xl` runs that an earlier life of the daemon started: it outlives one that is killed,
    /// and what it makes or ends is there or gone only when it is done.
    pub(super) fn wait_for_earlier(&self) -> Result<(), GrantError> {
        self.lock_xl(&self.prefix).map(drop)
    }

    /// A file that is locked as long as it is open, here or in an `xl` that has it as its input.
    fn lock_xl(&self, name: &str) -> Result<File, GrantError> {
        let path = self.run_dir.join(format!("{}.xl.lock", self.prefix));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(sys("making the lock for xl"))?;
        let deadline = Instant::now() + Duration::from_secs(TOOLSTACK_DEADLINE_S);
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(errno) => {
                    return Err(GrantError::CacheDomain {
                        name: name.to_owned(),
                        why: format!(
                            "an xl that was started before runs still ({}: {errno})",
                            path.display()
                        ),
                    });
                }
            }
        }
    }

    fn run(&self, name: &str, args: &[&str]) -> Result<(), GrantError> {
        let lock = self.lock_xl(name)?;
        let log_path = self.run_dir.join("xl.log");
        let log = File::create(&log_path).map_err(sys("making xl's log"))?;
        let errors = log.try_clone().map_err(sys("dup of xl's log"))?;
        let failed = |why: String| GrantError::CacheDomain {
            name: name.to_owned(),
            why,
        };
        let said = || {
            let log = fs::read_to_string(&log_path).unwrap_or_default();
            let chars = log.trim().chars().count();
            let tail = log
                .trim()
                .chars()
                .skip(chars.saturating_sub(COMPLAINT_CHARS_MAX));
            tail.map(|c| if c == '\n' { ';' } else { c })
                .collect::<String>()
        };
        let mut child = Command::new(&self.xl)
            .args(args)
            // Empty, and held by it however we end.
            .stdin(lock)
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(|e| failed(format!("{} cannot be run: {e}", self.xl.display())))?;
        let deadline = Instant::now() + Duration::from_secs(TOOLSTACK_DEADLINE_S);
        loop {
            match child.try_wait().map_err(sys("waiting for xl"))? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    let what = args.first().copied().unwrap_or_default();
                    return Err(failed(format!("xl {what} ended with {status}: {}", said())));
                }
                None if Instant::now() >= deadline => {
                    // It ends one way or the other.
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(failed(format!(
                        "xl took more than {TOOLSTACK_DEADLINE_S} s: {}",
                        said()
                    )));
                }
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

/// For `xl create`. PVH, because every Xen with HAP has it and its entries name its own frames; grant
/// tables of version 1 only; no maptrack frames, since it maps nothing.
fn domain_config(name: &str, kernel: &Path, mib: u32, grant_frames: u32) -> String {
    format!(
        "# A cache domain of copage: it holds pages for guests and never runs.\n\
         name = \"{name}\"\n\
         type = \"pvh\"\n\
         kernel = \"{}\"\n\
         memory = {mib}\n\
         vcpus = 1\n\
         max_grant_frames = {grant_frames}\n\
         max_grant_version = 1\n\
         max_maptrack_frames = 0\n\
         on_poweroff = \"destroy\"\n\
         on_reboot = \"destroy\"\n\
         on_crash = \"destroy\"\n",
        kernel.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// That xl takes it, only Xen can show.
    #[test]
    fn the_configuration_names_what_matters() {
        let text = domain_config("copage-cache-3", Path::new("/run/copage/k"), 64, 128);
        for line in [
            "name = \"copage-cache-3\"",
            "kernel = \"/run/copage/k\"",
            "memory = 64",
            "max_grant_frames = 128",
            "max_grant_version = 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
    }
}
