//! What a check gets: dom0's commands, a directory of its own, the list of domains; and what is done
//! after it, so that the next one finds a machine as after boot.

use crate::job::{Ended, Job};
use crate::output::Output;
use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a command may take when nothing is said. Emulation is some twenty times slower than the
/// machine it runs on.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Where the host's files for guests are.
const IMAGES: &str = "/images";

/// A domain, as `xl list` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its name; `(null)` for one that is dead but still has memory that others map.
    pub name: String,
    /// Its domid.
    pub domid: u16,
    /// MiB.
    pub mem_mib: u64,
    /// Six letters or dashes: running, blocked, paused, shutdown, crashed, dying.
    pub state: String,
}

/// The laboratory during one check.
pub struct Lab {
    check: String,
    logs: PathBuf,
    work: PathBuf,
    jobs: AtomicU64,
    over: AtomicBool,
}

impl Lab {
    /// For a check: an empty directory to work in.
    pub fn new(check: &str, logs: &Path) -> Result<Self> {
        let work = Path::new("/tmp").join(check);
        std::fs::create_dir_all(&work).with_context(|| work.display().to_string())?;
        Ok(Self {
            check: check.to_owned(),
            logs: logs.to_owned(),
            work,
            jobs: AtomicU64::new(0),
            over: AtomicBool::new(false),
        })
    }

    /// A directory in memory for the check's files. It goes when the check ends.
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// A file that stays, on the host, with the run's logs.
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{}.{name}", self.check))
    }

    /// Shows a line among the results, as it is.
    pub fn show(&self, line: &str) -> Result<()> {
        let results = self.logs.join("results");
        let mut file = std::fs::File::options().append(true).open(results)?;
        file.write_all(format!("{line}\n").as_bytes())?;
        Ok(())
    }

    /// Makes every wait of the check end with an error.
    pub fn give_up(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// An error once the check's time is up.
    pub fn still_time(&self) -> Result<()> {
        if self.over.load(Ordering::Relaxed) {
            bail!("the check's time is up");
        }
        Ok(())
    }

    /// A number used once.
    pub fn next(&self) -> u64 {
        self.jobs.fetch_add(1, Ordering::Relaxed)
    }

    /// Runs a shell's words in dom0.
    pub fn sh(&self, script: &str) -> Result<Output> {
        self.sh_for(script, COMMAND_LIMIT)
    }

    /// The same with another limit.
    pub fn sh_for(&self, script: &str, limit: Duration) -> Result<Output> {
        let mut job = self.spawn(script)?;
        let begin = Instant::now();
        let ended = loop {
            self.still_time()?;
            match job.wait(Duration::from_millis(200))? {
                Some(ended) => break ended,
                None if begin.elapsed() > limit => bail!("{script}: no end after {limit:?}"),
                None => {}
            }
        };
        Self::output(script, &job, ended)
    }

    /// Starts a shell's words in dom0 in the background. Killed when dropped.
    pub fn spawn(&self, script: &str) -> Result<Job> {
        let mut command = Command::new("/bin/sh");
        command
            .arg("-c")
            .arg(script)
            .current_dir(&self.work)
            .env("COPAGE_RUN_DIR", self.run_dir());
        let name = format!("job{}", self.next());
        Job::start(command, &self.work.join("jobs"), &name)
    }

    /// What an ended job of dom0 said.
    pub fn output(what: &str, job: &Job, ended: Ended) -> Result<Output> {
        let text = |path| -> Result<String> {
            Ok(String::from_utf8_lossy(&std::fs::read(path)?).into_owned())
        };
        Ok(Output {
            what: what.to_owned(),
            ended,
            stdout: text(&job.out)?,
            stderr: text(&job.err)?,
        })
    }

    /// The run directory of daemons and of the commands that speak to them.
    pub fn run_dir(&self) -> PathBuf {
        self.work.join("run")
    }

    /// Waits until `look` finds something.
    pub fn wait<T>(
        &self,
        what: &str,
        at_most: Duration,
        mut look: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let begin = Instant::now();
        loop {
            self.still_time()?;
            if let Some(found) = look()? {
                return Ok(found);
            }
            if begin.elapsed() > at_most {
                bail!("waited {at_most:?} for {what}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The Linux series that guests can run, the oldest first.
    pub fn series(&self) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(IMAGES).context(IMAGES)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            all.extend(name.strip_prefix("vmlinux-").map(str::to_owned));
        }
        all.sort_by_key(|s| {
            s.split('.')
                .map(|n| n.parse().unwrap_or(0_u32))
                .collect::<Vec<_>>()
        });
        Ok(all)
    }

    /// A guest's kernel or initramfs in dom0's memory, so that later guests start faster.
    pub fn image(&self, name: &str) -> Result<PathBuf> {
        let here = Path::new("/run/images").join(name);
        if !here.exists() {
            std::fs::create_dir_all("/run/images")?;
            let from = Path::new(IMAGES).join(name);
            std::fs::copy(&from, &here).with_context(|| from.display().to_string())?;
        }
        Ok(here)
    }

    /// All domains but dom0.
    pub fn domains(&self) -> Result<Vec<Domain>> {
        let list = self.sh("xl list")?;
        let mut all = Vec::new();
        for line in list.text()?.lines().skip(1) {
            let [name, domid, mem, _vcpus, state, ..] =
                line.split_whitespace().collect::<Vec<_>>()[..]
            else {
                bail!("xl list: {line}");
            };
            all.push(Domain {
                name: name.to_owned(),
                domid: domid.parse().with_context(|| line.to_owned())?,
                mem_mib: mem.parse().with_context(|| line.to_owned())?,
                state: state.to_owned(),
            });
        }
        all.retain(|d| d.domid != 0);
        Ok(all)
    }

    /// Ends every domain and daemon and removes the check's files. An error names what stayed.
    pub fn clean_up(self) -> Result<()> {
        let fresh = Self {
            over: AtomicBool::new(false),
            ..self
        };
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            let pid = entry.file_name().to_string_lossy().parse().ok();
            if let (Some(pid), "copage") =
                (pid.and_then(rustix::process::Pid::from_raw), name.trim())
            {
                // It may end by itself.
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
        for domain in fresh.domains()? {
            if !domain.state.contains('d') {
                fresh.sh(&format!("xl destroy {}", domain.domid))?;
            }
        }
        let gone = || Ok(fresh.domains()?.is_empty().then_some(()));
        let cleaned = fresh.wait("the domains to go", Duration::from_secs(20), gone);
        let left = fresh.domains()?;
        std::fs::remove_dir_all(&fresh.work)?;
        cleaned.with_context(|| format!("left behind: {left:?}"))
    }
}
