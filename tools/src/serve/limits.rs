//! Limits of the daemon: unit, reason, bound.

/// Connections that have not said Hello yet. Each holds two descriptors and nothing else.
pub const GREETING_MAX: usize = 128;
/// How long a connection may take to say Hello, in ms.
pub const GREETING_MS: u64 = 5_000;
/// Sessions in all; each holds two descriptors and a domid.
pub const SESSIONS_MAX: usize = 1024;
/// Sessions of one guest name, those not drained yet included.
pub const GUEST_SESSIONS_MAX: usize = 256;
/// Guest names remembered for their charges. A new name takes the place of one that nobody uses.
pub const GUEST_NAMES_MAX: usize = 4096;
/// Domains that are attached, configured ones included.
pub const DOMAINS_MAX: usize = 4096;
/// Requests of one session that wait for a disk. Beyond it the session is not read: what it sends
/// stays in its own socket buffer. `SESSIONS_MAX` of these must fit the cache's metadata queue.
pub const IN_FLIGHT_MAX: usize = 48;
/// What the writes of one session that are under way may hold, in bytes; beyond it the session is not
/// read, as with `IN_FLIGHT_MAX`. Eight of the longest.
pub const BYTES_IN_FLIGHT_PAUSE: usize = 1 << 20;
/// Pages of coherent files that one session may wait for: every request in flight a whole one.
pub const WANTS_MAX: usize = IN_FLIGHT_MAX * copage_coherence::msg::FAULT_PAGES_MAX as usize;
/// Pages that one session may have for writing, 256 MiB: for one more it is asked for its oldest.
pub const WRITABLE_PAGES_MAX: usize = 65_536;
/// Pages taken from everybody at once for what needs a file for itself: each may be a notice to each of
/// its holders, and far fewer than `OUTBOX_MESSAGES_MAX` of them.
pub const TAKES_AT_ONCE: usize = 256;
/// How often a fault begins anew because its first page was taken back before the others were there.
pub const LOST_TRIES_MAX: u32 = 64;
/// When a fault is tried again that waits for the guest's own pages, or a length that waits for frames, in ms.
pub const NO_ROOM_RETRY_MS: u64 = 20;
/// How often a file's length is tried to be changed while something of what is cut off is not out yet: 4 s in
/// all. What a fenced session may have mapped is lost, and stands in nobody's way.
pub const RESIZE_TRIES_MAX: u32 = 200;
/// When work that needs a file for itself is tried again after the disk refused, in ms.
pub const EXCLUSIVE_RETRY_MS: u64 = 500;
/// How often it is looked whether sessions that are gone let go of frames, in ms.
pub const LOST_POLL_MS: u64 = 100;
/// Messages taken from one session before the next session's turn.
pub const MESSAGES_PER_TURN: usize = 32;
/// Messages waiting for a guest to read them at which its requests are left unread.
pub const OUTBOX_PAUSE_MESSAGES: usize = 64;
/// Messages waiting for a guest to read them at which it is fenced: notices come unasked.
pub const OUTBOX_MESSAGES_MAX: usize = 1024;
/// The same in bytes: room for some of the longest replies.
pub const OUTBOX_PAUSE_BYTES: usize = 1 << 20;
/// The same in bytes, at which the guest is fenced: every request in flight may answer at length
/// after the pause.
pub const OUTBOX_BYTES_MAX: usize = 8 << 20;
/// Messages that make no sense before the session is fenced: one may be a misunderstanding.
pub const STRIKES_MAX: u32 = 16;
/// Rounds of events taken from the kernel at once.
pub const EVENTS_PER_ROUND: usize = 64;
/// Connections taken from a listener at once.
pub const ACCEPTS_PER_TURN: usize = 16;
/// How long nobody is accepted after the process ran out of descriptors, in ms.
pub const ACCEPT_PAUSE_MS: u64 = 100;
/// Answers of the cache that are passed on before sockets have their turn again.
pub const CACHE_EVENTS_PER_ROUND: usize = 256;
/// Admin connections at a time.
pub const ADMIN_CONNECTIONS_MAX: usize = 16;
/// The longest line on the admin socket, in bytes: paths and access lists.
pub const ADMIN_LINE_BYTES_MAX: usize = 64 * 1024;
/// Connections that may wait for the admin socket.
pub const ADMIN_BACKLOG: i32 = 8;
/// Entries listed by `grants` unless another number is asked for.
pub const GRANT_LINES_DEFAULT: u32 = 1_000;
/// The most entries listed by `grants`.
pub const GRANT_LINES_MAX: u32 = 100_000;
/// The most runs listed by `pages`.
pub const PAGE_RUNS_MAX: usize = 10_000;

const _: () = assert!(SESSIONS_MAX * IN_FLIGHT_MAX <= copage_cache::limits::META_WAITING_MAX);
const _: () = assert!(SESSIONS_MAX <= copage_coherence::limits::SESSIONS_MAX);
const _: () = assert!(OUTBOX_PAUSE_MESSAGES + IN_FLIGHT_MAX < OUTBOX_MESSAGES_MAX);
const _: () = assert!(
    OUTBOX_PAUSE_BYTES + (IN_FLIGHT_MAX + 1) * copage_coherence::msg::MESSAGE_BYTES_MAX
        < OUTBOX_BYTES_MAX
);
/// The most messages read from a channel whose other end is closed: more than a socket's default
/// buffer holds of the shortest (`net.core.wmem_default`, 212,992 bytes, some 700 a message).
pub(super) const LAST_MESSAGES_MAX: usize = 1024;
