//! The daemon: one thread that talks to every guest and to the administrator, over the cache.
//!
//! [`Daemon::run`] is `copage serve`; [`Daemon::start`] is the same in a thread of the caller's
//! process, for tests and benches. Nothing that the loop does waits for a guest or a disk: what may
//! touch a disk runs on the cache's threads, what a guest does not read is kept for it up to a
//! bound, and then it is fenced.

mod admin;
mod admin_loop;
mod admin_run;
pub mod admin_types;
mod attach;
mod clock;
mod coherent;
mod complete;
mod convert;
mod core;
mod ctx;
mod dispatch;
mod exports;
mod fault;
mod handles;
mod identity;
mod lifecycle;
mod limits;
mod outbox;
mod poll;
mod ready;
mod recalls;
mod run_dir;
mod session;
mod start;
mod strict_types;
mod wake;
mod xen;

pub use run_dir::{ADMIN_SOCKET, GUEST_SOCKET, RunDirError};
pub use start::{Daemon, DaemonHandle, RunOptions, ServeError};
