//! The index page of a ring: which word is where, and who writes it. docs/protocol.md draws it.
//!
//! Words that different ends write are in different lines of 64 bytes. Each end keeps its own
//! indexes in memory of its own and only publishes them here: what it reads are the other's.

/// `cpr1`, little-endian.
pub const MAGIC: u32 = u32::from_le_bytes(*b"cpr1");
/// u32, by the guest, before the page is published.
pub const MAGIC_AT: usize = 0;
/// u32, by the guest: pages of one direction are `1 << order`.
pub const ORDER_AT: usize = 4;
/// u8, by the guest: 1 while it is there. The guest's kernel clears it when the process ends.
pub const GUEST_LIVES_AT: usize = 8;
/// u8, by the daemon: 1 from when it has accepted until it is gone. Its kernel clears it.
pub const DAEMON_LIVES_AT: usize = 32;
/// u32 each, by the guest: the grant references of the pages to the daemon, then of those to the
/// guest.
pub const REFS_AT: usize = 1024;

/// Where the words of one direction are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneWords {
    /// u32, by the sender: bytes it has put in, free-running.
    pub producer: usize,
    /// u32, by the sender: not 0 while it waits for room.
    pub waits: usize,
    /// u32, by the receiver: bytes it has taken out, free-running.
    pub consumer: usize,
}

/// From the guest to the daemon.
pub const TO_DAEMON: LaneWords = LaneWords {
    producer: 64,
    waits: 68,
    consumer: 128,
};

/// From the daemon to the guest.
pub const TO_GUEST: LaneWords = LaneWords {
    producer: 192,
    waits: 196,
    consumer: 256,
};
