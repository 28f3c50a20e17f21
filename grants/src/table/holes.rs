//! Tables that come and go while others are used (xen: with their cache domain). A table keeps its number
//! and its slots: where there is none, a hole has them.

use super::{GrantTables, Inner, Placement, Table};
use crate::backend::TableInfo;
use crate::entry::EntryMemory;
use crate::error::GrantError;
use crate::ids::TableId;
use crate::ledger::Slot;
use crate::limits::ENTRIES_RESERVED;
use std::ops::Range;

impl<M: EntryMemory> Inner<M> {
    /// The slots of a table that can be used.
    fn usable(&self, table: usize) -> Range<Slot> {
        let next = self.tables.get(table + 1).map(|table| table.base);
        let end = next.unwrap_or_else(|| self.ledger.slots());
        (self.tables[table].base + ENTRIES_RESERVED).min(end)..end
    }
}

impl<M: EntryMemory, P: Placement> GrantTables<M, P> {
    /// Adds the number and the slots of a table with so many entries that is not there.
    pub fn add_hole(&self, entries: usize) -> Result<TableId, GrantError> {
        let inner = &mut *self.inner.lock();
        let (id, base) = inner.add_span(entries)?;
        inner.tables.push(Table { memory: None, base });
        let table = usize::from(id.0);
        let slots = inner.usable(table);
        inner.ledger.close_span(table, slots.len() as u32);
        Ok(id)
    }

    /// Tables and holes.
    pub fn count(&self) -> usize {
        self.inner.lock().tables.len()
    }

    /// Puts a table, all of whose entries but the reserved ones are free, into a hole. Refused when it does
    /// not have the hole's size, or where there is one.
    pub fn put_table(&self, id: TableId, memory: M) -> Result<(), GrantError> {
        let inner = &mut *self.inner.lock();
        let table = usize::from(id.0);
        let is_hole = inner.tables.get(table).is_some_and(|t| t.memory.is_none());
        let slots = if is_hole { inner.usable(table) } else { 0..0 };
        let entries = memory.entries().len();
        if !is_hole || slots.len() + ENTRIES_RESERVED as usize != entries {
            return Err(GrantError::BadRange(format!(
                "a table of {entries} entries does not fit hole {table}"
            )));
        }
        inner.tables[table].memory = Some(memory);
        inner.ledger.open_span(table, slots);
        Ok(())
    }

    /// Is nothing of a table in use: every entry free, in ledger and table, and no number resting? Then
    /// every guest that was told one of its numbers knows by now that it is worth nothing.
    pub fn is_quiet(&self, id: TableId) -> bool {
        let inner = &mut *self.inner.lock();
        inner.end_rests();
        let table = usize::from(id.0);
        let Some(entries) = inner.tables.get(table).map(Table::entries) else {
            return true;
        };
        let reserved = ENTRIES_RESERVED as usize;
        let all_free = entries.iter().skip(reserved).all(|e| e.state().is_free());
        let usable = entries.len().saturating_sub(reserved);
        // What rests or was left over is not free in the ledger.
        all_free && inner.ledger.available(table) as usize == usable
    }

    /// Makes a hole of a table of which nothing is in use ([`GrantTables::is_quiet`]); gives its memory.
    pub fn take_table(&self, id: TableId) -> Option<M> {
        if !self.is_quiet(id) {
            return None;
        }
        let inner = &mut *self.inner.lock();
        let table = usize::from(id.0);
        let slots = inner.tables.get(table).map(|_| inner.usable(table))?;
        // With this lock nothing is granted; between the two, that would show here.
        let closed = inner.ledger.close_span(table, slots.len() as u32);
        inner.tables[table].memory.take_if(|_| closed)
    }

