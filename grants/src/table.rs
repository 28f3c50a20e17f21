//! Grant tables with their ledger: every change goes through both, under one lock.
//!
//! Both backends use this. What differs is where a frame's entry must be (`xen`: in the table of
//! the cache domain that holds the frame), what the entry calls the frame, and who sets the bits
//! that show a mapping (`xen`: the hypervisor; `local`: the daemon itself).

use crate::backend::{Access, DomainEnd, GrantInfo, LedgerAudit, Revocation};
use crate::entry::EntryMemory;
use crate::error::GrantError;
use crate::ids::{DomId, FrameNo, Grant, GrantRef, TableId};
use crate::ledger::{Ledger, Slot};
use crate::limits::{AUDIT_LINES_MAX, ENTRIES_RESERVED, FRAMES_MAX, GRANTS_PER_LOCK_HOLD};
use parking_lot::Mutex;
use std::collections::HashSet;
use std::ops::Range;

/// Where frames are.
pub trait Placement: Send + Sync {
    /// The table that entries of `frame` go into (as numbered by [`GrantTables::add_table`]) and
    /// the frame as its entries call it.
    fn place(&self, frame: FrameNo) -> (TableId, u32);
}

struct Table<M> {
    memory: M,
    /// The slot of entry 0.
    base: Slot,
}

struct Inner<M> {
    ledger: Ledger,
    tables: Vec<Table<M>>,
}

/// Tables, ledger, and where frames are.
pub struct GrantTables<M, P> {
    inner: Mutex<Inner<M>>,
    placement: P,
}

impl<M: EntryMemory> Inner<M> {
    /// The table of a slot and its entry's number there.
    #[inline]
    fn locate(&self, slot: Slot) -> (usize, u32) {
        let table = match self.tables.as_slice() {
            [_] => 0,
            tables => tables
                .partition_point(|table| table.base <= slot)
                .saturating_sub(1),
        };
        (table, slot - self.tables[table].base)
    }

    #[inline]
    fn entry(&self, slot: Slot) -> &crate::entry::Entry {
        let (table, gref) = self.locate(slot);
        &self.tables[table].memory.entries()[gref as usize]
    }

    fn grant_of(&self, slot: Slot) -> Grant {
        let (table, gref) = self.locate(slot);
        // Tables are numbered by add_table, which keeps the count within a TableId.
        Grant {
            table: TableId(table as u16),
            gref: GrantRef(gref),
        }
    }

    /// Revokes a slot's entry and ends its grant. `false`: it is mapped.
    fn revoke(&mut self, slot: Slot) -> bool {
        let revoked = self.entry(slot).revoke();
        if revoked {
            let (table, _) = self.locate(slot);
            self.ledger.remove(table, slot);
        }
        revoked
    }
}

impl<M: EntryMemory, P: Placement> GrantTables<M, P> {
    /// No tables yet.
    pub fn new(placement: P) -> Self {
        Self {
            inner: Mutex::new(Inner {
                ledger: Ledger::default(),
                tables: Vec::new(),
            }),
            placement,
        }
    }

    /// Adds a table, all of whose entries but the reserved ones are free.
    pub fn add_table(&self, memory: M) -> Result<TableId, GrantError> {
        let full = |entries| GrantError::TableFull { entries };
        let inner = &mut *self.inner.lock();
        let have = u64::from(inner.ledger.slots());
        let id = u16::try_from(inner.tables.len()).map_err(|_| full(have))?;
        let entries = u32::try_from(memory.entries().len()).map_err(|_| full(have))?;
        let base = inner
            .ledger
            .add_span(entries, ENTRIES_RESERVED)
            .ok_or_else(|| full(have))?;
        inner.tables.push(Table { memory, base });
        Ok(TableId(id))
    }

