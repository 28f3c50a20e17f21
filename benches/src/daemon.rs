//! A daemon of its own process on a private socket, for one bench.

use crate::role::{self, Role};
use crate::setting::{Setting, wait_for};
use anyhow::{Context, Result, bail, ensure};
use copage::serve::admin_types::{AdminReply, AdminRequest, StatsEntry};
use copage_mmap::{Client, ConnectOptions, File, MapOptions, Mapping, OpenHow};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The name of the only export.
pub const EXPORT: &str = "bench";
/// How long a daemon may take to start or to stop.
const START_STOP_MAX: Duration = Duration::from_secs(20);

/// How a daemon is configured; the rest is as `copage serve` has it by default.
#[derive(Clone, Copy, Debug)]
pub struct DaemonOptions {
    /// The budget of frames.
    pub frames_mib: u64,
    /// Back frames by 2 MiB ones.
    pub huge: bool,
    /// Of the export.
    pub mode: Mode,
    /// Take pages back without asking.
    pub force: bool,
    /// Pages that go to and fro between writers are shared by them.
    pub share_bounced: bool,
}

/// What guests may do with the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Read.
    Ro,
    /// Write, all the same file.
    Coherent,
}

impl DaemonOptions {
    /// A read-only export with so large a budget.
    pub fn ro(frames_mib: u64, huge: bool) -> Self {
        Self {
            frames_mib,
            huge,
            mode: Mode::Ro,
            force: true,
            share_bounced: false,
        }
    }

    /// An export that guests write.
    pub fn coherent() -> Self {
        Self {
            mode: Mode::Coherent,
            ..Self::ro(64, false)
        }
    }
}

/// A running daemon; stopped when dropped.
pub struct Daemon {
    child: Child,
    run_dir: PathBuf,
}

impl Daemon {
    /// Exports `dir` and waits until guests can connect.
    pub fn start(setting: &Setting, dir: &Path, options: DaemonOptions) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let run_dir = setting.subdir(&format!("run-{number}"))?;
        let config = run_dir.join("copage.toml");
        std::fs::write(&config, config_text(dir, options))?;
        let child = role::command(Role::Daemon)?
            .arg(&config)
            .arg(&run_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("the daemon's process")?;
        let mut daemon = Self { child, run_dir };
        let up = wait_for(START_STOP_MAX, || {
            let ended = matches!(daemon.child.try_wait(), Ok(Some(_)) | Err(_));
            (ended || daemon.connect().is_ok()).then_some(!ended)
        });
        ensure!(up == Some(true), "the daemon did not start");
        Ok(daemon)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where guests connect.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("guest.sock")
    }

    /// A session of this process.
    pub fn connect(&self) -> Result<Client> {
        Ok(Client::connect(&self.socket(), &ConnectOptions::default())?)
    }

    /// Asks the administrator's socket.
    pub fn admin(&self, request: &AdminRequest) -> Result<AdminReply> {
        let mut stream = UnixStream::connect(self.run_dir.join("admin.sock"))?;
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        stream.write_all(line.as_bytes())?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        match serde_json::from_str(&answer).with_context(|| answer.clone())? {
            AdminReply::Error { text, .. } => bail!("{request:?}: {text}"),
            reply => Ok(reply),
        }
    }

    /// Its numbers.
    pub fn stats(&self) -> Result<StatsEntry> {
        match self.admin(&AdminRequest::Stats)? {
            AdminReply::Stats(stats) => Ok(stats),
            other => bail!("stats: {other:?}"),
        }
    }
}

/// How long frames may take to become huge ones behind the fills.
const HUGE_MAX: Duration = Duration::from_secs(5);

impl Daemon {
    /// Waits until at least `pages` pages are in 2 MiB frames, for at most some seconds; how many are.
    pub fn wait_for_huge(&self, pages: u64) -> Result<u64> {
        wait_for(HUGE_MAX, || {
            let huge = self.stats().ok()?.frames_huge;
            (huge >= pages).then_some(())
        });
        Ok(self.stats()?.frames_huge)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // A daemon that is gone already, or does not stop in time, is killed: all the same.
        let _ = self.admin(&AdminRequest::Stop);
        let ended = wait_for(START_STOP_MAX, || self.child.try_wait().ok().flatten());
        if ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn config_text(dir: &Path, options: DaemonOptions) -> String {
    // A TOML string and a JSON string are written alike.
    let path = serde_json::Value::from(dir.to_string_lossy());
    let mode = match options.mode {
        Mode::Ro => "ro",
        Mode::Coherent => "coherent",
    };
    format!(
        "frames_mib = {}\nhuge = {}\nforce = {}\nshare_bounced = {}\n\
         [limits]\ngrants_max = 4000000\npinned_mib = {}\n\
         [[export]]\nname = \"{EXPORT}\"\npath = {path}\nmode = \"{mode}\"\nallow = [\"*\"]\n",
        options.frames_mib, options.huge, options.force, options.share_bounced, options.frames_mib,
    )
}

/// The same to be written.
pub fn map_writable(client: &Client, name: &str) -> Result<(File, Mapping)> {
    let node = client.attach(EXPORT)?.root().lookup(name.as_bytes())?;
    let file = node.open_for_writing(OpenHow::Map)?;
    let mapping = file.map(&MapOptions::written())?;
    Ok((file, mapping))
}

/// Opens and maps `name` of the export in a session.
pub fn map(client: &Client, name: &str) -> Result<(File, Mapping)> {
    let node = client.attach(EXPORT)?.root().lookup(name.as_bytes())?;
    let file = node.open(OpenHow::Map)?;
    let mapping = file.map(&MapOptions::shared())?;
    Ok((file, mapping))
}
