//! Asking the daemon on its admin socket.

use crate::output::Progress;
use crate::serve::ADMIN_SOCKET;
use crate::serve::admin_types::{AdminReply, AdminRequest};
use anyhow::{Context, Result, bail};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The longest reply that is taken, in bytes: a hundred thousand grants are some ten million.
const REPLY_BYTES_MAX: u64 = 256 << 20;
/// How long one wait for the daemon lasts before it is shown that there is one.
const WAIT: Duration = Duration::from_millis(500);

/// Which daemon to ask.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Where {
    /// The daemon's run directory [default: $COPAGE_RUN_DIR, else /run/copage for root, else
    /// $XDG_RUNTIME_DIR/copage]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// The daemon's admin socket [default: admin.sock in the run directory]
    #[arg(long, value_name = "PATH", conflicts_with = "run_dir")]
    pub socket: Option<PathBuf>,
}

impl Where {
    /// The admin socket.
    pub fn socket(&self) -> PathBuf {
        match (&self.socket, &self.run_dir) {
            (Some(socket), _) => socket.clone(),
            (None, Some(dir)) => dir.join(ADMIN_SOCKET),
            (None, None) => run_dir_from_env().join(ADMIN_SOCKET),
        }
    }

    /// A connection.
    pub fn connect(&self) -> Result<Admin> {
        Admin::connect(&self.socket())
    }

    /// One question on a connection of its own.
    pub fn ask(&self, request: &AdminRequest) -> Result<AdminReply> {
        Ok(self.connect()?.ask(request)?)
    }
}

/// The run directory when the command line names none.
pub fn run_dir_from_env() -> PathBuf {
    match std::env::var_os("COPAGE_RUN_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => crate::config::default_run_dir(),
    }
}

/// A connection to the admin socket.
#[derive(Debug)]
pub struct Admin {
    stream: BufReader<UnixStream>,
}

/// Why there is no answer that was wanted.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The daemon said no.
    #[error("{text}")]
    Refused {
        /// The errno.
        errno: i32,
        /// The daemon's words.
        text: String,
    },
    /// The connection ended.
    #[error("the daemon closed the connection; it ended, or this user is not its own")]
    Closed,
    /// The connection failed.
    #[error("the daemon's admin socket: {0}")]
    Io(#[from] io::Error),
    /// What came is no reply: another version?
    #[error("the daemon's answer makes no sense ({0}); is it of another version?")]
    Senseless(#[from] serde_json::Error),
    /// What came is the reply to something else.
    #[error("the daemon answered something else; is it of another version?")]
    Other,
}

impl Admin {
    /// Connects.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(|error| {
            let hint = match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    "no daemon is running there; start one (copage serve), or say where it is (--run-dir)"
                }
                io::ErrorKind::PermissionDenied => "only root and the daemon's own user may ask",
                _ => "is it a daemon's admin.sock?",
            };
            anyhow::anyhow!("{}: {error}; {hint}", socket.display())
        })?;
        stream
            .set_read_timeout(Some(WAIT))
            .context("the admin socket")?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Asks, and waits for the answer as long as it takes.
    pub fn ask(&mut self, request: &AdminRequest) -> Result<AdminReply, AdminError> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(closed)?;
        let mut progress = Progress::new("waiting for the daemon", None);
        let mut answer = Vec::new();
        loop {
            // What arrived before a timeout stays in `answer`.
            let left = REPLY_BYTES_MAX - answer.len() as u64;
            match self
                .stream
                .by_ref()
                .take(left)
                .read_until(b'\n', &mut answer)
            {
                Ok(_) if answer.ends_with(b"\n") => break,
                Ok(_) => return Err(AdminError::Closed),
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) =>
                {
                    progress.at(0);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(closed(e)),
            }
        }
        match serde_json::from_slice(&answer)? {
            AdminReply::Error { errno, text } => Err(AdminError::Refused { errno, text }),
            reply => Ok(reply),
        }
    }
}

/// A broken connection is the daemon's end, not that of whoever reads our output.
fn closed(error: io::Error) -> AdminError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => AdminError::Closed,
        _ => AdminError::Io(error),
    }
}

/// Asks for something whose only answer is that it is done.
pub(super) fn order(at: &Where, request: &AdminRequest) -> Result<()> {
    match at.ask(request)? {
        AdminReply::Done => Ok(()),
        _ => bail!(AdminError::Other),
    }
}
