//! The Xen backend as the trait has it.

use super::XenBackend;
use super::frames::{Domains, Spread};
use super::home::{Home, check_placed};
use super::records::{Found, Record};
use crate::backend::{
    Access, Backend, Capabilities, DomainEnd, FramesThere, GrantInfo, HomeSpec, LedgerAudit,
    Revocation, TableInfo, Where,
};
use crate::error::GrantError;
use crate::ids::{DomId, FrameNo, Grant, HomeId, PAGE_SIZE, PageIndex, TableId};
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn unsupported<T>(what: &'static str) -> Result<T, GrantError> {
    Err(GrantError::Unsupported {
        backend: "xen",
        what,
    })
}

fn check_length(what: &str, have: usize, wanted: usize) -> Result<(), GrantError> {
    if have == wanted {
        Ok(())
    } else {
        Err(GrantError::BadRange(format!(
            "{what} of {have} bytes for {wanted} bytes of pages"
        )))
    }
}

impl XenBackend {
    fn home(&self, home: HomeId) -> Result<Arc<Home>, GrantError> {
        let homes = self.homes.read();
        homes
            .get(&home)
            .cloned()
            .ok_or(GrantError::NoSuchHome(home))
    }

    /// Nobody may have any of the frames mapped, and none holds a page.
    fn check_empty(&self, domains: &Domains, frames: &[FrameNo]) -> Result<(), GrantError> {
        if let Some(frame) = self.tables.first_granted(frames) {
            return Err(GrantError::StillGranted(frame));
        }
        let left = self.retry_left(domains);
        if let Some(&frame) = frames
            .iter()
            .find(|frame| left.binary_search(frame).is_ok())
        {
            return Err(GrantError::StillGranted(frame));
        }
        for &frame in frames {
            let (domain, within) = domains.of(frame)?;
            let found = domain.records()?.get(within);
            if found != Found::Nothing {
                return Err(GrantError::BadRange(format!(
                    "frame {} holds {found:?}",
                    frame.0
                )));
            }
        }
        Ok(())
    }

    /// Says in the records of frames that they are dirty, or not.
    fn mark(&self, frames: &[FrameNo], is_dirty: bool) -> Result<(), GrantError> {
        let domains = self.domains.read();
        for &frame in frames {
            let (domain, within) = domains.of(frame)?;
            let records = domain.records()?;
            let Found::Record(record) = records.get(within) else {
                let what = format!("frame {} holds nothing", frame.0);
                return Err(GrantError::BadRange(what));
            };
            // Records agree with their homes while these are locked.
            let home = self.home(record.home)?;
            let _pages = home.pages.lock();
            if record.is_dirty != is_dirty {
                records.put(Record { is_dirty, ..record });
            }
        }
        Ok(())
    }

    pub(super) fn record(&self, home: HomeId, page: u64, within: u32) -> Record {
        Record {
            home,
            page,
            is_dirty: false,
            frame: within,
            life: self.life,
        }
    }
}

