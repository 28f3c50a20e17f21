//! What the tests of copage are made of: daemons and guests as real processes, guests that say
//! whatever a test wants, directories to export, attacks.
//!
//! Everything here panics when something is not as it has to be: it is a test's voice.
#![forbid(unsafe_code)]
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking, and this is part of tests"
)]

pub mod acked;
pub mod admin;
pub mod attack;
pub mod beside;
pub mod daemon;
pub mod guest;
pub mod history;
pub mod mute;
pub mod needs;
pub mod orders;
pub mod raw;
pub mod stamp;
pub mod tree;
pub mod wait;
pub mod watch;
