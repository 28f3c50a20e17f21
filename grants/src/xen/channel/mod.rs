//! The control channel of Xen: a ring that the guest grants, found through xenstore.
//!
//! A guest writes what the daemon needs below its own `data/copage/<session>` and `state` last; the
//! daemon maps, binds, says so in the ring and removes the nodes. docs/protocol.md has the layout.
//! Whatever a guest writes is read once, checked, and counted where it cannot be.

mod accept;
mod guest;
pub mod limits;
mod listener;
mod nodes;
mod pages;
mod rate;
mod registry;
#[cfg(test)]
#[allow(clippy::unwrap_used)] // Tests.
mod tests;

pub use guest::connect;
pub use listener::{XenListener, XenListenerStats};
pub use registry::{ListenerEvent, Wanted};
