//! One end of a ring: both directions, the events of each, and who is still there.

use super::layout::{
    self, DAEMON_LIVES_AT, GUEST_LIVES_AT, LaneWords, MAGIC, MAGIC_AT, ORDER_AT, TO_DAEMON,
    TO_GUEST,
};
use super::limits::RING_ORDER_MAX;
use super::message::{ChannelError, Received};
use super::ring::{Consumer, Lane, Nonsense, Popped, Producer};
use crate::PAGE_SIZE;
use crate::volatile::VolatileBytesMut;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// The memory of a ring, as one end has it mapped.
pub trait RingMemory: Send + Sync {
    /// The index page: [`PAGE_SIZE`] bytes.
    fn index(&self) -> VolatileBytesMut<'_>;
    /// The pages to the daemon and then those to the guest, as many.
    fn bytes(&self) -> VolatileBytesMut<'_>;
}

/// The events of a ring, as one end has them: one port a direction, each with a descriptor that is
/// readable from an event until it is taken, however many came.
pub trait RingEvents: Send + Sync {
    /// Readable: messages came, or the other end is gone.
    fn read_fd(&self) -> BorrowedFd<'_>;
    /// Readable: room came.
    fn write_fd(&self) -> BorrowedFd<'_>;
    /// Takes what made [`Self::read_fd`] readable, so that the next event does again. `false`:
    /// nothing had.
    fn take_read(&self) -> io::Result<bool>;
    /// The same for [`Self::write_fd`].
    fn take_write(&self) -> io::Result<bool>;
    /// Tells the other end that messages came.
    fn notify_messages(&self);
    /// Tells the other end that room came.
    fn notify_room(&self);
}

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The guest's, which made the memory.
    Guest,
    /// The daemon's.
    Daemon,
}

impl Side {
    fn sends(self) -> LaneWords {
        match self {
            Self::Guest => TO_DAEMON,
            Self::Daemon => TO_GUEST,
        }
    }

    fn receives(self) -> LaneWords {
        match self {
            Self::Guest => TO_GUEST,
            Self::Daemon => TO_DAEMON,
        }
    }

    fn lives_at(self) -> usize {
        match self {
            Self::Guest => GUEST_LIVES_AT,
            Self::Daemon => DAEMON_LIVES_AT,
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Guest => Self::Daemon,
            Self::Daemon => Self::Guest,
        }
    }
}

/// Writes the words that a guest begins a ring with. All others of the page are zero.
pub fn begin(index: VolatileBytesMut<'_>, order: u32, refs: &[u32]) -> Result<(), Nonsense> {
    let written = refs
        .iter()
        .enumerate()
        .all(|(n, &gref)| index.write_u32(layout::REFS_AT + 4 * n, gref))
        && index.write_u32(ORDER_AT, order)
        && index.write_u8(GUEST_LIVES_AT, 1)
        && index.write_u32(MAGIC_AT, MAGIC);
    if written && refs.len() == 2 << order.min(RING_ORDER_MAX) {
        Ok(())
    } else {
        Err(Nonsense::NotARing(
            "an index page has no room for these references",
        ))
    }
}

/// The references that a guest wrote, each read once: what the daemon maps.
pub fn announced(index: VolatileBytesMut<'_>) -> Result<Vec<u32>, Nonsense> {
    let words = index.read_only();
    if words.read_u32(MAGIC_AT) != Some(MAGIC) {
        return Err(Nonsense::NotARing("its index page does not begin so"));
    }
    let order = words.read_u32(ORDER_AT).unwrap_or(u32::MAX);
    if order > RING_ORDER_MAX {
        return Err(Nonsense::NotARing("it has too many pages"));
    }
    if words.read_u8(GUEST_LIVES_AT) != Some(1) {
        return Err(Nonsense::NotARing("its guest is gone"));
    }
    let pages = 2usize << order;
    (0..pages)
        .map(|n| words.read_u32(layout::REFS_AT + 4 * n))
        .collect::<Option<Vec<u32>>>()
        .ok_or(Nonsense::NotARing("its index page is too short"))
}

/// Has the daemon accepted?
pub fn is_accepted(index: VolatileBytesMut<'_>) -> bool {
    index.read_only().read_u8(DAEMON_LIVES_AT) == Some(1)
}

#[derive(Default)]
struct Receiver {
    messages: Consumer,
    /// `more` is readable.
    more: bool,
}

fn event() -> Result<OwnedFd, ChannelError> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(ChannelError::sys("eventfd"))
}

/// See the module. Sending and receiving may go on in different threads.
pub struct RingEnd {
    side: Side,
    memory: Box<dyn RingMemory>,
    events: Box<dyn RingEvents>,
    /// Bytes of one direction.
    lane_bytes: usize,
    sender: Mutex<Producer>,
    receiver: Mutex<Receiver>,
    /// Readable when the event of messages is, or `more`.
    read: OwnedFd,
    /// Readable after an event was taken and a message found then: others may be behind it.
    more: OwnedFd,
    nonblocking: AtomicBool,
    /// This end has ended it.
    ended: AtomicBool,
    /// Readable when this end has ended it: for threads of ours that wait.
    end: OwnedFd,
}

