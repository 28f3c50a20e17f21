//! Grant tables with their ledger: every change goes through both, under one lock.
//!
//! Both backends use this. What differs is where a frame's entry must be (`xen`: in the table of
//! the cache domain that holds the frame), what the entry calls the frame, and who sets the bits
//! that show a mapping (`xen`: the hypervisor; `local`: the daemon itself).

mod audit;
mod holes;
mod left_over;
mod rest;

use crate::backend::{Access, DomainEnd, Revocation};
use crate::entry::{Entry, EntryMemory};
use crate::error::GrantError;
use crate::ids::{DomId, FrameNo, Grant, GrantRef, TableId};
use crate::ledger::{Ledger, Slot};
use crate::limits::{ENTRIES_RESERVED, FRAMES_MAX, GRANTS_PER_LOCK_HOLD};
use parking_lot::Mutex;
use rest::Rest;
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

/// Where frames are.
pub trait Placement: Send + Sync {
    /// The table that entries of `frame` go into (as numbered by [`GrantTables::add_table`]) and
    /// the frame as its entries call it.
    fn place(&self, frame: FrameNo) -> (TableId, u32);

    /// Whom entries of a session name.
    #[inline]
    fn domid(&self, dom: DomId) -> DomId {
        dom
    }
}

struct Table<M> {
    /// `None`: a hole, where a table may be put.
    memory: Option<M>,
    /// The slot of entry 0.
    base: Slot,
}

impl<M: EntryMemory> Table<M> {
    /// None of a hole.
    #[inline]
    fn entries(&self) -> &[Entry] {
        self.memory.as_ref().map_or(&[], M::entries)
    }
}

struct Inner<M> {
    ledger: Ledger,
    tables: Vec<Table<M>>,
    /// Entries of an earlier life that are in use still, with their frames.
    left_over: BTreeMap<Slot, Option<FrameNo>>,
    rest: Rest,
}

/// Tables, ledger, and where frames are.
pub struct GrantTables<M, P> {
    inner: Mutex<Inner<M>>,
    placement: P,
}

impl<M: EntryMemory> Inner<M> {
    /// Slots for the entries of the next table.
    fn add_span(&mut self, entries: usize) -> Result<(TableId, Slot), GrantError> {
        let full = |entries| GrantError::TableFull { entries };
        let have = u64::from(self.ledger.slots());
        let id = u16::try_from(self.tables.len()).map_err(|_| full(have))?;
        let entries = u32::try_from(entries).map_err(|_| full(have))?;
        let base = self
            .ledger
            .add_span(entries, ENTRIES_RESERVED)
            .ok_or_else(|| full(have))?;
        Ok((TableId(id), base))
    }

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
    fn entry(&self, slot: Slot) -> &Entry {
        let (table, gref) = self.locate(slot);
        &self.tables[table].entries()[gref as usize]
    }

    fn grant_of(&self, slot: Slot) -> Grant {
        let (table, gref) = self.locate(slot);
        // Tables are numbered by add_table, which keeps the count within a TableId.
        Grant {
            table: TableId(table as u16),
            gref: GrantRef(gref),
        }
    }

    /// Ends the grant of `frame` that the slot has, if `free` frees its entry.
    #[inline]
    fn end(&mut self, slot: Slot, frame: FrameNo, free: impl FnOnce(&Entry) -> bool) -> bool {
        let (table, gref) = self.locate(slot);
        let freed = free(&self.tables[table].entries()[gref as usize]);
        if freed {
            self.ledger.remove(slot, frame);
            if self.rest.ms == 0 {
                self.ledger.put_back(table, slot);
            } else {
                self.rest.begin(table, slot);
            }
        }
        freed
    }
}

impl<M: EntryMemory, P: Placement> GrantTables<M, P> {
    /// No tables yet.
    pub fn new(placement: P) -> Self {
        Self {
            inner: Mutex::new(Inner {
                ledger: Ledger::default(),
                tables: Vec::new(),
                left_over: BTreeMap::new(),
                rest: Rest::default(),
            }),
            placement,
        }
    }

