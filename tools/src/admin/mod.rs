//! The commands that are the administrator's: they ask the daemon and show what it says.
//!
//! Each has `Args` and `run(&Args)`. With `--json` standard output is one document, the fields of
//! which are those of [`crate::serve::admin_types`].

pub mod attach;
pub mod audit;
mod client;
pub mod control;
pub mod export;
pub mod grants;
pub mod guests;
mod host_cache;
pub mod leases;
pub mod pages;
pub mod stats;

pub use client::{Admin, AdminError, Where, run_dir_from_env};
