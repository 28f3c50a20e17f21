//! Names below an export: nodes, attributes, listings.

mod dir;
mod node;
mod xattr;

pub use dir::{Dir, DirItem};
pub(crate) use node::Nodes;
pub use node::{Attr, Kind, Node, NodeRef, StatFs};
