//! What the machine does to single pages, at once: grants, their ends, and the daemon's own stores and loads.

use crate::cache::Cache;
use crate::config::Holder;
use crate::error::CacheError;
use crate::fault::NoGrant;
use crate::file::{CachedFile, Home, Inner};
use crate::frames::FrameState;
use copage_grants::{
    Access, DomId, FrameNo, GrantError, PAGE_SIZE, PAGE_SIZE_U64, PageIndex, Where,
};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// By what a guest maps a page that it was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StrictGrant {
    /// The domain whose table holds the entry; `None` where guests have descriptors.
    pub granter: Option<DomId>,
    /// The entry.
    pub gref: Option<u32>,
    /// Which descriptor has the page.
    pub at: Where,
    /// Of [`Where::Common`]: which one ([`Cache::common`]); else 0.
    pub serial: u32,
}

/// The home's number for a page that is within it.
fn page_in(home: &Home, page: PageIndex) -> Result<u32, CacheError> {
    if page.0 < home.pages() {
        Ok(page.0 as u32)
    } else {
        Err(CacheError::BadRange("past the end of the file"))
    }
}

/// The live home and the page's number, when `frame` holds the page.
pub(super) fn live_page(
    inner: &mut Inner,
    page: PageIndex,
    frame: FrameNo,
) -> Result<(&mut Home, u32), CacheError> {
    let home = inner.live.as_mut().ok_or(CacheError::Changing)?;
    let number = page_in(home, page)?;
    if home.index.get(number) != Some(frame) {
        return Err(CacheError::BadRange("the page is in another frame"));
    }
    Ok((home, number))
}

impl Cache {
    /// Grants a page for reading or writing, as nothing stands against by the machine's book. `shared`: several
    /// write it. What is granted already is answered again. EDQUOT: the guest has as many grants or frames as it
    /// may; its oldest pages are wanted back, after which it is to be tried again.
    pub fn strict_grant(
        &self,
        who: Holder,
        file: &Arc<CachedFile>,
        page: PageIndex,
        frame: FrameNo,
        access: Access,
        shared: bool,
    ) -> Result<StrictGrant, CacheError> {
        let mut room_made = false;
        loop {
            let granted = {
                let mut inner = file.inner.lock();
                self.grant_page(&mut inner, who, (page, frame), access, shared)
            };
            match granted {
                Ok(granted) => return Ok(granted),
                Err(NoGrant::Failed(error)) => return Err(error),
                Err(NoGrant::Room(error)) if room_made => return Err(error),
                Err(NoGrant::Room(_)) => {
                    room_made = true;
                    self.make_room(who, 1);
                }
            }
        }
    }

