//! What is watched of each call, and which calls fail.

use super::{Call, FailingBackend};
use crate::backend::{
    Access, Backend, Capabilities, DomainEnd, FramesThere, GrantInfo, HomeSpec, LedgerAudit,
    Revocation, TableInfo, Where,
};
use crate::error::GrantError;
use crate::ids::{DomId, FrameNo, Grant, HomeId, PageIndex, TableId};
use std::os::fd::OwnedFd;

impl Backend for FailingBackend {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn make_frames(&self, frames: u32) -> Result<FramesThere, GrantError> {
        self.watch.lock().says_fail(Call::MakeFrames)?;
        self.inner.make_frames(frames)
    }

    fn end_bank(&self, bank: u32) -> Result<bool, GrantError> {
        self.inner.end_bank(bank)
    }

    fn tables(&self) -> Vec<TableInfo> {
        self.inner.tables()
    }

    fn open_home(&self, spec: &HomeSpec) -> Result<HomeId, GrantError> {
        self.watch.lock().says_fail(Call::OpenHome)?;
        let home = self.inner.open_home(spec)?;
        self.watch.lock().home_bytes.insert(home, spec.bytes);
        Ok(home)
    }

    fn close_home(&self, home: HomeId) -> Result<(), GrantError> {
        {
            let watch = &mut *self.watch.lock();
            let left = watch.content.values().filter(|held| held.0 == home).count();
            if left > 0 {
                watch.violation(format!("{home:?} is closed with {left} pages in frames"));
            }
            watch.home_bytes.remove(&home);
        }
        self.inner.close_home(home)
    }

    fn home_descriptor(&self, home: HomeId) -> Result<OwnedFd, GrantError> {
        self.watch.lock().says_fail(Call::HomeDescriptor)?;
        self.inner.home_descriptor(home)
    }

    fn make_runnable(&self, home: HomeId) -> Result<(), GrantError> {
        self.inner.make_runnable(home)
    }

    fn home_in_use(&self, home: HomeId) -> Result<bool, GrantError> {
        self.inner.home_in_use(home)
    }

    fn store(
        &self,
        home: HomeId,
        first: PageIndex,
        frames: &[FrameNo],
        data: &[u8],
    ) -> Result<(), GrantError> {
        self.check_store(home, first, frames, data);
        self.watch.lock().says_fail(Call::Store)?;
        self.inner.store(home, first, frames, data)?;
        let pages = frames.iter().zip(first.0..);
        self.watch
            .lock()
            .content
            .extend(pages.map(|(&frame, page)| (frame, (home, page, Where::Home))));
        Ok(())
    }

    fn load(
        &self,
        home: HomeId,
        page: PageIndex,
        frame: FrameNo,
        buf: &mut [u8],
    ) -> Result<(), GrantError> {
        {
            let watch = &mut *self.watch.lock();
            watch.check_content("load", home, page, &[frame]);
            watch.says_fail(Call::Load)?;
        }
        self.inner.load(home, page, frame, buf)
    }

    fn discard(
        &self,
        home: HomeId,
        first: PageIndex,
        frames: &[FrameNo],
    ) -> Result<(), GrantError> {
        {
            let watch = &mut *self.watch.lock();
            watch.check_content("discard", home, first, frames);
            watch.says_fail(Call::Discard)?;
        }
        self.inner.discard(home, first, frames)?;
        let watch = &mut *self.watch.lock();
        for frame in frames {
            watch.content.remove(frame);
        }
        Ok(())
    }

    fn arena(&self, home: HomeId, dom: DomId) -> Result<OwnedFd, GrantError> {
        self.watch.lock().says_fail(Call::Arena)?;
        self.inner.arena(home, dom)
    }

    fn end_arena(&self, home: HomeId, dom: DomId) -> Result<(), GrantError> {
        let at = Where::Arena(dom);
        self.watch.lock().check_nothing_at("end_arena", home, at);
        self.inner.end_arena(home, dom)
    }

    fn common(&self, home: HomeId) -> Result<(u32, OwnedFd), GrantError> {
        self.watch.lock().says_fail(Call::Common)?;
        self.inner.common(home)
    }

