//! What a program may do with a mapping, and so how its memory is made.

use crate::mapping::MapKind;
use crate::sys::Protection;
use crate::uffd::Uffd;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Read what everybody sees.
    Read,
    /// Store too: a page that is stored to becomes the mapping's own.
    Own,
    /// Store to the file.
    Write,
}

impl Form {
    pub(crate) fn new(kind: MapKind, writable: bool) -> Self {
        match (kind, writable) {
            (MapKind::Private, _) => Self::Own,
            (MapKind::Shared, true) => Self::Write,
            (MapKind::Shared, false) => Self::Read,
        }
    }

    pub(crate) fn kind(self) -> MapKind {
        match self {
            Self::Own => MapKind::Private,
            Self::Read | Self::Write => MapKind::Shared,
        }
    }

    pub(crate) fn protection(self) -> Protection {
        match self {
            Self::Read => Protection::Read,
            Self::Own | Self::Write => Protection::ReadWrite,
        }
    }

    /// Stores to pages that are there come to the pager.
    pub(crate) fn is_armed(self) -> bool {
        self != Self::Read
    }

    /// Pages of the home are mapped by the library one by one, each armed in the same step.
    pub(crate) fn is_shown(self, uffd: &Uffd) -> bool {
        match self {
            Self::Read => false,
            Self::Own => uffd.can_show(),
            Self::Write => true,
        }
    }
}
