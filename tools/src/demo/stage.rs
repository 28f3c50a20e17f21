//! The demo's processes: a daemon on a private socket and guests that take orders.

use super::cast::Part;
use super::proto::{Answer, Order};
use crate::serve::admin_types::{AdminReply, AdminRequest};
use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// How long the daemon may take until it says READY.
const READY_MAX: Duration = Duration::from_secs(60);

/// The daemon.
pub struct DaemonProcess {
    child: Child,
    dir: PathBuf,
    run_dir: PathBuf,
}

impl DaemonProcess {
    /// Starts `copage serve` with `config` (TOML) and waits until it is ready.
    pub fn start(dir: &Path, config: &str) -> Result<Self> {
        let file = config_file(dir);
        std::fs::write(&file, config).with_context(|| format!("{}", file.display()))?;
        Ok(Self {
            child: Self::spawn(dir)?,
            dir: dir.to_owned(),
            run_dir: dir.join("run"),
        })
    }

    /// Kills it without a word, starts it again, and waits until it is ready.
    pub fn restart(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = Self::spawn(&self.dir)?;
        Ok(())
    }

    fn spawn(dir: &Path) -> Result<Child> {
        let notify = dir.join("ready.sock");
        // Of the one before it.
        let _ = std::fs::remove_file(&notify);
        let ready = UnixDatagram::bind(&notify).context("a socket for READY")?;
        ready.set_read_timeout(Some(READY_MAX))?;
        let child = Command::new(std::env::current_exe()?)
            .arg("serve")
            .arg("--config")
            .arg(config_file(dir))
            .arg("--run-dir")
            .arg(dir.join("run"))
            .env("NOTIFY_SOCKET", &notify)
            .env("COPAGE_LOG", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("start copage serve")?;
        let mut message = [0; 256];
        loop {
            let len = ready
                .recv(&mut message)
                .context("the daemon did not become ready")?;
            if message[..len].starts_with(b"READY=1") {
                return Ok(child);
            }
        }
    }

    /// Where guests connect.
    pub fn guest_socket(&self) -> PathBuf {
        self.run_dir.join("guest.sock")
    }

    /// The directory of its sockets.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks on the admin socket.
    pub fn ask(&self, request: &AdminRequest) -> Result<AdminReply> {
        let mut stream = UnixStream::connect(self.run_dir.join("admin.sock"))
            .context("the daemon's admin socket")?;
        writeln!(stream, "{}", serde_json::to_string(request)?)?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        match serde_json::from_str(&line).context("the daemon's answer")? {
            AdminReply::Error { text, .. } => bail!("the daemon refused: {text}"),
            reply => Ok(reply),
        }
    }
}

fn config_file(dir: &Path) -> PathBuf {
    dir.join("copage.toml")
}

impl Drop for DaemonProcess {
    fn drop(&mut self) {
        // A demo that failed may leave it busy; nothing of it outlives its process.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One guest: its agent's process here, or the pipe to it.
pub struct Guest {
    part: Part,
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Guest {
    /// Starts a guest's agent; it connects when ordered to.
    pub fn start(part: &Part) -> Result<Self> {
        let (program, words) = part.agent.split_first().context("a guest without agent")?;
        let mut child = Command::new(program)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", part.name))?;
        let orders = child.stdin.take().context("the guest's input")?;
        let answers = BufReader::new(child.stdout.take().context("the guest's output")?);
        Ok(Self {
            part: part.clone(),
            child,
            orders,
            answers,
        })
    }

    /// What it is.
    pub fn part(&self) -> &Part {
        &self.part
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives an order; take the answer with [`Self::answer`].
    pub fn order(&mut self, order: &Order) -> Result<()> {
        let line = serde_json::to_string(order)?;
        writeln!(self.orders, "{line}").or_else(|error| {
            let status = self.child.wait()?;
            bail!(
                "{} did not take the order {line}: {error}; it ended: {status}",
                self.part.name
            )
        })
    }

    /// Waits for the answer; a failure of the guest is an error here.
    pub fn answer(&mut self) -> Result<Answer> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            let status = self.child.wait()?;
            // A pipe ends as a shell says that a program did.
            let piped = status.code().and_then(|code| code.checked_sub(128));
            if let Some(signal) = status.signal().or(piped.filter(|signal| *signal > 0)) {
                return Ok(Answer::Refused {
                    why: format!("killed by signal {signal}"),
                });
            }
            bail!("{} ended: {status}", self.part.name);
        }
        match serde_json::from_str(&line)? {
            Answer::Failed { why } => bail!("{}: {why}", self.part.name),
            answer => Ok(answer),
        }
    }

    /// Order and answer.
    pub fn ask(&mut self, order: &Order) -> Result<Answer> {
        self.order(order)?;
        self.answer()
    }

    /// Ends it at once.
    pub fn kill(&self) -> Result<()> {
        self.control(&self.part.kill, Signal::KILL)
    }

    /// Stops it where it is.
    pub fn stop(&self) -> Result<()> {
        self.control(&self.part.stop, Signal::STOP)
    }

    /// Lets it go on.
    pub fn resume(&self) -> Result<()> {
        self.control(&self.part.resume, Signal::CONT)
    }

    fn control(&self, words: &[String], signal: Signal) -> Result<()> {
        let Some((program, words)) = words.split_first() else {
            let pid = i32::try_from(self.pid())
                .ok()
                .and_then(rustix::process::Pid::from_raw);
            return rustix::process::kill_process(pid.context("a pid")?, signal)
                .with_context(|| format!("signal {}", self.part.name));
        };
        let status = Command::new(program)
            .args(words)
            .stdout(Stdio::null())
            .status()
            .with_context(|| program.clone())?;
        anyhow::ensure!(status.success(), "{program} {words:?}: {status}");
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Gives all guests one order at the same time and collects their answers.
pub fn ask_all(guests: &mut [Guest], order: &Order) -> Result<Vec<Answer>> {
    for guest in guests.iter_mut() {
        guest.order(order)?;
    }
    guests.iter_mut().map(Guest::answer).collect()
}

/// Waits until `done` is so, at most `limit`; how long it took.
pub fn wait_until(
    limit: Duration,
    mut done: impl FnMut() -> Result<bool>,
) -> Result<Option<Duration>> {
    let begin = Instant::now();
    while begin.elapsed() < limit {
        if done()? {
            return Ok(Some(begin.elapsed()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(None)
}
