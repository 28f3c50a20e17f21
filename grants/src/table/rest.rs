//! Entries' numbers rest before they are used again.
//!
//! A guest that was told an entry may map it a little later than the daemon revokes it: by the number,
//! which would then stand for another page. So a number is used again only when every guest that was
//! told it has either mapped it, or knows that it lost its lease and maps nothing. (local: guests map no
//! entries, nothing rests.)

use super::{GrantTables, Inner};
use crate::entry::EntryMemory;
use crate::ledger::Slot;
use std::collections::VecDeque;
use std::ops::Range;

/// Numbers that rest, and until when.
#[derive(Debug, Default)]
pub(super) struct Rest {
    /// How long, in ms; 0: not at all.
    pub ms: u64,
    /// Table and slot, those that began to rest first.
    slots: VecDeque<(u64, usize, Slot)>,
    /// Whole tables.
    tables: Vec<(u64, usize, Range<Slot>)>,
}

impl Rest {
    pub(super) fn begin(&mut self, table: usize, slot: Slot) {
        self.slots.push_back((now_ms() + self.ms, table, slot));
    }

    pub(super) fn begin_table(&mut self, table: usize, slots: Range<Slot>) {
        self.tables.push((now_ms() + self.ms, table, slots));
    }

    pub(super) fn has_table(&self, table: usize) -> bool {
        self.tables.iter().any(|(_, resting, _)| *resting == table)
    }
}

impl<M: EntryMemory> Inner<M> {
    /// Lets numbers be used again that have rested.
    #[inline]
    pub(super) fn end_rests(&mut self) {
        if !self.rest.slots.is_empty() || !self.rest.tables.is_empty() {
            self.end_rests_at(now_ms());
        }
    }

    #[inline(never)]
    pub(super) fn end_rests_at(&mut self, now_ms: u64) {
        while let Some(&(until_ms, table, slot)) = self.rest.slots.front() {
            if until_ms > now_ms {
                break;
            }
            self.rest.slots.pop_front();
            self.ledger.put_back(table, slot);
        }
        for (until_ms, table, slots) in std::mem::take(&mut self.rest.tables) {
            if until_ms > now_ms {
                self.rest.tables.push((until_ms, table, slots));
                continue;
            }
            // Nothing of it was granted yet.
            let left = &self.left_over;
            let is_out = |slot| left.contains_key(&slot);
            self.ledger.leave_out(table, slots, is_out);
        }
    }
}

impl<M, P> GrantTables<M, P> {
    /// Numbers rest so long before they are used again, in ms; said before any table is added.
    #[must_use]
    pub fn resting_ms(mut self, ms: u64) -> Self {
        self.inner.get_mut().rest.ms = ms;
        self
    }
}

/// CLOCK_BOOTTIME, as of leases.
fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    (now.tv_sec as u64).saturating_mul(1000) + now.tv_nsec as u64 / 1_000_000
}

#[cfg(test)]
mod tests {
    use crate::backend::{Access, Revocation};
    use crate::entry::OwnEntries;
    use crate::error::GrantError;
    use crate::ids::{DomId, FrameNo, Grant, TableId};
    use crate::limits::ENTRIES_RESERVED;
    use crate::table::{GrantTables, Placement};

    struct OneTable;

    impl Placement for OneTable {
        fn place(&self, frame: FrameNo) -> (TableId, u32) {
            (TableId(0), frame.0)
        }
    }

    const ROOM: u32 = 4;
    const REST_MS: u64 = 10_000;

    fn grant(tables: &GrantTables<OwnEntries, OneTable>, frame: u32) -> Result<Grant, GrantError> {
        let mut out = Vec::new();
        tables.grant(
            DomId(1),
            Access::ReadOnly,
            &[FrameNo(frame)],
            false,
            &mut out,
        )?;
        Ok(out[0])
    }

    fn pass(tables: &GrantTables<OwnEntries, OneTable>, ms: u64) {
        let now_ms = super::now_ms();
        tables.inner.lock().end_rests_at(now_ms + ms);
    }

    #[test]
    fn local_a_number_is_not_used_again_before_it_has_rested() {
        let tables = GrantTables::new(OneTable).resting_ms(REST_MS);
        let memory = OwnEntries::new(ENTRIES_RESERVED + ROOM).unwrap();
        tables.add_table(memory).unwrap();
        let first = grant(&tables, 1).unwrap();
        let mut answers = Vec::new();
        tables.revoke(DomId(1), &[FrameNo(1)], &mut answers);
        assert_eq!(answers, [Revocation::Revoked]);
        for frame in 2..5 {
            assert_ne!(grant(&tables, frame).unwrap(), first);
        }
        assert!(matches!(
            grant(&tables, 5),
            Err(GrantError::TableFull { .. })
        ));
        pass(&tables, REST_MS - 1000);
        assert!(grant(&tables, 5).is_err());
        pass(&tables, REST_MS + 1000);
        assert_eq!(grant(&tables, 5).unwrap(), first);
        assert_eq!(tables.audit().differences, Vec::<String>::new());
    }

    #[test]
    fn local_a_found_table_rests_as_a_whole() {
        let tables = GrantTables::new(OneTable).resting_ms(REST_MS);
        let memory = OwnEntries::new(ENTRIES_RESERVED + ROOM).unwrap();
        tables.add_found_table(memory, |_| None).unwrap();
        assert!(matches!(
            grant(&tables, 0),
            Err(GrantError::TableFull { .. })
        ));
        pass(&tables, REST_MS + 1000);
        for frame in 0..ROOM {
            grant(&tables, frame).unwrap();
        }
        assert!(grant(&tables, ROOM).is_err());
        assert_eq!(tables.audit().differences, Vec::<String>::new());
    }
}
