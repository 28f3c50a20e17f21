//! The mount's client of the daemon, begun again when it is lost: when no daemon came back in the time that
//! the library looks for one, or the session was fenced.

use super::limits::{HANDLES_MIN, HANDLES_SHARE, RECONNECT_PAUSE};
use crate::client::{Client, ConnectOptions, DaemonAt};
use crate::error::Result;
use crate::export::Export;
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::time::Instant;

/// Whom to connect to, and for what.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where the daemon is.
    pub daemon: DaemonAt,
    /// What to tell of oneself.
    pub connect: ConnectOptions,
    /// The export's name.
    pub export: String,
}

/// One session.
pub(super) struct Live {
    /// Sessions of this mount, counted from 1.
    pub(super) number: u64,
    pub(super) export: Export,
}

impl Live {
    /// Handles that the table may keep.
    pub(super) fn nodes_max(&self) -> usize {
        let all = self.export.client().welcome().handles_max as usize;
        (all / HANDLES_SHARE).max(HANDLES_MIN)
    }

    pub(super) fn is_lost(&self) -> bool {
        self.export.client().lost().is_some()
    }

    /// The daemon is looked for: questions wait.
    pub(super) fn is_away(&self) -> bool {
        self.export.client().is_away()
    }
}

pub(super) struct Link {
    target: Target,
    live: RwLock<Arc<Live>>,
    /// Held while connecting: when the next attempt may be made.
    next_attempt: Mutex<Instant>,
}

impl Link {
    pub(super) fn new(target: Target) -> Result<Self> {
        let export = connect(&target)?;
        let live = RwLock::new(Arc::new(Live { number: 1, export }));
        Ok(Self {
            target,
            live,
            next_attempt: Mutex::new(Instant::now()),
        })
    }

    pub(super) fn target(&self) -> &Target {
        &self.target
    }

    /// The last session that was begun; it may be lost.
    pub(super) fn last(&self) -> Arc<Live> {
        self.live.read().clone()
    }

    /// A session that was not lost just now, begun anew if need be; `None` when the daemon cannot be
    /// reached, without waiting for others who try. `before_use` is called with a new session before
    /// anybody else sees it.
    pub(super) fn live(&self, before_use: impl FnOnce(&Live)) -> Option<Arc<Live>> {
        let last = self.last();
        if !last.is_lost() {
            return Some(last);
        }
        let mut next_attempt = self.next_attempt.try_lock()?;
        let last = self.last();
        if !last.is_lost() {
            return Some(last);
        }
        if Instant::now() < *next_attempt {
            return None;
        }
        let result = connect(&self.target);
        *next_attempt = Instant::now() + RECONNECT_PAUSE;
        match result {
            Ok(export) => {
                let live = Arc::new(Live {
                    number: last.number + 1,
                    export,
                });
                before_use(&live);
                *self.live.write() = live.clone();
                tracing::info!(export = self.target.export, "connected again");
                Some(live)
            }
            Err(error) => {
                tracing::warn!(export = self.target.export, %error, "cannot connect again");
                None
            }
        }
    }
}

fn connect(target: &Target) -> Result<Export> {
    Client::connect_at(&target.daemon, &target.connect)?.attach(&target.export)
}
