//! A host in small: the machine as it is, a grant table that keeps what is mapped, frames with one
//! number in each, guests, and messages that take as long as they like.

use super::places::{Entries, Entry, Spot};
use copage_coherence::msg::FenceReason;
use copage_coherence::session::{
    Action as SessionAction, Event as SessionEvent, Guest as Who, SessionConfig, Subject,
};
use copage_coherence::strict::{Action, DAEMON, Event, Input, Output, Place, Strict, StrictConfig};
use copage_grants::{Access, Epoch, FrameNo, PageIndex, Version};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub const TERM_MS: u32 = 100;
/// What a clock that is 1 % slow makes of a term.
pub const SLOW_TERM_MS: u64 = 101;
pub const PAGES: StrictConfig = StrictConfig {
    map_ms: 0,
    hold_ms: 1,
    unmap_deadline_ms: TERM_MS,
    look_again_ms: 50,
    bounces_max: u32::MAX,
    bounce_ms: 20,
    wants_max: 4,
    writable_max: 8,
    share_in_place: true,
};
const SESSIONS: SessionConfig = SessionConfig {
    lease_ttl_ms: TERM_MS,
    invalidate_deadline_ms: TERM_MS,
    sessions_max: 64,
    guest_sessions_max: 64,
    recalls_max: 64,
};

/// The first epoch and version of the first life.
const FIRST: u64 = 1 << 32 | 1;

pub fn place(page: u64) -> Place {
    Place {
        file: 1,
        page: PageIndex(page),
    }
}

/// From the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Down {
    Granted(Place, (FrameNo, Spot), Access, Version),
    Refused(Place),
    Invalidate(u64, Place),
    /// When the guest asked.
    Renewed(u64),
    Fenced,
}

/// To the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Up {
    Want(Place, Access),
    Ack(u64, Place),
    Released(Place),
    /// When it was asked.
    Renew(u64),
}

/// A guest, as it sees things.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Guest {
    pub epoch: Option<Epoch>,
    /// It says what is not so: it is not asked what it reads any more.
    pub liar: bool,
    /// By its own, slow clock.
    pub lease_until_ms: u64,
    pub mapped: BTreeMap<Place, (FrameNo, Access, Spot)>,
    pub seen: BTreeMap<Place, Version>,
    pub wants: BTreeSet<Place>,
    pub down: VecDeque<Down>,
    pub up: VecDeque<Up>,
}

/// What may still happen: each happens so often at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Left {
    pub wants: u8,
    pub stores: u8,
    /// Stores by a guest whose lease is over and which does not know: it was stopped.
    pub late: u8,
    pub renewals: u8,
    pub advances: u8,
    pub deaths: u8,
    pub connects: u8,
    pub takes: u8,
    /// Saves that fail.
    pub fails: u8,
    /// Pages that the daemon reads.
    pub looks: u8,
    /// Pages that the daemon writes.
    pub writes: u8,
    pub restarts: u8,
    pub lies: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub machine: Strict,
    pub config: StrictConfig,
    pub now_ms: u64,
    pub table: Entries,
    pub frames: u32,
    pub free: BTreeSet<FrameNo>,
    /// Frames that an earlier daemon's guests have mapped.
    pub left_over: BTreeSet<FrameNo>,
    pub disk: BTreeMap<Place, u8>,
    pub guests: Vec<Guest>,
    /// Fills and copies under way.
    pub placing: BTreeMap<Place, Option<FrameNo>>,
    /// Saves under way, with what was in the frame when they were asked for.
    pub saving: BTreeMap<Place, (FrameNo, Version, u8)>,
    /// Pages of which a save or a copy failed, and was not tried again since.
    pub unsaved: BTreeSet<Place>,
    /// Who stored each value, value 1 first.
    pub authors: Vec<Epoch>,
    /// Pages that were written by several at once, since they were last saved.
    pub mixed: BTreeSet<Place>,
    pub left: Left,
    /// The newest value that a store which counts put into a page.
    pub latest: BTreeMap<Place, u8>,
    /// Pages of which a fenced writer had the only content: the daemon's snapshot counts.
    pub orphaned: BTreeSet<Place>,
    /// Sessions that were fenced or have ended.
    pub gone: BTreeSet<Epoch>,
    pub life: u64,
    /// What went wrong on the way.
    pub wrong: Option<&'static str>,
}

