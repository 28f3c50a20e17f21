//! Frames: one array of metadata, the queues threaded through it, and what guests are charged.

mod accounts;
mod ghost;
mod table;

pub(crate) use table::{FrameState, FrameTable};
