//! The xenstore as its stream of messages (Xen's public/io/xs_wire.h), over the daemon's socket in
//! dom0 and the kernel's device in a guest.
//!
//! The laboratory speaks it itself, so that it does not depend on what it is there to check.

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Kinds of messages: enum xsd_sockmsg_type.
const DIRECTORY: u32 = 1;
const READ: u32 = 2;
const WATCH: u32 = 4;
const WRITE: u32 = 11;
const RM: u32 = 13;
const WATCH_EVENT: u32 = 15;
const ERROR: u32 = 16;
/// Bytes of a message behind its header, at most (XENSTORE_PAYLOAD_MAX).
pub const PAYLOAD_MAX: usize = 4096;

/// A connection.
pub struct Store {
    stream: File,
    changed: bool,
}

impl Store {
    /// In dom0: the daemon's socket.
    pub fn of_dom0() -> Result<Self> {
        let path = "/run/xenstored/socket";
        let socket = UnixStream::connect(path).context(path)?;
        Ok(Self::over(File::from(OwnedFd::from(socket))))
    }

    /// In a guest: the kernel's device. Relative names are below the guest's own node.
    pub fn of_guest() -> Result<Self> {
        let path = "/dev/xen/xenbus";
        let device = File::options().read(true).write(true).open(path);
        Ok(Self::over(device.context(path)?))
    }

    fn over(stream: File) -> Self {
        Self {
            stream,
            changed: false,
        }
    }

    /// A node's value; `None`: there is no such node.
    pub fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>> {
        match self.ask(READ, &[path.as_bytes(), b"\0"])? {
            Ok(value) => Ok(Some(value)),
            Err(name) if name == "ENOENT" => Ok(None),
            Err(name) => bail!("reading {path}: {name}"),
        }
    }

    /// The names below a node; none if it is not there.
    pub fn list(&mut self, path: &str) -> Result<Vec<String>> {
        match self.ask(DIRECTORY, &[path.as_bytes(), b"\0"])? {
            Ok(names) => {
                let names = String::from_utf8_lossy(&names).into_owned();
                let names = names.split_terminator('\0');
                Ok(names.map(str::to_owned).collect())
            }
            Err(name) if name == "ENOENT" => Ok(Vec::new()),
            Err(name) => bail!("listing {path}: {name}"),
        }
    }

    /// Writes a node.
    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<()> {
        match self.ask(WRITE, &[path.as_bytes(), b"\0", value])? {
            Ok(_) => Ok(()),
            Err(name) => bail!("writing {path}: {name}"),
        }
    }

    /// Removes a node and what is below it. That there is none is no error.
    pub fn remove(&mut self, path: &str) -> Result<()> {
        match self.ask(RM, &[path.as_bytes(), b"\0"])? {
            Ok(_) => Ok(()),
            Err(name) if name == "ENOENT" => Ok(()),
            Err(name) => bail!("removing {path}: {name}"),
        }
    }

    /// From now on [`Self::wait`] returns when this node changes.
    pub fn watch(&mut self, path: &str) -> Result<()> {
        match self.ask(WATCH, &[path.as_bytes(), b"\0lab\0"])? {
            Ok(_) => Ok(()),
            Err(name) => bail!("watching {path}: {name}"),
        }
    }

    /// Waits for a change of a watched node. Once after [`Self::watch`] it returns at once.
    pub fn wait(&mut self, at_most: Duration) -> Result<bool> {
        if !self.changed {
            let timeout = Timespec::try_from(at_most).context("a time to wait")?;
            let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
            if poll(&mut fds, Some(&timeout)).context("the xenstore")? > 0 {
                self.receive()?;
            }
        }
        Ok(std::mem::take(&mut self.changed))
    }

    fn ask(&mut self, kind: u32, parts: &[&[u8]]) -> Result<Result<Vec<u8>, String>> {
        let payload = parts.concat();
        if payload.len() > PAYLOAD_MAX {
            bail!("{} bytes are too many for the xenstore", payload.len());
        }
        let mut message = Vec::with_capacity(16 + payload.len());
        for word in [kind, 0, 0, u32::try_from(payload.len())?] {
            message.extend(word.to_le_bytes());
        }
        message.extend(payload);
        self.stream.write_all(&message).context("the xenstore")?;
        loop {
            match self.receive()? {
                Some((ERROR, mut name)) => {
                    name.pop();
                    return Ok(Err(String::from_utf8_lossy(&name).into_owned()));
                }
                Some((_, value)) => return Ok(Ok(value)),
                None => {}
            }
        }
    }

    /// The next message; `None`: it was a watch's, and is remembered.
    fn receive(&mut self) -> Result<Option<(u32, Vec<u8>)>> {
        let mut header = [0_u8; 16];
        self.stream
            .read_exact(&mut header)
            .context("the xenstore")?;
        let word = |n: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| header[4 * n + b]));
        let mut payload = vec![0; usize::try_from(word(3))?];
        self.stream
            .read_exact(&mut payload)
            .context("the xenstore")?;
        if word(0) == WATCH_EVENT {
            self.changed = true;
            return Ok(None);
        }
        Ok(Some((word(0), payload)))
    }
}
