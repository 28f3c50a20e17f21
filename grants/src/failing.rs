//! For tests: a backend that fails when it is told to, and that watches how it is used.
//!
//! What a backend trusts its caller to do is checked here: that pages are zero past the end of
//! their file, that no page is put into a frame that is granted or holds another one, that only
//! what is there is granted, read, or taken out.

use crate::backend::{
    Access, Backend, Capabilities, DomainEnd, FramesThere, GrantInfo, HomeSpec, LedgerAudit,
    Revocation, TableInfo, Where,
};
use crate::error::GrantError;
use crate::ids::{DomId, FrameNo, Grant, HomeId, PAGE_SIZE, PAGE_SIZE_U64, PageIndex, TableId};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A call that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// [`Backend::make_frames`]
    MakeFrames,
    /// [`Backend::open_home`]
    OpenHome,
    /// [`Backend::home_descriptor`]
    HomeDescriptor,
    /// [`Backend::store`]
    Store,
    /// [`Backend::load`]
    Load,
    /// [`Backend::discard`]
    Discard,
    /// [`Backend::grant`]
    Grant,
    /// [`Backend::force_out`]
    ForceOut,
    /// [`Backend::arena`]
    Arena,
    /// [`Backend::common`]
    Common,
    /// [`Backend::place`]
    Place,
    /// [`Backend::load_at`]
    LoadAt,
    /// [`Backend::write_at`]
    WriteAt,
    /// [`Backend::resize_home`]
    ResizeHome,
}

/// The error that a call fails with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailWith {
    /// [`GrantError::NoMemory`]
    NoMemory,
    /// [`GrantError::TableFull`]
    TableFull,
    /// [`GrantError::Sys`] with this errno.
    Errno(i32),
}

impl FailWith {
    fn error(self) -> GrantError {
        match self {
            Self::NoMemory => GrantError::NoMemory(io::Error::from_raw_os_error(libc::ENOSPC)),
            Self::TableFull => GrantError::TableFull { entries: 0 },
            Self::Errno(errno) => GrantError::Sys {
                call: "a call that was told to fail",
                source: io::Error::from_raw_os_error(errno),
            },
        }
    }
}

#[derive(Default)]
struct Watch {
    calls: HashMap<Call, u64>,
    /// The number of the call that fails, and whether all later ones do too.
    plans: HashMap<Call, (u64, bool, FailWith)>,
    home_bytes: HashMap<HomeId, u64>,
    /// What each frame holds, and where.
    content: HashMap<FrameNo, (HomeId, u64, Where)>,
    violations: Vec<String>,
}

impl Watch {
    fn says_fail(&mut self, call: Call) -> Result<(), GrantError> {
        let count = self.calls.entry(call).or_default();
        *count += 1;
        match self.plans.get(&call) {
            Some(&(at, ever, with)) if *count == at || ever && *count > at => Err(with.error()),
            _ => Ok(()),
        }
    }

    fn violation(&mut self, text: String) {
        // Enough to see what went wrong.
        if self.violations.len() < 100 {
            self.violations.push(text);
        }
    }

    fn check_content(&mut self, what: &str, home: HomeId, first: PageIndex, frames: &[FrameNo]) {
        for (&frame, page) in frames.iter().zip(first.0..) {
            let held = self.content.get(&frame).copied();
            if held.is_none_or(|held| (held.0, held.1) != (home, page)) {
                self.violation(format!(
                    "{what} of page {page} of {home:?} in {frame:?}, which holds {held:?}"
                ));
            }
        }
    }

    fn check_place(
        &mut self,
        (home, page): (HomeId, PageIndex),
        frame: FrameNo,
        (from, to): (Where, Where),
        leave: bool,
    ) {
        let there = |at| move |held: &(HomeId, u64, Where)| *held == (home, page.0, at);
        let held = self.content.get(&frame).copied();
        let is_right = if leave {
            held.is_none() && self.content.values().any(there(from))
        } else {
            held.as_ref().is_some_and(there(from))
        };
        if !is_right {
            self.violation(format!(
                "page {} of {home:?} goes from {from:?} to {to:?} (left: {leave}) in {frame:?}, \
                 which holds {held:?}",
                page.0
            ));
        }
        if self.content.values().any(there(to)) {
            self.violation(format!(
                "page {} of {home:?} goes to {to:?}, where it is",
                page.0
            ));
        }
    }

    fn check_at(&mut self, what: &str, home: HomeId, page: PageIndex, frame: FrameNo, at: Where) {
        self.check_content(what, home, page, &[frame]);
        let held = self.content.get(&frame).map(|held| held.2);
        if held.is_some_and(|held| held != at) {
            self.violation(format!("{what} of {frame:?} at {at:?}, it is at {held:?}"));
        }
    }

    fn check_nothing_at(&mut self, what: &str, home: HomeId, at: Where) {
        let mut held = self.content.values();
        if held.any(|held| (held.0, held.2) == (home, at)) {
            self.violation(format!("{what} of {home:?} with pages at {at:?}"));
        }
    }
}

/// See the module.
pub struct FailingBackend {
    inner: Arc<dyn Backend>,
    watch: Mutex<Watch>,
}

