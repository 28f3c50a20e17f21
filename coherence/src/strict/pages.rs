//! The machine.

use super::page::{Holder, Leaving, Page, Want};
use super::{Action, Event, Place, StrictConfig, Table};
use crate::limits::DRIFT_PERMILLE;
use copage_grants::{Access, Epoch, FrameNo, Version};
use std::collections::{BTreeMap, BTreeSet};

/// `EAGAIN`, asm-generic/errno-base.h.
const EAGAIN: i32 = 11;

/// The pages of all files. Equal states behave equally: a model checker can hash them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pages {
    config: StrictConfig,
    /// The latest time seen: time that goes back counts as standing still.
    now_ms: u64,
    /// Nobody writes before.
    grace_until_ms: u64,
    next_version: Version,
    pages: BTreeMap<Place, Page>,
    /// Frames that sessions which are gone may have mapped.
    lost: BTreeMap<FrameNo, BTreeSet<Epoch>>,
    /// Those of them that no page is in.
    dropped: BTreeSet<FrameNo>,
    /// Where each session holds or wants something.
    places: BTreeMap<Epoch, BTreeSet<Place>>,
    /// When to look at a page though nothing happens.
    due: BTreeSet<(u64, Place)>,
}

impl Pages {
    /// No pages. Versions are given from `first_version` on, which must be above every version of
    /// earlier daemons; nobody writes before `grace_until_ms`, when the sessions of the earlier daemon
    /// must have ended (0: there was none).
    pub fn new(config: StrictConfig, first_version: Version, grace_until_ms: u64) -> Self {
        Self {
            config,
            now_ms: 0,
            grace_until_ms,
            next_version: first_version,
            pages: BTreeMap::new(),
            lost: BTreeMap::new(),
            dropped: BTreeSet::new(),
            places: BTreeMap::new(),
            due: BTreeSet::new(),
        }
    }

    /// Takes one event at a time `now_ms` of a clock that also runs while the machine sleeps, and
    /// appends what is to be done to `out`. What fell due by then comes first.
    pub fn step(
        &mut self,
        now_ms: u64,
        event: Event,
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) {
        self.now_ms = self.now_ms.max(now_ms);
        self.expire(table, out);
        match event {
            Event::Want {
                epoch,
                ticket,
                place,
                access,
            } => {
                self.places.entry(epoch).or_default().insert(place);
                if self.waiting(epoch) >= self.config.wants_max {
                    let errno = EAGAIN;
                    out.push(Action::Refuse { ticket, errno });
                    return;
                }
                let want = Want::Hold {
                    epoch,
                    ticket,
                    access,
                };
                self.want(place, want, table, out);
            }
            Event::Take { ticket, place } => self.want(place, Want::Take { ticket }, table, out),
            Event::Acked { epoch, place } => self.acked(epoch, place, table, out),
            Event::Released { epoch, place } => {
                self.with(place, table, out, |all, page, table, _| {
                    all.try_end(page, epoch, table);
                })
            }
            Event::Gone { epoch } => self.gone(epoch, table, out),
            Event::Placed { place, frame } => self.placed(place, frame, table, out),
            Event::NotPlaced { place, errno } => {
                self.with(place, table, out, |_, page, _, out| {
                    page.busy = false;
                    if let Some(Want::Hold { ticket, .. } | Want::Take { ticket }) =
                        page.wants.pop_front()
                    {
                        out.push(Action::Refuse { ticket, errno });
                    }
                });
            }
            Event::Drained { epoch, frame } => self.drained(epoch, frame, out),
            Event::Tick => {}
        }
    }

    /// When something falls due, in ms.
    pub fn next_due_ms(&self) -> Option<u64> {
        self.due.first().map(|&(at, _)| at)
    }

