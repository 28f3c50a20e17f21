//! The audit: ledger, grant tables, frame files and the cache's own books, entry by entry.

use crate::cache::Cache;
use crate::config::GuestId;
use crate::file::{CachedFile, Home, Inner};
use crate::frames::{FrameState, FrameTable};
use crate::limits::AUDIT_LINES_MAX;
use crate::report::AuditReport;
use copage_grants::{Access, DomId, FrameNo, PAGE_SIZE, PAGE_SIZE_U64, PageIndex, Where};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

impl AuditReport {
    pub(crate) fn differs(&mut self, line: String) {
        if self.differences.len() < AUDIT_LINES_MAX {
            self.differences.push(line);
        }
    }
}

/// What pins of homes are charged, counted anew.
#[derive(Default)]
struct Pins {
    reserved: u64,
    /// Pinned and quarantined pages by guest.
    charged: HashMap<GuestId, (u64, u64)>,
}

impl Pins {
    fn add(&mut self, home: &Home) {
        self.reserved += if home.reserved { home.pages() } else { 0 };
        for charge in &home.charges {
            let (pinned, quarantined) = self.charged.entry(charge.guest).or_default();
            let count = if charge.quarantined {
                quarantined
            } else {
                pinned
            };
            *count += home.pages();
        }
    }

    fn compare(&self, table: &FrameTable, report: &mut AuditReport) {
        if table.pin_pages != self.reserved {
            let (counted, found) = (table.pin_pages, self.reserved);
            report.differs(format!("{counted} pages are kept for pins, not {found}"));
        }
        for (guest, account) in table.accounts.all() {
            let counted = (account.pinned, account.quarantined);
            let found = self.charged.get(&guest).copied().unwrap_or_default();
            if counted != found {
                report.differs(format!(
                    "guest {guest} is charged {counted:?} pinned and quarantined pages, not {found:?}"
                ));
            }
        }
    }
}

impl Cache {
    /// Compares everything that can be compared. Each file is looked at under its lock, with the
    /// frame table's, so what is found is a difference and not a change seen half way; fills go on
    /// meanwhile.
    pub fn audit(&self) -> AuditReport {
        let mut report = AuditReport {
            ledger: self.backend.audit(),
            ..AuditReport::default()
        };
        let mut seen = HashSet::new();
        let mut exact = true;
        let mut pins = Pins::default();
        let (pin_moves, frame_moves, write_moves) = {
            let table = self.frames.lock();
            (table.pin_moves, table.frame_moves, table.write_moves)
        };
        let mut places = HashMap::new();
        for file in self.all_files() {
            let mut inner = file.inner.lock();
            report.files += 1;
            exact &= inner.flights.is_empty();
            for home in inner.old.iter().chain(&inner.live) {
                exact &= home.busy == 0;
                seen.extend(home.lost.keys().copied());
                self.audit_places(home, file.id.0, &mut places, &mut report);
            }
            inner
                .old
                .iter()
                .chain(&inner.live)
                .for_each(|h| pins.add(h));
            self.audit_file(&file, &mut inner, &mut seen, &mut report);
        }
        // Frames of an earlier life are in no index.
        let left = self.left_over.lock();
        let table = self.frames.lock();
        for frame in &left.frames {
            if table.state(*frame) != FrameState::Quarantined || !seen.insert(*frame) {
                report.differs(format!("{frame:?}, mapped of old, is in use"));
            }
        }
        if table.pin_moves == pin_moves {
            pins.compare(&table, &mut report);
        }
        let owned = table.frames_by_owner();
        for (guest, account) in table.accounts.all() {
            let frames = owned.get(&guest).copied().unwrap_or(0);
            if account.frames != frames {
                let charged = account.frames;
                report.differs(format!(
                    "guest {guest} is charged {charged} frames and has {frames}"
                ));
            }
        }
        // With the table's lock: nothing is granted and no frame given back meanwhile.
        let is_still = table.write_moves == write_moves && table.frame_moves == frame_moves;
        self.backend.each_grant(&mut |grant| {
            if is_still && grant.access == Access::ReadWrite && self.descriptors {
                let at = places.get(&grant.frame);
                if !matches!(at, Some(Where::Arena(dom)) if *dom == grant.dom)
                    && at != Some(&Where::Common)
                {
                    let (frame, dom) = (grant.frame, grant.dom);
                    report.differs(format!("{dom} may write {frame:?}, which is in {at:?}"));
                }
            }
            let state = (grant.frame.0 < table.capacity()).then(|| table.state(grant.frame));
            if matches!(
                state,
                None | Some(FrameState::Free | FrameState::Filling | FrameState::Out)
            ) {
                let (frame, dom) = (grant.frame, grant.dom);
                report.differs(format!("{dom} holds {frame:?}, which is {state:?}"));
            }
        });
        report.frames = u64::from(table.capacity());
        let states = [
            FrameState::Small,
            FrameState::Main,
            FrameState::Granted,
            FrameState::Evicting,
            FrameState::Recalling,
            FrameState::Held,
            FrameState::Quarantined,
        ];
        let resident: u32 = states.iter().map(|s| table.count(*s)).sum();
        let empty = [FrameState::Free, FrameState::Out, FrameState::Filling];
        let all = empty.iter().map(|s| table.count(*s)).sum::<u32>() + resident;
        if all != table.capacity() {
            report.differs(format!("{all} frames are counted of {}", table.capacity()));
        }
        // Only when nothing moved: files were looked at one after the other.
        exact &= table.frame_moves == frame_moves;
        if exact && table.count(FrameState::Filling) == 0 && seen.len() as u32 != resident {
            report.differs(format!(
                "{resident} frames hold pages, {} are in indexes",
                seen.len()
            ));
        }
        report
    }

