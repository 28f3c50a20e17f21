//! What this machine gives a guest, found by asking for it: for `copage doctor`.

use crate::client::{UserfaultMode, UserfaultPolicy};
use crate::uffd::{Mode, Uffd};

/// What a userfaultfd of this process can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Userfault {
    /// Which faults arrive.
    pub mode: UserfaultMode,
    /// Private writable mappings can be had (write protection of tmpfs files, Linux 5.19).
    pub write_protect: bool,
    /// Refused pages become SIGBUS without another mapping over them (Linux 6.6).
    pub poison: bool,
    /// Why there is none, in words.
    pub why_none: Option<String>,
}

/// Makes a userfaultfd as a session would without a daemon's help, and forgets it again.
pub fn userfault() -> Userfault {
    match Uffd::open(UserfaultPolicy::Best, Uffd::full().ok(), None) {
        Ok(uffd) => Userfault {
            mode: match uffd.mode() {
                Mode::Full => UserfaultMode::Full,
                Mode::UserModeOnly => UserfaultMode::UserModeOnly,
            },
            write_protect: uffd.can_protect(),
            poison: uffd.can_poison(),
            why_none: None,
        },
        Err(why) => Userfault {
            mode: UserfaultMode::None,
            write_protect: false,
            poison: false,
            why_none: Some(why),
        },
    }
}
