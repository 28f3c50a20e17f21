//! An export that this client uses.

use crate::client::Client;
use crate::error::Result;
use crate::node::Node;
use copage_coherence::msg::StatFs;

/// Who may write, as the administrator set it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportMode {
    /// Nobody.
    ReadOnly,
    /// Every allowed guest; all see one file.
    Coherent,
    /// Every allowed guest, each for itself.
    CopyOnWrite,
    /// Every allowed guest, in the same frames.
    SharedMemory,
    /// A mode that this version does not know.
    Unknown(u8),
}

/// A directory tree that the daemon shares. Paths are resolved by [`Export::resolve`], on this side:
/// the daemon is asked for one name at a time and follows no link.
#[derive(Clone, Debug)]
pub struct Export {
    name: String,
    mode: u8,
    root: Node,
}

impl Export {
    pub(crate) fn new(name: String, mode: u8, root: Node) -> Self {
        Self { name, mode, root }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Who may write.
    pub fn mode(&self) -> ExportMode {
        match self.mode {
            0 => ExportMode::ReadOnly,
            1 => ExportMode::Coherent,
            2 => ExportMode::CopyOnWrite,
            3 => ExportMode::SharedMemory,
            other => ExportMode::Unknown(other),
        }
    }

    /// Its root directory.
    pub fn root(&self) -> Node {
        self.root.clone()
    }

    /// The client.
    pub fn client(&self) -> &Client {
        self.root.client()
    }

    /// Sizes and quotas.
    pub fn statfs(&self) -> Result<StatFs> {
        self.root.statfs()
    }
}