    /// Adds a table, all of whose entries but the reserved ones are free.
    pub fn add_table(&self, memory: M) -> Result<TableId, GrantError> {
        let inner = &mut *self.inner.lock();
        let (id, base) = inner.add_span(memory.entries().len())?;
        inner.tables.push(Table {
            memory: Some(memory),
            base,
        });
        Ok(id)
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
            return Err(not_a_guest(dom));
        }
        out.reserve(frames.len());
        let mut inner = self.inner.lock();
        inner.end_rests();
        // Mostly all are new and fit: one pass tells that and records them.
        let Some((id, slots)) = self.add_all(&mut inner, frames, dom, access) else {
            return self.grant_others(&mut inner, frames, (dom, access, mapped), out);
        };
        let grefs = self.publish(&inner, id, slots, frames, (dom, access, mapped));
        drop(inner);
        out.extend(grants(id, grefs));
        Ok(())
    }

    /// [`Ledger::add_all`], of frames whose entries are all in one table.
    #[inline]
    fn add_all(
        &self,
        inner: &mut Inner<M>,
        frames: &[FrameNo],
        dom: DomId,
        access: Access,
    ) -> Option<(TableId, Range<Slot>)> {
        let (batch, id) = self.of_one_table(*frames.first()?, frames);
        if batch.len() < frames.len() {
            return None;
        }
        let slots = inner.ledger.add_all(id.0.into(), frames, dom, access)?;
        Some((id, slots))
    }

    /// [`GrantTables::grant`] of whatever it is: frames that are there already, in several tables,
    /// more than the room thought of, or nothing that can be granted.
    #[inline(never)]
    fn grant_others(
        &self,
        inner: &mut Inner<M>,
        frames: &[FrameNo],
        (dom, access, mapped): (DomId, Access, bool),
        out: &mut Vec<Grant>,
    ) -> Result<(), GrantError> {
        self.check_grant(inner, dom, access, frames)?;
        let mut rest = frames;
        while let Some(&frame) = rest.first() {
            let (batch, id) = self.of_one_table(frame, rest);
            let slots = inner.ledger.add(id.0.into(), batch, dom, access);
            let (new, behind) = rest.split_at(slots.len());
            rest = behind;
            let grefs = self.publish(inner, id, slots, new, (dom, access, mapped));
            out.extend(grants(id, grefs));
            // What stopped it is a frame that is there, or the end of a run of free slots.
            if let [frame, behind @ ..] = behind
                && let Some(slot) = inner.ledger.find(*frame, dom)
            {
                if mapped {
                    inner.entry(slot).set_mapped(access);
                }
                out.push(inner.grant_of(slot));
                rest = behind;
            }
        }
        Ok(())
    }

    /// Writes the entries of slots that the ledger has given to `frames`; gives their numbers.
    #[inline]
    fn publish(
        &self,
        inner: &Inner<M>,
        id: TableId,
        slots: Range<Slot>,
        frames: &[FrameNo],
        (dom, access, mapped): (DomId, Access, bool),
    ) -> Range<u32> {
        let table = &inner.tables[usize::from(id.0)];
        let grefs = slots.start - table.base..slots.end - table.base;
        let entries = &table.entries()[grefs.start as usize..grefs.end as usize];
        let dom = self.placement.domid(dom);
        for (entry, &frame) in entries.iter().zip(frames) {
            entry.publish(dom, access, self.placement.place(frame).1, mapped);
        }
        grefs
    }

    /// The first of `frames`, up to one whose entry is in another table than that of `first`, and
    /// this table.
    #[inline]
    fn of_one_table<'f>(&self, first: FrameNo, frames: &'f [FrameNo]) -> (&'f [FrameNo], TableId) {
        let table = self.placement.place(first).0;
        let other = frames
            .iter()
            .position(|&frame| self.placement.place(frame).0 != table);
        (&frames[..other.unwrap_or(frames.len())], table)
    }

    /// Everything that can refuse a grant, so that granting cannot stop half-way: entries that a
    /// guest has seen cannot be taken back.
    fn check_grant(
        &self,
        inner: &mut Inner<M>,
        dom: DomId,
        access: Access,
        frames: &[FrameNo],
    ) -> Result<(), GrantError> {
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
            return Ok(());
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
                let entries = inner.tables[table].entries().len() as u64;
                return Err(GrantError::TableFull { entries });
            }
        }
        Ok(())
    }

    /// [`crate::Backend::revoke`].
    pub fn revoke(&self, dom: DomId, frames: &[FrameNo], out: &mut Vec<Revocation>) {
        let inner = &mut *self.inner.lock();
        out.extend(
            frames
                .iter()
                .map(|&frame| match inner.ledger.find(frame, dom) {
                    None => Revocation::NotGranted,
                    Some(slot) if inner.end(slot, frame, Entry::revoke) => Revocation::Revoked,
                    Some(_) => Revocation::StillMapped,
                }),
        );
    }

    /// Does an entry of `dom`'s for `frame` show a mapping?
    pub fn is_mapped(&self, dom: DomId, frame: FrameNo) -> bool {
        let inner = self.inner.lock();
        let slot = inner.ledger.find(frame, dom);
        slot.is_some_and(|slot| inner.entry(slot).state().is_mapped())
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
            for &frame in frames {
                while let Some(slot) = inner.ledger.newest_of(frame) {
                    gone.push((frame, inner.ledger.dom_of(slot)));
                    inner.end(slot, frame, end_unmapped);
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
        let free = if unmapped {
            end_unmapped
        } else {
            Entry::revoke
        };
        while left > 0 {
            let inner = &mut *self.inner.lock();
            let batch = left.min(u64::from(GRANTS_PER_LOCK_HOLD));
            left -= batch;
            for _ in 0..batch {
                let Some(slot) = inner.ledger.oldest(dom) else {
                    break;
                };
                let frame = inner.ledger.frame_of(slot);
                if inner.end(slot, frame, free) {
                    end.revoked += 1;
                } else {
                    end.still_mapped.push(frame);
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

    /// Does anybody hold a grant of `frame` for writing?
    pub fn is_writable(&self, frame: FrameNo) -> bool {
        let inner = self.inner.lock();
        let mut slots = inner.ledger.slots_of(frame);
        slots.any(|slot| inner.ledger.access_of(slot) == Access::ReadWrite)
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
}

#[inline]
fn grants(table: TableId, grefs: Range<u32>) -> impl ExactSizeIterator<Item = Grant> {
    grefs.map(move |gref| Grant {
        table,
        gref: GrantRef(gref),
    })
}

#[cold]
fn not_a_guest(dom: DomId) -> GrantError {
    GrantError::BadRange(format!("{dom} is not a guest's domid"))
}

/// Frees an entry that nobody maps any more, as the daemon knows in the hypervisor's place.
fn end_unmapped(entry: &Entry) -> bool {
    entry.end();
    true
}