    fn grant_page(
        &self,
        inner: &mut Inner,
        who: Holder,
        (page, frame): (PageIndex, FrameNo),
        access: Access,
        shared: bool,
    ) -> Result<StrictGrant, NoGrant> {
        if !inner.may_hold_grants(who.dom) {
            return Err(NoGrant::Failed(CacheError::NotOpen(who.dom)));
        }
        let (home, number) = live_page(inner, page, frame).map_err(NoGrant::Failed)?;
        let from = home.at(number);
        let mut holders = Vec::new();
        self.backend.holders(frame, &mut holders);
        let has = holders.contains(&who.dom);
        let its = from == Where::Arena(who.dom) || from == Where::Common;
        let to = match access {
            _ if !self.descriptors => Where::Home,
            // It may write it, so it may read it.
            Access::ReadOnly if has && its => from,
            Access::ReadOnly => Where::Home,
            Access::ReadWrite if shared => Where::Common,
            Access::ReadWrite => Where::Arena(who.dom),
        };
        let access = match access {
            Access::ReadOnly if has && its && self.descriptors => Access::ReadWrite,
            access => access,
        };
        let serial = match to {
            Where::Common => self.common_serial(home).map_err(NoGrant::Failed)?,
            _ => 0,
        };
        let mut grants = Vec::new();
        {
            let mut frames = self.frames.lock();
            let account = *frames.accounts.of(who.guest);
            if account.frames >= account.limits.frames_max && frames.owner(frame).is_none() {
                return Err(NoGrant::Room(CacheError::FramesOverLimit {
                    frames: account.frames,
                    frames_max: account.limits.frames_max,
                }));
            }
            match self.backend.grant(who.dom, access, &[frame], &mut grants) {
                Ok(()) => {}
                Err(e @ (GrantError::GrantsOverLimit { .. } | GrantError::TableFull { .. })) => {
                    return Err(NoGrant::Room(e.into()));
                }
                Err(e) => return Err(NoGrant::Failed(e.into())),
            }
            frames.granted(frame, who.guest);
            frames.write_moves += u64::from(access == Access::ReadWrite);
        }
        if let Err(error) = self.move_page(home, number, frame, to) {
            if !has {
                self.backend.note_unmapped(who.dom, &[frame]);
                self.revoke_from(who.dom, &[frame]);
            }
            return Err(NoGrant::Failed(error));
        }
        self.counters
            .strict_grants
            .fetch_add(grants.len() as u64, Relaxed);
        let grant = grants.first();
        let granter = grant.and_then(|grant| self.backend.granter(grant.table));
        Ok(StrictGrant {
            granter,
            gref: grant.filter(|_| granter.is_some()).map(|g| g.gref.0),
            at: to,
            serial,
        })
    }

    fn common_serial(&self, home: &mut Home) -> Result<u32, CacheError> {
        if let Some(serial) = home.common_serial {
            return Ok(serial);
        }
        let (serial, _) = self.backend.common(home.id)?;
        home.common_serial = Some(serial);
        Ok(serial)
    }

    /// Puts a page's bytes to where they are wanted. (Where guests have no descriptors a frame stays.)
    pub(super) fn move_page(
        &self,
        home: &mut Home,
        page: u32,
        frame: FrameNo,
        to: Where,
    ) -> Result<(), CacheError> {
        let from = home.at(page);
        if from == to || !self.descriptors {
            return Ok(());
        }
        if home.is_taken(page, to) {
            return Err(CacheError::Busy("for a frame that is lost"));
        }
        if let Where::Arena(dom) = to
            && !home.arenas.contains(&dom)
        {
            self.backend.arena(home.id, dom)?;
            home.arenas.insert(dom);
        }
        let index = PageIndex(page.into());
        self.backend.place(home.id, index, frame, from, to, false)?;
        home.put(page, to);
        Ok(())
    }

    /// Does the table show that the session maps the frame, or may it?
    pub fn strict_is_mapped(&self, dom: DomId, frame: FrameNo) -> bool {
        self.backend.is_mapped(dom, frame)
    }

    /// Ends `dom`'s grant of a page. `false`: the table shows it mapped, and it stays. Without such a grant: `true`.
    /// Whoever only reads is unmapped by force, where the daemon has it; a writer is not.
    pub fn strict_revoke(
        &self,
        dom: DomId,
        file: &Arc<CachedFile>,
        page: PageIndex,
        frame: FrameNo,
    ) -> bool {
        self.end_grant(dom, file, page, frame, false)
    }

    /// The same for a session that is gone: a writer too is unmapped by force. What it wrote is the page's
    /// content.
    pub fn strict_seize(
        &self,
        dom: DomId,
        file: &Arc<CachedFile>,
        page: PageIndex,
        frame: FrameNo,
    ) -> bool {
        self.end_grant(dom, file, page, frame, true)
    }

