//! The backend for Xen hosts, and what guests and daemon need of a hypervisor's libraries.
//!
//! Frames are the memory of *cache domains*: PVH domains of fixed size that are made by the toolstack,
//! stay paused for ever, and have a grant table each, which the daemon writes from the control domain.
//! Guests map frames by the table of the cache domain, from their own kernel, without a word to the
//! daemon; the hypervisor's bits in the entry show it. What is mapped cannot be taken back.
//!
//! The set of cache domains changes while the daemon runs: frames `n·F..(n+1)·F` are those of the domain with
//! number `n`, which is made when they are needed and ended when nothing is in them any more.
//!
//! Domains, tables and pages outlive the daemon. When it starts again it finds the domains by their
//! names; entries that are not in use are freed then, so that no domain which died meanwhile has any;
//! frames of the others are not used before their last mapping is gone ([`crate::table`]).

mod audit;
mod backend;
pub mod channel;
mod config;
mod domains;
mod frames;
mod home;
pub mod lib;
mod records;
mod resize;
mod stub;
mod toolstack;

pub use config::XenConfig;
pub use lib::{Presence, Role, XenError, here};

use crate::ids::{FrameNo, HomeId};
use crate::table::GrantTables;
use config::Layout;
use frames::{Bindings, Domains, Spread};
use home::Home;
use lib::{ForeignMemory, GrantTableMap};
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use toolstack::Toolstack;

/// See the module.
///
/// Locks, in this order: `resize`, `domains`, then `left`, a home's pages, or the tables' own. `domains` is
/// never taken twice by one thread (one that waits to write would come between).
pub struct XenBackend {
    layout: Layout,
    bindings: Arc<Bindings>,
    domains: RwLock<Domains>,
    tables: GrantTables<GrantTableMap, Spread>,
    homes: RwLock<HashMap<HomeId, Arc<Home>>>,
    next_home: AtomicU64,
    /// In records: which daemon wrote them.
    life: u32,
    /// Frames whose entries of an earlier life were in use when we last looked, in order.
    left: Mutex<Vec<FrameNo>>,
    xen: ForeignMemory,
    toolstack: Toolstack,
    /// The hypervisor said that tables may be as large as they are to be.
    tables_allowed: bool,
    /// Held while domains are made or ended.
    resize: Mutex<()>,
    /// No more domains are made.
    is_stopping: AtomicBool,
    /// Held until the process ends.
    _lock: File,
}
