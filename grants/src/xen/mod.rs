//! The backend for Xen hosts, and what guests and daemon need of a hypervisor's libraries.
//!
//! Frames are the memory of *cache domains*: PVH domains of fixed size that are made by the toolstack,
//! stay paused for ever, and have a grant table each, which the daemon writes from the control domain.
//! Guests map frames by the table of the cache domain, from their own kernel, without a word to the
//! daemon; the hypervisor's bits in the entry show it. What is mapped cannot be taken back.
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
mod stub;
mod toolstack;

pub use config::XenConfig;
pub use lib::{Presence, Role, XenError, here};

use crate::ids::{FrameNo, HomeId};
use crate::table::GrantTables;
use config::Layout;
use frames::{Bindings, CacheDomain, Spread};
use home::Home;
use lib::GrantTableMap;
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use toolstack::Toolstack;

/// See the module.
pub struct XenBackend {
    frames_max: u32,
    layout: Layout,
    bindings: Arc<Bindings>,
    /// By number, which is that of the domain's table.
    domains: Vec<CacheDomain>,
    tables: GrantTables<GrantTableMap, Spread>,
    homes: RwLock<HashMap<HomeId, Arc<Home>>>,
    next_home: AtomicU64,
    /// In records: which daemon wrote them.
    life: u32,
    /// Frames whose entries of an earlier life were in use when we last looked, in order.
    left: Mutex<Vec<FrameNo>>,
    toolstack: Toolstack,
    /// Cache domains found at the start beyond those needed.
    surplus: Vec<(u32, u16)>,
    /// Held until the process ends.
    _lock: File,
}