    /// Frames that sessions which are gone may have mapped, with whose.
    pub fn lost(&self) -> impl Iterator<Item = (FrameNo, Epoch)> + '_ {
        let each = |(frame, epochs): (&FrameNo, &BTreeSet<Epoch>)| {
            let frame = *frame;
            epochs.clone().into_iter().map(move |epoch| (frame, epoch))
        };
        self.lost.iter().flat_map(each)
    }

    /// Where a page is, and its version.
    pub fn content(&self, place: Place) -> Option<(FrameNo, Version)> {
        let page = self.pages.get(&place)?;
        page.frame.map(|frame| (frame, page.version))
    }

    /// Who holds a page, and how.
    pub fn holders(&self, place: Place) -> impl Iterator<Item = (Epoch, Access)> + '_ {
        let holders = self.pages.get(&place).into_iter().flat_map(|p| &p.holders);
        holders.map(|(epoch, holder)| (*epoch, holder.access))
    }

    /// Do several sessions have the page for writing, as one frame?
    pub fn is_shared_rw(&self, place: Place) -> bool {
        self.pages.get(&place).is_some_and(|page| page.shared_rw)
    }

    /// How many pages a session waits for.
    pub fn waiting(&self, epoch: Epoch) -> usize {
        let places = self.places.get(&epoch).into_iter().flatten();
        let pages = places.filter_map(|place| self.pages.get(place));
        pages.map(|page| page.wants_of(epoch)).sum()
    }

    /// A session is gone, which [`Event::Gone`] will say: it waits for nothing any more. Said of all that
    /// went together before the first of these events, so that nothing is granted to the next.
    pub(super) fn end_wants(&mut self, epoch: Epoch) {
        for place in self.places.get(&epoch).into_iter().flatten() {
            if let Some(page) = self.pages.get_mut(place) {
                page.end_wants(epoch);
            }
        }
    }

    /// For the audit: a page that somebody waits for and that waits for nothing itself. There is none.
    pub fn forgotten(&self) -> Option<Place> {
        let forgotten = |(place, page): (&Place, &Page)| {
            let waits = page.busy || self.due.iter().any(|(_, due)| due == place);
            (!page.wants.is_empty() && !waits).then_some(*place)
        };
        self.pages.iter().find_map(forgotten)
    }

    fn expire(&mut self, table: &mut impl Table, out: &mut Vec<Action>) {
        while let Some(&(at_ms, place)) = self.due.first() {
            if at_ms > self.now_ms {
                break;
            }
            self.due.pop_first();
            self.with(place, table, out, |all, page, table, out| {
                all.look_again(page, place, table, out);
            });
        }
    }

    /// Changes a page, then does what has become possible for it.
    fn with<T: Table>(
        &mut self,
        place: Place,
        table: &mut T,
        out: &mut Vec<Action>,
        change: impl FnOnce(&mut Self, &mut Page, &mut T, &mut Vec<Action>),
    ) {
        let Some(mut page) = self.pages.remove(&place) else {
            return;
        };
        change(self, &mut page, table, out);
        self.advance(place, &mut page, table, out);
        if !page.is_blank() {
            self.pages.insert(place, page);
        }
    }

    fn want(&mut self, place: Place, want: Want, table: &mut impl Table, out: &mut Vec<Action>) {
        let version = self.next_version;
        let page = self.pages.entry(place);
        page.or_insert_with(|| Page::new(version))
            .wants
            .push_back(want);
        self.with(place, table, out, |_, _, _, _| {});
    }

    /// Does what can be done for a page now.
    fn advance(
        &mut self,
        place: Place,
        page: &mut Page,
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) {
        while !page.busy {
            if page.holders.is_empty() {
                page.shared_rw = false;
            }
            if page.moving {
                if !page.holders.is_empty() {
                    let all: Vec<Epoch> = page.holders.keys().copied().collect();
                    return self.recall(place, page, &all, out);
                }
                if let Some(from) = page.frame {
                    page.busy = true;
                    return out.push(Action::Copy { place, from });
                }
                page.moving = false;
            }
            let go_on = match page.wants.front().copied() {
                None => false,
                Some(Want::Take { ticket }) => self.take(place, page, ticket, out),
                Some(Want::Hold {
                    epoch,
                    ticket,
                    access,
                }) => self.hold(place, page, (epoch, ticket, access), table, out),
            };
            if !go_on {
                return;
            }
        }
    }

    /// `true`: done.
    fn take(&mut self, place: Place, page: &mut Page, ticket: u64, out: &mut Vec<Action>) -> bool {
        if !page.holders.is_empty() {
            let all: Vec<Epoch> = page.holders.keys().copied().collect();
            self.recall(place, page, &all, out);
            return false;
        }
        page.wants.pop_front();
        let frame = page.frame.take();
        out.push(Action::Taken {
            ticket,
            place,
            frame,
            version: page.version,
            dirty: std::mem::take(&mut page.dirty),
        });
        if let Some(frame) = frame {
            self.drop_frame(frame, out);
        }
        true
    }

    /// `true`: done.
    fn hold(
        &mut self,
        place: Place,
        page: &mut Page,
        (epoch, ticket, access): (Epoch, u64, Access),
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) -> bool {
        let writes = access == Access::ReadWrite;
        let own = page.holders.get(&epoch);
        if own.is_some_and(|own| own.leaving.is_some()) {
            return false;
        }
        if writes && self.now_ms < self.grace_until_ms {
            self.due.insert((self.grace_until_ms, place));
            return false;
        }
        let Some(frame) = page.frame else {
            page.busy = true;
            out.push(Action::Fill { place });
            return false;
        };
        if writes && page.is_exclusive() && page.bounces >= self.config.bounces_max {
            page.shared_rw = true;
        }
        let mut against = page.against(epoch, access);
        if against.contains(&epoch) && table.revoke(epoch, frame) {
            page.holders.remove(&epoch);
            against.retain(|who| *who != epoch);
        }
        if !against.is_empty() {
            let since_ms = page.writer.map_or(0, |(_, since_ms)| since_ms);
            let hold_until_ms = since_ms.saturating_add(self.config.hold_ms.into());
            if page.is_exclusive() && self.now_ms < hold_until_ms {
                self.due.insert((hold_until_ms, place));
            } else {
                self.recall(place, page, &against, out);
            }
            return false;
        }
        if writes && !page.shared_rw && self.lost.contains_key(&frame) {
            page.busy = true;
            out.push(Action::Copy { place, from: frame });
            return false;
        }
        page.wants.pop_front();
        self.grant(place, page, frame, (epoch, ticket, access), table, out);
        true
    }

    fn grant(
        &mut self,
        place: Place,
        page: &mut Page,
        frame: FrameNo,
        (epoch, ticket, access): (Epoch, u64, Access),
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) {
        let had = page.holders.get(&epoch).map(|holder| holder.access);
        let access = match had {
            Some(Access::ReadWrite) => Access::ReadWrite,
            _ => access,
        };
        if let Err(errno) = table.grant(epoch, frame, access) {
            return out.push(Action::Refuse { ticket, errno });
        }
        if access == Access::ReadWrite && had != Some(Access::ReadWrite) {
            if let Some((last, since_ms)) = page.writer
                && last != epoch
            {
                let soon = self.now_ms - since_ms <= self.config.bounce_ms.into();
                page.bounces = if soon {
                    page.bounces.saturating_add(1)
                } else {
                    0
                };
            }
            if page.holders.is_empty() {
                page.version = self.next_version();
            }
            page.writer = Some((epoch, self.now_ms));
            page.dirty = true;
        }
        let leaving = None;
        page.holders.insert(epoch, Holder { access, leaving });
        out.push(Action::Grant {
            ticket,
            epoch,
            place,
            frame,
            access,
            version: page.version,
        });
    }

    /// Asks sessions for a page that were not asked yet.
    fn recall(&mut self, place: Place, page: &mut Page, whom: &[Epoch], out: &mut Vec<Action>) {
        let term_ms = u64::from(self.config.unmap_deadline_ms);
        let until_ms = self.now_ms + term_ms + term_ms * DRIFT_PERMILLE / 1000;
        for epoch in whom {
            if let Some(holder) = page.holders.get_mut(epoch)
                && holder.leaving.is_none()
            {
                let look_ms = None;
                holder.leaving = Some(Leaving { until_ms, look_ms });
                self.due.insert((until_ms, place));
                let epoch = *epoch;
                out.push(Action::Recall { epoch, place });
            }
        }
    }

    fn acked(&mut self, epoch: Epoch, place: Place, table: &mut impl Table, out: &mut Vec<Action>) {
        let look_ms = self.now_ms + u64::from(self.config.look_again_ms).max(1);
        self.with(place, table, out, |all, page, table, _| {
            let asked = page
                .holders
                .get(&epoch)
                .is_some_and(|h| h.leaving.is_some());
            if asked && !all.try_end(page, epoch, table) {
                if let Some(Holder {
                    leaving: Some(leaving),
                    ..
                }) = page.holders.get_mut(&epoch)
                {
                    leaving.look_ms = Some(look_ms);
                }
                all.due.insert((look_ms, place));
            }
        });
    }

    /// Ends a holding if the table shows that the page is not mapped. `false`: it is.
    fn try_end(&mut self, page: &mut Page, epoch: Epoch, table: &mut impl Table) -> bool {
        let Some(frame) = page.frame.filter(|_| page.holders.contains_key(&epoch)) else {
            return true;
        };
        let ended = table.revoke(epoch, frame);
        if ended {
            page.holders.remove(&epoch);
        }
        ended
    }

    /// Looks at those of a page who should have let go.
    fn look_again(
        &mut self,
        page: &mut Page,
        place: Place,
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) {
        let leaving: Vec<(Epoch, Leaving)> = page
            .holders
            .iter()
            .filter_map(|(epoch, holder)| Some((*epoch, holder.leaving?)))
            .collect();
        for (epoch, Leaving { until_ms, look_ms }) in leaving {
            let due = until_ms <= self.now_ms || look_ms.is_some_and(|at| at <= self.now_ms);
            if !due || (look_ms.is_some() && self.try_end(page, epoch, table)) {
                continue;
            }
            if until_ms <= self.now_ms {
                out.push(Action::Fence { epoch });
            } else if look_ms.is_some() {
                let next_ms = self.now_ms + u64::from(self.config.look_again_ms).max(1);
                if let Some(holder) = page.holders.get_mut(&epoch) {
                    let look_ms = Some(next_ms);
                    holder.leaving = Some(Leaving { until_ms, look_ms });
                }
                self.due.insert((next_ms, place));
            }
        }
    }

    fn gone(&mut self, epoch: Epoch, table: &mut impl Table, out: &mut Vec<Action>) {
        for place in self.places.remove(&epoch).unwrap_or_default() {
            self.with(place, table, out, |all, page, table, _| {
                page.end_wants(epoch);
                let (Some(holder), Some(frame)) = (page.holders.remove(&epoch), page.frame) else {
                    return;
                };
                if !table.revoke(epoch, frame) {
                    all.lost.entry(frame).or_default().insert(epoch);
                    page.moving |= holder.access == Access::ReadWrite;
                }
            });
        }
    }

    fn placed(
        &mut self,
        place: Place,
        frame: FrameNo,
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) {
        self.with(place, table, out, |all, page, _, out| {
            page.busy = false;
            page.moving = false;
            if let Some(old) = page.frame.replace(frame) {
                all.drop_frame(old, out);
            }
            page.version = all.next_version();
        });
    }

    fn drained(&mut self, epoch: Epoch, frame: FrameNo, out: &mut Vec<Action>) {
        let Some(epochs) = self.lost.get_mut(&frame) else {
            return;
        };
        epochs.remove(&epoch);
        if epochs.is_empty() {
            self.lost.remove(&frame);
            if self.dropped.remove(&frame) {
                out.push(Action::Free { frame });
            }
        }
    }

    /// No page is in the frame any more.
    fn drop_frame(&mut self, frame: FrameNo, out: &mut Vec<Action>) {
        if self.lost.contains_key(&frame) {
            self.dropped.insert(frame);
        } else {
            out.push(Action::Free { frame });
        }
    }

    fn next_version(&mut self) -> Version {
        let version = self.next_version;
        self.next_version = Version(version.0 + 1);
        version
    }
}