impl Backend for XenBackend {
    fn name(&self) -> &'static str {
        "xen"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            frames_shared: true,
            read_only_enforced: true,
            executable_mappings: false,
            forced_revoke: false,
            in_place_upgrade: true,
            descriptors: false,
        }
    }

    fn make_frames(&self, frames: u32) -> Result<FramesThere, GrantError> {
        self.make_domains(frames)?;
        Ok(FramesThere {
            bank_frames: self.layout.frames,
            end: self.domains.read().end(),
        })
    }

    fn end_bank(&self, bank: u32) -> Result<bool, GrantError> {
        self.end_domain(bank)
    }

    fn tables(&self) -> Vec<TableInfo> {
        let mut infos = self.tables.infos();
        let domains = self.domains.read();
        for info in &mut infos {
            info.granter = domains
                .get(info.table.0.into())
                .map(|domain| DomId(domain.domid));
        }
        infos
    }

    fn open_home(&self, spec: &HomeSpec) -> Result<HomeId, GrantError> {
        let id = HomeId(self.next_home.fetch_add(1, Ordering::Relaxed));
        let home = Arc::new(Home::new(id, spec.bytes));
        self.homes.write().insert(id, home);
        Ok(id)
    }

    fn close_home(&self, home: HomeId) -> Result<(), GrantError> {
        let left = self.home(home)?.pages.lock().len();
        if left > 0 {
            return Err(GrantError::BadRange(format!(
                "a home is closed with {left} pages in frames"
            )));
        }
        self.homes.write().remove(&home);
        Ok(())
    }

    fn make_runnable(&self, _home: HomeId) -> Result<(), GrantError> {
        unsupported("running programs from frames")
    }

    /// Does anybody hold a grant of any page?
    fn home_in_use(&self, home: HomeId) -> Result<bool, GrantError> {
        let frames: Vec<FrameNo> = {
            let home = self.home(home)?;
            let pages = home.pages.lock();
            pages.iter().map(|&(_, frame)| frame).collect()
        };
        Ok(self.tables.first_granted(&frames).is_some())
    }

    fn store(
        &self,
        home: HomeId,
        first: PageIndex,
        frames: &[FrameNo],
        data: &[u8],
    ) -> Result<(), GrantError> {
        check_length("data", data.len(), frames.len() * PAGE_SIZE)?;
        let home = self.home(home)?;
        home.check(first, frames.len())?;
        let domains = self.domains.read();
        self.check_empty(&domains, frames)?;
        for (&frame, page) in frames.iter().zip(data.chunks_exact(PAGE_SIZE)) {
            let (domain, within) = domains.of(frame)?;
            domain.frame(within)?.write_from(0, page);
        }
        let mut pages = home.pages.lock();
        for (page, &frame) in (first.0..).zip(frames) {
            let (domain, within) = domains.of(frame)?;
            let record = self.record(home.id, page, within);
            domain.records()?.put(record);
            pages.insert((page, frame));
        }
        Ok(())
    }

    fn load(
        &self,
        home: HomeId,
        page: PageIndex,
        frame: FrameNo,
        buf: &mut [u8],
    ) -> Result<(), GrantError> {
        check_length("a buffer", buf.len(), PAGE_SIZE)?;
        let home = self.home(home)?;
        let domains = self.domains.read();
        check_placed(&home.pages.lock(), page, &[frame])?;
        let (domain, within) = domains.of(frame)?;
        domain.frame(within)?.read_only().read_into(0, buf);
        Ok(())
    }

    fn discard(
        &self,
        home: HomeId,
        first: PageIndex,
        frames: &[FrameNo],
    ) -> Result<(), GrantError> {
        if let Some(frame) = self.tables.first_granted(frames) {
            return Err(GrantError::StillGranted(frame));
        }
        let home = self.home(home)?;
        let domains = self.domains.read();
        let mut pages = home.pages.lock();
        check_placed(&pages, first, frames)?;
        for (page, &frame) in (first.0..).zip(frames) {
            let (domain, within) = domains.of(frame)?;
            domain.records()?.clear(within);
            pages.remove(&(page, frame));
        }
        Ok(())
    }

    fn load_at(
        &self,
        home: HomeId,
        page: PageIndex,
        frame: FrameNo,
        _at: Where,
        buf: &mut [u8],
    ) -> Result<(), GrantError> {
        self.load(home, page, frame, buf)?;
        let home = self.home(home)?;
        if let Some(tail) = buf.get_mut(home.bytes_of(page)..) {
            tail.fill(0);
        }
        Ok(())
    }

    fn write_at(
        &self,
        home: HomeId,
        page: PageIndex,
        frame: FrameNo,
        _at: Where,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), GrantError> {
        if offset
            .checked_add(bytes.len())
            .is_none_or(|end| end > PAGE_SIZE)
        {
            let what = format!(
                "{} bytes from {offset} on are not within a page",
                bytes.len()
            );
            return Err(GrantError::BadRange(what));
        }
        let home = self.home(home)?;
        self.mark(&[frame], true)?;
        let domains = self.domains.read();
        check_placed(&home.pages.lock(), page, &[frame])?;
        let (domain, within) = domains.of(frame)?;
        domain.frame(within)?.write_from(offset, bytes);
        Ok(())
    }

    fn note_saved(&self, home: HomeId, page: PageIndex, frame: FrameNo) -> Result<(), GrantError> {
        check_placed(&self.home(home)?.pages.lock(), page, &[frame])?;
        if self.tables.is_writable(frame) {
            return Ok(());
        }
        self.mark(&[frame], false)
    }

    /// Frames stay: that pages past the end are mapped by nobody is the cache's to see to.
    fn resize_home(&self, home: HomeId, bytes: u64) -> Result<(), GrantError> {
        self.home(home)?.resize(bytes);
        Ok(())
    }

    /// Cache domains may well be backed by 2 MiB pages, but grants are for 4 KiB.
    fn make_huge(&self, _home: HomeId, _first: PageIndex) -> Result<bool, GrantError> {
        Ok(false)
    }

    fn bind(&self, dom: DomId, domid: u16) -> Result<(), GrantError> {
        let before = self.bindings.of(dom);
        if before.is_some_and(|before| before != domid) && self.tables.grant_count(dom) > 0 {
            return Err(GrantError::BadRange(format!(
                "entries of session {} name another domain still",
                dom.0
            )));
        }
        self.bindings.set(dom, domid)
    }

    fn granter(&self, table: TableId) -> Option<DomId> {
        let domains = self.domains.read();
        Some(DomId(domains.get(table.0.into())?.domid))
    }

    fn in_one_table(&self, frames: &[FrameNo]) -> usize {
        let number = |frame: &FrameNo| Spread::locate(self.layout, *frame).0;
        let Some(first) = frames.first().map(number) else {
            return 0;
        };
        frames
            .iter()
            .take_while(|frame| number(frame) == first)
            .count()
    }

    fn grant(
        &self,
        dom: DomId,
        access: Access,
        frames: &[FrameNo],
        out: &mut Vec<Grant>,
    ) -> Result<(), GrantError> {
        if self.bindings.of(dom).is_none() {
            return Err(GrantError::BadRange(format!(
                "session {} was bound to no domain",
                dom.0
            )));
        }
        if access == Access::ReadWrite {
            self.mark(frames, true)?;
        }
        self.tables.grant(dom, access, frames, false, out)
    }

    fn revoke(&self, dom: DomId, frames: &[FrameNo], out: &mut Vec<Revocation>) {
        self.tables.revoke(dom, frames, out);
    }

    fn force_out(
        &self,
        _home: HomeId,
        _first: PageIndex,
        _frames: &[FrameNo],
        _evicted: &mut dyn FnMut(FrameNo, DomId),
    ) -> Result<(), GrantError> {
        unsupported("forced revocation")
    }

    fn holders(&self, frame: FrameNo, out: &mut Vec<DomId>) {
        self.tables.holders(frame, out);
    }

    fn holder_count(&self, frame: FrameNo) -> u32 {
        self.tables.holder_count(frame)
    }

    fn grant_count(&self, dom: DomId) -> u64 {
        self.tables.grant_count(dom)
    }

    fn oldest_grants(&self, dom: DomId, max: usize, out: &mut Vec<FrameNo>) {
        self.tables.oldest_grants(dom, max, out);
    }

    fn is_mapped(&self, dom: DomId, frame: FrameNo) -> bool {
        self.tables.is_mapped(dom, frame)
    }

    fn note_unmapped(&self, _dom: DomId, _frames: &[FrameNo]) {}

    fn domain_ended(&self, dom: DomId) -> DomainEnd {
        self.tables.domain_ended(dom, false)
    }

    fn set_grants_max(&self, dom: DomId, grants_max: u64) {
        self.tables.set_grants_max(dom, grants_max);
    }

    fn unusable_frames(&self, out: &mut Vec<FrameNo>) {
        out.extend(self.retry_left(&self.domains.read()));
    }

    fn stop(&self) -> Result<(), GrantError> {
        self.end_all()
    }

    fn each_grant(&self, visit: &mut dyn FnMut(GrantInfo)) {
        self.tables.each_grant(visit);
    }

    fn audit(&self) -> LedgerAudit {
        let mut audit = self.tables.audit();
        self.audit_records(&mut audit);
        self.audit_writable(&mut audit);
        self.audit_domains(&mut audit);
        audit
    }

    fn present_pages(&self, home: HomeId) -> Result<Vec<(PageIndex, u64)>, GrantError> {
        let home = self.home(home)?;
        let domains = self.domains.read();
        let pages = home.pages.lock();
        let mut runs: Vec<(PageIndex, u64)> = Vec::new();
        for &(page, frame) in &*pages {
            let (domain, within) = domains.of(frame)?;
            let record = self.record(home.id, page, within);
            if !domain.records()?.get(within).is_of(record) {
                continue;
            }
            match runs.last_mut() {
                // In another frame too.
                Some((first, count)) if first.0 + *count == page + 1 => {}
                Some((first, count)) if first.0 + *count == page => *count += 1,
                _ => runs.push((PageIndex(page), 1)),
            }
        }
        Ok(runs)
    }
}
