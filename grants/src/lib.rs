//! Frames, grant tables and the ledger of copage, behind one [`Backend`] trait chosen at run time.

pub mod backend;
pub mod channel;
pub mod error;
pub mod ids;
pub mod limits;
pub mod sys;
#[cfg(test)]
mod testing;

pub use backend::{
    Access, Backend, Capabilities, DomainEnd, GrantInfo, HomeSpec, LedgerAudit, Revocation,
};
pub use error::GrantError;
pub use ids::{
    DomId, Epoch, FrameNo, Grant, GrantRef, HomeId, PAGE_SIZE, PAGE_SIZE_U64, PageIndex, TableId,
    Version, pages_for,
};
