//! The guest's side of copage: connect to a daemon, map its files, read, run.
//!
//! [`Client::connect`] begins a session. [`Client::attach`] gives an [`Export`], whose [`Node`]s are
//! found by name; [`Node::open`] gives a [`File`], [`File::map`] a [`Mapping`]: plain memory whose
//! pages are the daemon's frames. What a mapping promises, and when it is SIGBUS, is written there.

pub mod bare;
mod bitmap;
mod client;
mod connect;
mod error;
pub mod exec;
mod export;
mod file;
mod granted;
mod limits;
mod line;
mod mapped;
mod mapping;
pub mod mount;
pub mod native;
mod node;
mod pager;
mod place;
mod populate;
pub mod probe;
mod quiet;
mod rebase;
mod returning;
mod session;
mod shared;
mod site;
mod stamp;
mod sys;
#[cfg(test)]
mod tests;
mod uffd;
mod walk;
mod window;
mod write;

pub use client::{Client, ConnectOptions, DaemonAt, UserfaultMode, UserfaultPolicy, Welcome};
pub use error::{LostWhy, MmapError, Result};
pub use export::{Export, ExportMode};
pub use file::File;
pub use mapping::{MapKind, MapOptions, Mapping, PageError};
pub use node::{DirPage, Entry, Node};
pub use walk::{Found, LINKS_MAX, LastLink};

/// The types of messages that the guest's side shows.
pub use copage_coherence::msg::{Attr, FileKind, Handle, OpenHow, StatFs};
