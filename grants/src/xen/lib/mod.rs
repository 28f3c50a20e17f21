//! Xen's C libraries, loaded at run time by their stable sonames: one program with and without Xen.
//!
//! | here | library | header | device |
//! |---|---|---|---|
//! | [`Evtchn`] | libxenevtchn.so.1 | xenevtchn.h | /dev/xen/evtchn |
//! | [`Store`] | libxenstore.so.4 | xenstore.h | xenstored's socket or /dev/xen/xenbus |
//! | [`Gnttab`] | libxengnttab.so.1 | xengnttab.h | /dev/xen/gntdev |
//! | [`GrantShare`] | libxengnttab.so.1 | xengnttab.h | /dev/xen/gntalloc |
//! | [`ForeignMemory`] | libxenforeignmemory.so.1 | xenforeignmemory.h | /dev/xen/privcmd |
//! | [`Hypfs`] | libxenhypfs.so.1 | xenhypfs.h | /dev/xen/hypercall or /dev/xen/privcmd |
//!
//! The types of the functions are those of the headers of Xen 4.17; they are the libraries' stable
//! interfaces. A library stays loaded for the life of the process. What is mapped keeps the handle
//! it was mapped through alive, and is unmapped when dropped.

mod error;
mod evtchn;
mod foreign;
mod gntshr;
mod gnttab;
mod hypfs;
mod load;
mod memory;
mod presence;
mod store;

pub use error::XenError;
pub use evtchn::Evtchn;
pub use foreign::{ForeignMap, ForeignMemory, GrantTableMap};
pub use gntshr::{GrantShare, SharedPages};
pub use gnttab::{Gnttab, GrantMap};
pub use hypfs::Hypfs;
pub use presence::{Presence, Role, here};
pub use store::{NodeAccess, Store};
