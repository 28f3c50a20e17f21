//! Messages over a Unix socket.

use super::message::{ChannelError, Received};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// One end of a `SOCK_SEQPACKET` connection.
#[derive(Debug)]
pub(super) struct Socket {
    socket: OwnedFd,
    takes_descriptors: bool,
}

impl Socket {
    /// Connects to a listener. The channel takes descriptors (daemons send them).
    pub(super) fn connect(path: &Path) -> Result<Self, ChannelError> {
        let socket = super::listener::seqpacket_socket()?;
        let address = super::listener::socket_address(path)?;
        rustix::net::connect(&socket, &address).map_err(ChannelError::sys("connect"))?;
        Ok(Self::new(socket, true))
    }

    /// Two ends connected to each other, both taking descriptors.
    pub(super) fn pair() -> Result<(Self, Self), ChannelError> {
        let (a, b) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .map_err(ChannelError::sys("socketpair"))?;
        Ok((Self::new(a, true), Self::new(b, true)))
    }

    /// A connected `SOCK_SEQPACKET` socket as a channel. Without `takes_descriptors` none that the
    /// other end sends ever comes into this process.
    pub(super) fn new(socket: OwnedFd, takes_descriptors: bool) -> Self {
        Self {
            socket,
            takes_descriptors,
        }
    }

    /// Makes every later call of both directions return [`ChannelError::WouldBlock`] instead of
    /// waiting.
    pub(super) fn set_nonblocking(&self, nonblocking: bool) -> Result<(), ChannelError> {
        rustix::io::ioctl_fionbio(&self.socket, nonblocking).map_err(ChannelError::sys("FIONBIO"))
    }

    /// Sends one message, with at most one descriptor beside it. Waits for room unless the channel
    /// is non-blocking.
    pub(super) fn send(
        &self,
        bytes: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), ChannelError> {
        self.send_with(bytes, fd, SendFlags::empty())
    }

    /// As [`Self::send`], never waiting: what a daemon uses, which no guest may hold up.
    pub(super) fn try_send(
        &self,
        bytes: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), ChannelError> {
        self.send_with(bytes, fd, SendFlags::DONTWAIT)
    }

    fn send_with(
        &self,
        bytes: &[u8],
        fd: Option<BorrowedFd<'_>>,
        flags: SendFlags,
    ) -> Result<(), ChannelError> {
        use rustix::io::Errno;
        if bytes.is_empty() {
            return Err(ChannelError::BadLength { bytes: 0 });
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds;
        if let Some(fd) = fd {
            fds = [fd];
            // The buffer was made for exactly this message.
            let pushed = control.push(SendAncillaryMessage::ScmRights(&fds));
            debug_assert!(pushed);
        }
        let flags = flags | SendFlags::NOSIGNAL;
        let sent = rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, flags)
        });
        match sent {
            // A seqpacket socket takes the whole message or none of it.
            Ok(_) => Ok(()),
            Err(Errno::AGAIN) => Err(ChannelError::WouldBlock),
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => Err(ChannelError::Closed),
            Err(Errno::MSGSIZE) => Err(ChannelError::BadLength { bytes: bytes.len() }),
            Err(errno) => Err(ChannelError::sys("sendmsg")(errno)),
        }
    }

    /// Receives one message. Waits for one unless the channel is non-blocking.
    pub(super) fn recv(&self, buf: &mut [u8]) -> Result<Received, ChannelError> {
        self.recv_with(buf, RecvFlags::empty())
    }

    /// As [`Self::recv`], never waiting.
    pub(super) fn try_recv(&self, buf: &mut [u8]) -> Result<Received, ChannelError> {
        self.recv_with(buf, RecvFlags::DONTWAIT)
    }

    fn recv_with(&self, buf: &mut [u8], flags: RecvFlags) -> Result<Received, ChannelError> {
        use rustix::io::Errno;
        let buffer_bytes = buf.len();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        // With no room for control messages the kernel drops descriptors before they are installed.
        let room = if self.takes_descriptors {
            space.len()
        } else {
            0
        };
        let mut control = RecvAncillaryBuffer::new(&mut space[..room]);
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        let mut receive = || {
            rustix::io::retry_on_intr(|| {
                rustix::net::recvmsg(
                    &self.socket,
                    &mut [IoSliceMut::new(buf)],
                    &mut control,
                    flags,
                )
            })
        };
        let received = match receive() {
            // Said once, when the other end closed without having read all, and before what it had
            // sent by then (net/unix/af_unix.c, unix_release_sock).
            Err(Errno::CONNRESET) => receive(),
            other => other,
        };
        // Alignment leaves room for a second descriptor: whatever is not the first is closed here.
        let fd = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .reduce(|first, _more| first);
        match received {
            Ok(message) if message.flags.contains(ReturnFlags::TRUNC) => {
                Err(ChannelError::Truncated { buffer_bytes })
            }
            Ok(message) if message.bytes == 0 => Err(ChannelError::Closed),
            Ok(message) => Ok(Received {
                len: message.bytes,
                fd,
            }),
            Err(Errno::AGAIN) => Err(ChannelError::WouldBlock),
            Err(Errno::CONNRESET) => Err(ChannelError::Closed),
            Err(errno) => Err(ChannelError::sys("recvmsg")(errno)),
        }
    }

    /// Ends both directions: the other end and every thread that waits here see it closed.
    pub(super) fn shutdown(&self) {
        // The only possible error is that the other end is gone already.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
