//! The local backend as the trait has it.

use super::home::Home;
use super::{FrameStore, LocalBackend};
use crate::backend::{
    Access, Backend, Capabilities, DomainEnd, FramesThere, GrantInfo, HomeSpec, LedgerAudit,
    Revocation, TableInfo, Where,
};
use crate::error::GrantError;
use crate::ids::{DomId, FrameNo, Grant, HomeId, PAGE_SIZE, PAGE_SIZE_U64, PageIndex, TableId};
use crate::limits::FRAMES_MAX;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn check_length(what: &str, have: usize, wanted: usize) -> Result<(), GrantError> {
    if have == wanted {
        Ok(())
    } else {
        Err(GrantError::BadRange(format!(
            "{what} of {have} bytes for {wanted} bytes of pages"
        )))
    }
}

impl Backend for LocalBackend {
    fn name(&self) -> &'static str {
        "local"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            frames_shared: true,
            read_only_enforced: self.own_files.kind() == FrameStore::PrivateMount
                || self.config.guests_other_uid,
            executable_mappings: self.own_files.executable(),
            forced_revoke: self.config.force,
            in_place_upgrade: false,
            descriptors: true,
        }
    }

    /// Frames are numbers here: what they take is taken as they are filled.
    fn make_frames(&self, frames: u32) -> Result<FramesThere, GrantError> {
        if frames > FRAMES_MAX {
            return Err(GrantError::BadRange(format!(
                "{frames} frames: at most {FRAMES_MAX} can be named"
            )));
        }
        self.make_room(u64::from(frames) * PAGE_SIZE_U64)?;
        Ok(FramesThere {
            bank_frames: FRAMES_MAX,
            end: frames,
        })
    }

    fn end_bank(&self, _bank: u32) -> Result<bool, GrantError> {
        Ok(false)
    }

    fn tables(&self) -> Vec<TableInfo> {
        self.tables.infos()
    }

    fn open_home(&self, spec: &HomeSpec) -> Result<HomeId, GrantError> {
        let id = self.next_home.fetch_add(1, Ordering::Relaxed);
        let home = Home::create(&self.files_of(spec.class)?, id, spec)?;
        self.homes.write().insert(HomeId(id), Arc::new(home));
        Ok(HomeId(id))
    }

    fn close_home(&self, home: HomeId) -> Result<(), GrantError> {
        self.home(home)?.close()?;
        self.homes.write().remove(&home);
        Ok(())
    }

    fn home_descriptor(&self, home: HomeId) -> Result<OwnedFd, GrantError> {
        self.home(home)?.descriptor()
    }

    fn make_runnable(&self, home: HomeId) -> Result<(), GrantError> {
        self.home(home)?.make_runnable()
    }

    fn home_in_use(&self, home: HomeId) -> Result<bool, GrantError> {
        let home = self.home(home)?;
        if home.in_use()? {
            return Ok(true);
        }
        let writable = home.beside.lock().writable();
        Ok(self.tables.first_granted(&writable).is_some())
    }

    fn store(
        &self,
        home: HomeId,
        first: PageIndex,
        frames: &[FrameNo],
        data: &[u8],
    ) -> Result<(), GrantError> {
        check_length("data", data.len(), frames.len() * PAGE_SIZE)?;
        if self.home(home)?.store(first.0, data)? {
            self.foreign_pages.fetch_add(1, Ordering::Relaxed);
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
        self.home(home)?.load(page.0, frame, None, buf)
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
        self.home(home)?.discard(first.0, frames)
    }

    fn arena(&self, home: HomeId, dom: DomId) -> Result<OwnedFd, GrantError> {
        let home = self.home(home)?;
        home.arena(dom, || {
            self.guest_file(home.class, &self.guest_files_of(dom)?)
        })
    }

    fn end_arena(&self, home: HomeId, dom: DomId) -> Result<(), GrantError> {
        self.home(home)?.end_arena(dom)
    }

    fn common(&self, home: HomeId) -> Result<(u32, OwnedFd), GrantError> {
        let home = self.home(home)?;
        home.common(|| self.guest_file(home.class, &self.guest_files()?))
    }

    fn renew_common(&self, home: HomeId) -> Result<(), GrantError> {
        self.home(home)?.renew_common()
    }

    fn place(
        &self,
        home: HomeId,
        page: PageIndex,
        frame: FrameNo,
        from: Where,
        to: Where,
        leave: bool,
    ) -> Result<(), GrantError> {
        if self.home(home)?.place(page.0, frame, (from, to), leave)? {
            self.foreign_pages.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn load_at(
        &self,
        home: HomeId,
        page: PageIndex,
        frame: FrameNo,
        at: Where,
        buf: &mut [u8],
    ) -> Result<(), GrantError> {
        check_length("a buffer", buf.len(), PAGE_SIZE)?;
        self.home(home)?.load(page.0, frame, Some(at), buf)
    }

    fn write_at(
        &self,
        home: HomeId,
        page: PageIndex,
        frame: FrameNo,
        at: Where,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), GrantError> {
        self.home(home)?.write_at(page.0, frame, at, offset, bytes)
    }

    fn note_saved(
        &self,
        _home: HomeId,
        _page: PageIndex,
        _frame: FrameNo,
    ) -> Result<(), GrantError> {
        Ok(())
    }

    fn resize_home(&self, home: HomeId, bytes: u64) -> Result<(), GrantError> {
        self.home(home)?.resize(bytes)
    }

    fn make_huge(&self, home: HomeId, first: PageIndex) -> Result<bool, GrantError> {
        self.home(home)?.make_huge(first.0)
    }

    fn bind(&self, _dom: DomId, _domid: u16) -> Result<(), GrantError> {
        Ok(())
    }

    fn granter(&self, _table: TableId) -> Option<DomId> {
        None
    }

    fn in_one_table(&self, frames: &[FrameNo]) -> usize {
        frames.len()
    }

    fn grant(
        &self,
        dom: DomId,
        access: Access,
        frames: &[FrameNo],
        out: &mut Vec<Grant>,
    ) -> Result<(), GrantError> {
        self.tables.grant(dom, access, frames, true, out)
    }

    fn revoke(&self, dom: DomId, frames: &[FrameNo], out: &mut Vec<Revocation>) {
        self.tables.revoke(dom, frames, out);
    }

    fn force_out(
        &self,
        home: HomeId,
        first: PageIndex,
        frames: &[FrameNo],
        evicted: &mut dyn FnMut(FrameNo, DomId),
    ) -> Result<(), GrantError> {
        if !self.config.force {
            return Err(GrantError::Unsupported {
                backend: "local",
                what: "forced revocation",
            });
        }
        // Out of the file first: only then is it true that nobody maps them.
        self.home(home)?.discard(first.0, frames)?;
        self.tables.end_all(frames, evicted);
        Ok(())
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

    fn is_mapped(&self, _dom: DomId, _frame: FrameNo) -> bool {
        true
    }

    fn note_unmapped(&self, dom: DomId, frames: &[FrameNo]) {
        self.tables.clear_mapped(dom, frames);
    }

    fn domain_ended(&self, dom: DomId) -> DomainEnd {
        // Another session with the number gets files of its own.
        if let Some(files) = self.sessions.lock().remove(&dom).and_then(|f| f.upgrade()) {
            files.end();
        }
        self.tables.domain_ended(dom, true)
    }

    fn set_grants_max(&self, dom: DomId, grants_max: u64) {
        self.tables.set_grants_max(dom, grants_max);
    }

    fn unusable_frames(&self, _out: &mut Vec<FrameNo>) {}

    fn stop(&self) -> Result<(), GrantError> {
        Ok(())
    }

    fn each_grant(&self, visit: &mut dyn FnMut(GrantInfo)) {
        self.tables.each_grant(visit);
    }

    fn audit(&self) -> LedgerAudit {
        self.tables.audit()
    }

    fn present_pages(&self, home: HomeId) -> Result<Vec<(PageIndex, u64)>, GrantError> {
        let runs = self.home(home)?.present_pages()?;
        Ok(runs
            .into_iter()
            .map(|(first, count)| (PageIndex(first), count))
            .collect())
    }
}
