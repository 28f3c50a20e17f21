//! Limits of the session machine: unit, reason, bound.

use copage_grants::DomId;

/// The first domid given to a guest. 0 is the host's on Xen, and stays free here for it.
pub const DOM_FIRST: u16 = 1;
/// One more than the last domid given to a guest (`DOMID_FIRST_RESERVED`, xen/include/public/xen.h).
pub const DOM_END: u16 = DomId::FIRST_RESERVED;
/// The shortest session lease, in ms: a third of it must be long beside a scheduler's hiccup.
pub const LEASE_TTL_MS_MIN: u32 = 100;
/// The longest session lease, in ms: a strict write may have to wait this long.
pub const LEASE_TTL_MS_MAX: u32 = 600_000;
/// How much longer than the lease the daemon waits, in thousandths: two clocks of one term may
/// differ by 1 %.
pub const DRIFT_PERMILLE: u64 = 10;
/// Notices that one session may leave unacknowledged. Recalls come in runs of pages, so a guest that
/// follows at all stays far below; one that does not would make the daemon remember each.
pub const RECALLS_MAX: usize = 4096;
/// Sessions in all that a configuration may allow: every one needs a domid, and a fenced one keeps it.
pub const SESSIONS_MAX: usize = 4096;

const _: () = assert!(DOM_FIRST < DOM_END);
const _: () = assert!(SESSIONS_MAX < (DOM_END - DOM_FIRST) as usize);
const _: () = assert!(LEASE_TTL_MS_MIN < LEASE_TTL_MS_MAX);