impl World {
    pub fn new(
        guests: usize,
        frames: u32,
        (force, descriptors): (bool, bool),
        config: StrictConfig,
        left: Left,
    ) -> Self {
        Self {
            machine: Strict::new(SESSIONS, config, (Epoch(FIRST), Version(FIRST)), 0),
            config,
            now_ms: 1,
            table: Entries {
                force,
                descriptors,
                ..Entries::default()
            },
            frames,
            free: (1..=frames).map(FrameNo).collect(),
            left_over: BTreeSet::new(),
            disk: BTreeMap::new(),
            guests: vec![Guest::default(); guests],
            placing: BTreeMap::new(),
            saving: BTreeMap::new(),
            unsaved: BTreeSet::new(),
            authors: Vec::new(),
            mixed: BTreeSet::new(),
            left,
            latest: BTreeMap::new(),
            orphaned: BTreeSet::new(),
            gone: BTreeSet::new(),
            life: 1,
            wrong: None,
        }
    }

    /// Is the mapping there, and does the guest, by its own clock, have the right to use it?
    pub fn usable(&self, guest: &Guest, frame: FrameNo, spot: Spot) -> bool {
        self.is_there(guest, frame, spot) && self.now_ms < guest.lease_until_ms
    }

    pub fn is_there(&self, guest: &Guest, frame: FrameNo, spot: Spot) -> bool {
        let Some(epoch) = guest.epoch else {
            return false;
        };
        let there = self.table.all.get(&(epoch, frame));
        match self.table.descriptors {
            true => self.table.bytes.contains_key(&spot),
            false => there.is_some_and(|e| e.mapped),
        }
    }

    /// What a guest that does not lie would load now, and from which frame, if it asked nobody.
    pub fn view(&self, guest: &Guest, place: Place) -> Option<(u8, Access)> {
        let home = Spot::Home(place);
        let (frame, access, spot) = match guest.mapped.get(&place) {
            Some(mapped) => *mapped,
            // Whoever has the home mapped sees what is there.
            None => (FrameNo(0), Access::ReadOnly, home),
        };
        let usable = self.usable(guest, frame, spot);
        usable.then(|| (self.table.bytes.get(&spot).copied().unwrap_or(0), access))
    }

    /// Of this life of the daemon, and not fenced?
    pub fn counts(&self, epoch: Epoch) -> bool {
        self.machine.sessions().counts(self.now_ms, epoch)
    }

    /// Of an earlier life of the daemon?
    pub fn is_old(&self, epoch: Epoch) -> bool {
        epoch.0 < self.life << 32 | 1
    }

    /// What a page holds where the machine has it.
    pub fn value(&self, frame: FrameNo) -> u8 {
        self.table.value(frame)
    }

    pub fn on_disk(&self, place: Place) -> u8 {
        self.disk.get(&place).copied().unwrap_or(0)
    }

    /// Somebody writes the next value.
    pub fn store(&mut self, epoch: Epoch, place: Place, spot: Spot) {
        self.authors.push(epoch);
        let value = self.authors.len() as u8;
        self.table.bytes.insert(spot, value);
        let frame = self.machine.pages().content(place).map(|(frame, _)| frame);
        let is_page = frame.is_some_and(|frame| self.table.spot(frame) == spot);
        // What somebody who is gone does before the page is put out of reach may have been before.
        let snapshot = self.table.descriptors && is_page && self.orphaned.contains(&place);
        if epoch == DAEMON || self.counts(epoch) || snapshot {
            self.latest.insert(place, value);
        }
        if self.machine.pages().is_shared_rw(place) {
            self.mixed.insert(place);
        }
    }

    /// Did two write?
    pub fn is_by_two(&self) -> bool {
        self.authors.iter().any(|author| *author != self.authors[0])
    }

