//! The backend for Xen hosts, and what guests and daemon need of a hypervisor's libraries.

pub mod channel;
pub mod lib;

pub use lib::{Presence, Role, XenError, here};