impl FailingBackend {
    /// Watches `inner`; nothing fails yet.
    pub fn new(inner: Arc<dyn Backend>) -> Self {
        Self {
            inner,
            watch: Mutex::default(),
        }
    }

    /// The `nth` call from now (1 is the next one) fails, before it does anything.
    pub fn fail_nth(&self, call: Call, nth: u64, with: FailWith) {
        self.plan(call, nth, false, with);
    }

    /// The `nth` call from now and all behind it fail, until [`Self::fail_none`].
    pub fn fail_from(&self, call: Call, nth: u64, with: FailWith) {
        self.plan(call, nth, true, with);
    }

    /// Ends what was planned for a call.
    pub fn fail_none(&self, call: Call) {
        self.watch.lock().plans.remove(&call);
    }

    fn plan(&self, call: Call, nth: u64, ever: bool, with: FailWith) {
        let watch = &mut *self.watch.lock();
        let done = watch.calls.get(&call).copied().unwrap_or(0);
        watch
            .plans
            .insert(call, (done.saturating_add(nth), ever, with));
    }

    /// How often a call was made, failed ones included.
    pub fn calls(&self, call: Call) -> u64 {
        self.watch.lock().calls.get(&call).copied().unwrap_or(0)
    }

    /// What the caller did that no backend allows, at most a hundred lines.
    pub fn violations(&self) -> Vec<String> {
        self.watch.lock().violations.clone()
    }

    /// Frames that hold a page.
    pub fn frames_filled(&self) -> usize {
        self.watch.lock().content.len()
    }

    fn check_store(&self, home: HomeId, first: PageIndex, frames: &[FrameNo], data: &[u8]) {
        let granted: Vec<FrameNo> = frames
            .iter()
            .copied()
            .filter(|&frame| self.inner.holder_count(frame) != 0)
            .collect();
        let watch = &mut *self.watch.lock();
        for frame in granted {
            watch.violation(format!("store into {frame:?}, which is granted"));
        }
        for &frame in frames {
            if let Some(held) = watch.content.get(&frame).copied() {
                watch.violation(format!("store into {frame:?}, which holds {held:?}"));
            }
        }
        let bytes = watch.home_bytes.get(&home).copied().unwrap_or(0);
        for (page, number) in data.chunks(PAGE_SIZE).zip(first.0..) {
            let within = bytes.saturating_sub(number.saturating_mul(PAGE_SIZE_U64));
            let tail = usize::try_from(within).unwrap_or(PAGE_SIZE).min(page.len());
            if page[tail..].iter().any(|&byte| byte != 0) {
                watch.violation(format!(
                    "page {number} of {home:?} is not zero past byte {tail}"
                ));
            }
        }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::{LocalBackend, LocalConfig};

    fn backend() -> FailingBackend {
        FailingBackend::new(Arc::new(LocalBackend::new(LocalConfig::default()).unwrap()))
    }

    #[test]
    fn local_the_nth_call_fails_and_no_other() {
        let backend = backend();
        let home = backend
            .open_home(&HomeSpec {
                label: "f".into(),
                bytes: 8 * 4096,
                class: crate::TrustClass::OWN,
            })
            .unwrap();
        backend.fail_nth(Call::Store, 2, FailWith::NoMemory);
        let page = [1; PAGE_SIZE];
        let store = |n: u32| backend.store(home, PageIndex(n.into()), &[FrameNo(n)], &page);
        store(0).unwrap();
        assert!(matches!(store(1), Err(GrantError::NoMemory(_))));
        store(1).unwrap();
        backend.fail_from(Call::Store, 1, FailWith::Errno(libc::EIO));
        assert_eq!(store(2).unwrap_err().errno(), libc::EIO);
        assert_eq!(store(2).unwrap_err().errno(), libc::EIO);
        backend.fail_none(Call::Store);
        store(2).unwrap();
        assert_eq!(
            (backend.calls(Call::Store), backend.frames_filled()),
            (6, 3)
        );
        assert_eq!(backend.violations(), Vec::<String>::new());
    }

    #[test]
    fn local_what_no_backend_allows_is_seen() {
        let backend = backend();
        let home = backend
            .open_home(&HomeSpec {
                label: "f".into(),
                bytes: 4096 + 10,
                class: crate::TrustClass::OWN,
            })
            .unwrap();
        let frames = [FrameNo(0), FrameNo(1)];
        backend
            .store(home, PageIndex(0), &frames, &[1; 2 * PAGE_SIZE])
            .unwrap();
        assert_eq!(backend.violations().len(), 1, "the tail");
        backend
            .grant(DomId(1), Access::ReadOnly, &frames[..1], &mut Vec::new())
            .unwrap();
        backend
            .store(home, PageIndex(0), &frames[..1], &[1; PAGE_SIZE])
            .unwrap();
        assert_eq!(backend.violations().len(), 3, "granted, and holds a page");
        backend
            .grant(DomId(1), Access::ReadOnly, &[FrameNo(9)], &mut Vec::new())
            .unwrap();
        assert_eq!(backend.violations().len(), 4, "empty");
        backend
            .load(home, PageIndex(1), FrameNo(0), &mut [0; PAGE_SIZE])
            .unwrap();
        backend.close_home(home).unwrap();
        assert_eq!(
            backend.violations().len(),
            6,
            "the wrong frame; not emptied"
        );
    }
}