    /// [`crate::Backend::grant`]. With `mapped` the entries show a mapping from the start, and
    /// those that were there already show one again.
    pub fn grant(
        &self,
        dom: DomId,
        access: Access,
        frames: &[FrameNo],
        mapped: bool,
        out: &mut Vec<Grant>,
    ) -> Result<(), GrantError> {
        if dom.0 >= DomId::FIRST_RESERVED {
            return Err(GrantError::BadRange(format!(
                "{dom} is not a guest's domid"
            )));
        }
        let inner = &mut *self.inner.lock();
        let there = self.check_grant(inner, dom, access, frames)?;
        out.reserve(frames.len());
        let mut rest = frames;
        while let Some(&frame) = rest.first() {
            let none_held = there == 0 && rest.len() == frames.len();
            let there_now = if none_held {
                None
            } else {
                inner.ledger.find(frame, dom)
            };
            if let Some(slot) = there_now {
                if mapped {
                    inner.entry(slot).set_mapped(access);
                }
                out.push(inner.grant_of(slot));
                rest = &rest[1..];
                continue;
            }
            let (batch, id) = self.of_one_table(rest);
            let slots = inner
                .ledger
                .add(usize::from(id.0), batch, dom, access, none_held);
            let table = &inner.tables[usize::from(id.0)];
            let grefs = slots.start - table.base..slots.end - table.base;
            let entries = &table.memory.entries()[grefs.start as usize..grefs.end as usize];
            for (entry, &frame) in entries.iter().zip(batch) {
                entry.publish(dom, access, self.placement.place(frame).1, mapped);
            }
            rest = &rest[entries.len()..];
            out.extend(grefs.map(|gref| Grant {
                table: id,
                gref: GrantRef(gref),
            }));
        }
        Ok(())
    }

