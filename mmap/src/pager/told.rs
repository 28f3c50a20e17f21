//! What other threads tell the pager.

use crate::file::FileInner;
use crate::granted::{Brought, MapOutcome, Pages};
use crate::mapped::Mapped;
use crate::session::{Recall, Session};
use crate::stamp::SessionNo;
use crossbeam_channel::Sender;
use std::sync::Arc;

/// See the module.
pub(crate) enum Told {
    /// Bring pages of a mapping, `page` first, none at or past `end`.
    Want {
        mapped: Arc<Mapped>,
        page: u64,
        end: u64,
        /// To store to them.
        write: bool,
        tell: Sender<Brought>,
    },
    /// A batch that the pager handed to the worker is done with.
    Mapped { number: u64, outcome: MapOutcome },
    /// The daemon asked for pages and they are unmapped: say so, whatever is on its way.
    TakenBack {
        file: Arc<FileInner>,
        pages: Pages,
        /// To be acked.
        recall: Option<Recall>,
    },
    /// Pages were unmapped because we wanted to: say so, but of none that are on their way.
    GivenBack { file: Arc<FileInner>, pages: Pages },
    /// A daemon is there again and said Welcome.
    Connected {
        session: Arc<Session>,
        /// When Hello was sent.
        hello_ms: u64,
    },
    /// In this session everything is open again, or known to be gone.
    Returned(SessionNo),
}
