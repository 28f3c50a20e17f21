//! The mappings of a session by address.

use crate::file::FileInner;
use crate::mapped::Mapped;
use crate::stamp::SessionNo;
use std::collections::BTreeMap;
use std::sync::Arc;

/// See the module. Kept under a leaf lock, for a lookup or a change.
#[derive(Default)]
pub(crate) struct Space {
    by_addr: BTreeMap<usize, Arc<Mapped>>,
    closed: bool,
}

impl Space {
    /// Enters a mapping; `false` when the session is lost: nothing enters any more.
    pub(crate) fn insert(&mut self, mapped: &Arc<Mapped>) -> bool {
        if !self.closed {
            self.by_addr.insert(mapped.addr(), Arc::clone(mapped));
        }
        !self.closed
    }

    pub(crate) fn remove(&mut self, mapped: &Arc<Mapped>) {
        // The address may be another mapping's by now, if this one never entered.
        if self
            .by_addr
            .get(&mapped.addr())
            .is_some_and(|there| Arc::ptr_eq(there, mapped))
        {
            self.by_addr.remove(&mapped.addr());
        }
    }

    /// The mapping that holds an address.
    pub(crate) fn find(&self, addr: usize) -> Option<&Arc<Mapped>> {
        let (start, mapped) = self.by_addr.range(..=addr).next_back()?;
        (addr - start < mapped.bytes()).then_some(mapped)
    }

    /// Every mapping.
    pub(crate) fn all(&self) -> Vec<Arc<Mapped>> {
        self.by_addr.values().cloned().collect()
    }

    /// The mappings of one open file.
    pub(crate) fn of_file(&self, file: &Arc<FileInner>) -> Vec<Arc<Mapped>> {
        self.by_addr
            .values()
            .filter(|m| Arc::ptr_eq(m.file(), file))
            .cloned()
            .collect()
    }

    /// Does any mapping of a `coherent` file show what an earlier session had?
    pub(crate) fn any_before(&self, session: SessionNo) -> bool {
        let mut coherent = self.by_addr.values().filter(|m| m.file().coherent());
        coherent.any(|m| m.stamp().session() < session)
    }

    /// Takes them all out; nothing enters from here on.
    pub(crate) fn close(&mut self) -> Vec<Arc<Mapped>> {
        self.closed = true;
        std::mem::take(&mut self.by_addr).into_values().collect()
    }
}
