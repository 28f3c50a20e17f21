//! What one guest has not read yet: bounded, and never a reason to wait.

use super::limits::{
    OUTBOX_BYTES_MAX, OUTBOX_MESSAGES_MAX, OUTBOX_PAUSE_BYTES, OUTBOX_PAUSE_MESSAGES,
};
use copage_grants::channel::{Channel, ChannelError};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

/// Why a message could not be sent or kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unsent {
    /// The guest does not read.
    Overflow,
    /// The channel is gone, or the kernel takes nothing of this guest's any more.
    Broken,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    waiting: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    bytes: usize,
}

impl Outbox {
    /// Nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The guest reads too slowly to be asked what else it wants.
    pub(super) fn is_paused(&self) -> bool {
        self.waiting.len() >= OUTBOX_PAUSE_MESSAGES || self.bytes >= OUTBOX_PAUSE_BYTES
    }

    /// Sends a message, or keeps it behind those that wait.
    pub(super) fn send(
        &mut self,
        channel: &Channel,
        message: &[u8],
        fd: Option<OwnedFd>,
    ) -> Result<(), Unsent> {
        if self.waiting.is_empty() {
            match channel.try_send(message, fd.as_ref().map(AsFd::as_fd)) {
                Ok(()) => return Ok(()),
                Err(ChannelError::WouldBlock) => {}
                Err(_) => return Err(Unsent::Broken),
            }
        }
        if self.waiting.len() >= OUTBOX_MESSAGES_MAX
            || self.bytes + message.len() > OUTBOX_BYTES_MAX
        {
            return Err(Unsent::Overflow);
        }
        self.bytes += message.len();
        self.waiting.push_back((message.to_vec(), fd));
        Ok(())
    }

    /// Sends what waits, as far as the guest reads.
    pub(super) fn flush(&mut self, channel: &Channel) -> Result<(), Unsent> {
        match channel.flush() {
            Ok(()) => {}
            Err(ChannelError::WouldBlock) => return Ok(()),
            Err(_) => return Err(Unsent::Broken),
        }
        while let Some((message, fd)) = self.waiting.front() {
            match channel.try_send(message, fd.as_ref().map(AsFd::as_fd)) {
                Ok(()) => {
                    self.bytes -= message.len();
                    self.waiting.pop_front();
                }
                Err(ChannelError::WouldBlock) => return Ok(()),
                Err(_) => return Err(Unsent::Broken),
            }
        }
        // A burst's memory is not kept.
        self.waiting.shrink_to(OUTBOX_PAUSE_MESSAGES);
        Ok(())
    }
}
