//! One guest's connection, before and after Hello.

use super::handles::Handles;
use super::limits::{BYTES_IN_FLIGHT_PAUSE, IN_FLIGHT_MAX};
use super::outbox::{Outbox, Unsent};
use super::poll::Interest;
use copage_cache::{CachedFile, Holder, OpenHow};
use copage_coherence::msg::FileToken;
use copage_grants::Epoch;
use copage_grants::channel::{Channel, Peer};
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What a connection said in Hello, while the answer is worked out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hello {
    pub request: u64,
    pub guest: u32,
    pub wants_userfaultfd: bool,
}

/// An open file of a session.
#[derive(Debug)]
pub(super) struct Open {
    pub file: Arc<CachedFile>,
    pub how: OpenHow,
    /// Recalls that concern it and are not answered.
    pub asked: Vec<u64>,
    /// The Rebase among them: at most one at a time.
    pub rebase: Option<u64>,
    /// The content changed again since: ask once more after the answer. Without a Rebase: the
    /// connection has it among those to be asked when there is room.
    pub rebase_again: bool,
    /// The cache ended this open itself.
    pub withdrawn: bool,
    /// It may write.
    pub writes: bool,
    /// The connection has it among those to be told of a new length when there is room.
    pub length_due: bool,
}

/// What a connection is once it has a session.
#[derive(Debug)]
pub(super) struct Session {
    pub epoch: Epoch,
    pub who: Holder,
    pub name: Arc<str>,
    pub handles: Handles,
    pub files: HashMap<FileToken, Open>,
    pub connected_ms: u64,
    /// Requests that the cache works on.
    pub in_flight: usize,
    /// What these keep in memory, in bytes, as far as it is much.
    pub bytes_in_flight: usize,
    /// Requests so far.
    pub requests: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Conn {
    pub id: u64,
    pub peer: Peer,
    /// `None` after the guest hung up: its process may live on and have pages mapped.
    pub channel: Option<Channel>,
    pub outbox: Outbox,
    /// What the poller waits for.
    pub interest: Interest,
    pub since_ms: u64,
    pub hello: Option<Hello>,
    pub session: Option<Box<Session>>,
    /// Messages that made no sense.
    pub strikes: u32,
    /// A message could not be sent.
    pub unsent: Option<Unsent>,
    /// Open files with a newer content of which the guest hears when it has read what waits.
    pub rebases: VecDeque<FileToken>,
    /// The same with another length.
    pub lengths: VecDeque<FileToken>,
}

impl Conn {
    pub(super) fn new(id: u64, channel: Channel, peer: Peer, now_ms: u64) -> Self {
        Self {
            id,
            peer,
            channel: Some(channel),
            outbox: Outbox::default(),
            interest: Interest::READ,
            since_ms: now_ms,
            hello: None,
            session: None,
            strikes: 0,
            unsent: None,
            rebases: VecDeque::new(),
            lengths: VecDeque::new(),
        }
    }

    /// Is there room for a notice that can wait?
    pub(super) fn has_room(&self) -> bool {
        !self.outbox.is_paused() && self.unsent.is_none()
    }

    /// The next file to ask about, if there is room.
    pub(super) fn next_rebase(&mut self) -> Option<FileToken> {
        let token = self.has_room().then(|| self.rebases.pop_front())??;
        if let Some(open) = self.session.as_mut().and_then(|s| s.files.get_mut(&token)) {
            open.rebase_again &= open.rebase.is_some();
        }
        Some(token)
    }

    /// The next file to tell the length of, if there is room.
    pub(super) fn next_length(&mut self) -> Option<FileToken> {
        let token = self.has_room().then(|| self.lengths.pop_front())??;
        if let Some(open) = self.session.as_mut().and_then(|s| s.files.get_mut(&token)) {
            open.length_due = false;
        }
        Some(token)
    }

    /// Sends, or keeps, one message; what goes wrong is seen to by the loop.
    pub(super) fn send(&mut self, message: &[u8], fd: Option<OwnedFd>) {
        let Some(channel) = &self.channel else { return };
        if let Err(unsent) = self.outbox.send(channel, message, fd) {
            self.unsent = self.unsent.or(Some(unsent));
        }
    }

    /// Sends what waits.
    pub(super) fn flush(&mut self) {
        let Some(channel) = &self.channel else { return };
        if let Err(unsent) = self.outbox.flush(channel) {
            self.unsent = self.unsent.or(Some(unsent));
        }
    }

    /// May it ask for more?
    pub(super) fn may_read(&self) -> bool {
        let may_ask =
            |s: &Session| s.in_flight < IN_FLIGHT_MAX && s.bytes_in_flight < BYTES_IN_FLIGHT_PAUSE;
        self.session.as_deref().is_none_or(may_ask) && self.has_room()
    }

    /// What the poller should wait for.
    pub(super) fn wanted(&self) -> Interest {
        Interest {
            read: self.may_read(),
            write: !self.outbox.is_empty() || self.channel.as_ref().is_some_and(Channel::has_rest),
        }
    }
}
