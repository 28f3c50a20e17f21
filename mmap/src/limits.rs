//! Every constant of the guest's side: unit, reason, and the bound of the kernel it respects.

use copage_coherence::msg::FAULT_PAGES_MAX;
use std::time::Duration;

/// The largest window of one fault, in pages: 2 MiB, one huge frame, and all that one Fault may ask.
pub(crate) const WINDOW_PAGES_MAX: u32 = FAULT_PAGES_MAX;
/// The first window of a stream that was recognised, in pages: 64 KiB, what the kernel's fault-around
/// maps at once (fault_around_bytes).
pub(crate) const WINDOW_PAGES_FIRST: u32 = 16;
/// The largest window of a fault of a `coherent` file, in pages: 256 KiB. The answer waits for whoever
/// holds any of them for writing.
pub(crate) const LOAD_PAGES_MAX: u32 = 64;
/// The largest window of a store to one, in pages: 64 KiB. Nobody else has them while this guest does.
pub(crate) const STORE_PAGES_MAX: u32 = 16;
/// Sequential streams remembered for one mapping. Copying programs have two, linkers a handful.
pub(crate) const STREAMS_MAX: usize = 8;
/// How far behind the one page of a stream that has just begun the next fault may be, in pages: the
/// page behind it may be there already.
pub(crate) const STREAM_START_REACH_PAGES: u64 = 1;
/// How far behind the last window of a stream its next fault may be, in pages: others brought those
/// between. Not more: see [`crate::window::Windows::choose`].
pub(crate) const STREAM_REACH_PAGES: u64 = 32;
/// The window of a fault of a granted file from which nothing follows, in pages: 64 KiB, as the kernel's
/// fault-around. A map costs a hypercall and a VMA, whatever its length.
pub(crate) const GRANTED_PAGES_FIRST: u32 = 16;
/// Windows that a session has mapped at one time. Each is a VMA and leaves one beside it: a quarter
/// of vm.max_map_count (65,530 by default), which the program needs as well.
pub(crate) const WINDOWS_MAX: usize = 8192;
/// Pages that a session has mapped from grants at one time: 768 MiB, three quarters of what Xen tracks
/// for a guest by default (max_maptrack_frames, 262,144 pages); the rest is for other sessions, and for
/// a batch that is tried before it is shown. In a PV guest Linux maps each page twice, and that bound is met
/// first: as where it was made smaller, windows are given back when a map fails.
pub(crate) const GRANTED_PAGES_MAX: usize = 196_608;
/// Part of what is mapped that is given back when there is no room, oldest first.
pub(crate) const GIVE_BACK_PART: usize = 16;
/// How often a batch of grants is tried before its pages are asked for one by one.
pub(crate) const MAP_TRIES_MAX: u32 = 2;
/// How often one page is tried then of files that others write: what was granted may be another's before it is mapped.
pub(crate) const CONTENDED_TRIES_MAX: u32 = 64;
/// Bytes of a huge frame: mappings are placed so that huge frames can be mapped whole.
pub(crate) const HUGE_BYTES: usize = 2 << 20;
/// Messages waiting for a daemon that does not read. A full queue means that the daemon is stuck:
/// at a renewal each third of a term the lease runs out long before requests alone fill it.
pub(crate) const OUTBOUND_MESSAGES_MAX: usize = 65_536;
/// Pages that are there and shown together in a private mapping: what kernels map around a fault (64 KiB).
pub(crate) const SHOWN_PAGES_MAX: usize = 16;
/// Fault events read from the userfaultfd at once.
pub(crate) const EVENTS_MAX: usize = 32;
/// Messages taken from the channel before the userfaultfd is looked at again.
pub(crate) const MESSAGES_BURST_MAX: usize = 64;
/// Fault requests under way at one time; faults beyond wait in the kernel.
pub(crate) const IN_FLIGHT_MAX: usize = 1024;
/// How long `connect` waits for Welcome.
pub(crate) const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a daemon that is gone is looked for, in ms, where nothing else is said: longer than a service
/// takes to be started again, shorter than what looks like a hang.
pub(crate) const RECONNECT_MS: u32 = 60_000;
/// Between two attempts to reach a daemon that is gone: the first pause, and the longest.
pub(crate) const RECONNECT_PAUSE_MIN: Duration = Duration::from_millis(20);
pub(crate) const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// A session that lasted as long, in ms, was a good one: when it ends the daemon is looked for at once.
pub(crate) const STEADY_MS: u64 = 5000;
/// How often `populate` asks again for pages that were taken back before they could be mapped.
pub(crate) const POPULATE_TRIES_MAX: u32 = 16;
/// How often a system call that says EAGAIN because mappings are just changing is tried again.
pub(crate) const AGAIN_TRIES_MAX: u32 = 100_000;

const _: () = assert!(WINDOW_PAGES_FIRST.is_power_of_two() && WINDOW_PAGES_MAX.is_power_of_two());
const _: () = assert!(WINDOW_PAGES_FIRST <= WINDOW_PAGES_MAX);
const _: () = assert!(WINDOW_PAGES_MAX as usize * copage_grants::PAGE_SIZE == HUGE_BYTES);
