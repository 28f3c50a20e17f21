//! The control channel of the local backend: messages over a Unix socket.
//!
//! `SOCK_SEQPACKET`: one send is one message, whole or not at all. At most one descriptor goes
//! beside a message. Whoever is at the other end may send what he likes: a message too long for the
//! buffer is an error, descriptors that nobody asked for never come into the process, and more than
//! one are closed at once.

mod listener;
mod message;

pub use listener::{Listener, Peer};
pub use message::{Channel, ChannelError, Received};
