//! The daemon in this process, and raw channels as its guests: what it answers, to the good and to
//! the hostile.
//!
//! Cannot show: mappings and faults by userfaultfd (the guest library's tests do), kernel leases
//! (a daemon in a process of its own is needed), guests of another uid unless run as root.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::panic, reason = "a test fails by panicking")]

mod admin;
mod coherent;
mod coherent_ends;
mod files;
mod hostile;
mod recalls;
mod sessions;
mod strict_guest;
mod support;
