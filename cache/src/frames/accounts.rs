//! What guests are charged, by name and so across reconnects.

use crate::config::{GuestId, GuestLimits};
use std::collections::HashMap;

/// One guest's charges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Account {
    pub limits: GuestLimits,
    /// Frames it was the first to hold a grant of and that are still granted.
    pub frames: u64,
    /// Pages of live homes that it pinned, and that may still be mapped.
    pub pinned: u64,
    /// Pages of retired homes that it pinned.
    pub quarantined: u64,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Accounts {
    by_guest: HashMap<GuestId, Account>,
}

impl Accounts {
    pub(crate) fn of(&mut self, guest: GuestId) -> &mut Account {
        self.by_guest.entry(guest).or_default()
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = (GuestId, Account)> + '_ {
        self.by_guest.iter().map(|(g, a)| (*g, *a))
    }
}
