//! The lease state machine of copage, and the messages between daemon and guests.
#![forbid(unsafe_code)]

pub mod limits;
pub mod msg;
pub mod session;
pub mod strict;