    fn end_grant(
        &self,
        dom: DomId,
        file: &Arc<CachedFile>,
        page: PageIndex,
        frame: FrameNo,
        is_gone: bool,
    ) -> bool {
        let mut inner = file.inner.lock();
        let Ok((home, number)) = live_page(&mut inner, page, frame) else {
            return self.revoke_from(dom, &[frame]);
        };
        let at = home.at(number);
        if is_gone && at == Where::Common {
            self.outdate_common(file, home);
            if self.is_held_by_others(dom, frame) {
                // It cannot be taken from one alone: the machine asks the others, and then has the page moved.
                return false;
            }
        }
        let is_read = self.descriptors && matches!(at, Where::Home | Where::Spare);
        if self.force && (is_gone || is_read) {
            // A reader of what is not punched now reads what is the content still; the punch comes with the move.
            self.backend.note_unmapped(dom, &[frame]);
        }
        if !self.revoke_from(dom, &[frame]) {
            return false;
        }
        if self.backend.holder_count(frame) == 0 {
            self.bring_back(home, number, frame);
        }
        true
    }

    /// Nobody holds the page any more: what was written goes to where no guest has it, because whoever maps the home
    /// would see it there before it is saved. What is past the file's end goes.
    fn bring_back(&self, home: &mut Home, page: u32, frame: FrameNo) {
        let to = match home.at(page) {
            Where::Arena(_) | Where::Common => Where::Spare,
            at => at,
        };
        self.frames.lock().write_moves += 1;
        if let Err(error) = self.move_page(home, page, frame, to) {
            tracing::warn!(page, %error, "a page that was written stays where it is");
        }
        let tail = (home.bytes % PAGE_SIZE_U64) as usize;
        if !self.descriptors && tail > 0 && u64::from(page) == home.bytes / PAGE_SIZE_U64 {
            let zeros = &[0; PAGE_SIZE][tail..];
            let index = PageIndex(page.into());
            let at = Where::Home;
            if let Err(error) = self
                .backend
                .write_at(home.id, index, frame, at, tail, zeros)
            {
                tracing::warn!(page, %error, "what is past the end of a file stays");
            }
        }
    }

    /// The guest says that it unmapped a page. (On Xen the hypervisor knows by itself.)
    pub fn strict_unmapped(
        &self,
        dom: DomId,
        file: &Arc<CachedFile>,
        page: PageIndex,
        frame: FrameNo,
    ) {
        let mut inner = file.inner.lock();
        if live_page(&mut inner, page, frame).is_ok() {
            self.backend.note_unmapped(dom, &[frame]);
        }
    }

    fn is_held_by_others(&self, dom: DomId, frame: FrameNo) -> bool {
        let mut holders = Vec::new();
        self.backend.holders(frame, &mut holders);
        holders.iter().any(|holder| *holder != dom)
    }

    /// Has a session that is gone let go of a lost frame? `is_dead`: its process has ended, and its mappings with it,
    /// which no table here shows.
    pub fn strict_drained(&self, dom: DomId, frame: FrameNo, is_dead: bool) -> bool {
        let Some((file, slot, page)) = self.file_of_frame(frame) else {
            return true;
        };
        let mut inner = file.inner.lock();
        let is_page = |home: &Home| home.index.get(page) == Some(frame);
        let is_page = inner.home_at(slot).is_some_and(|home| is_page(home));
        if is_page && self.is_held_by_others(dom, frame) {
            return false;
        }
        if self.force || is_dead {
            self.backend.note_unmapped(dom, &[frame]);
        }
        self.revoke_from(dom, &[frame])
    }

    /// The file whose page is or was in a frame, the home's number, and the page.
    fn file_of_frame(&self, frame: FrameNo) -> Option<(Arc<CachedFile>, u32, u32)> {
        let table = self.frames.lock();
        if frame.0 >= table.capacity() {
            return None;
        }
        let (slot, page) = table.place(frame);
        let file = table.slot_file(slot)?.upgrade()?;
        Some((file, slot, page))
    }

