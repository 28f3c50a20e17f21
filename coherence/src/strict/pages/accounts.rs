//! What one session has and waits for.

use super::{Page, Pages, Place, Want};
use crate::strict::page::{Holder, Leaving};
use crate::strict::{Action, DAEMON, Table};
use copage_grants::{Access, Epoch, Version};
use std::collections::{BTreeSet, VecDeque};

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Account {
    /// Where it holds something or waits for something, parked wants not counted.
    places: BTreeSet<Place>,
    /// How often it waits, parked wants counted.
    waiting: usize,
    /// How often it waits to write, parked wants not counted.
    waiting_to_write: usize,
    /// What it has for writing, about in the order in which it got that.
    writable: BTreeSet<(Version, Place)>,
    /// How many of these it was asked for.
    leaving: usize,
    /// Wants to write that no page knows of yet, because the session has too much for writing: place and
    /// ticket. They stand in no page's queue, so that they keep nobody else waiting.
    parked: VecDeque<(Place, u64)>,
}

impl Account {
    pub(super) const fn waiting(&self) -> usize {
        self.waiting
    }

    /// What it has for writing, or will have once it is served.
    pub(super) fn writing(&self) -> usize {
        self.writable.len() + self.waiting_to_write
    }

    pub(super) fn places(&self) -> impl Iterator<Item = &Place> {
        self.places.iter()
    }

    pub(super) fn writable(&self) -> impl Iterator<Item = Place> + '_ {
        self.writable.iter().map(|&(_, place)| place)
    }

    pub(super) fn wants(&mut self, place: Place, access: Access) {
        self.places.insert(place);
        self.waiting += 1;
        self.waiting_to_write += usize::from(access == Access::ReadWrite);
    }

    pub(super) fn park(&mut self, place: Place, ticket: u64) {
        self.waiting += 1;
        self.parked.push_back((place, ticket));
    }

    /// A page that it waits for while nothing is on its way that would make room for it.
    pub(super) fn forgotten(&self) -> Option<Place> {
        let (place, _) = self.parked.front()?;
        (self.leaving == 0 && self.waiting_to_write == 0).then_some(*place)
    }

    pub(super) fn end_wants(&mut self) {
        self.waiting = 0;
        self.waiting_to_write = 0;
        self.parked.clear();
    }
}

impl Pages {
    /// Takes the want in front of a page.
    pub(super) fn pop_want(&mut self, place: Place, page: &mut Page) -> Option<Want> {
        let want = page.wants.pop_front()?;
        if let Want::Hold { epoch, access, .. } = want {
            if let Some(account) = self.accounts.get_mut(&epoch) {
                account.waiting -= 1;
                account.waiting_to_write -= usize::from(access == Access::ReadWrite);
            }
            self.settle_account(epoch, place, page);
        }
        Some(want)
    }

    pub(super) fn add_holder(
        &mut self,
        place: Place,
        page: &mut Page,
        epoch: Epoch,
        access: Access,
    ) {
        self.remove_holder(place, page, epoch);
        let leaving = None;
        page.holders.insert(epoch, Holder { access, leaving });
        let account = self.accounts.entry(epoch).or_default();
        account.places.insert(place);
        if access == Access::ReadWrite {
            account.writable.insert((page.version, place));
        }
    }

    pub(super) fn remove_holder(&mut self, place: Place, page: &mut Page, epoch: Epoch) {
        let Some(holder) = page.holders.remove(&epoch) else {
            return;
        };
        if let Some(account) = self.accounts.get_mut(&epoch)
            && holder.access == Access::ReadWrite
        {
            account.writable.remove(&(page.version, place));
            account.leaving -= usize::from(holder.leaving.is_some());
        }
        self.settle_account(epoch, place, page);
    }

    /// One that holds the page is asked for it.
    pub(super) fn set_leaving(&mut self, page: &mut Page, epoch: Epoch, leaving: Leaving) {
        let Some(holder) = page.holders.get_mut(&epoch) else {
            return;
        };
        if holder.leaving.replace(leaving).is_none()
            && holder.access == Access::ReadWrite
            && let Some(account) = self.accounts.get_mut(&epoch)
        {
            account.leaving += 1;
        }
    }

    fn settle_account(&mut self, epoch: Epoch, place: Place, page: &Page) {
        let Some(account) = self.accounts.get_mut(&epoch) else {
            return;
        };
        if !page.holders.contains_key(&epoch) && page.wants_of(epoch) == 0 {
            account.places.remove(&place);
        }
        if account.places.is_empty() && account.waiting == 0 {
            self.accounts.remove(&epoch);
        }
    }

    /// Lets in what is parked, as far as there is room, and asks for the oldest pages of those sessions
    /// that have none.
    pub(super) fn make_room(&mut self, table: &mut impl Table, out: &mut Vec<Action>) {
        let crowded: Vec<Epoch> = self.crowded.iter().copied().collect();
        for epoch in crowded {
            while let Some((place, ticket)) = self.next_parked(epoch) {
                let access = Access::ReadWrite;
                let want = Want::Hold {
                    epoch,
                    ticket,
                    access,
                };
                self.want(place, want, table, out);
            }
            while let Some(place) = self.next_oldest(epoch) {
                self.with(place, table, out, |all, page, table, out| {
                    all.recall(place, page, &[epoch], table, out);
                });
            }
        }
    }

    /// What is parked and has room.
    fn next_parked(&mut self, epoch: Epoch) -> Option<(Place, u64)> {
        let max = self.config.writable_max;
        let account = self.accounts.get_mut(&epoch)?;
        let next = if account.writing() < max {
            account.parked.pop_front()
        } else {
            None
        };
        if let Some((place, _)) = next {
            account.waiting -= 1;
            account.wants(place, Access::ReadWrite);
        }
        if account.parked.is_empty() {
            self.crowded.remove(&epoch);
        }
        next
    }

    /// A page to ask a session for, if it is asked for fewer than it has parked.
    fn next_oldest(&self, epoch: Epoch) -> Option<Place> {
        let account = self.accounts.get(&epoch)?;
        if account.leaving >= account.parked.len() {
            return None;
        }
        let stays = |place: &Place| {
            let holder = self.pages.get(place).and_then(|p| p.holders.get(&epoch));
            holder.is_some_and(|holder| holder.leaving.is_none())
        };
        account.writable().find(stays)
    }

    /// For the audit: do the accounts say what the pages say?
    pub fn accounts_hold(&self) -> bool {
        self.accounts.iter().all(|(epoch, account)| {
            let of = |place: &&Place| {
                let page = self.pages.get(*place);
                page.is_some_and(|p| p.holders.contains_key(epoch) || p.wants_of(*epoch) > 0)
            };
            let pages = self.pages.values();
            let waiting = pages.map(|page| page.wants_of(*epoch)).sum::<usize>();
            let writes = |(place, page): (&Place, &Page)| {
                let holder = page.holders.get(epoch)?;
                (holder.access == Access::ReadWrite).then_some((page.version, *place))
            };
            account.places.iter().all(|place| of(&place))
                && account.waiting == waiting + account.parked.len()
                && self
                    .pages
                    .iter()
                    .filter_map(writes)
                    .collect::<BTreeSet<_>>()
                    == account.writable
                && (*epoch == DAEMON || account.writable.len() <= self.config.writable_max)
        })
    }
}
