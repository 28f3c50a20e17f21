//! What the audit compares beside ledger and tables: records against homes, domains against the
//! xenstore.

use super::XenBackend;
use super::frames::Domains;
use super::records::Found;
use crate::backend::{Access, LedgerAudit};
use crate::ids::FrameNo;
use crate::limits::AUDIT_LINES_MAX;

impl XenBackend {
    /// Every frame's record against the home that it names, and every page of every home against its
    /// frame's record.
    pub(super) fn audit_records(&self, audit: &mut LedgerAudit) {
        let domains = &*self.domains.read();
        let left = self.retry_left(domains);
        for domain in domains.there() {
            for frame in domain.frames() {
                // An entry of an earlier daemon is in use: its record is that daemon's.
                if left.binary_search(&frame).is_err() {
                    differs(audit, self.audit_record(domains, frame));
                }
            }
        }
        let homes: Vec<_> = self.homes.read().values().cloned().collect();
        for home in homes {
            for &(page, frame) in &*home.pages.lock() {
                let wanted = |within| self.record(home.id, page, within);
                let found = found(domains, frame);
                if found.is_none_or(|(found, within)| !found.is_of(wanted(within))) {
                    differs(
                        audit,
                        Some(format!(
                            "page {page} of {:?} is in frame {}, whose record says {:?}",
                            home.id, frame.0, found
                        )),
                    );
                }
            }
        }
    }

    /// What is granted for writing is dirty.
    pub(super) fn audit_writable(&self, audit: &mut LedgerAudit) {
        self.tables.each_grant(&mut |grant| {
            if grant.access != Access::ReadWrite {
                return;
            }
            let is_dirty = |found| matches!(found, Found::Record(record) if record.is_dirty);
            let domains = &*self.domains.read();
            let found = found(domains, grant.frame).map(|(found, _)| found);
            // It may have been taken back since.
            if !found.is_some_and(is_dirty) && self.tables.is_writable(grant.frame) {
                let line = format!(
                    "frame {} is granted for writing, its record says {found:?}",
                    grant.frame.0
                );
                differs(audit, Some(line));
            }
        });
    }

    fn audit_record(&self, domains: &Domains, frame: FrameNo) -> Option<String> {
        let (found_now, _) = found(domains, frame)?;
        let record = match found_now {
            Found::Nothing => return None,
            // Perhaps half of it was written when we looked: its home tells.
            Found::Torn | Found::Record(_) => found_now,
        };
        let homes: Vec<_> = match record {
            Found::Record(record) => self
                .homes
                .read()
                .get(&record.home)
                .cloned()
                .into_iter()
                .collect(),
            _ => self.homes.read().values().cloned().collect(),
        };
        for home in homes {
            let pages = home.pages.lock();
            // With the home's lock: it says the same now, or it was cleared meanwhile.
            match found(domains, frame)?.0 {
                Found::Nothing => return None,
                Found::Record(record)
                    if (record.home, record.life) == (home.id, self.life)
                        && pages.contains(&(record.page, frame)) =>
                {
                    return None;
                }
                _ => {}
            }
        }
        match found(domains, frame)?.0 {
            Found::Nothing => None,
            found => Some(format!(
                "frame {} says {found:?}, no home has it there",
                frame.0
            )),
        }
    }

    /// The domains are there and called as they were.
    pub(super) fn audit_domains(&self, audit: &mut LedgerAudit) {
        let ours = || -> Vec<(u32, u16)> {
            let domains = self.domains.read();
            domains.there().map(|d| (d.number, d.domid)).collect()
        };
        let before = ours();
        let found = self.toolstack.find();
        let after = ours();
        // Not one that was made or ended meanwhile.
        for (number, domid) in before.into_iter().filter(|domain| after.contains(domain)) {
            let line = match &found {
                Ok(found) if found.get(&number) == Some(&domid) => None,
                Ok(_) => Some(format!(
                    "cache domain {} (domain {domid}) is gone: restart the daemon",
                    self.toolstack.name(number),
                )),
                Err(error) => Some(format!("cache domains cannot be looked up: {error}")),
            };
            differs(audit, line);
        }
    }
}

/// What a frame's record says, and the frame's number in its domain.
fn found(domains: &Domains, frame: FrameNo) -> Option<(Found, u32)> {
    let (domain, within) = domains.of(frame).ok()?;
    Some((domain.records().ok()?.get(within), within))
}

fn differs(audit: &mut LedgerAudit, line: Option<String>) {
    if audit.differences.len() < AUDIT_LINES_MAX {
        audit.differences.extend(line);
    }
}
