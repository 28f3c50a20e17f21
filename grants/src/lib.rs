//! Frames, grant tables and the ledger of copage, behind one [`Backend`] trait chosen at run time.

mod ages;
pub mod backend;
pub mod channel;
pub mod entry;
pub mod error;
pub mod failing;
pub mod ids;
mod ledger;
pub mod limits;
pub mod local;
pub mod quarantine;
mod span;
mod sync;
pub mod sys;
pub mod table;
#[cfg(test)]
mod testing;
pub mod volatile;
pub mod xen;

pub use backend::{
    Access, Backend, Capabilities, DomainEnd, FramesThere, GrantInfo, HomeSpec, LedgerAudit,
    Revocation, TableInfo, Where,
};
pub use error::GrantError;
pub use ids::{
    DomId, Epoch, FrameNo, Grant, GrantRef, HomeId, PAGE_SIZE, PAGE_SIZE_U64, PageIndex, TableId,
    TrustClass, Version, pages_for,
};
pub use local::{FrameStore, LocalBackend, LocalConfig};
pub use xen::{XenBackend, XenConfig, XenError};
