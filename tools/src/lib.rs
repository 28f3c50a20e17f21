//! copage: the daemon and the command, as a library.
#![forbid(unsafe_code)]

pub mod admin;
pub mod cli;
pub mod config;
pub mod demo;
pub mod doctor;
pub mod guest;
pub mod output;
pub mod serve;