    /// Would a crash take from `epoch` what it sees in a page though another stored it?
    pub fn is_seen_unsaved(&self, epoch: Epoch, place: Place, value: u8) -> bool {
        let author = usize::from(value).checked_sub(1).map(|n| self.authors[n]);
        let exempt = self.mixed.contains(&place) || self.machine.pages().is_shared_rw(place);
        !exempt && author.is_some_and(|author| author != epoch) && self.on_disk(place) < value
    }

    pub fn step(&mut self, input: Input) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let mut out = Vec::new();
            self.machine
                .step(self.now_ms, input, &mut self.table, &mut out);
            for output in out {
                match output {
                    Output::Session(action) => self.session(action),
                    Output::Page(action) => {
                        if let Action::Grant { epoch, place, .. } = action
                            && epoch == DAEMON
                        {
                            inputs.push_back(Input::Page(Event::Released { epoch, place }));
                        }
                        self.page(action);
                    }
                }
            }
        }
        self.adopt_snapshots();
        self.wrong = self.wrong.or(self.table.wrong);
    }

    /// Of a page whose writer is gone, what is in the frame counts once the writer has it no more.
    fn adopt_snapshots(&mut self) {
        for (place, frame) in self.places() {
            let gone = |((epoch, f), e): (&(Epoch, FrameNo), &Entry)| {
                *f == frame && e.access == Access::ReadWrite && self.gone.contains(epoch)
            };
            if self.orphaned.contains(&place) && !self.table.all.iter().any(gone) {
                self.orphaned.remove(&place);
                self.latest.insert(place, self.value(frame));
            }
        }
    }

    /// The daemon is let at a page.
    fn daemon(&mut self, place: Place, frame: FrameNo, access: Access) {
        if access == Access::ReadWrite {
            if let Spot::Home(_) = self.table.spot(frame) {
                self.table.shift(frame, Spot::Spare(place));
            }
            let spot = self.table.spot(frame);
            self.store(DAEMON, place, spot);
        } else if self.value(frame) != self.latest.get(&place).copied().unwrap_or(0)
            && !self.orphaned.contains(&place)
        {
            self.wrong = Some("the daemon reads what is not the newest");
        } else if self.is_seen_unsaved(DAEMON, place, self.value(frame)) {
            self.wrong = Some("the daemon reads what is not saved");
        }
    }

    fn guest_of(&mut self, epoch: Epoch) -> Option<&mut Guest> {
        self.guests.iter_mut().find(|g| g.epoch == Some(epoch))
    }

    fn session(&mut self, action: SessionAction) {
        match action {
            SessionAction::Welcome { conn, epoch, .. } => {
                let lease_until_ms = self.now_ms + SLOW_TERM_MS;
                let guest = &mut self.guests[conn as usize];
                guest.epoch = Some(epoch);
                guest.lease_until_ms = lease_until_ms;
            }
            SessionAction::Renewed { epoch } => {
                let asked_ms = self.now_ms;
                if let Some(guest) = self.guest_of(epoch) {
                    guest.down.push_back(Down::Renewed(asked_ms));
                }
            }
            SessionAction::Ask {
                epoch,
                recall,
                subject: Subject::Place(place),
            } => {
                if let Some(guest) = self.guest_of(epoch) {
                    guest.down.push_back(Down::Invalidate(recall, place));
                }
            }
            SessionAction::Fenced { epoch, reason, .. } => self.fenced(epoch, reason),
            SessionAction::Ended { epoch, .. } => {
                self.gone.insert(epoch);
            }
            _ => {}
        }
    }

    fn fenced(&mut self, epoch: Epoch, reason: FenceReason) {
        self.gone.insert(epoch);
        let now_ms = self.now_ms;
        let of_epoch: Vec<FrameNo> = self.writable_of(epoch);
        for (place, frame) in self.places() {
            if of_epoch.contains(&frame) {
                self.orphaned.insert(place);
            }
        }
        let has_mapped = self
            .table
            .all
            .iter()
            .any(|((e, _), entry)| *e == epoch && entry.mapped);
        let Some(guest) = self.guest_of(epoch) else {
            return;
        };
        let trusts = !guest.liar && now_ms < guest.lease_until_ms;
        guest.down.push_back(Down::Fenced);
        // Forced revocation has unmapped it all.
        if reason == FenceReason::LeaseExpired && trusts && has_mapped {
            self.wrong = Some("fenced for its lease while its own clock says that it has one");
        }
    }

    fn writable_of(&self, epoch: Epoch) -> Vec<FrameNo> {
        let writable = |((e, frame), entry): (&(Epoch, FrameNo), &Entry)| {
            (*e == epoch && entry.access == Access::ReadWrite).then_some(*frame)
        };
        self.table.all.iter().filter_map(writable).collect()
    }

    fn places(&self) -> Vec<(Place, FrameNo)> {
        let known = [place(0), place(1)];
        let content = |p: Place| Some((p, self.machine.pages().content(p)?.0));
        known.into_iter().filter_map(content).collect()
    }

    fn page(&mut self, action: Action) {
        match action {
            Action::Fill { place } => {
                self.placing.insert(place, None);
            }
            Action::Copy { place, from } => {
                self.unsaved.remove(&place);
                self.placing.insert(place, Some(from));
            }
            Action::Grant {
                epoch,
                place,
                frame,
                access,
                version,
                ..
            } => {
                self.unsaved.remove(&place);
                if epoch == DAEMON {
                    return self.daemon(place, frame, access);
                }
                if self.gone.contains(&epoch) {
                    self.wrong = Some("granted to a session that is gone");
                }
                let spot = self.table.mapped_at(epoch, place, frame, access);
                if let Some(guest) = self.guest_of(epoch) {
                    let granted = Down::Granted(place, (frame, spot), access, version);
                    guest.down.push_back(granted);
                }
            }
            Action::Refuse { ticket, .. } => {
                // The ticket is the guest's number, and the page.
                let (guest, page) = (ticket as usize / 8, ticket % 8);
                if let Some(guest) = self.guests.get_mut(guest) {
                    guest.down.push_back(Down::Refused(place(page)));
                }
            }
            Action::Save {
                place,
                frame,
                version,
            } => {
                self.unsaved.remove(&place);
                let value = self.value(frame);
                self.saving.insert(place, (frame, version, value));
            }
            Action::Taken { place, frame, .. } => {
                let newest = self.latest.get(&place).copied().unwrap_or(0);
                if frame.is_some() && self.on_disk(place) != newest {
                    self.wrong = Some("a page is taken that is not saved");
                }
            }
            Action::Free { frame } => {
                if self.table.all.keys().any(|(_, f)| *f == frame) {
                    self.wrong = Some("a frame is freed that has entries");
                }
                self.table.empty(frame);
                self.free.insert(frame);
            }
            Action::Recall { .. } | Action::Fence { .. } => {
                self.wrong = Some("an action that should have become the sessions'");
            }
        }
    }

    /// A fill or a copy ends.
    pub fn placed(&mut self, place: Place) {
        let Some(from) = self.placing.remove(&place) else {
            return;
        };
        if let Some(frame) = from
            && self.table.put_out_of_reach(place, frame)
        {
            return self.is_placed(place, frame, true);
        }
        let Some(frame) = self.free.pop_first() else {
            if from.is_some() {
                self.unsaved.insert(place);
            }
            self.step(Input::Page(Event::NotPlaced { place, errno: 12 }));
            return;
        };
        if self
            .table
            .all
            .iter()
            .any(|((_, f), e)| *f == frame && e.mapped)
        {
            self.wrong = Some("a frame is filled that somebody has mapped");
        }
        let spot = match (self.table.descriptors, from) {
            (false, _) => Spot::Frame(frame),
            (true, None) => Spot::Home(place),
            (true, Some(_)) => Spot::Spare(place),
        };
        let value = match from {
            Some(from) => self.value(from),
            None => self.on_disk(place),
        };
        self.table.put(frame, spot, value);
        self.is_placed(place, frame, from.is_some());
    }

    fn is_placed(&mut self, place: Place, frame: FrameNo, copied: bool) {
        if copied && self.orphaned.remove(&place) {
            let value = self.value(frame);
            self.latest.insert(place, value);
        }
        self.step(Input::Page(Event::Placed { place, frame }));
    }

    /// A save ends.
    pub fn saved(&mut self, place: Place) {
        let Some((frame, version, value)) = self.saving.remove(&place) else {
            return;
        };
        if self.value(frame) != value {
            self.wrong = Some("a page is written while it is saved");
        }
        self.disk.insert(place, value);
        self.mixed.remove(&place);
        self.step(Input::Page(Event::Saved { place, version }));
    }

    /// A save fails.
    pub fn not_saved(&mut self, place: Place) {
        if self.saving.remove(&place).is_some() {
            self.unsaved.insert(place);
            self.step(Input::Page(Event::NotSaved { place, errno: 5 }));
        }
    }

    /// The table is looked at for what sessions that are gone have mapped.
    pub fn drain(&mut self) -> bool {
        let lost: Vec<(FrameNo, Epoch)> = self.machine.pages().lost().collect();
        let mut any = false;
        for (frame, epoch) in lost {
            let is_page = self.places().iter().any(|(_, f)| *f == frame);
            if self.table.drained(epoch, frame, is_page) {
                self.step(Input::Page(Event::Drained { epoch, frame }));
                any = true;
            }
        }
        let (free, life_begin) = (&mut self.free, self.life << 32);
        let entries = &mut self.table.all;
        entries.retain(|(epoch, _), entry| entry.mapped || epoch.0 > life_begin);
        let still = |frame: &FrameNo| {
            let used = entries.keys().any(|(_, f)| f == frame);
            if !used {
                any = true;
                free.insert(*frame);
            }
            used
        };
        self.left_over.retain(still);
        any
    }

    /// The daemon is killed, and another begins with what is on the disk.
    pub fn restart(&mut self) {
        self.latest = self.disk.clone();
        self.saving.clear();
        self.unsaved.clear();
        self.mixed.clear();
        self.table.all.retain(|_, entry| entry.mapped);
        self.left_over = self.table.all.keys().map(|(_, frame)| *frame).collect();
        self.free = (1..=self.frames)
            .map(FrameNo)
            .filter(|frame| !self.left_over.contains(frame))
            .collect();
        self.placing.clear();
        self.orphaned.clear();
        self.gone.clear();
        self.life += 1;
        let first = self.life << 32 | 1;
        let grace = self.now_ms + u64::from(TERM_MS) + u64::from(TERM_MS) / 100;
        self.machine = Strict::new(SESSIONS, self.config, (Epoch(first), Version(first)), grace);
        for guest in &mut self.guests {
            guest.down.clear();
            guest.up.clear();
            guest.wants.clear();
        }
    }

    /// Lets go of all it has mapped.
    pub fn unmap_all(&mut self, guest: usize) {
        let guest = &mut self.guests[guest];
        guest.mapped.clear();
        if let Some(epoch) = guest.epoch {
            for ((e, _), entry) in &mut self.table.all {
                if *e == epoch {
                    entry.mapped = false;
                }
            }
        }
    }

    /// Its process ends: what it had mapped is gone, which the daemon hears from the kernel. Where it takes
    /// the guests' word for what they have mapped it comes to know it after it dealt with the session.
    pub fn die(&mut self, guest: usize, epoch: Epoch) {
        self.guests[guest].mapped.clear();
        if !self.table.descriptors {
            self.unmap_all(guest);
        }
        self.guests[guest].up.clear();
        self.step(Input::Session(SessionEvent::End { epoch }));
        if self.table.descriptors {
            self.table.all.retain(|(who, _), _| *who != epoch);
        }
    }

    fn said_unmapped(&mut self, epoch: Epoch, place: Place) {
        if let Some((frame, _)) = self.machine.pages().content(place) {
            self.table.said_unmapped(epoch, frame);
        }
    }

    pub fn unmap(&mut self, guest: usize, place: Place) {
        let guest = &mut self.guests[guest];
        if let (Some(epoch), Some((frame, _, _))) = (guest.epoch, guest.mapped.remove(&place))
            && !self.table.descriptors
            && let Some(entry) = self.table.all.get_mut(&(epoch, frame))
        {
            entry.mapped = false;
        }
    }

    /// A guest begins anew, with nothing mapped.
    pub fn connect(&mut self, guest: usize) {
        self.unmap_all(guest);
        let seen = std::mem::take(&mut self.guests[guest].seen);
        self.guests[guest] = Guest {
            seen,
            ..Guest::default()
        };
        let connect = SessionEvent::Connect {
            conn: guest as u64,
            guest: Who(guest as u32),
        };
        self.step(Input::Session(connect));
    }

    /// The next message of a guest reaches the daemon.
    pub fn deliver_up(&mut self, guest: usize) {
        let Some(epoch) = self.guests[guest].epoch else {
            return;
        };
        let Some(up) = self.guests[guest].up.pop_front() else {
            return;
        };
        match up {
            Up::Want(place, access) => {
                let ticket = guest as u64 * 8 + place.page.0;
                self.step(Input::Page(Event::Want {
                    epoch,
                    ticket,
                    place,
                    access,
                }));
            }
            Up::Ack(recall, place) => {
                self.said_unmapped(epoch, place);
                self.step(Input::Session(SessionEvent::Ack { epoch, recall }));
            }
            // Who was asked for it says so by its Ack.
            Up::Released(place)
                if self.table.descriptors && self.machine.pages().is_leaving(epoch, place) => {}
            Up::Released(place) => {
                self.said_unmapped(epoch, place);
                self.step(Input::Page(Event::Released { epoch, place }));
            }
            Up::Renew(asked_ms) => {
                self.step(Input::Session(SessionEvent::Renew { epoch }));
                // From when it asked, whenever it was heard.
                if let Some(Down::Renewed(at)) = self.guests[guest].down.back_mut() {
                    *at = asked_ms;
                }
            }
        }
    }

    /// The next message of the daemon reaches a guest. `lie`: it acks without unmapping.
    pub fn deliver_down(&mut self, guest: usize, lie: bool) {
        let Some(down) = self.guests[guest].down.pop_front() else {
            return;
        };
        match down {
            Down::Granted(place, frame_at, access, version) => {
                self.guests[guest].wants.remove(&place);
                self.map(guest, place, frame_at, access, version);
            }
            Down::Refused(place) => {
                self.guests[guest].wants.remove(&place);
            }
            Down::Invalidate(recall, place) => {
                if lie {
                    self.guests[guest].liar = true;
                } else {
                    self.unmap(guest, place);
                }
                self.guests[guest].up.push_back(Up::Ack(recall, place));
            }
            Down::Renewed(asked_ms) => {
                let guest = &mut self.guests[guest];
                guest.lease_until_ms = guest.lease_until_ms.max(asked_ms + SLOW_TERM_MS);
            }
            Down::Fenced => {
                self.unmap_all(guest);
                self.guests[guest].epoch = None;
                self.guests[guest].up.clear();
                self.guests[guest].wants.clear();
            }
        }
    }

    fn map(
        &mut self,
        guest: usize,
        place: Place,
        (frame, spot): (FrameNo, Spot),
        access: Access,
        version: Version,
    ) {
        let Some(epoch) = self.guests[guest].epoch else {
            return;
        };
        let descriptors = self.table.descriptors;
        match self.table.all.get_mut(&(epoch, frame)) {
            // The hypervisor's part.
            None if !descriptors => return,
            Some(entry) if access == Access::ReadWrite && entry.access == Access::ReadOnly => {
                return;
            }
            Some(entry) => entry.mapped = true,
            None => {}
        }
        let guest = &mut self.guests[guest];
        guest.mapped.insert(place, (frame, access, spot));
        let seen = guest.seen.entry(place).or_insert(version);
        if version < *seen {
            self.wrong = Some("a version went back");
        }
        *seen = version;
    }
}
