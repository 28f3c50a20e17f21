//! The rival of whatever asks other processes: one message to each of some, what they do with it, and one back
//! from each, over the kind of socket that the daemon and its guests speak by.

use crate::process;
use crate::reader;
use crate::role::{self, Role};
use anyhow::{Context, Result, bail, ensure};
use copage_grants::PAGE_SIZE;
use copage_mmap::native::NativeMapping;
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// As long as an Invalidate (docs/protocol.md).
const MESSAGE_BYTES: usize = 80;

/// What each of the processes does before it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Do {
    Nothing,
    /// It loads a word of the page, so that it has it mapped.
    Load,
    /// madvise(MADV_DONTNEED): the least that takes a page out of a process's page table.
    LetGo,
}

/// Processes that have some pages of one file mapped and answer what they are sent.
pub struct Broadcast {
    near: Vec<OwnedFd>,
    children: Vec<Child>,
    pages: u64,
}

impl Broadcast {
    /// Starts them.
    pub fn start(count: usize, pages: u64) -> Result<Self> {
        let shared = File::from(rustix::fs::memfd_create(c"broadcast", MemfdFlags::CLOEXEC)?);
        shared.set_len(pages * PAGE_SIZE as u64)?;
        let mut all = Self {
            near: Vec::new(),
            children: Vec::new(),
            pages,
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
                .stdout(Stdio::from(shared.try_clone()?))
                .spawn()
                .context("a process that echoes")?;
            all.near.push(near);
            all.children.push(child);
        }
        // They have all begun.
        all.round(Do::Nothing, 0)?;
        Ok(all)
    }

    /// How long it takes each page to be let go of by all who had just loaded it, in ns.
    pub fn let_go(&self) -> Result<Vec<u64>> {
        let one = |page| {
            self.round(Do::Load, page)?;
            self.round(Do::LetGo, page)
        };
        (0..self.pages).map(one).collect()
    }

    /// How long each of some mere round trips took, in ns.
    pub fn rounds(&self, count: u64) -> Result<Vec<u64>> {
        (0..count).map(|_| self.round(Do::Nothing, 0)).collect()
    }

    /// The CPU time that one of them takes for a message each `pause`, in seconds a message.
    pub fn cpu_of_message(&self, count: u32, pause: Duration) -> Result<f64> {
        let pid = self.children.first().context("nobody")?.id();
        let before = process::cpu_seconds(pid)?;
        for _ in 0..count {
            std::thread::sleep(pause);
            self.round(Do::Nothing, 0)?;
        }
        Ok((process::cpu_seconds(pid)? - before) / f64::from(count))
    }

    fn round(&self, what: Do, page: u64) -> Result<u64> {
        let mut message = [what as u8; MESSAGE_BYTES];
        message[8..16].copy_from_slice(&page.to_ne_bytes());
        let begin = Instant::now();
        for near in &self.near {
            rustix::net::send(near, &message, SendFlags::NOSIGNAL)?;
        }
        for near in &self.near {
            let mut back = [0; MESSAGE_BYTES];
            let (_, got) = rustix::net::recv(near, &mut back, RecvFlags::empty())?;
            if back != message || got != back.len() {
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

/// One of the processes: the socket is stdin, the file stdout.
pub fn echo_main() -> Result<()> {
    let socket = rustix::stdio::stdin();
    let file = File::from(rustix::stdio::stdout().as_fd().try_clone_to_owned()?);
    let map = NativeMapping::new(&file, false)?;
    let mut message = [0; MESSAGE_BYTES];
    loop {
        let (_, got) = rustix::net::recv(socket, &mut message, RecvFlags::empty())?;
        if got == 0 {
            return Ok(());
        }
        let page = message[8..]
            .first_chunk()
            .map_or(0, |w| u64::from_ne_bytes(*w));
        let what = message[0];
        if what == Do::Load as u8 {
            let word = reader::touch(map.as_volatile(), [page]);
            ensure!(word == 0, "WRONG BYTES: {word:#x} among zeros");
        } else if what == Do::LetGo as u8 {
            map.let_go(page as usize * PAGE_SIZE)?;
        }
        rustix::net::send(socket, &message, SendFlags::NOSIGNAL)?;
    }
}
