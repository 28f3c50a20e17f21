//! The daemon.

pub mod admin_types;
