//! The machine.

mod accounts;
mod advance;
mod leave;
mod show;

pub use show::{DirtyPage, HolderState, PageState, State, WantState};

use super::page::{Page, Want, Work};
use super::{Action, DAEMON, Event, Place, StrictConfig, Table};
use accounts::Account;
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
    /// Those whose `dirty` is set.
    dirty: BTreeSet<Place>,
    /// Frames that sessions which are gone may have mapped.
    lost: BTreeMap<FrameNo, BTreeSet<Epoch>>,
    /// Those of them that no page is in.
    dropped: BTreeSet<FrameNo>,
    accounts: BTreeMap<Epoch, Account>,
    /// Sessions that want pages for writing and have too many: see [`Account::parked`].
    crowded: BTreeSet<Epoch>,
    /// When to look at a page though nothing happens.
    due: BTreeSet<(u64, Place)>,
}

impl Pages {
    /// No pages. Versions are given from `first_version` on, which must be above every version of
    /// earlier daemons; nobody writes before `grace_until_ms`, when the sessions of the earlier daemon
    /// must have ended (0: there was none).
    pub fn new(config: StrictConfig, first_version: Version, grace_until_ms: u64) -> Self {
        Self {
            config: StrictConfig {
                writable_max: config.writable_max.max(1),
                ..config
            },
            now_ms: 0,
            grace_until_ms,
            next_version: first_version,
            pages: BTreeMap::new(),
            dirty: BTreeSet::new(),
            lost: BTreeMap::new(),
            dropped: BTreeSet::new(),
            accounts: BTreeMap::new(),
            crowded: BTreeSet::new(),
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
            } => self.want_to_hold(place, (epoch, ticket, access), table, out),
            Event::Take { ticket, place } => self.want(place, Want::Take { ticket }, table, out),
            Event::Acked { epoch, place } => self.acked(epoch, place, table, out),
            Event::Released { epoch, place } => {
                self.with(place, table, out, |all, page, table, _| {
                    all.try_end(place, page, epoch, table);
                });
            }
            Event::Gone { epoch } => self.gone(epoch, table, out),
            Event::Placed { place, frame } => self.placed(place, frame, table, out),
            Event::NotPlaced { place, errno } => {
                self.undone(place, Work::Placing, errno, table, out);
            }
            Event::Saved { place, version } => {
                self.with(place, table, out, |_, page, _, _| {
                    if page.work == Some(Work::Saving) && page.version == version {
                        page.work = None;
                        page.dirty = false;
                    }
                });
            }
            Event::NotSaved { place, errno } => {
                self.undone(place, Work::Saving, errno, table, out);
            }
            Event::Drained { epoch, frame } => self.drained(epoch, frame, out),
            Event::Tick => {}
        }
        self.make_room(table, out);
    }

    /// When something falls due, in ms.
    pub fn next_due_ms(&self) -> Option<u64> {
        self.due.first().map(|&(at, _)| at)
    }

    /// A session is gone, which [`Event::Gone`] will say: it waits for nothing any more. Said of all that
    /// went together before the first of these events, so that nothing is granted to the next.
    pub(in crate::strict) fn end_wants(&mut self, epoch: Epoch) {
        self.crowded.remove(&epoch);
        let Some(account) = self.accounts.get_mut(&epoch) else {
            return;
        };
        account.end_wants();
        for place in account.places() {
            if let Some(page) = self.pages.get_mut(place) {
                page.end_wants(epoch);
            }
        }
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
        if page.dirty {
            self.dirty.insert(place);
        } else {
            self.dirty.remove(&place);
        }
        if !page.is_blank() {
            self.pages.insert(place, page);
        }
    }

    fn want(&mut self, place: Place, want: Want, table: &mut impl Table, out: &mut Vec<Action>) {
        let version = self.next_version;
        let bounces = self.bounces();
        let page = self.pages.entry(place);
        let page = page.or_insert_with(|| Page::new(version));
        if let Some((last, since_ms)) = page.writer {
            let soon = self.now_ms - since_ms <= self.config.bounce_ms.into();
            page.wanted_soon |= bounces && soon && want.is_to_write_beside(last);
        }
        page.wants.push_back(want);
        self.with(place, table, out, |_, _, _, _| {});
    }

    fn want_to_hold(
        &mut self,
        place: Place,
        (epoch, ticket, access): (Epoch, u64, Access),
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) {
        let limits = self.config;
        let account = self.accounts.entry(epoch).or_default();
        if epoch != DAEMON && account.waiting() >= limits.wants_max {
            let errno = EAGAIN;
            return out.push(Action::Refuse { ticket, errno });
        }
        if epoch != DAEMON
            && access == Access::ReadWrite
            && account.writing() >= limits.writable_max
        {
            account.park(place, ticket);
            self.crowded.insert(epoch);
            return;
        }
        account.wants(place, access);
        let want = Want::Hold {
            epoch,
            ticket,
            access,
        };
        self.want(place, want, table, out);
    }

    /// What was asked for could not be done: the want in front is refused.
    fn undone(
        &mut self,
        place: Place,
        work: Work,
        errno: i32,
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) {
        self.with(place, table, out, |all, page, _, out| {
            if page.work != Some(work) {
                return;
            }
            page.work = None;
            page.failed = true;
            if let Some(want) = all.pop_want(place, page) {
                let ticket = want.ticket();
                out.push(Action::Refuse { ticket, errno });
            }
        });
    }

    fn placed(
        &mut self,
        place: Place,
        frame: FrameNo,
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) {
        self.with(place, table, out, |all, page, _, out| {
            page.work = None;
            page.moving = false;
            match page.frame.replace(frame) {
                Some(old) if old == frame => drop(all.lost.remove(&frame)),
                Some(old) => all.drop_frame(old, out),
                None => {}
            }
            page.version = all.next_version();
        });
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
