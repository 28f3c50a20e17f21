//! Sending and receiving.

use super::end::{RingEnd, Side};
use super::local_ring;
use super::ring::Nonsense;
use super::socket::Socket;
use crate::xen::XenError;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

/// What can go wrong with a channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other end is gone (or sent an empty message, which nobody does).
    #[error("the other end closed the channel")]
    Closed,
    /// Non-blocking: nothing to receive, or no room to send into.
    #[error("the channel would block")]
    WouldBlock,
    /// A message came that is longer than the buffer; it is lost.
    #[error("a message longer than {buffer_bytes} bytes came")]
    Truncated {
        /// The buffer's length.
        buffer_bytes: usize,
    },
    /// A message is empty or longer than the socket takes in one piece; nothing was sent.
    #[error("a message of {bytes} bytes cannot be sent")]
    BadLength {
        /// Its length.
        bytes: usize,
    },
    /// A descriptor was to go beside a message, and this channel carries none.
    #[error("no descriptors go over a ring")]
    NoDescriptors,
    /// The daemon would not have this connection.
    #[error("the daemon refused: {0}")]
    Refused(String),
    /// Something of Xen's could not be had or done.
    #[error(transparent)]
    Xen(#[from] XenError),
    /// The other end of a ring wrote what cannot be; the channel is closed.
    #[error("the other end of the ring wrote nonsense: {0}")]
    Nonsense(#[from] Nonsense),
    /// A system call failed.
    #[error("{call}: {source}")]
    Sys {
        /// Which.
        call: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

impl ChannelError {
    pub(super) fn sys(call: &'static str) -> impl Fn(rustix::io::Errno) -> Self {
        move |errno| Self::Sys {
            call,
            source: errno.into(),
        }
    }
}

/// One message that came.
#[derive(Debug)]
#[must_use]
pub struct Received {
    /// Bytes of the buffer that hold the message; never 0.
    pub len: usize,
    /// The descriptor beside it, on channels that take descriptors.
    pub fd: Option<OwnedFd>,
}

/// One end of a connection: a socket, or a ring in shared memory. Sending and receiving may go on in
/// different threads.
#[derive(Debug)]
pub struct Channel(Kind);

#[derive(Debug)]
enum Kind {
    Socket(Socket),
    // A ring is long, and there are few.
    Ring(Box<RingEnd>),
}

impl From<RingEnd> for Channel {
    fn from(end: RingEnd) -> Self {
        Self(Kind::Ring(Box::new(end)))
    }
}

impl Channel {
    /// Connects to a listener. The channel takes descriptors (daemons send them).
    pub fn connect(path: &Path) -> Result<Self, ChannelError> {
        Ok(Self(Kind::Socket(Socket::connect(path)?)))
    }

    /// Connects to the daemon of the control domain, from a Xen guest.
    pub fn connect_xen() -> Result<Self, ChannelError> {
        crate::xen::channel::connect()
    }

    /// Two ends of a socket, both taking descriptors.
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let (a, b) = Socket::pair()?;
        Ok((Self(Kind::Socket(a)), Self(Kind::Socket(b))))
    }

    /// The guest's and the daemon's end of a ring in memory of this process, with eventfds for its
    /// events: what a ring is without a hypervisor, for tests. `order` as in
    /// [`super::limits::RING_ORDER`].
    pub fn ring_pair(order: u32) -> Result<(Self, Self), ChannelError> {
        let guest = local_ring::end(order)?;
        let daemon = guest.1;
        let guest = RingEnd::new(Side::Guest, guest.0.memory, guest.0.events)?;
        let daemon = RingEnd::new(Side::Daemon, daemon.memory, daemon.events)?;
        Ok((guest.into(), daemon.into()))
    }

    /// A connected `SOCK_SEQPACKET` socket as a channel. Without `takes_descriptors` none that the
    /// other end sends ever comes into this process.
    pub fn new(socket: OwnedFd, takes_descriptors: bool) -> Self {
        Self(Kind::Socket(Socket::new(socket, takes_descriptors)))
    }

    /// Can descriptors go beside messages?
    pub fn carries_descriptors(&self) -> bool {
        matches!(self.0, Kind::Socket(_))
    }

    /// To poll for POLLIN: readable when a message may have come, or the other end is gone.
    pub fn read_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Kind::Socket(socket) => socket.as_fd(),
            Kind::Ring(ring) => ring.read_fd(),
        }
    }

    /// To poll when something waits for room: for POLLOUT on a socket, where it is
    /// [`Self::read_fd`]; for POLLIN on a ring ([`Self::carries_descriptors`] tells).
    pub fn write_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Kind::Socket(socket) => socket.as_fd(),
            Kind::Ring(ring) => ring.write_fd(),
        }
    }

    /// Part of a message that was taken waits for room: [`Self::flush`] when there may be some.
    /// Never on a socket.
    pub fn has_rest(&self) -> bool {
        match &self.0 {
            Kind::Socket(_) => false,
            Kind::Ring(ring) => ring.has_rest(),
        }
    }

    /// Sends on what [`Self::has_rest`] says; never waits. [`ChannelError::WouldBlock`]: not all of
    /// it yet.
    pub fn flush(&self) -> Result<(), ChannelError> {
        match &self.0 {
            Kind::Socket(_) => Ok(()),
            Kind::Ring(ring) => ring.flush(),
        }
    }

    /// Makes every later call of both directions return [`ChannelError::WouldBlock`] instead of
    /// waiting.
    pub fn set_nonblocking(&self, nonblocking: bool) -> Result<(), ChannelError> {
        match &self.0 {
            Kind::Socket(socket) => socket.set_nonblocking(nonblocking),
            Kind::Ring(ring) => {
                ring.set_nonblocking(nonblocking);
                Ok(())
            }
        }
    }

    /// Sends one message, with at most one descriptor beside it. Waits for room unless the channel
    /// is non-blocking.
    pub fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), ChannelError> {
        match &self.0 {
            Kind::Socket(socket) => socket.send(bytes, fd),
            Kind::Ring(_) if fd.is_some() => Err(ChannelError::NoDescriptors),
            Kind::Ring(ring) => ring.send(bytes),
        }
    }

    /// As [`Self::send`], never waiting: what a daemon uses, which no guest may hold up. The message
    /// is taken whole or not at all; see [`Self::has_rest`].
    pub fn try_send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), ChannelError> {
        match &self.0 {
            Kind::Socket(socket) => socket.try_send(bytes, fd),
            Kind::Ring(_) if fd.is_some() => Err(ChannelError::NoDescriptors),
            Kind::Ring(ring) => ring.try_send(bytes),
        }
    }

    /// Receives one message. Waits for one unless the channel is non-blocking.
    pub fn recv(&self, buf: &mut [u8]) -> Result<Received, ChannelError> {
        match &self.0 {
            Kind::Socket(socket) => socket.recv(buf),
            Kind::Ring(ring) => ring.recv(buf),
        }
    }

    /// As [`Self::recv`], never waiting.
    pub fn try_recv(&self, buf: &mut [u8]) -> Result<Received, ChannelError> {
        match &self.0 {
            Kind::Socket(socket) => socket.try_recv(buf),
            Kind::Ring(ring) => ring.try_recv(buf),
        }
    }

    /// Sends an event without a message, as nobody but a test of storms does. Nothing on a socket.
    pub fn ring(&self) {
        if let Kind::Ring(ring) = &self.0 {
            ring.ring();
        }
    }

    /// Ends both directions: the other end and every thread that waits here see it closed.
    pub fn shutdown(&self) {
        match &self.0 {
            Kind::Socket(socket) => socket.shutdown(),
            Kind::Ring(ring) => ring.shutdown(),
        }
    }
}

/// [`Channel::read_fd`].
impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.read_fd().as_raw_fd()
    }
}
