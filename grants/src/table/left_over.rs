//! Tables with entries of an earlier life of the daemon (xen: the table outlives it).
//!
//! What is not in use is freed when the table is found. The rest is *left over*: not in the ledger,
//! its slot not free, its frame not to be used until the entry shows no mapping any more. It permits nothing,
//! because the domain that it names may end, and another get its number, before anybody looks again.

use super::{GrantTables, Placement, Table};
use crate::entry::EntryMemory;
use crate::error::GrantError;
use crate::ids::{FrameNo, TableId};
use crate::limits::ENTRIES_RESERVED;
use std::collections::BTreeMap;

impl<M: EntryMemory, P: Placement> GrantTables<M, P> {
    /// Adds a table as an earlier life left it; where numbers rest, all of them do. `frame_of` gives the frame that entries call by a
    /// number; entries in use of what is no frame are told by the audit.
    pub fn add_found_table(
        &self,
        memory: M,
        frame_of: impl Fn(u32) -> Option<FrameNo>,
    ) -> Result<TableId, GrantError> {
        let inner = &mut *self.inner.lock();
        let (id, base) = inner.add_span(memory.entries().len())?;
        let slots = base + ENTRIES_RESERVED..inner.ledger.slots();
        let table = usize::from(id.0);
        let mut left = BTreeMap::new();
        let entries = (base..).zip(memory.entries());
        for (slot, entry) in entries.skip(ENTRIES_RESERVED as usize) {
            let state = entry.state();
            if !state.is_free() && !entry.revoke() {
                entry.withdraw();
                left.insert(slot, frame_of(state.frame));
            }
        }
        let rests = inner.rest.ms > 0;
        if rests {
            // A guest may have been told any of the numbers a moment ago.
            inner.rest.begin_table(table, slots.clone());
        }
        if rests || !left.is_empty() {
            let is_out = |slot| rests || left.contains_key(&slot);
            inner.ledger.leave_out(table, slots, is_out);
        }
        inner.left_over.append(&mut left);
        inner.tables.push(Table {
            memory: Some(memory),
            base,
        });
        Ok(id)
    }

    /// Frees what was left over and is not in use any more; puts the frames of the rest in `out`, each
    /// once, in order.
    pub fn retry_left_over(&self, out: &mut Vec<FrameNo>) {
        let inner = &mut *self.inner.lock();
        let mut left = std::mem::take(&mut inner.left_over);
        left.retain(|&slot, _| {
            let freed = inner.entry(slot).revoke();
            if freed {
                let (table, _) = inner.locate(slot);
                if !inner.rest.has_table(table) {
                    inner.ledger.put_back(table, slot);
                }
            }
            !freed
        });
        let mut frames: Vec<FrameNo> = left.values().flatten().copied().collect();
        inner.left_over = left;
        frames.sort_unstable();
        frames.dedup();
        out.append(&mut frames);
    }

    /// Frees all entries that are not in use, granted ones too; gives the tables in which some are. The
    /// ledger does not know: nothing is granted or audited afterwards.
    pub fn abandon(&self) -> Vec<TableId> {
        let inner = &*self.inner.lock();
        let tables = (0..).map(TableId).zip(&inner.tables);
        let in_use = tables.filter(|(_, table)| {
            let entries = table.entries().iter();
            let freed = entries.skip(ENTRIES_RESERVED as usize).map(|e| e.revoke());
            // All of them, also behind one that is in use.
            freed.fold(false, |any, freed| any | !freed)
        });
        in_use.map(|(id, _)| id).collect()
    }

