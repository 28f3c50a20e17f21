//! copage: the daemon and the command, as a library.
#![forbid(unsafe_code)]

pub mod config;
pub mod demo;
pub mod guest;
pub mod serve;
