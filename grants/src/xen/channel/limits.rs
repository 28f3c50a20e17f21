//! Limits of finding each other: unit, reason, bound.

use std::time::Duration;

/// The domain that the daemon runs in.
pub const CONTROL_DOMID: u16 = 0;
/// The version of the nodes and of the ring's layout.
pub const VERSION: u32 = 1;
/// How long a guest waits for a daemon to accept. In an emulator a start of ten guests at once takes
/// seconds.
pub const ACCEPT_TIMEOUT: Duration = Duration::from_secs(15);
/// How often a guest that waits looks whether it was refused.
pub const REFUSED_EVERY: Duration = Duration::from_millis(100);
/// The longest name of a session's node, in bytes.
pub const SESSION_NAME_BYTES_MAX: usize = 40;
/// The longest value read from a guest's node, in bytes: a number and no more.
pub const VALUE_BYTES_MAX: usize = 16;
/// The longest text of a refusal, in bytes (a node's value has at most 2,048 by xenstored's quota).
pub const REFUSAL_BYTES_MAX: usize = 200;
/// Events of a domain's nodes that are looked at, in a second. A session takes about ten.
pub const EVENTS_PER_SECOND: u32 = 32;
/// The same at once, after a time of rest: eight processes that begin together, and more.
pub const EVENTS_BURST: u32 = 128;
/// How long a domain that sends more is not listened to.
pub const FLOOD_PAUSE: Duration = Duration::from_secs(5);
/// Session nodes of one domain that are looked at when all are: more than it may have sessions.
pub const NODES_LOOKED_AT: usize = 64;
/// Refused sessions whose nodes are remembered, so that they go away when nobody removes them.
pub const REFUSED_MAX: usize = 256;
/// How long the text of a refusal stays for the guest to read.
pub const REFUSED_STAYS: Duration = Duration::from_secs(10);
/// Domains whose names are known; Xen has 32,752 domids.
pub const DOMAINS_MAX: usize = 32_752;
/// How long the listener waits before it asks a xenstored again that failed.
pub const STORE_RETRY: Duration = Duration::from_secs(1);
