//! The commands that are a guest's: what a guest does with an export.
//!
//! Each has `Args` and `run(args)`; errors are for the user's eyes, exit codes are the commands'
//! own.

pub mod cat;
mod connect;
pub mod cp;
pub mod exec;
pub mod keeper;
pub mod ls;
pub mod mount;
mod show;
pub mod stat;
pub mod umount;

pub use connect::Where;
