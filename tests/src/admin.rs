//! The admin socket as tests use it.

use copage::serve::admin_types::{AdminReply, AdminRequest, AuditEntry, GuestEntry, StatsEntry};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A connection to the admin socket.
pub struct Admin {
    stream: BufReader<UnixStream>,
}

impl Admin {
    /// Connects to the daemon of `run_dir`.
    pub fn connect(run_dir: &Path) -> std::io::Result<Self> {
        let stream = UnixStream::connect(run_dir.join("admin.sock"))?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Asks and waits for the reply.
    pub fn ask(&mut self, request: &AdminRequest) -> AdminReply {
        self.try_ask(request)
            .unwrap_or_else(|e| panic!("admin: {request:?}: {e}"))
    }

    /// Asks; an error when the daemon is gone.
    pub fn try_ask(&mut self, request: &AdminRequest) -> std::io::Result<AdminReply> {
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes())?;
        line.clear();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// The audit.
    pub fn audit(&mut self) -> AuditEntry {
        match self.ask(&AdminRequest::Audit) {
            AdminReply::Audit(audit) => audit,
            other => panic!("to audit: {other:?}"),
        }
    }

    /// The numbers.
    pub fn stats(&mut self) -> StatsEntry {
        match self.ask(&AdminRequest::Stats) {
            AdminReply::Stats(stats) => stats,
            other => panic!("to stats: {other:?}"),
        }
    }

    /// The sessions.
    pub fn guests(&mut self) -> Vec<GuestEntry> {
        match self.ask(&AdminRequest::Guests) {
            AdminReply::Guests { guests } => guests,
            other => panic!("to guests: {other:?}"),
        }
    }

    /// Takes frames back; how many pages went at once.
    pub fn reclaim(&mut self, pages: u64) -> u64 {
        match self.ask(&AdminRequest::Reclaim { pages }) {
            AdminReply::Reclaimed { pages } => pages,
            other => panic!("to reclaim: {other:?}"),
        }
    }

    /// Changes the budget.
    pub fn set_budget(&mut self, frames_mib: u64) {
        match self.ask(&AdminRequest::SetBudget { frames_mib }) {
            AdminReply::Done => {}
            other => panic!("to set-budget: {other:?}"),
        }
    }
}
