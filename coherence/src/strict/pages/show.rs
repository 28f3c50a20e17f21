//! What displays, sync and the audit see.

use super::accounts::Account;
use super::{Page, Pages, Place, Want, Work};
use crate::strict::page::Holder;
use copage_grants::{Access, Epoch, FrameNo, PageIndex, Version};

/// The state of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// In no frame.
    Away,
    /// In a frame, and nobody has it.
    Free,
    /// Sessions read it.
    Shared,
    /// One session writes it.
    Exclusive,
    /// Sessions write it together.
    SharedRw,
}

/// One who has a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HolderState {
    /// Who.
    pub epoch: Epoch,
    /// How.
    pub access: Access,
    /// It was asked for the page.
    pub leaving: bool,
}

/// One who waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WantState {
    /// Whose want; `None`: the page is to be taken from all.
    pub who: Option<(Epoch, Access)>,
    /// The caller's.
    pub ticket: u64,
}

/// One page, for displays.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PageState {
    /// Which.
    pub page: PageIndex,
    /// Where it is.
    pub frame: Option<FrameNo>,
    /// Which content.
    pub version: Version,
    /// See [`State`].
    pub state: State,
    /// Somebody could write since it was last filled or saved.
    pub dirty: bool,
    /// It is being filled or copied.
    pub placing: bool,
    /// It is being saved.
    pub saving: bool,
    /// Who has it.
    pub holders: Vec<HolderState>,
    /// Who waits, in order.
    pub wants: Vec<WantState>,
    /// When a session last got it, in ms of the machine's clock.
    pub since_ms: u64,
}

/// A page that the file on the disk may differ from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DirtyPage {
    /// Which.
    pub page: PageIndex,
    /// Where it is.
    pub frame: FrameNo,
    /// Which content.
    pub version: Version,
    /// Sessions have it for writing.
    pub has_writers: bool,
}

impl Pages {
    /// The pages of a file which its disk may differ from.
    pub fn dirty(&self, file: u64) -> impl Iterator<Item = DirtyPage> + '_ {
        let places = self.dirty.range(all_of(file));
        places.filter_map(|place| {
            let page = self.pages.get(place)?;
            Some(DirtyPage {
                page: place.page,
                frame: page.frame?,
                version: page.version,
                has_writers: page.has_writers(),
            })
        })
    }

    /// Is there any such page, of any file?
    pub fn any_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// What is known of the pages of a file.
    pub fn pages_of(&self, file: u64) -> impl Iterator<Item = PageState> + '_ {
        let pages = self.pages.range(all_of(file));
        pages.map(|(place, page)| state_of(place.page, page))
    }

    /// What a session has for writing, the oldest first.
    pub fn writable_pages(&self, epoch: Epoch) -> impl Iterator<Item = Place> + '_ {
        let account = self.accounts.get(&epoch).into_iter();
        account.flat_map(|account| account.writable())
    }

    /// Where a session has something, or waits for something.
    pub fn places_of(&self, epoch: Epoch) -> impl Iterator<Item = Place> + '_ {
        let account = self.accounts.get(&epoch).into_iter();
        account.flat_map(|account| account.places().copied())
    }

    /// How many pages a session waits for.
    pub fn waiting(&self, epoch: Epoch) -> usize {
        self.accounts.get(&epoch).map_or(0, |a| a.waiting())
    }

    /// Frames that sessions which are gone may have mapped, with whose.
    pub fn lost(&self) -> impl Iterator<Item = (FrameNo, Epoch)> + '_ {
        self.lost
            .iter()
            .flat_map(|(frame, epochs)| epochs.iter().map(|epoch| (*frame, *epoch)))
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

    /// Was a session asked for a page that it still holds?
    pub fn is_leaving(&self, epoch: Epoch, place: Place) -> bool {
        let page = self.pages.get(&place);
        let holder = page.and_then(|page| page.holders.get(&epoch));
        holder.is_some_and(|holder| holder.leaving.is_some())
    }

    /// Do several sessions have the page for writing, as one frame?
    pub fn is_shared_rw(&self, place: Place) -> bool {
        self.pages.get(&place).is_some_and(|page| page.shared_rw)
    }

    /// For the audit: a page that somebody waits for and that waits for nothing itself. There is none.
    pub fn forgotten(&self) -> Option<Place> {
        let forgotten = |(place, page): (&Place, &Page)| {
            let waits = page.work.is_some() || self.due.iter().any(|(_, due)| due == place);
            (!page.wants.is_empty() && !waits).then_some(*place)
        };
        let parked = self.accounts.values().find_map(Account::forgotten);
        self.pages.iter().find_map(forgotten).or(parked)
    }
}

fn all_of(file: u64) -> std::ops::RangeInclusive<Place> {
    let at = |page| Place {
        file,
        page: PageIndex(page),
    };
    at(0)..=at(u64::MAX)
}

fn state_of(index: PageIndex, page: &Page) -> PageState {
    let state = match page.frame {
        None => State::Away,
        Some(_) if page.holders.is_empty() => State::Free,
        Some(_) if page.shared_rw => State::SharedRw,
        Some(_) if page.has_writers() => State::Exclusive,
        Some(_) => State::Shared,
    };
    let holder = |(epoch, holder): (&Epoch, &Holder)| HolderState {
        epoch: *epoch,
        access: holder.access,
        leaving: holder.leaving.is_some(),
    };
    let want = |want: &Want| WantState {
        who: match *want {
            Want::Hold { epoch, access, .. } => Some((epoch, access)),
            Want::Take { .. } => None,
        },
        ticket: want.ticket(),
    };
    PageState {
        page: index,
        frame: page.frame,
        version: page.version,
        state,
        dirty: page.dirty,
        placing: page.work == Some(Work::Placing),
        saving: page.work == Some(Work::Saving),
        holders: page.holders.iter().map(holder).collect(),
        wants: page.wants.iter().map(want).collect(),
        since_ms: page.since_ms,
    }
}
