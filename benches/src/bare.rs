//! The rivals of faults by the library: userfaultfd services that keep no books.
//!
//! Three of them, each one thing more than the one before: a thread that puts the page in from
//! memory; a thread that asks another process over a socket, which reads the disk; the same with a
//! budget, so that the other process punches a page out for each one it puts in.

use crate::files::{PageReader, ReadKind, TestFile};
use crate::role::{self, Role};
use anyhow::{Context, Result, bail};
use copage_grants::PAGE_SIZE;
use copage_mmap::bare::BareService;
use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Stdio};

fn frame_file(bytes: u64) -> Result<std::fs::File> {
    let frames: std::fs::File =
        rustix::fs::memfd_create(c"bare-frames", MemfdFlags::CLOEXEC)?.into();
    frames.set_len(bytes)?;
    Ok(frames)
}

/// A service whose thread copies each page touched from memory. The file must fit in memory.
pub fn from_memory(file: &TestFile) -> Result<BareService> {
    let content = std::fs::read(&file.path)?;
    let frames = frame_file(file.bytes())?;
    let writer = frames.try_clone()?;
    let service = BareService::start(frames.as_fd(), file.bytes() as usize, move |page| {
        let at = page as usize * PAGE_SIZE;
        let bytes = content
            .get(at..at + PAGE_SIZE)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        writer.write_all_at(bytes, at as u64)?;
        Ok(page..page + 1)
    })?;
    Ok(service)
}

/// What the far end of [`Remote`] does with each request.
#[derive(Clone, Copy, Debug)]
pub struct RemoteOptions {
    /// How it reads.
    pub read: ReadKind,
    /// How many pages it keeps; the oldest is punched out.
    pub frames_max: u64,
}

/// A service whose thread asks another process for each page touched: one `SOCK_SEQPACKET` message
/// there and one back, one read of the file there.
pub struct Remote {
    // The mapping goes first: its thread talks to the child.
    service: Option<BareService>,
    child: Child,
}

impl Remote {
    /// Starts the far end and maps.
    pub fn start(file: &TestFile, options: RemoteOptions) -> Result<Self> {
        let frames = frame_file(file.bytes())?;
        let (near, far) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let child = role::command(Role::BareServer)?
            .arg(&file.path)
            .arg(if options.read == ReadKind::Direct {
                "direct"
            } else {
                "buffered"
            })
            .arg(options.frames_max.to_string())
            .stdin(Stdio::from(far))
            .stdout(Stdio::from(OwnedFd::from(frames.try_clone()?)))
            .spawn()
            .context("the bare server's process")?;
        let mut remote = Self {
            service: None,
            child,
        };
        let started = BareService::start(frames.as_fd(), file.bytes() as usize, move |page| {
            rustix::net::send(&near, &page.to_le_bytes(), SendFlags::NOSIGNAL)?;
            let mut answer = [0; 8];
            let (_, got) = rustix::net::recv(&near, &mut answer, RecvFlags::empty())?;
            if got != 8 || u64::from_le_bytes(answer) != page {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(page..page + 1)
        })?;
        remote.service = Some(started);
        Ok(remote)
    }

    /// The mapping.
    pub fn mapping(&self) -> Result<&BareService> {
        self.service
            .as_ref()
            .context("a bare service that did not start")
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // Closes the near end of the socket, which ends the child.
        self.service = None;
        let _ = self.child.wait();
    }
}

/// The far end: the socket is stdin, the frame file stdout. FILE direct|buffered FRAMES_MAX.
pub fn server_main(args: &[OsString]) -> Result<()> {
    let [path, kind, frames_max] = args else {
        bail!("FILE direct|buffered FRAMES_MAX")
    };
    let kind = if kind == "direct" {
        ReadKind::Direct
    } else {
        ReadKind::Buffered
    };
    let frames_max: usize = frames_max.to_str().context("FRAMES_MAX")?.parse()?;
    let mut reader = PageReader::open(Path::new(path), kind, 1)?;
    let (socket, frames) = (rustix::stdio::stdin(), rustix::stdio::stdout());
    let mut resident = VecDeque::new();
    let mut request = [0; 8];
    loop {
        let (_, got) = rustix::net::recv(socket, &mut request, RecvFlags::empty())?;
        if got != 8 {
            return Ok(());
        }
        let page = u64::from_le_bytes(request);
        if resident.len() >= frames_max
            && let Some(oldest) = resident.pop_front()
        {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(frames, how, oldest * PAGE_SIZE as u64, PAGE_SIZE as u64)?;
        }
        let bytes = reader.read(page, 1)?;
        if rustix::io::pwrite(frames, bytes, page * PAGE_SIZE as u64)? != PAGE_SIZE {
            bail!("a short write");
        }
        resident.push_back(page);
        rustix::net::send(socket, &request, SendFlags::NOSIGNAL)?;
    }
}
