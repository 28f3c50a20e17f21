//! Frames that must not be used again because a domain may still have them mapped, and who is to
//! blame.
//!
//! Domids are used again and sessions come and go, so each frame is charged to a *guest*: the
//! number by which the daemon knows it across reconnects. A frame that several domains hold is
//! charged to each of their guests. What a domain holds here is found by its domid, since that is
//! what its grants are written to.
//!
//! Plain data: whoever owns it locks it.

use crate::ids::{DomId, FrameNo};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// The number by which the daemon knows a guest across its sessions.
pub type GuestId = u32;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Quarantine {
    /// Who may still have the frame mapped; never empty.
    frames: BTreeMap<FrameNo, BTreeSet<(DomId, GuestId)>>,
    of_domain: HashMap<DomId, BTreeSet<FrameNo>>,
    /// Charges, one for each (frame, domain); never 0.
    charges: HashMap<GuestId, u64>,
    /// Where the next [`Self::sweep`] goes on.
    next: u32,
}

impl Quarantine {
    /// Nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// `dom`, which is `guest`, may still have `frame` mapped. Saying so twice changes nothing.
    pub fn put(&mut self, frame: FrameNo, dom: DomId, guest: GuestId) {
        if self.of_domain.entry(dom).or_default().insert(frame) {
            self.frames.entry(frame).or_default().insert((dom, guest));
            *self.charges.entry(guest).or_default() += 1;
        }
    }

    /// `dom` has let go of `frame`. `true` when it was the last: the frame is out of quarantine and
    /// may be emptied and used again.
    #[must_use]
    pub fn let_go(&mut self, frame: FrameNo, dom: DomId) -> bool {
        if let Some(held) = self.of_domain.get_mut(&dom) {
            held.remove(&frame);
            if held.is_empty() {
                self.of_domain.remove(&dom);
            }
        }
        self.drop_holder(frame, dom)
    }

    fn drop_holder(&mut self, frame: FrameNo, dom: DomId) -> bool {
        let Some(holders) = self.frames.get_mut(&frame) else {
            return false;
        };
        let Some(&holder) = holders.iter().find(|holder| holder.0 == dom) else {
            return false;
        };
        holders.remove(&holder);
        let empty = holders.is_empty();
        if empty {
            self.frames.remove(&frame);
        }
        if let Some(charged) = self.charges.get_mut(&holder.1) {
            *charged -= 1;
            if *charged == 0 {
                self.charges.remove(&holder.1);
            }
        }
        empty
    }

    /// `dom` exists no more: gives the frames that were here for it alone.
    #[must_use]
    pub fn domain_ended(&mut self, dom: DomId) -> Vec<FrameNo> {
        let held = self.of_domain.remove(&dom).unwrap_or_default();
        held.into_iter()
            .filter(|&frame| self.drop_holder(frame, dom))
            .collect()
    }

    /// Asks `is_gone` of up to `max` frames, going on where the last sweep stopped, whether a
    /// domain has let go of them; gives the frames that nobody holds any more. (Xen: `is_gone`
    /// tries to revoke.)
    #[must_use]
    pub fn sweep(
        &mut self,
        max: usize,
        mut is_gone: impl FnMut(FrameNo, DomId) -> bool,
    ) -> Vec<FrameNo> {
        let from = FrameNo(self.next);
        let round = self
            .frames
            .range(from..)
            .chain(self.frames.range(..from))
            .take(max);
        let looked_at: Vec<(FrameNo, Vec<DomId>)> = round
            .map(|(&frame, holders)| (frame, holders.iter().map(|holder| holder.0).collect()))
            .collect();
        if let Some((last, _)) = looked_at.last() {
            self.next = last.0.wrapping_add(1);
        }
        let mut free = Vec::new();
        for (frame, doms) in looked_at {
            for dom in doms {
                if is_gone(frame, dom) && self.let_go(frame, dom) {
                    free.push(frame);
                }
            }
        }
        free
    }

    /// Is the frame here?
    pub fn holds(&self, frame: FrameNo) -> bool {
        self.frames.contains_key(&frame)
    }

    /// Frames here, each counted once.
    pub fn frames(&self) -> u64 {
        self.frames.len() as u64
    }

    /// Frames charged to a guest, over all its domids.
    pub fn charged(&self, guest: GuestId) -> u64 {
        self.charges.get(&guest).copied().unwrap_or(0)
    }

    /// Frames that a domain may still have mapped. A domid is given to nobody else before this
    /// is 0.
    pub fn held_by(&self, dom: DomId) -> u64 {
        self.of_domain.get(&dom).map_or(0, |held| held.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_out_when_its_last_holder_let_go() {
        let mut quarantine = Quarantine::new();
        quarantine.put(FrameNo(1), DomId(1), 10);
        quarantine.put(FrameNo(1), DomId(1), 10);
        quarantine.put(FrameNo(1), DomId(2), 20);
        quarantine.put(FrameNo(2), DomId(2), 20);
        assert_eq!(
            (
                quarantine.frames(),
                quarantine.charged(10),
                quarantine.charged(20)
            ),
            (2, 1, 2)
        );
        assert!(!quarantine.let_go(FrameNo(1), DomId(1)));
        assert!(!quarantine.let_go(FrameNo(1), DomId(1)), "only once");
        assert_eq!(quarantine.domain_ended(DomId(2)), [FrameNo(1), FrameNo(2)]);
        assert_eq!((quarantine.frames(), quarantine.charged(20)), (0, 0));
        assert_eq!(quarantine.held_by(DomId(2)), 0);
    }

    #[test]
    fn a_reconnected_guest_is_charged_for_its_old_domids() {
        let mut quarantine = Quarantine::new();
        quarantine.put(FrameNo(1), DomId(1), 10);
        quarantine.put(FrameNo(1), DomId(7), 10);
        quarantine.put(FrameNo(3), DomId(7), 10);
        assert_eq!(quarantine.charged(10), 3);
        assert!(quarantine.domain_ended(DomId(1)).is_empty());
        assert_eq!(
            (quarantine.charged(10), quarantine.held_by(DomId(7))),
            (2, 2)
        );
    }

    #[test]
    fn sweeps_go_round() {
        let mut quarantine = Quarantine::new();
        for frame in 0..5 {
            quarantine.put(FrameNo(frame), DomId(1), 1);
        }
        let mut seen = Vec::new();
        for _ in 0..3 {
            let free = quarantine.sweep(2, |frame, _| {
                seen.push(frame.0);
                frame.0 == 3
            });
            assert_eq!(free.is_empty(), free != [FrameNo(3)]);
        }
        assert_eq!(seen, [0, 1, 2, 3, 4, 0]);
        assert!(!quarantine.holds(FrameNo(3)));
    }
}
