//! The set of cache domains as the budget moves: made, ended, all ended at the stop.

use super::XenBackend;
use crate::error::GrantError;
use crate::ids::TableId;
use std::sync::atomic::Ordering;

impl XenBackend {
    /// Makes what is missing of the domains that hold `frames` frames.
    pub(super) fn make_domains(&self, frames: u32) -> Result<(), GrantError> {
        let _resize = self.resize.lock();
        let mut made = Vec::new();
        for number in 0..self.layout.domains(frames)? {
            if self.domains.read().get(number).is_some() {
                continue;
            }
            if let Err(error) = self.make_domain(number) {
                // Nobody has heard of the new ones, and the host may need their memory.
                for number in made {
                    if let Err(error) = self.end_domain_locked(number) {
                        tracing::warn!(%error, "a cache domain that is not needed stays");
                    }
                }
                return Err(error);
            }
            made.push(number);
        }
        Ok(())
    }

    fn make_domain(&self, number: u32) -> Result<(), GrantError> {
        if self.is_stopping.load(Ordering::Relaxed) {
            return Err(GrantError::CacheDomain {
                name: self.toolstack.name(number),
                why: "the daemon stops".to_owned(),
            });
        }
        let opener = self.opener(number);
        // One that could not be ended before, or of somebody else.
        if let Some(domid) = self.toolstack.find()?.remove(&number)
            && !opener.end_unused(domid)?
        {
            return Err(GrantError::CacheDomain {
                name: self.toolstack.name(number),
                why: format!("domain {domid} is called so already, and is in use"),
            });
        }
        let (domain, table) = opener.make()?;
        let id = TableId(u16::try_from(number).unwrap_or(u16::MAX));
        while self.tables.count() <= number as usize {
            self.tables.add_hole(self.layout.entries())?;
        }
        self.tables.put_table(id, table)?;
        self.domains.write().put(domain);
        Ok(())
    }

    /// [`crate::Backend::end_bank`].
    pub(super) fn end_domain(&self, number: u32) -> Result<bool, GrantError> {
        let _resize = self.resize.lock();
        self.end_domain_locked(number)
    }

    fn end_domain_locked(&self, number: u32) -> Result<bool, GrantError> {
        self.retry_left(&self.domains.read());
        let id = TableId(u16::try_from(number).unwrap_or(u16::MAX));
        let is_there = self.domains.read().get(number).is_some();
        if is_there && self.tables.take_table(id).is_none() {
            return Ok(false);
        }
        let domain = self.domains.write().take(number);
        // Unmapped by us before it is ended: its memory is free then.
        drop(domain);
        match self.toolstack.find()?.remove(&number) {
            Some(domid) => self.opener(number).end_unused(domid),
            None => Ok(true),
        }
    }

    /// Frees all entries and ends the domains of which none is in use.
    pub(super) fn end_all(&self) -> Result<(), GrantError> {
        self.is_stopping.store(true, Ordering::Relaxed);
        let _resize = self.resize.lock();
        let in_use = self.tables.abandon();
        let mut stay = Vec::new();
        for domain in self.domains.read().there() {
            let name = || self.toolstack.name(domain.number);
            if in_use
                .iter()
                .any(|table| u32::from(table.0) == domain.number)
            {
                stay.push(name());
            } else {
                self.toolstack.destroy(domain.number, domain.domid)?;
            }
        }
        if stay.is_empty() {
            return Ok(());
        }
        Err(GrantError::CacheDomain {
            name: stay.join(", "),
            why: "guests map pages of it: it stays, and the next start finds it".to_owned(),
        })
    }
}
