//! Exports, files, pages and frames.
#![forbid(unsafe_code)]

mod advance;
mod audit;
mod cache;
mod config;
mod error;
mod events;
mod exports;
mod fault;
mod file;
mod fill;
mod frames;
mod guests;
mod host;
pub mod limits;
mod meta;
mod open;
mod pool;
mod reclaim;
mod report;
mod retire;
mod tick;
mod tree;

pub use cache::Cache;
pub use config::{
    CacheConfig, ExportId, ExportInfo, ExportMode, ExportSpec, GuestId, GuestLimits, Holder,
};
pub use error::CacheError;
pub use events::{
    CacheEvent, EventSink, FaultDone, FaultHint, FaultOutcome, FileState, OpenDone, OpenHow,
    RecallEnd, RecallReason,
};
pub use file::{CachedFile, FileId};
pub use meta::{MetaOp, MetaReply};
pub use report::{AuditReport, CacheStats, FilePages, GuestStats, PageRun};
pub use tree::{Attr, Dir, DirItem, Kind, Node, NodeRef, StatFs};
