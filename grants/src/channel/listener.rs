//! Waiting for guests.

use super::message::{Channel, ChannelError};
use crate::limits::{LISTEN_BACKLOG, SOCKET_PATH_BYTES_MAX};
use crate::sys;
use rustix::fs::{AtFlags, CWD, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

/// Who connected.
#[derive(Debug)]
pub enum Peer {
    /// A process of this machine.
    Process(ProcessPeer),
    /// A domain of this hypervisor.
    Domain(DomainPeer),
}

/// A domain, as the toolstack says it in xenstore, where guests cannot write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainPeer {
    /// Its number now; used again for others later.
    pub domid: u16,
    /// Its name.
    pub name: String,
    /// Its uuid.
    pub uuid: [u8; 16],
}

/// A process, as the kernel says it.
#[derive(Debug)]
pub struct ProcessPeer {
    /// Its user when it connected.
    pub uid: u32,
    /// Its group when it connected.
    pub gid: u32,
    /// Its process when it connected, in the daemon's pid namespace; for displays (numbers are used
    /// again).
    pub pid: u32,
    /// The process itself: readable when it has ended.
    pub pidfd: OwnedFd,
}

/// A socket in the file system that guests connect to. Dropping it removes the socket's name.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// (device, inode) of the name this listener made.
    name: (u64, u64),
}

impl Listener {
    /// Makes a socket at `path` with permission bits `mode` (who may write to it may connect).
    ///
    /// A name left by a daemon that is gone is taken over; where one still listens the answer is
    /// EADDRINUSE.
    pub fn bind(path: &Path, mode: u32) -> Result<Self, ChannelError> {
        let address = socket_address(path)?;
        let socket = seqpacket_socket()?;
        match rustix::net::bind(&socket, &address) {
            Err(Errno::ADDRINUSE) if is_abandoned(path, &address)? => {
                rustix::fs::unlink(path).map_err(ChannelError::sys("unlink of an old socket"))?;
                rustix::net::bind(&socket, &address).map_err(ChannelError::sys("bind"))?;
            }
            bound => bound.map_err(ChannelError::sys("bind"))?,
        }
        // Nobody can connect before listen, so the mode is right before anybody comes.
        rustix::fs::chmodat(CWD, path, Mode::from_raw_mode(mode), AtFlags::empty())
            .map_err(ChannelError::sys("chmod of the socket"))?;
        rustix::net::listen(&socket, LISTEN_BACKLOG).map_err(ChannelError::sys("listen"))?;
        let name = name_of(path).map_err(ChannelError::sys("stat of the socket"))?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            name,
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes `accept` return [`ChannelError::WouldBlock`] instead of waiting.
    pub fn set_nonblocking(&self, nonblocking: bool) -> Result<(), ChannelError> {
        rustix::io::ioctl_fionbio(&self.socket, nonblocking).map_err(ChannelError::sys("FIONBIO"))
    }

    /// The next connection. Its channel takes no descriptors: guests have none to give.
    ///
    /// An error other than `WouldBlock` concerns that connection only (the peer has gone already),
    /// or the process has no descriptors left (EMFILE): the caller should wait before it asks
    /// again, since the connection stays in the queue.
    pub fn accept(&self) -> Result<(Channel, ProcessPeer), ChannelError> {
        let accepted = rustix::io::retry_on_intr(|| {
            rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC)
        });
        let socket = match accepted {
            Ok(socket) => socket,
            Err(Errno::AGAIN) => return Err(ChannelError::WouldBlock),
            Err(errno) => return Err(ChannelError::sys("accept")(errno)),
        };
        let creds = rustix::net::sockopt::socket_peercred(&socket)
            .map_err(ChannelError::sys("SO_PEERCRED"))?;
        let pid = creds.pid.as_raw_nonzero().get().unsigned_abs();
        let pidfd = sys::peer_pidfd(&socket, pid).map_err(|source| ChannelError::Sys {
            call: "SO_PEERPIDFD",
            source,
        })?;
        let peer = ProcessPeer {
            uid: creds.uid.as_raw(),
            gid: creds.gid.as_raw(),
            pid,
            pidfd,
        };
        Ok((Channel::new(socket, false), peer))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Another daemon may have taken the name over meanwhile: then it is not ours to remove.
        if name_of(&self.path).is_ok_and(|name| name == self.name) {
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

pub(super) fn seqpacket_socket() -> Result<OwnedFd, ChannelError> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(ChannelError::sys("socket"))
}

pub(super) fn socket_address(path: &Path) -> Result<SocketAddrUnix, ChannelError> {
    if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Err(ChannelError::Sys {
            call: "a socket's path has at most 107 bytes",
            source: io::Error::from_raw_os_error(libc::ENAMETOOLONG),
        });
    }
    SocketAddrUnix::new(path).map_err(ChannelError::sys("socket path"))
}

fn name_of(path: &Path) -> Result<(u64, u64), Errno> {
    let stat = rustix::fs::lstat(path)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Is `path` a socket nobody listens on any more?
fn is_abandoned(path: &Path, address: &SocketAddrUnix) -> Result<bool, ChannelError> {
    let stat = rustix::fs::lstat(path).map_err(ChannelError::sys("stat of an old socket"))?;
    if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_socket() {
        return Ok(false);
    }
    let probe = seqpacket_socket()?;
    // A full backlog must not hold up the start.
    rustix::io::ioctl_fionbio(&probe, true).map_err(ChannelError::sys("FIONBIO"))?;
    Ok(matches!(
        rustix::net::connect(&probe, address),
        Err(Errno::CONNREFUSED)
    ))
}
