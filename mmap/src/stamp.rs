//! Which session a number is of. A daemon's numbers mean nothing to the next one: what is compared, or
//! kept from one message to the next, carries the session it came from.

use copage_coherence::msg::Generation;

/// Which of a client's sessions, counted from 1. Higher is later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SessionNo(u32);

impl SessionNo {
    pub(crate) const FIRST: Self = Self(1);

    pub(crate) fn before(self) -> Option<Self> {
        self.0.checked_sub(1).map(Self)
    }

    /// 2^31 sessions are more than a client has.
    pub(crate) fn next(self) -> Self {
        Self((self.0 + 1) & (u32::MAX >> 1))
    }
}

/// What pages show, in the order in which they show it: the generations of a session; nothing any
/// more, when its lease is over; the generations of the next session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Stamp(u64);

const HOLLOW: u64 = 1 << 32;
const SESSION_SHIFT: u32 = 33;

impl Stamp {
    pub(crate) fn new(session: SessionNo, generation: Generation) -> Self {
        Self((u64::from(session.0) << SESSION_SHIFT) | u64::from(generation.0))
    }

    pub(crate) fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    pub(crate) fn session(self) -> SessionNo {
        SessionNo((self.0 >> SESSION_SHIFT) as u32)
    }

    /// The generation, of whichever session it is.
    pub(crate) fn generation(self) -> Generation {
        Generation(self.0 as u32)
    }

    /// The generation, to be named to the daemon of `session`; `None`: that one does not know it, or
    /// the pages show nothing.
    pub(crate) fn within(self, session: SessionNo) -> Option<Generation> {
        (self.session() == session && !self.is_hollow()).then(|| self.generation())
    }

    /// Nothing is shown any more of what this session gave.
    pub(crate) fn hollowed(self) -> Self {
        Self(self.0 | HOLLOW)
    }

    pub(crate) fn is_hollow(self) -> bool {
        self.0 & HOLLOW != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_show_a_session_then_nothing_then_the_next_session() {
        let first = SessionNo::FIRST;
        let second = first.next();
        let old = [1, 7, u32::MAX].map(|g| Stamp::new(first, Generation(g)));
        let new = [1, 2].map(|g| Stamp::new(second, Generation(g)));
        let order = [old[0], old[1], old[2], old[0].hollowed(), new[0], new[1]];
        assert!(order.is_sorted_by(|a, b| a < b), "{order:?}");
        assert_eq!(old[1].within(first), Some(Generation(7)));
        assert_eq!(old[1].within(second), None, "another daemon's number");
        assert_eq!(old[1].hollowed().within(first), None);
        assert_eq!(old[2].hollowed().session(), first);
        assert_eq!(Stamp::from_bits(new[1].bits()), new[1]);
    }
}
