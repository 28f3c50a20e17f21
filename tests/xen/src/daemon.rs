//! The copage daemon in dom0.

use crate::job::{Ended, Job};
use crate::lab::{COMMAND_LIMIT, Lab};
use crate::output::Output;
use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;

/// A daemon. Killed when dropped; what it said is in the run's logs, `CHECK.daemon-N.err`.
pub struct Daemon<'a> {
    lab: &'a Lab,
    config: PathBuf,
    job: Option<Job>,
    starts: u32,
}

impl<'a> Daemon<'a> {
    /// Starts a daemon with this configuration (without `run_dir`, which is the check's own) and waits
    /// until it answers.
    pub fn start(lab: &'a Lab, configuration: &str) -> Result<Self> {
        let config = lab.work().join("copage.toml");
        let text = format!("run_dir = {:?}\n{configuration}", lab.run_dir());
        std::fs::write(&config, text)?;
        let mut daemon = Self {
            lab,
            config,
            job: None,
            starts: 0,
        };
        daemon.again()?;
        Ok(daemon)
    }

    /// Starts it again, after [`Self::kill`] or [`Self::stop`], with the configuration it had.
    pub fn again(&mut self) -> Result<()> {
        let mut command = std::process::Command::new("copage");
        command.arg("serve").arg("--config").arg(&self.config);
        let logs = self.lab.log(&format!("daemon-{}", self.starts));
        self.starts += 1;
        let name = logs.file_name().context("a name")?.to_string_lossy();
        let mut job = Job::start(command, logs.parent().context("a directory")?, &name)?;
        self.lab.wait("a daemon that answers", COMMAND_LIMIT, || {
            if let Some(ended) = job.wait(Duration::ZERO)? {
                let said = std::fs::read_to_string(&job.err)?;
                bail!("copage serve: {ended:?}: {}", said.trim());
            }
            Ok(self.copage("stats --json")?.success().then_some(()))
        })?;
        self.job = Some(job);
        Ok(())
    }

    /// Runs `copage` with these words against it.
    pub fn copage(&self, words: &str) -> Result<Output> {
        self.lab.sh(&format!("copage {words}"))
    }

    /// What a command says with `--json`.
    pub fn json(&self, words: &str) -> Result<Value> {
        self.copage(&format!("{words} --json"))?.json()
    }

    /// Its process; an error when it does not run.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.job.as_ref().context("the daemon does not run")?.pid())
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.end(Signal::KILL, Ended::Signal(9))
    }

    /// SIGTERM, and waits for its end, which has to be clean.
    pub fn stop(&mut self) -> Result<()> {
        self.end(Signal::TERM, Ended::Exit(0))
    }

    fn end(&mut self, signal: Signal, expected: Ended) -> Result<()> {
        let mut job = self.job.take().context("the daemon does not run")?;
        job.signal(signal);
        let ended = self.lab.wait("the daemon's end", COMMAND_LIMIT, || {
            job.wait(Duration::ZERO)
        })?;
        if ended != expected {
            bail!("the daemon ended with {ended:?}, not {expected:?}");
        }
        Ok(())
    }
}