    /// Entries that are left over, of frames or not.
    pub fn left_over(&self) -> usize {
        self.inner.lock().left_over.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Access;
    use crate::entry::{Entry, OwnEntries};
    use crate::ids::{DomId, GrantRef};
    use std::sync::Arc;

    /// A table that outlives its user.
    struct Kept(Arc<OwnEntries>);

    impl EntryMemory for Kept {
        fn entries(&self) -> &[Entry] {
            self.0.entries()
        }
    }

    struct OneTable;

    impl Placement for OneTable {
        fn place(&self, frame: FrameNo) -> (TableId, u32) {
            (TableId(0), frame.0 + 100)
        }

        fn domid(&self, dom: DomId) -> DomId {
            DomId(dom.0 + 50)
        }
    }

    fn frame_of(name: u32) -> Option<FrameNo> {
        name.checked_sub(100).filter(|&n| n < 64).map(FrameNo)
    }

    fn open(memory: &Arc<OwnEntries>) -> GrantTables<Kept, OneTable> {
        let tables = GrantTables::new(OneTable);
        let memory = Kept(Arc::clone(memory));
        tables.add_found_table(memory, frame_of).unwrap();
        tables
    }

    /// The daemon stands in for the hypervisor here.
    #[test]
    fn local_what_is_in_use_is_kept_out_and_all_else_is_free() {
        let memory = Arc::new(OwnEntries::new(32).unwrap());
        memory.entries()[0].publish(DomId(0), Access::ReadWrite, 7, true);
        let frames: Vec<FrameNo> = (0..10).map(FrameNo).collect();
        let mut grants = Vec::new();
        let first = open(&memory);
        first
            .grant(DomId(3), Access::ReadOnly, &frames, false, &mut grants)
            .unwrap();
        let at = |n: usize| &memory.entries()[grants[n].gref.0 as usize];
        assert_eq!(at(2).state().dom, DomId(53), "the entry names the domain");
        assert_eq!(first.audit().differences, Vec::<String>::new());
        for n in [2, 3, 7] {
            assert!(at(n).map(DomId(53), Access::ReadOnly).is_some());
        }
        drop(first);

        let second = open(&memory);
        assert_eq!(second.left_over(), 3);
        let another = |n: usize| at(n).map(DomId(53), Access::ReadOnly);
        assert!([2, 3, 7].iter().all(|n| another(*n).is_none()), "permitted");
        assert!(at(2).state().is_mapped() && !at(2).state().is_free());
        assert!(!memory.entries()[0].state().is_free(), "the toolstack's");
        assert!(at(1).state().is_free());
        let mut out = Vec::new();
        second.retry_left_over(&mut out);
        assert_eq!(out, [FrameNo(2), FrameNo(3), FrameNo(7)]);
        let audit = second.audit();
        assert_eq!((audit.left_over, audit.entries, audit.grants), (3, 3, 0));
        assert_eq!(audit.differences, Vec::<String>::new());
        // All other slots but the reserved ones can be granted, and no more than these.
        let many: Vec<FrameNo> = (20..20 + 32 - ENTRIES_RESERVED - 3).map(FrameNo).collect();
        let mut new = Vec::new();
        second
            .grant(DomId(1), Access::ReadOnly, &many, false, &mut new)
            .unwrap();
        let left: Vec<GrantRef> = [2, 3, 7].map(|n: usize| grants[n].gref).to_vec();
        assert!(new.iter().all(|grant| !left.contains(&grant.gref)));
        assert_eq!(second.audit().differences, Vec::<String>::new());
        let one_more = second.grant(DomId(1), Access::ReadOnly, &[FrameNo(63)], false, &mut new);
        assert!(matches!(one_more, Err(GrantError::TableFull { .. })));

        at(3).clear_mapped();
        out.clear();
        second.retry_left_over(&mut out);
        assert_eq!(out, [FrameNo(2), FrameNo(7)]);
        second
            .grant(DomId(1), Access::ReadOnly, &[FrameNo(63)], false, &mut new)
            .unwrap();
        assert_eq!(second.audit().differences, Vec::<String>::new());
    }

    /// One that had the frame for writing keeps it out as one that reads, and writes or reads it no more than
    /// by the mapping that it has.
    #[test]
    fn local_what_a_writer_left_mapped_is_kept_out_too() {
        let memory = Arc::new(OwnEntries::new(32).unwrap());
        let frames = [1, 2, 3].map(FrameNo);
        let mut grants = Vec::new();
        let first = open(&memory);
        first
            .grant(DomId(3), Access::ReadWrite, &frames, false, &mut grants)
            .unwrap();
        let at = |n: usize| &memory.entries()[grants[n].gref.0 as usize];
        assert!(at(0).map(DomId(53), Access::ReadWrite).is_some());
        // A writable entry may be mapped for reading alone.
        assert!(at(1).map(DomId(53), Access::ReadOnly).is_some());
        assert!(first.is_writable(FrameNo(1)));
        let mut answers = Vec::new();
        first.revoke(DomId(3), &frames, &mut answers);
        use crate::backend::Revocation::{Revoked, StillMapped};
        assert_eq!(answers, [StillMapped, StillMapped, Revoked]);
        assert_eq!(first.audit().differences, Vec::<String>::new());
        drop(first);

        let second = open(&memory);
        assert!(!second.is_writable(FrameNo(1)));
        let mut out = Vec::new();
        second.retry_left_over(&mut out);
        assert_eq!(out, [FrameNo(1), FrameNo(2)]);
        for n in [0, 1] {
            for access in [Access::ReadOnly, Access::ReadWrite] {
                assert_eq!(at(n).map(DomId(53), access), None);
            }
        }
        assert_eq!(at(0).state().flags, crate::entry::GTF_IN_USE);
        at(0).clear_mapped();
        out.clear();
        second.retry_left_over(&mut out);
        assert_eq!(out, [FrameNo(2)]);
        assert_eq!(second.audit().differences, Vec::<String>::new());
    }

    #[test]
    fn local_an_entry_in_use_of_no_frame_is_told() {
        let memory = Arc::new(OwnEntries::new(32).unwrap());
        memory.entries()[20].publish(DomId(1), Access::ReadOnly, 5000, true);
        let tables = open(&memory);
        let mut out = Vec::new();
        tables.retry_left_over(&mut out);
        assert_eq!(out, []);
        let audit = tables.audit();
        assert_eq!(audit.differences.len(), 1, "{audit:?}");
        // And one that nobody wrote here.
        memory.entries()[25].publish(DomId(1), Access::ReadOnly, 101, false);
        assert_eq!(tables.audit().differences.len(), 2);
    }
}
