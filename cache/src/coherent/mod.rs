//! Coherent files: one content for all guests, who may write it.
//!
//! Who may hold which page is not decided here but by the daemon's machine (`copage_coherence::strict`), which
//! calls [`Cache::strict_grant`] and its like and is told of what took longer by events. Here is where pages
//! lie, and how they come from the host's file and go back to it.
//!
//! A page is in its home, where guests read it, or, on a backend with descriptors, in the arena of the one
//! who writes it, in the common file of all who do, or in the spare file, which no guest has. The home's
//! [`Home::places`](crate::file::Home) says which. A frame that a session which is gone may have mapped is
//! *lost*: its page has another, and it rests until the machine frees it.
//!
//! # Writing back
//! [`Coherent::disk`](file::Coherent) is held from the look at a page until its bytes are in the host's page
//! cache, so that what is older is never written over what is newer. It is taken before the file's other
//! lock, never by the daemon's loop, and not held while the disk is waited for (`fdatasync`).

mod audit;
mod copy;
mod file;
mod fill;
mod grant;
mod host;
mod ranges;
mod reclaim;
mod reserve;
mod resize;
mod save;
mod work;

pub(crate) use file::{Coherent, Strict};
pub(crate) use fill::FillWant;
pub use grant::StrictGrant;
pub(crate) use work::DiskWork;