    fn audit_file(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
        seen: &mut HashSet<FrameNo>,
        report: &mut AuditReport,
    ) {
        let id = file.id.0;
        let open: HashSet<DomId> = inner
            .opens
            .iter()
            .filter(|e| e.maps > 0 || e.pins > 0)
            .map(|e| e.who.dom)
            .chain(inner.lingering.iter().copied())
            .collect();
        let live = inner.live.as_ref().map(|h| h.generation);
        let flying = !inner.flights.is_empty();
        for home in inner.old.iter().chain(&inner.live) {
            let is_live = live == Some(home.generation);
            let pages = home.index.pages();
            {
                let table = self.frames.lock();
                for (page, frame) in &pages {
                    if !seen.insert(*frame) {
                        report.differs(format!(
                            "{frame:?} is in two places, one is file {id} page {page}"
                        ));
                    }
                    if table.place(*frame) != (home.slot, *page) {
                        report.differs(format!(
                            "{frame:?} of file {id} page {page} says {:?}",
                            table.place(*frame)
                        ));
                    }
                    self.audit_state(&table, home, is_live, *page, *frame, report);
                }
            }
            let mut holders = Vec::new();
            for (page, frame) in &pages {
                holders.clear();
                self.backend.holders(*frame, &mut holders);
                report.grants += holders.len() as u64;
                for dom in holders.iter().filter(|_| is_live) {
                    if !open.contains(dom) {
                        report.differs(format!(
                            "{dom} holds page {page} of file {id}, which it does not have open"
                        ));
                    }
                }
            }
            if is_live && !flying && home.busy == 0 {
                self.audit_present(home, &pages, id, report);
                self.audit_tail(home, file.is_coherent(), id, report);
            }
        }
    }

    fn audit_state(
        &self,
        table: &crate::frames::FrameTable,
        home: &Home,
        is_live: bool,
        page: u32,
        frame: FrameNo,
        report: &mut AuditReport,
    ) {
        let state = table.state(frame);
        let granted = self.backend.holder_count(frame) > 0;
        let good = match state {
            FrameState::Free | FrameState::Filling | FrameState::Out => false,
            FrameState::Evicting => true,
            FrameState::Recalling => true,
            FrameState::Quarantined => !is_live || home.recalling > 0,
            FrameState::Held => is_live && home.holds_frames(),
            FrameState::Granted => granted,
            FrameState::Small | FrameState::Main => !granted,
        };
        if !good || is_live && home.holds_frames() && state != FrameState::Held {
            report.differs(format!(
                "{frame:?} (page {page}) is {state:?}, granted: {granted}"
            ));
        }
    }

    /// What the backend holds for the home, against the index.
    fn audit_present(
        &self,
        home: &Home,
        pages: &[(u32, FrameNo)],
        id: u64,
        report: &mut AuditReport,
    ) {
        let present = match self.backend.present_pages(home.id) {
            Ok(present) => present,
            Err(e) => return report.differs(format!("file {id}: {e}")),
        };
        let held: HashSet<u64> = present
            .iter()
            .flat_map(|(first, count)| first.0..first.0 + count)
            .collect();
        let mut indexed: HashMap<u64, FrameNo> =
            pages.iter().map(|(p, f)| (u64::from(*p), *f)).collect();
        indexed.extend(Self::lost_pages(home).map(|(page, frame)| (page.0, frame)));
        for page in held.iter().filter(|p| !indexed.contains_key(p)) {
            report.differs(format!(
                "file {id} page {page} is in its home but in no frame"
            ));
        }
        for page in indexed.keys().filter(|p| !held.contains(p)) {
            report.differs(format!(
                "file {id} page {page} has a frame but its home holds nothing there"
            ));
        }
    }

    /// Bytes past the end of the file are zero.
    fn audit_tail(&self, home: &Home, is_coherent: bool, id: u64, report: &mut AuditReport) {
        let tail = (home.bytes % PAGE_SIZE_U64) as usize;
        let last = home.bytes / PAGE_SIZE_U64;
        // Who writes may store there, for nobody to see.
        let is_seen = |frame: &FrameNo| {
            let is_home = home.at(last as u32) == Where::Home;
            tail > 0
                && is_home
                && (self.descriptors || !is_coherent || self.backend.holder_count(*frame) == 0)
        };
        let Some(frame) = home.index.get(last as u32).filter(is_seen) else {
            return;
        };
        let mut page = [0; PAGE_SIZE];
        match self
            .backend
            .load(home.id, PageIndex(last), frame, &mut page)
        {
            Ok(()) if page[tail..].iter().all(|b| *b == 0) => report.tails += 1,
            Ok(()) => report.differs(format!("file {id}: bytes past its end are not zero")),
            Err(e) => report.differs(format!("file {id}: {e}")),
        }
    }
}