    /// The tables there are; whose each is, the backend knows.
    pub fn infos(&self) -> Vec<TableInfo> {
        let inner = &mut *self.inner.lock();
        inner.end_rests();
        let tables = (0..).map(TableId).zip(&inner.tables);
        let there = tables.filter(|(_, table)| table.memory.is_some());
        there
            .map(|(id, _)| {
                let slots = inner.usable(usize::from(id.0)).len() as u32;
                TableInfo {
                    table: id,
                    granter: None,
                    entries_max: slots,
                    entries_used: slots - inner.ledger.available(usize::from(id.0)),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Access, Revocation};
    use crate::entry::{Entry, OwnEntries};
    use crate::ids::{DomId, FrameNo, Grant};
    use std::sync::Arc;

    /// Eight frames a table.
    struct Eight;

    impl Placement for Eight {
        fn place(&self, frame: FrameNo) -> (TableId, u32) {
            (TableId((frame.0 / 8) as u16), frame.0 % 8)
        }
    }

    const ROOM: u32 = 4;

    /// A table that the test sees too.
    struct Seen(Arc<OwnEntries>);

    impl EntryMemory for Seen {
        fn entries(&self) -> &[Entry] {
            self.0.entries()
        }
    }

    fn memory() -> Arc<OwnEntries> {
        Arc::new(OwnEntries::new(ENTRIES_RESERVED + ROOM).unwrap())
    }

    fn three(rest_ms: u64) -> (GrantTables<Seen, Eight>, Arc<OwnEntries>) {
        let tables = GrantTables::new(Eight).resting_ms(rest_ms);
        let last = memory();
        tables.add_table(Seen(memory())).unwrap();
        tables.add_hole((ENTRIES_RESERVED + ROOM) as usize).unwrap();
        tables.add_table(Seen(Arc::clone(&last))).unwrap();
        (tables, last)
    }

    fn grant(tables: &GrantTables<Seen, Eight>, frames: &[u32]) -> Result<Vec<Grant>, GrantError> {
        let frames: Vec<FrameNo> = frames.iter().copied().map(FrameNo).collect();
        let mut out = Vec::new();
        tables.grant(DomId(1), Access::ReadOnly, &frames, false, &mut out)?;
        assert_eq!(tables.audit().differences, Vec::<String>::new());
        Ok(out)
    }

    fn revoke(tables: &GrantTables<Seen, Eight>, frame: u32) -> Revocation {
        let mut out = Vec::new();
        tables.revoke(DomId(1), &[FrameNo(frame)], &mut out);
        out[0]
    }

    #[test]
    fn local_nothing_is_granted_in_a_hole_and_a_table_put_there_is_whole() {
        let (tables, _) = three(0);
        let refused = grant(&tables, &[8]);
        assert!(
            matches!(refused, Err(GrantError::TableFull { .. })),
            "{refused:?}"
        );
        assert!(grant(&tables, &[0, 8, 16]).is_err());
        assert_eq!(tables.grant_count(DomId(1)), 0, "all or nothing");
        for _ in 0..3 {
            tables.put_table(TableId(1), Seen(memory())).unwrap();
            assert!(
                tables.put_table(TableId(1), Seen(memory())).is_err(),
                "there is one"
            );
            // In an order that leaves its free slots in pieces.
            let given = grant(&tables, &[8, 9, 10, 11]).unwrap();
            assert!(given.iter().all(|g| g.table == TableId(1)));
            assert!(grant(&tables, &[12]).is_err());
            for frame in [9, 11, 8] {
                assert_eq!(revoke(&tables, frame), Revocation::Revoked);
            }
            assert!(tables.take_table(TableId(1)).is_none(), "one is granted");
            assert_eq!(revoke(&tables, 10), Revocation::Revoked);
            assert!(tables.take_table(TableId(1)).is_some());
            assert!(tables.take_table(TableId(1)).is_none(), "it is a hole");
            assert!(grant(&tables, &[8]).is_err());
        }
        let small = Seen(Arc::new(OwnEntries::new(ENTRIES_RESERVED + 1).unwrap()));
        assert!(tables.put_table(TableId(1), small).is_err());
        let infos = tables.infos();
        assert_eq!(infos.iter().map(|t| t.table.0).collect::<Vec<_>>(), [0, 2]);
    }

    #[test]
    fn local_what_is_mapped_or_rests_keeps_its_table() {
        let (tables, last) = three(10_000);
        let given = grant(&tables, &[16]).unwrap();
        let entry = &last.entries()[given[0].gref.0 as usize];
        assert!(entry.map(DomId(1), Access::ReadOnly).is_some());
        assert_eq!(revoke(&tables, 16), Revocation::StillMapped);
        assert!(tables.take_table(TableId(2)).is_none());
        entry.clear_mapped();
        assert_eq!(revoke(&tables, 16), Revocation::Revoked);
        assert!(tables.take_table(TableId(2)).is_none(), "a number rests");
        tables.inner.lock().end_rests_at(u64::MAX);
        assert_eq!(tables.infos()[1].entries_used, 0);
        // Somebody else wrote an entry.
        last.entries()[9].publish(DomId(9), Access::ReadOnly, 1, false);
        assert!(tables.take_table(TableId(2)).is_none());
        last.entries()[9].end();
        assert!(tables.take_table(TableId(2)).is_some());
    }

    #[test]
    fn local_a_found_table_rests_before_it_can_go() {
        let tables = GrantTables::new(Eight).resting_ms(10_000);
        tables.add_found_table(Seen(memory()), |_| None).unwrap();
        assert!(tables.take_table(TableId(0)).is_none());
        tables.inner.lock().end_rests_at(u64::MAX);
        assert!(tables.take_table(TableId(0)).is_some());
    }
}
