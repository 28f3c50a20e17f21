//! The admin socket: lines in, lines out, one request of a connection at a time.

use super::admin_run::Runner;
use super::admin_types::{AdminReply, AdminRequest};
use super::limits::{ADMIN_BACKLOG, ADMIN_CONNECTIONS_MAX, ADMIN_LINE_BYTES_MAX};
use super::poll::Interest;
use rustix::fs::{AtFlags, CWD, Mode};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    send, socket_with,
};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// One connection of the administrator.
#[derive(Debug)]
pub(super) struct AdminConn {
    pub socket: OwnedFd,
    pub interest: Interest,
    input: Vec<u8>,
    output: Vec<u8>,
    /// A request is being worked on; the next is not looked at before.
    pub busy: bool,
    /// The other end will say nothing more.
    ended: bool,
}

/// The listener, its connections, and the thread for slow requests.
pub(super) struct AdminServer {
    listener: OwnedFd,
    pub conns: HashMap<u64, AdminConn>,
    pub runner: Runner,
    next_conn: u64,
}

/// Makes the socket, over one that a dead daemon left: the caller holds the run directory's lock.
pub(super) fn bind_admin(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    // Nobody can connect before listen.
    rustix::fs::chmodat(CWD, path, Mode::from_raw_mode(0o600), AtFlags::empty())?;
    listen(&socket, ADMIN_BACKLOG)?;
    Ok(socket)
}

impl AdminServer {
    pub(super) fn new(listener: OwnedFd, runner: Runner) -> Self {
        Self {
            listener,
            conns: HashMap::new(),
            runner,
            next_conn: 0,
        }
    }

    pub(super) fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Takes a connection, if there is one and it is the administrator's.
    pub(super) fn accept(&mut self, own_uid: u32) -> Option<u64> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = accept_with(&self.listener, flags).ok()?;
        let creds = rustix::net::sockopt::socket_peercred(&socket).ok()?;
        let uid = creds.uid.as_raw();
        // Dropping the socket is the answer to everybody else.
        if (uid != own_uid && uid != 0) || self.conns.len() >= ADMIN_CONNECTIONS_MAX {
            return None;
        }
        self.next_conn += 1;
        let conn = AdminConn {
            socket,
            interest: Interest::READ,
            input: Vec::new(),
            output: Vec::new(),
            busy: false,
            ended: false,
        };
        self.conns.insert(self.next_conn, conn);
        Some(self.next_conn)
    }

    /// The loop stops: what fits the sockets' buffers still goes out.
    pub(super) fn flush_all(&mut self) {
        for conn in self.conns.values_mut() {
            conn.flush();
        }
    }
}

impl AdminConn {
    /// Reads what is there, up to a line's bound.
    pub(super) fn fill(&mut self) {
        let mut chunk = [0u8; 4096];
        while !self.ended && self.input.len() <= ADMIN_LINE_BYTES_MAX {
            match rustix::io::read(&self.socket, &mut chunk) {
                Ok(0) => self.ended = true,
                Ok(n) => self
                    .input
                    .extend_from_slice(chunk.get(..n).unwrap_or_default()),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => self.ended = true,
            }
        }
    }

    /// The next request, when none is being worked on: an error is for the other end.
    pub(super) fn next_request(&mut self) -> Option<Result<AdminRequest, AdminReply>> {
        if self.busy || !self.output.is_empty() {
            return None;
        }
        let Some(end) = self.input.iter().position(|&b| b == b'\n') else {
            if self.input.len() > ADMIN_LINE_BYTES_MAX {
                self.input.clear();
                self.ended = true;
                return Some(Err(AdminReply::Error {
                    errno: libc::E2BIG,
                    text: format!("a request has at most {ADMIN_LINE_BYTES_MAX} bytes"),
                }));
            }
            return None;
        };
        let line: Vec<u8> = self.input.drain(..=end).collect();
        Some(
            serde_json::from_slice(&line).map_err(|error| AdminReply::Error {
                errno: libc::EINVAL,
                text: format!("not a request: {error}"),
            }),
        )
    }

    /// Answers.
    pub(super) fn reply(&mut self, reply: &AdminReply) {
        match serde_json::to_vec(reply) {
            Ok(line) => self.output.extend_from_slice(&line),
            // The reply types hold nothing that JSON cannot say.
            Err(error) => tracing::error!(%error, "an admin reply could not be written"),
        }
        self.output.push(b'\n');
        self.flush();
    }

    /// Sends what waits.
    pub(super) fn flush(&mut self) {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        while !self.output.is_empty() {
            match send(&self.socket, &self.output, flags) {
                Ok(sent) => drop(self.output.drain(..sent)),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => {
                    self.output.clear();
                    self.ended = true;
                }
            }
        }
    }

    /// Nothing more can come of it.
    pub(super) fn is_over(&self) -> bool {
        self.ended && !self.busy && self.output.is_empty()
    }

    pub(super) fn wanted(&self) -> Interest {
        let read = !self.busy && !self.ended && self.output.is_empty();
        Interest {
            read,
            write: !self.output.is_empty(),
        }
    }
}