impl fmt::Debug for RingEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingEnd")
            .field("side", &self.side)
            .field("lane_bytes", &self.lane_bytes)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl RingEnd {
    /// An end over its memory and events. The daemon's end says here that it has accepted.
    ///
    /// # Errors
    /// The memory is of no size that a ring has, or there is no descriptor left.
    pub fn new(
        side: Side,
        memory: Box<dyn RingMemory>,
        events: Box<dyn RingEvents>,
    ) -> Result<Self, ChannelError> {
        let lane_bytes = memory.bytes().len() / 2;
        if memory.index().len() < PAGE_SIZE
            || !lane_bytes.is_power_of_two()
            || lane_bytes < PAGE_SIZE
        {
            return Err(Nonsense::NotARing("its memory is of another size").into());
        }
        let (end, more) = (event()?, event()?);
        let read =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(ChannelError::sys("epoll"))?;
        for fd in [events.read_fd(), more.as_fd()] {
            let data = epoll::EventData::new_u64(0);
            epoll::add(&read, fd, data, epoll::EventFlags::IN)
                .map_err(ChannelError::sys("epoll_ctl"))?;
        }
        let ring = Self {
            side,
            memory,
            events,
            lane_bytes,
            sender: Mutex::default(),
            receiver: Mutex::default(),
            read,
            more,
            nonblocking: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            end,
        };
        if side == Side::Daemon {
            ring.say_alive(1);
            ring.events.notify_messages();
        }
        Ok(ring)
    }

    fn say_alive(&self, alive: u8) {
        let there = self.memory.index().write_u8(self.side.lives_at(), alive);
        debug_assert!(there, "`new` has checked the page's size");
    }

    fn lane(&self, words: LaneWords) -> Result<Lane<'_>, ChannelError> {
        let range = match words {
            TO_DAEMON => 0..self.lane_bytes,
            _ => self.lane_bytes..2 * self.lane_bytes,
        };
        let bytes = self.memory.bytes().range(range);
        bytes
            .and_then(|bytes| Lane::new(self.memory.index(), bytes, words))
            .ok_or_else(|| Nonsense::NotARing("its memory is of another size").into())
    }

    /// Readable: a message may have come, or the other end is gone.
    pub fn read_fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }

    /// Readable: room may have come.
    pub fn write_fd(&self) -> BorrowedFd<'_> {
        self.events.write_fd()
    }

    /// Makes [`Self::send`] and [`Self::recv`] answer [`ChannelError::WouldBlock`] instead of
    /// waiting.
    pub fn set_nonblocking(&self, nonblocking: bool) {
        self.nonblocking.store(nonblocking, Ordering::Relaxed);
    }

    fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    fn other_lives(&self) -> bool {
        let at = self.side.other().lives_at();
        self.memory.index().read_only().read_u8(at) == Some(1)
    }

    /// Part of a message waits for room: when [`Self::write_fd`] is readable, [`Self::flush`].
    pub fn has_rest(&self) -> bool {
        self.sender.lock().has_rest()
    }

    /// What the other end wrote cannot be: nothing it writes counts any more.
    fn fail(&self, nonsense: Nonsense) -> ChannelError {
        self.shutdown();
        nonsense.into()
    }

    /// Sends on what was kept for lack of room.
    ///
    /// # Errors
    /// [`ChannelError::WouldBlock`] while some of it is still kept; else as [`Self::try_send`].
    pub fn flush(&self) -> Result<(), ChannelError> {
        let mut sender = self.sender.lock();
        if !sender.has_rest() {
            return Ok(());
        }
        // Twice: once more after the event that made the descriptor readable was taken.
        for last in [false, true] {
            if self.is_ended() || !self.other_lives() {
                return Err(ChannelError::Closed);
            }
            let lane = self.lane(self.side.sends())?;
            let moved = sender.flush(&lane).map_err(|e| self.fail(e))?;
            if moved {
                self.events.notify_messages();
            }
            if !sender.has_rest() {
                return Ok(());
            }
            if !last {
                self.take_write()?;
            }
        }
        Err(ChannelError::WouldBlock)
    }

    fn take_write(&self) -> Result<(), ChannelError> {
        let taken = self.events.take_write();
        taken.map(drop).map_err(|source| ChannelError::Sys {
            call: "taking an event",
            source,
        })
    }

    /// Sends a message without waiting: whole (what the ring has no room for is kept, at most one
    /// message), or not at all.
    pub fn try_send(&self, message: &[u8]) -> Result<(), ChannelError> {
        let mut sender = self.sender.lock();
        for last in [false, true] {
            if self.is_ended() || !self.other_lives() {
                return Err(ChannelError::Closed);
            }
            let lane = self.lane(self.side.sends())?;
            let pushed = match sender.push(&lane, message) {
                Ok(pushed) => pushed,
                Err(Nonsense::Length { .. }) => {
                    return Err(ChannelError::BadLength {
                        bytes: message.len(),
                    });
                }
                Err(nonsense) => return Err(self.fail(nonsense)),
            };
            if pushed.moved {
                self.events.notify_messages();
            }
            if pushed.taken {
                return Ok(());
            }
            if !last {
                self.take_write()?;
            }
        }
        Err(ChannelError::WouldBlock)
    }

    /// As [`Self::try_send`], waiting until all of it is in the ring unless non-blocking.
    pub fn send(&self, message: &[u8]) -> Result<(), ChannelError> {
        let waits = !self.nonblocking.load(Ordering::Relaxed);
        loop {
            match self.try_send(message) {
                Err(ChannelError::WouldBlock) if waits => self.wait(self.write_fd())?,
                other => {
                    other?;
                    break;
                }
            }
        }
        loop {
            match self.flush() {
                Err(ChannelError::WouldBlock) if waits => self.wait(self.write_fd())?,
                // It was taken and is kept.
                Err(ChannelError::WouldBlock) => return Ok(()),
                other => return other,
            }
        }
    }

    fn wait(&self, fd: BorrowedFd<'_>) -> Result<(), ChannelError> {
        let mut fds = [
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
            PollFd::new(&self.end, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(ChannelError::sys("poll")(errno)),
        }
    }

    /// Takes a message without waiting. The event that announced it stays until the ring was found
    /// empty, so that [`Self::read_fd`] is readable as long as there is more.
    pub fn try_recv(&self, buf: &mut [u8]) -> Result<Received, ChannelError> {
        let mut receiver = self.receiver.lock();
        if self.is_ended() {
            return Err(ChannelError::Closed);
        }
        let lane = self.lane(self.side.receives())?;
        let (mut lives, mut taken) = (true, false);
        // Once for what is there, once more after the event was taken, and once more after the
        // other end was found gone: what it had sent by then counts. No event is taken without a
        // look at the ring after it.
        for last in [false, false, true] {
            let mut moved = false;
            let popped = receiver.messages.pop(&lane, buf, &mut moved);
            if moved && receiver.messages.sender_waits(&lane) {
                self.events.notify_room();
            }
            match popped.map_err(|e| self.fail(e))? {
                Popped::Nothing if !lives => return Err(ChannelError::Closed),
                Popped::Nothing if last => break,
                Popped::Nothing => {}
                found => {
                    if taken && !receiver.more {
                        // The event stood for all that came before it, and the caller may not ask
                        // again before it polls.
                        let _ = rustix::io::write(&self.more, &1u64.to_ne_bytes());
                        receiver.more = true;
                    }
                    return match found {
                        Popped::Message(len) => Ok(Received { len, fd: None }),
                        _ => Err(ChannelError::Truncated {
                            buffer_bytes: buf.len(),
                        }),
                    };
                }
            }
            taken = self.take_read(&mut receiver)?;
            lives = self.other_lives();
            if lives && !taken {
                break;
            }
        }
        if lives {
            Err(ChannelError::WouldBlock)
        } else {
            Err(ChannelError::Closed)
        }
    }

    /// Takes what made the descriptor readable, before the ring is looked at again.
    fn take_read(&self, receiver: &mut Receiver) -> Result<bool, ChannelError> {
        let had_more = std::mem::take(&mut receiver.more);
        if had_more {
            let _ = rustix::io::read(&self.more, &mut [0u8; 8]);
        }
        match self.events.take_read() {
            Ok(taken) => Ok(taken || had_more),
            Err(source) => Err(ChannelError::Sys {
                call: "taking an event",
                source,
            }),
        }
    }

    /// Takes a message; waits for one unless non-blocking.
    pub fn recv(&self, buf: &mut [u8]) -> Result<Received, ChannelError> {
        loop {
            match self.try_recv(buf) {
                Err(ChannelError::WouldBlock) if !self.nonblocking.load(Ordering::Relaxed) => {
                    self.wait(self.read_fd())?;
                }
                other => return other,
            }
        }
    }

    /// Sends an event without a message.
    pub(super) fn ring(&self) {
        self.events.notify_messages();
    }

    /// Ends both directions: the other end, and every thread of ours that waits here, sees it
    /// closed.
    pub fn shutdown(&self) {
        if self.ended.swap(true, Ordering::AcqRel) {
            return;
        }
        self.say_alive(0);
        self.events.notify_messages();
        self.events.notify_room();
        // It can only fail when the count is at its end, and it is written once.
        let _ = rustix::io::write(&self.end, &1u64.to_ne_bytes());
    }
}

impl Drop for RingEnd {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl AsFd for RingEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read_fd()
    }
}
