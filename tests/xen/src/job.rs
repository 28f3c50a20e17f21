//! A command with an end, its output in files: how the agent runs what it is asked for in a guest, and
//! the driver what it needs in dom0.

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group};
use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this status.
    Exit(i32),
    /// By this signal.
    Signal(i32),
}

impl From<ExitStatus> for Ended {
    fn from(status: ExitStatus) -> Self {
        match status.signal() {
            Some(signal) => Self::Signal(signal),
            None => Self::Exit(status.code().unwrap_or(-1)),
        }
    }
}

/// A running or ended command, in a process group of its own.
#[derive(Debug)]
pub struct Job {
    child: Child,
    /// Its standard output.
    pub out: PathBuf,
    /// Its standard error.
    pub err: PathBuf,
}

impl Job {
    /// Starts it; its output goes to `dir`, into files with this name.
    pub fn start(mut command: Command, dir: &Path, name: &str) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let file = |kind: &str| -> Result<(PathBuf, File)> {
            let path = dir.join(format!("{name}.{kind}"));
            let file = File::create(&path).with_context(|| path.display().to_string())?;
            Ok((path, file))
        };
        let ((out, out_file), (err, err_file)) = (file("out")?, file("err")?);
        let child = command
            .stdin(Stdio::null())
            .stdout(out_file)
            .stderr(err_file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("{}", command.get_program().display()))?;
        Ok(Self { child, out, err })
    }

    /// How it ended; `None`: it runs still, after so long a wait.
    pub fn wait(&mut self, at_most: Duration) -> Result<Option<Ended>> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status.into()));
            }
            if begin.elapsed() >= at_most {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(4));
        }
    }

    /// Sends a signal to it and what it started.
    pub fn signal(&self, signal: Signal) {
        // It may have ended.
        let _ = kill_process_group(Pid::from_child(&self.child), signal);
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }
}