    /// The first of `frames` (there is one) whose entries are all in one table, and the table.
    #[inline]
    fn of_one_table<'f>(&self, frames: &'f [FrameNo]) -> (&'f [FrameNo], TableId) {
        let table = self.placement.place(frames[0]).0;
        let other = frames
            .iter()
            .position(|&frame| self.placement.place(frame).0 != table);
        (&frames[..other.unwrap_or(frames.len())], table)
    }

    /// Everything that can refuse a grant, so that granting cannot stop half-way: entries that a
    /// guest has seen cannot be taken back. Gives how many of the grants are there already.
    #[inline]
    fn check_grant(
        &self,
        inner: &mut Inner<M>,
        dom: DomId,
        access: Access,
        frames: &[FrameNo],
    ) -> Result<usize, GrantError> {
        let end = frames.iter().fold(0, |end, frame| frame.0.max(end));
        if end >= FRAMES_MAX {
            return Err(GrantError::BadRange(format!(
                "frame {end} is not below {FRAMES_MAX}"
            )));
        }
        inner.ledger.reserve_frames(end + 1);
        let mut there = 0;
        for &frame in frames {
            if let Some(slot) = inner.ledger.find(frame, dom) {
                if inner.ledger.access_of(slot) != access {
                    return Err(GrantError::BadRange(format!(
                        "{dom} holds frame {} otherwise: revoke that grant first",
                        frame.0
                    )));
                }
                there += 1;
            }
        }
        let wanted = frames.len() - there;
        let fits = |wanted: u64| {
            inner.ledger.count(dom).saturating_add(wanted) <= inner.ledger.grants_max(dom)
        };
        if fits(wanted as u64)
            && inner.tables.len() == 1
            && wanted as u64 <= u64::from(inner.ledger.available(0))
        {
            return Ok(there);
        }
        // A frame that is named twice gets one entry: count again, exactly.
        let mut new = HashSet::new();
        let mut of_table = vec![0u64; inner.tables.len()];
        for &frame in frames {
            if inner.ledger.find(frame, dom).is_none() && new.insert(frame) {
                let table = usize::from(self.placement.place(frame).0.0);
                *of_table
                    .get_mut(table)
                    .ok_or(GrantError::TableFull { entries: 0 })? += 1;
            }
        }
        if !fits(new.len() as u64) {
            return Err(GrantError::GrantsOverLimit {
                dom,
                wanted: inner.ledger.count(dom).saturating_add(new.len() as u64),
                grants_max: inner.ledger.grants_max(dom),
            });
        }
        for (table, &wanted) in of_table.iter().enumerate() {
            if wanted > u64::from(inner.ledger.available(table)) {
                let entries = inner.tables[table].memory.entries().len() as u64;
                return Err(GrantError::TableFull { entries });
            }
        }
        Ok(there)
    }

    /// [`crate::Backend::revoke`].
    pub fn revoke(&self, dom: DomId, frames: &[FrameNo], out: &mut Vec<Revocation>) {
        let inner = &mut *self.inner.lock();
        out.extend(
            frames
                .iter()
                .map(|&frame| match inner.ledger.find(frame, dom) {
                    None => Revocation::NotGranted,
                    Some(slot) if inner.revoke(slot) => Revocation::Revoked,
                    Some(_) => Revocation::StillMapped,
                }),
        );
    }

    /// Where the daemon stands in for the hypervisor: `dom` maps `frames` no more.
    pub fn clear_mapped(&self, dom: DomId, frames: &[FrameNo]) {
        let inner = self.inner.lock();
        for &frame in frames {
            if let Some(slot) = inner.ledger.find(frame, dom) {
                inner.entry(slot).clear_mapped();
            }
        }
    }

    /// Where the daemon stands in for the hypervisor: nobody maps `frames` any more. Ends all
    /// their grants; `ended` is called for each, without the lock.
    pub fn end_all(&self, frames: &[FrameNo], ended: &mut dyn FnMut(FrameNo, DomId)) {
        let mut gone = Vec::new();
        {
            let inner = &mut *self.inner.lock();
            let mut slots = Vec::new();
            for &frame in frames {
                slots.clear();
                slots.extend(inner.ledger.slots_of(frame));
                for &slot in &slots {
                    let dom = inner.ledger.dom_of(slot);
                    inner.entry(slot).clear_mapped();
                    if inner.revoke(slot) {
                        gone.push((frame, dom));
                    }
                }
            }
        }
        for (frame, dom) in gone {
            ended(frame, dom);
        }
    }

    /// [`crate::Backend::domain_ended`]. With `unmapped` the daemon stands in for the hypervisor,
    /// whose bits clear when a domain dies.
    pub fn domain_ended(&self, dom: DomId, unmapped: bool) -> DomainEnd {
        let mut end = DomainEnd::default();
        let mut left = self.inner.lock().ledger.count(dom);
        let mut slots = Vec::new();
        while left > 0 {
            let inner = &mut *self.inner.lock();
            slots.clear();
            let batch = left.min(u64::from(GRANTS_PER_LOCK_HOLD));
            slots.extend(inner.ledger.slots_by_age(dom).take(batch as usize));
            if slots.is_empty() {
                break;
            }
            left = left.saturating_sub(slots.len() as u64);
            for &slot in &slots {
                if unmapped {
                    inner.entry(slot).clear_mapped();
                }
                if inner.revoke(slot) {
                    end.revoked += 1;
                } else {
                    end.still_mapped.push(inner.ledger.frame_of(slot));
                    // Out of the way of the next batch.
                    inner.ledger.renew(slot);
                }
            }
        }
        self.set_grants_max(dom, crate::limits::GRANTS_PER_DOMAIN_DEFAULT);
        end
    }

    /// [`crate::Backend::set_grants_max`].
    pub fn set_grants_max(&self, dom: DomId, grants_max: u64) {
        if dom.0 < DomId::FIRST_RESERVED {
            self.inner.lock().ledger.set_grants_max(dom, grants_max);
        }
    }

    /// [`crate::Backend::holders`].
    pub fn holders(&self, frame: FrameNo, out: &mut Vec<DomId>) {
        let inner = self.inner.lock();
        out.extend(
            inner
                .ledger
                .slots_of(frame)
                .map(|slot| inner.ledger.dom_of(slot)),
        );
    }

    /// [`crate::Backend::holder_count`].
    pub fn holder_count(&self, frame: FrameNo) -> u32 {
        self.inner.lock().ledger.slots_of(frame).count() as u32
    }

    /// The first of `frames` that anybody holds a grant of.
    pub fn first_granted(&self, frames: &[FrameNo]) -> Option<FrameNo> {
        let inner = self.inner.lock();
        frames
            .iter()
            .copied()
            .find(|&frame| inner.ledger.slots_of(frame).next().is_some())
    }

    /// [`crate::Backend::grant_count`].
    pub fn grant_count(&self, dom: DomId) -> u64 {
        self.inner.lock().ledger.count(dom)
    }

    /// [`crate::Backend::oldest_grants`].
    pub fn oldest_grants(&self, dom: DomId, max: usize, out: &mut Vec<FrameNo>) {
        let inner = self.inner.lock();
        out.extend(
            inner
                .ledger
                .slots_by_age(dom)
                .take(max)
                .map(|slot| inner.ledger.frame_of(slot)),
        );
    }

    /// Slots in pieces that one hold of the lock may go over.
    fn pieces(&self) -> impl Iterator<Item = Range<Slot>> {
        let slots = self.inner.lock().ledger.slots();
        (0..slots)
            .step_by(GRANTS_PER_LOCK_HOLD as usize)
            .map(move |from| from..slots.min(from.saturating_add(GRANTS_PER_LOCK_HOLD)))
    }

    /// [`crate::Backend::each_grant`]: `visit` is called without the lock; what changes meanwhile
    /// may or may not be shown.
    pub fn each_grant(&self, visit: &mut dyn FnMut(GrantInfo)) {
        let mut infos = Vec::new();
        for piece in self.pieces() {
            {
                let inner = self.inner.lock();
                infos.extend(piece.filter_map(|slot| {
                    let held = inner.ledger.held(slot)?;
                    Some(GrantInfo {
                        grant: inner.grant_of(slot),
                        dom: held.dom,
                        frame: held.frame,
                        access: held.access,
                        mapped: inner.entry(slot).state().is_mapped(),
                    })
                }));
            }
            infos.drain(..).for_each(&mut *visit);
        }
    }

    /// [`crate::Backend::audit`]: every entry against its slot of the ledger, every list link, every
    /// count. Goes on while others grant and revoke: each comparison is under the lock.
    pub fn audit(&self) -> LedgerAudit {
        let mut audit = LedgerAudit::default();
        for piece in self.pieces() {
            let inner = self.inner.lock();
            for slot in piece {
                self.audit_slot(&inner, slot, &mut audit);
            }
        }
        let domains = self.inner.lock().ledger.domains();
        for dom in 0..domains {
            let line = self.inner.lock().ledger.check_domain(DomId(dom));
            audit_line(&mut audit, line);
        }
        audit
    }

    fn audit_slot(&self, inner: &Inner<M>, slot: Slot, audit: &mut LedgerAudit) {
        let state = inner.entry(slot).state();
        let held = inner.ledger.held(slot);
        let (table, gref) = inner.locate(slot);
        audit.entries += u64::from(!state.is_free() && gref >= ENTRIES_RESERVED);
        audit.grants += u64::from(held.is_some());
        let line = match held {
            // The reserved entries are the toolstack's business.
            None if state.is_free() || gref < ENTRIES_RESERVED => None,
            None => Some(format!(
                "entry {table}:{gref} is in use ({state:?}) and not in the ledger"
            )),
            Some(held) => {
                let (id, name) = self.placement.place(held.frame);
                let equal = usize::from(id.0) == table
                    && state.access() == Some(held.access)
                    && state.dom == held.dom
                    && state.frame == name;
                if equal {
                    inner.ledger.check_slot(slot)
                } else {
                    Some(format!(
                        "entry {table}:{gref} is {state:?}, the ledger has {held:?}"
                    ))
                }
            }
        };
        audit_line(audit, line);
    }
}

fn audit_line(audit: &mut LedgerAudit, line: Option<String>) {
    if audit.differences.len() < AUDIT_LINES_MAX {
        audit.differences.extend(line);
    }
}
