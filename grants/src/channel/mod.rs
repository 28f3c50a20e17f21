//! The control channel: messages between a guest and the daemon, over one of two kinds of carrier.
//!
//! A socket (`SOCK_SEQPACKET`, local): one send is one message, whole or not at all. At most one
//! descriptor goes beside a message. A ring (Xen): pages that the guest granted, two event
//! channels, no descriptors; [`ring`] is its logic and [`layout`] its byte map. Whoever is at the
//! other end may send what he likes: a message too long for the buffer is an error, descriptors that
//! nobody asked for never come into the process, and what a ring says that cannot be closes it.

mod end;
pub mod layout;
pub mod limits;
mod listener;
mod local_ring;
mod message;
pub mod ring;
mod socket;

pub use end::{RingEnd, RingEvents, RingMemory, Side, announced, begin, is_accepted};
pub use listener::{DomainPeer, Listener, Peer, ProcessPeer};
pub use local_ring::HeapMemory;
pub use message::{Channel, ChannelError, Received};