    fn renew_common(&self, home: HomeId) -> Result<(), GrantError> {
        let at = Where::Common;
        self.watch.lock().check_nothing_at("renew_common", home, at);
        self.inner.renew_common(home)
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
        let moves = self.inner.capabilities().descriptors;
        {
            let watch = &mut *self.watch.lock();
            if moves {
                watch.check_place((home, page), frame, (from, to), leave);
            }
            watch.says_fail(Call::Place)?;
        }
        self.inner.place(home, page, frame, from, to, leave)?;
        if moves {
            let held = (home, page.0, to);
            self.watch.lock().content.insert(frame, held);
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
        {
            let watch = &mut *self.watch.lock();
            watch.check_at("load_at", home, page, frame, at);
            watch.says_fail(Call::LoadAt)?;
        }
        self.inner.load_at(home, page, frame, at, buf)
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
        {
            let watch = &mut *self.watch.lock();
            watch.check_at("write_at", home, page, frame, at);
            let file_bytes = watch.home_bytes.get(&home).copied().unwrap_or(0);
            let start = page.byte_offset().unwrap_or(u64::MAX);
            let from = start.saturating_add(offset as u64);
            let within = usize::try_from(file_bytes.saturating_sub(from)).unwrap_or(usize::MAX);
            let mut past = bytes.iter().skip(within);
            if past.any(|&byte| byte != 0) {
                watch.violation(format!("write_at past the end of {home:?}"));
            }
            watch.says_fail(Call::WriteAt)?;
        }
        self.inner.write_at(home, page, frame, at, offset, bytes)
    }

    fn note_saved(&self, home: HomeId, page: PageIndex, frame: FrameNo) -> Result<(), GrantError> {
        let watch = &mut *self.watch.lock();
        watch.check_content("note_saved", home, page, &[frame]);
        self.inner.note_saved(home, page, frame)
    }

    fn resize_home(&self, home: HomeId, bytes: u64) -> Result<(), GrantError> {
        self.watch.lock().says_fail(Call::ResizeHome)?;
        self.inner.resize_home(home, bytes)?;
        self.watch.lock().home_bytes.insert(home, bytes);
        Ok(())
    }

    fn make_huge(&self, home: HomeId, first: PageIndex) -> Result<bool, GrantError> {
        self.inner.make_huge(home, first)
    }

    fn bind(&self, dom: DomId, domid: u16) -> Result<(), GrantError> {
        self.inner.bind(dom, domid)
    }

    fn granter(&self, table: TableId) -> Option<DomId> {
        self.inner.granter(table)
    }

    fn in_one_table(&self, frames: &[FrameNo]) -> usize {
        self.inner.in_one_table(frames)
    }

    fn grant(
        &self,
        dom: DomId,
        access: Access,
        frames: &[FrameNo],
        out: &mut Vec<Grant>,
    ) -> Result<(), GrantError> {
        {
            let watch = &mut *self.watch.lock();
            for frame in frames {
                if !watch.content.contains_key(frame) {
                    watch.violation(format!("grant of {frame:?}, which holds nothing"));
                }
            }
            watch.says_fail(Call::Grant)?;
        }
        self.inner.grant(dom, access, frames, out)
    }

    fn revoke(&self, dom: DomId, frames: &[FrameNo], out: &mut Vec<Revocation>) {
        self.inner.revoke(dom, frames, out);
    }

    fn force_out(
        &self,
        home: HomeId,
        first: PageIndex,
        frames: &[FrameNo],
        evicted: &mut dyn FnMut(FrameNo, DomId),
    ) -> Result<(), GrantError> {
        {
            let watch = &mut *self.watch.lock();
            watch.check_content("force_out", home, first, frames);
            watch.says_fail(Call::ForceOut)?;
        }
        self.inner.force_out(home, first, frames, evicted)?;
        let watch = &mut *self.watch.lock();
        for frame in frames {
            watch.content.remove(frame);
        }
        Ok(())
    }

    fn holders(&self, frame: FrameNo, out: &mut Vec<DomId>) {
        self.inner.holders(frame, out);
    }

    fn holder_count(&self, frame: FrameNo) -> u32 {
        self.inner.holder_count(frame)
    }

    fn grant_count(&self, dom: DomId) -> u64 {
        self.inner.grant_count(dom)
    }

    fn oldest_grants(&self, dom: DomId, max: usize, out: &mut Vec<FrameNo>) {
        self.inner.oldest_grants(dom, max, out);
    }

    fn is_mapped(&self, dom: DomId, frame: FrameNo) -> bool {
        self.inner.is_mapped(dom, frame)
    }

    fn note_unmapped(&self, dom: DomId, frames: &[FrameNo]) {
        self.inner.note_unmapped(dom, frames);
    }

    fn domain_ended(&self, dom: DomId) -> DomainEnd {
        self.inner.domain_ended(dom)
    }

    fn set_grants_max(&self, dom: DomId, grants_max: u64) {
        self.inner.set_grants_max(dom, grants_max);
    }

    fn unusable_frames(&self, out: &mut Vec<FrameNo>) {
        self.inner.unusable_frames(out);
    }

    fn stop(&self) -> Result<(), GrantError> {
        self.inner.stop()
    }

    fn each_grant(&self, visit: &mut dyn FnMut(GrantInfo)) {
        self.inner.each_grant(visit);
    }

    fn audit(&self) -> LedgerAudit {
        self.inner.audit()
    }

    fn present_pages(&self, home: HomeId) -> Result<Vec<(PageIndex, u64)>, GrantError> {
        self.inner.present_pages(home)
    }
}