    /// The daemon loads from a page that nobody writes meanwhile.
    pub fn strict_read(
        &self,
        file: &Arc<CachedFile>,
        page: PageIndex,
        frame: FrameNo,
        offset: usize,
        buf: &mut [u8],
    ) -> Result<(), CacheError> {
        let mut inner = file.inner.lock();
        let (home, number) = live_page(&mut inner, page, frame)?;
        let end = check_within(home, page, offset, buf.len())?;
        let mut whole = [0; PAGE_SIZE];
        let at = home.at(number);
        self.backend.load_at(home.id, page, frame, at, &mut whole)?;
        buf.copy_from_slice(&whole[offset..end]);
        self.frames.lock().used_once(frame);
        Ok(())
    }

    /// The daemon stores to a page that nobody else holds. It is out of readers' sight first: they see what is
    /// saved.
    pub fn strict_write(
        &self,
        file: &Arc<CachedFile>,
        page: PageIndex,
        frame: FrameNo,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), CacheError> {
        let mut inner = file.inner.lock();
        let (home, number) = live_page(&mut inner, page, frame)?;
        check_within(home, page, offset, bytes.len())?;
        if self.descriptors && home.at(number) == Where::Home {
            self.move_page(home, number, frame, Where::Spare)?;
        }
        let at = home.at(number);
        self.backend
            .write_at(home.id, page, frame, at, offset, bytes)?;
        self.frames.lock().used_once(frame);
        Ok(())
    }

    /// No page is in the frame and no grant of it is left.
    pub fn strict_free(&self, frame: FrameNo) {
        let Some((file, slot, page)) = self.file_of_frame(frame) else {
            return;
        };
        let mut inner = file.inner.lock();
        let Some(home) = inner.home_at(slot) else {
            return;
        };
        let is_page = home.index.get(page) == Some(frame);
        if !is_page && home.lost.remove(&frame).is_none() {
            return;
        }
        if is_page {
            home.index.remove(page);
        }
        let at = home.at(page);
        match self
            .backend
            .discard(home.id, PageIndex(page.into()), &[frame])
        {
            Ok(()) => {
                let mut table = self.frames.lock();
                let remember = table.state(frame) == FrameState::Recalling;
                table.release(frame, file.id.0, remember);
            }
            Err(error) => {
                tracing::warn!(page, %error, "a page could not be given back; it is tried again");
                home.lost.insert(frame, (page, at));
                home.unfreed.push(frame);
                self.frames.lock().set_state(frame, FrameState::Quarantined);
            }
        }
        if is_page {
            home.places.remove(&page);
        }
        let is_empty = !inner.has_pages();
        if is_empty {
            inner.strict.is_emptying = false;
        }
        let waits = is_empty && !inner.waiters.is_empty();
        self.settle_idle(&file, &mut inner);
        self.look_at(&file, &inner);
        drop(inner);
        if waits {
            self.push_advance(&file);
        }
        if !self.parked.lock().is_empty() {
            self.kick_parked();
        }
    }

    /// Frames that could not be emptied when they were freed.
    pub(crate) fn retry_unfreed(&self, file: &CachedFile, inner: &mut Inner) {
        for home in inner.old.iter_mut().chain(&mut inner.live) {
            for frame in std::mem::take(&mut home.unfreed) {
                let Some((page, at)) = home.lost.remove(&frame) else {
                    continue;
                };
                let index = PageIndex(page.into());
                match self.backend.discard(home.id, index, &[frame]) {
                    Ok(()) => self.frames.lock().release(frame, file.id.0, false),
                    Err(_) => {
                        home.lost.insert(frame, (page, at));
                        home.unfreed.push(frame);
                    }
                }
            }
        }
    }
}

/// Is a piece of a page within the page and the file? Gives its end in the page.
fn check_within(
    home: &Home,
    page: PageIndex,
    offset: usize,
    len: usize,
) -> Result<usize, CacheError> {
    let start = page.0 * PAGE_SIZE_U64;
    let room = home.bytes.saturating_sub(start).min(PAGE_SIZE_U64) as usize;
    match offset.checked_add(len) {
        Some(end) if end <= room => Ok(end),
        _ => Err(CacheError::BadRange("past the end of the page or the file")),
    }
}
