//! Going over all grants: listing them, and comparing tables and ledger.

use super::{GrantTables, Inner, Placement};
use crate::backend::{GrantInfo, LedgerAudit};
use crate::entry::EntryMemory;
use crate::ids::DomId;
use crate::ledger::Slot;
use crate::limits::{AUDIT_LINES_MAX, ENTRIES_RESERVED, GRANTS_PER_LOCK_HOLD};
use std::ops::Range;

impl<M: EntryMemory, P: Placement> GrantTables<M, P> {
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
        let held = inner.ledger.held(slot);
        let (table, gref) = inner.locate(slot);
        let Some(entry) = inner.tables[table].entries().get(gref as usize) else {
            // A hole.
            let line =
                held.map(|held| format!("the ledger has {held:?} in table {table}, which is gone"));
            return audit_line(audit, line);
        };
        let state = entry.state();
        audit.entries += u64::from(!state.is_free() && gref >= ENTRIES_RESERVED);
        audit.grants += u64::from(held.is_some());
        if let Some(frame) = inner.left_over.get(&slot) {
            audit.left_over += 1;
            let line = match frame {
                Some(_) if held.is_none() => None,
                _ => Some(format!(
                    "entry {table}:{gref} was left over by an earlier daemon, {state:?} of {frame:?}"
                )),
            };
            return audit_line(audit, line);
        }
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
                    && state.dom == self.placement.domid(held.dom)
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
