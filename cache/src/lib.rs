//! Exports, files, pages and frames.
//!
//! A *cached file* is an inode of one share group. Its content counts in *generations*; each has one
//! *home* of the backend, in which its pages lie. A fault of resident pages is granted under the
//! file's lock; missing ones are filled by jobs of a bounded pool, which take frames first, read
//! without a lock, and look once more at the file's times before they publish what they read.
//!
//! # Locks
//! Taken in this order; none is held across a read of a host's file, and the one only that says so across a write.
//!
//! | lock | protects | beside it may be taken |
//! |---|---|---|
//! | `Resize::making` | which banks there are | all below, but no file's |
//! | `Coherent::disk`, one a coherent file | which of two looks at its pages is written first | all below, and the host's file is written |
//! | `CachedFile::inner`, one a file | homes and their indexes, opens, what waits, lease | all below; never another file's |
//! | `Cache::frames` | the table of frames, queues, charges, budget | `guests`, the backend |
//! | the backend's own | ledger, tables, homes | - |
//! | leaves: `left_over` (the frame table's beside it), `files`, `attention`, `parked`, `idle`, `lives`, `guests`, `leases`, watches, the pools' queues, export registry | their maps | - (the registry: nodes) |
//!
//! Eviction chooses frames under `frames` alone, marks them, and then locks each file by itself: whoever
//! is granted such a page first takes the mark away. Stores and collapses go on without the file's
//! lock; `Home::busy` keeps the home from being emptied meanwhile.
#![forbid(unsafe_code)]

mod advance;
mod audit;
mod cache;
mod coherent;
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
mod left_over;
pub mod limits;
mod meta;
mod open;
mod pool;
mod reclaim;
mod report;
mod resize;
mod retire;
mod tick;
mod tree;

pub use cache::Cache;
pub use coherent::StrictGrant;
pub use config::{
    CacheConfig, ExportId, ExportInfo, ExportMode, ExportSpec, GuestId, GuestLimits, Holder,
};
pub use error::CacheError;
pub use events::{
    CacheEvent, EventSink, FaultDone, FaultHint, FaultOutcome, FileState, GrantedRefs, OpenDone,
    OpenHow, RecallEnd, RecallReason,
};
pub use file::{CachedFile, FileId};
pub use frames::BankStats;
pub use meta::{MetaOp, MetaReply};
pub use report::{AuditReport, CacheStats, FilePages, GuestStats, PageRun};
pub use tree::{Attr, Dir, DirItem, Kind, Node, NodeRef, StatFs};
