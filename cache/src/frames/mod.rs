//! Frames: one array of metadata, the queues threaded through it, and what guests are charged.

mod accounts;
mod banks;
mod ghost;
mod table;

pub use banks::BankStats;
pub(crate) use table::{FrameState, FrameTable};
