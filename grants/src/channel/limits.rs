//! Limits of the channel: unit, reason, bound.

/// The longest message of a ring, in bytes: the protocol's (128 KiB of data and 512;
/// docs/protocol.md). A length above it is nonsense.
pub const RING_MESSAGE_BYTES_MAX: usize = 131_584;

/// Pages of one direction of a ring are `1 << order`, at most 16: grants of one session that the
/// daemon maps, and memory that a guest cannot use otherwise.
pub const RING_ORDER_MAX: u32 = 4;

/// What a guest of ours takes: 8 pages each way. Requests are short, and the longest replies
/// (128 KiB) go in pieces anyway.
pub const RING_ORDER: u32 = 3;

/// Pages of both directions and the index page, at most.
pub const RING_PAGES_MAX: usize = 1 + (2 << RING_ORDER_MAX);

/// Memory that an end keeps for a message that comes in pieces, between messages, in bytes.
pub(super) const RING_PART_BYTES_KEPT: usize = 4096;

// The byte map has room for all references.
const _: () = assert!(super::layout::REFS_AT + 4 * (2 << RING_ORDER_MAX) <= crate::PAGE_SIZE);
