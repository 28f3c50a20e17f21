//! The rival of an unshare: one message to each of some processes, and one back from each, over the
//! kind of socket that the daemon and its guests speak by.

use crate::role::{self, Role};
use anyhow::{Context, Result, bail};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::time::Instant;

/// As long as an Invalidate (docs/protocol.md).
const MESSAGE: [u8; 80] = [7; 80];

/// Processes that send back what they are sent; ended when dropped.
pub struct Broadcast {
    near: Vec<OwnedFd>,
    children: Vec<Child>,
}

impl Broadcast {
    /// Starts them.
    pub fn start(count: usize) -> Result<Self> {
        let mut all = Self {
            near: Vec::new(),
            children: Vec::new(),
        };
        for _ in 0..count {
            let (near, far) = rustix::net::socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )?;
            let child = role::command(Role::Echo)?
                .stdin(Stdio::from(far))
                .spawn()
                .context("a process that echoes")?;
            all.near.push(near);
            all.children.push(child);
        }
        // They have all begun.
        all.round()?;
        Ok(all)
    }

    /// How long each of some rounds took, in ns.
    pub fn rounds(&self, count: u64) -> Result<Vec<u64>> {
        (0..count).map(|_| self.round()).collect()
    }

    fn round(&self) -> Result<u64> {
        let begin = Instant::now();
        for near in &self.near {
            rustix::net::send(near, &MESSAGE, SendFlags::NOSIGNAL)?;
        }
        for near in &self.near {
            let mut back = [0; MESSAGE.len()];
            let (_, got) = rustix::net::recv(near, &mut back, RecvFlags::empty())?;
            if back != MESSAGE || got != back.len() {
                bail!("an echo of {got} bytes");
            }
        }
        Ok(begin.elapsed().as_nanos() as u64)
    }
}

impl Drop for Broadcast {
    fn drop(&mut self) {
        // The end of its socket ends each.
        self.near.clear();
        for child in &mut self.children {
            let _ = child.wait();
        }
    }
}

/// One of the processes: the socket is stdin.
pub fn echo_main() -> Result<()> {
    let socket = rustix::stdio::stdin();
    let mut message = [0; MESSAGE.len()];
    loop {
        let (_, got) = rustix::net::recv(socket, &mut message, RecvFlags::empty())?;
        if got == 0 {
            return Ok(());
        }
        rustix::net::send(socket, &message, SendFlags::NOSIGNAL)?;
    }
}
