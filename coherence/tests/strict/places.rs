//! Where what is in a frame is, and the table that says who has it.
//!
//! On Xen it is in the frame. On the local backend it is in files that guests have mapped, page for page: whoever
//! has the home mapped sees what is there, asked for or not; what a session writes stays mapped for it, whatever
//! the table says; and a file that several write is mapped by them all. Pages are taken out of guests' files late:
//! here, never.

use copage_coherence::strict::{DAEMON, Place, Table};
use copage_grants::{Access, Epoch, FrameNo};
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Spot {
    Frame(FrameNo),
    Home(Place),
    Arena(Epoch, Place),
    /// With the file's serial.
    Common(u32, Place),
    Spare(Place),
}

impl Spot {
    const fn is_guests(self) -> bool {
        matches!(self, Self::Arena(..) | Self::Common(..))
    }
}

/// One entry: how, and whether the hypervisor shows it mapped (local: whether the guest said otherwise).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    pub access: Access,
    pub mapped: bool,
    /// It may be that of several writers.
    pub shared: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Entries {
    pub all: BTreeMap<(Epoch, FrameNo), Entry>,
    pub force: bool,
    /// As on local.
    pub descriptors: bool,
    pub bytes: BTreeMap<Spot, u8>,
    /// Where there are descriptors: which frame is where.
    pub at: BTreeMap<FrameNo, Spot>,
    pub serial: u32,
    /// Somebody who is gone may have the common file mapped.
    pub stale: bool,
    pub wrong: Option<&'static str>,
}

impl Entries {
    pub fn spot(&self, frame: FrameNo) -> Spot {
        self.at.get(&frame).copied().unwrap_or(Spot::Frame(frame))
    }

    pub fn value(&self, frame: FrameNo) -> u8 {
        self.bytes.get(&self.spot(frame)).copied().unwrap_or(0)
    }

    /// The frame's content is put there.
    pub fn put(&mut self, frame: FrameNo, spot: Spot, value: u8) {
        if self.at.iter().any(|(f, at)| *f != frame && *at == spot) {
            self.wrong = Some("two frames in one place");
        }
        self.bytes.insert(spot, value);
        if self.descriptors {
            self.at.insert(frame, spot);
        }
    }

    /// Nothing is in the frame any more.
    pub fn empty(&mut self, frame: FrameNo) {
        let spot = self.spot(frame);
        self.at.remove(&frame);
        if !spot.is_guests() {
            self.bytes.remove(&spot);
        }
    }

    pub fn shift(&mut self, frame: FrameNo, to: Spot) {
        if self.spot(frame) != to {
            let value = self.value(frame);
            self.empty(frame);
            self.put(frame, to, value);
        }
    }

    /// A copy is asked for. `true`: the page could be put out of reach in its own frame.
    pub fn put_out_of_reach(&mut self, place: Place, frame: FrameNo) -> bool {
        if !self.descriptors || matches!(self.spot(frame), Spot::Arena(..)) {
            return false;
        }
        self.shift(frame, Spot::Spare(place));
        self.all.retain(|(_, f), _| *f != frame);
        true
    }

    /// Where a session that was granted a page maps it; it may have been taken back since.
    pub fn mapped_at(&self, epoch: Epoch, place: Place, frame: FrameNo, access: Access) -> Spot {
        match (self.spot(frame), access) {
            (spot, _) if !self.descriptors => spot,
            (_, Access::ReadOnly) => Spot::Home(place),
            (spot @ Spot::Common(..), _) => spot,
            _ => Spot::Arena(epoch, place),
        }
    }

    /// A guest's word that it has the page mapped no more.
    pub fn said_unmapped(&mut self, epoch: Epoch, frame: FrameNo) {
        if self.descriptors
            && let Some(entry) = self.all.get_mut(&(epoch, frame))
        {
            entry.mapped = false;
        }
    }

    fn maps(&self, epoch: Epoch, frame: FrameNo) -> bool {
        self.all.get(&(epoch, frame)).is_some_and(|e| e.mapped)
    }

    fn others_have(&self, epoch: Epoch, frame: FrameNo) -> bool {
        let mut all = self.all.keys();
        all.any(|(who, f)| *f == frame && *who != epoch)
    }

    fn end(&mut self, epoch: Epoch, place: Place, frame: FrameNo, stays: bool) -> bool {
        if !stays {
            self.all.remove(&(epoch, frame));
            if self.spot(frame).is_guests() && !self.others_have(epoch, frame) {
                self.shift(frame, Spot::Spare(place));
            }
        }
        !stays
    }

    /// Has a session that is gone let go of a frame? `is_page`: a page is in it still.
    pub fn drained(&mut self, epoch: Epoch, frame: FrameNo, is_page: bool) -> bool {
        if self.descriptors && is_page && self.others_have(epoch, frame) {
            return false;
        }
        let drained = self.force || !self.maps(epoch, frame);
        if drained {
            self.all.remove(&(epoch, frame));
        }
        drained
    }
}

impl Table for Entries {
    fn grant(
        &mut self,
        epoch: Epoch,
        place: Place,
        frame: FrameNo,
        access: Access,
        shared: bool,
    ) -> Result<(), i32> {
        // The daemon has no entries.
        if epoch == DAEMON {
            return Ok(());
        }
        let mine = Spot::Arena(epoch, place);
        let common = Spot::Common(self.serial, place);
        if self.descriptors {
            let has = self.all.contains_key(&(epoch, frame));
            let its = has && (self.spot(frame) == mine || self.spot(frame) == common);
            let to = match access {
                Access::ReadOnly if its => self.spot(frame),
                Access::ReadOnly => Spot::Home(place),
                Access::ReadWrite if shared => common,
                Access::ReadWrite => mine,
            };
            self.shift(frame, to);
        }
        let entry = self.all.entry((epoch, frame)).or_insert(Entry {
            access,
            mapped: false,
            shared,
        });
        // Until it says otherwise.
        entry.mapped |= self.descriptors;
        entry.access = access;
        entry.shared = shared;
        Ok(())
    }

    fn revoke(&mut self, epoch: Epoch, place: Place, frame: FrameNo) -> bool {
        let entry = self.all.get(&(epoch, frame));
        let forced = self.force && entry.is_some_and(|e| e.access == Access::ReadOnly);
        let stays = self.maps(epoch, frame) && !forced;
        self.end(epoch, place, frame, stays)
    }

    fn seize(&mut self, epoch: Epoch, place: Place, frame: FrameNo) -> bool {
        if let Spot::Common(..) = self.spot(frame) {
            self.stale = true;
            // It cannot be taken from one of them.
            if self.others_have(epoch, frame) {
                return false;
            }
        }
        let stays = self.maps(epoch, frame) && !self.force;
        self.end(epoch, place, frame, stays)
    }

    fn can_share(&mut self, _: Place) -> bool {
        let in_use = self.at.values().any(|at| matches!(at, Spot::Common(..)));
        if self.stale && !in_use {
            self.serial += 1;
            self.stale = false;
        }
        !self.stale
    }
}
