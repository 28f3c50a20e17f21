//! What the loop waits for: epoll, with a timer on CLOCK_BOOTTIME.

use super::limits::EVENTS_PER_ROUND;
use copage_grants::channel::Channel;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The listener for guests.
    Listener,
    /// The listener for the administrator.
    AdminListener,
    /// The eventfd by which other threads wake the loop.
    Wake,
    /// The signalfd.
    Signals,
    /// The timer.
    Timer,
    /// The cache's inotify.
    Host,
    /// A guest's channel.
    Guest(u64),
    /// The descriptor by which a guest's ring says that room came; told as [`Self::Guest`].
    Room(u64),
    /// A guest's process.
    Peer(u64),
    /// An admin connection.
    Admin(u64),
}

/// Connection numbers count up from 1 and never get near this.
const ID_BITS: u32 = 56;

impl Source {
    fn data(self) -> EventData {
        let (kind, id) = match self {
            Self::Listener => (0, 0),
            Self::AdminListener => (1, 0),
            Self::Wake => (2, 0),
            Self::Signals => (3, 0),
            Self::Timer => (4, 0),
            Self::Host => (5, 0),
            Self::Guest(id) => (6, id),
            Self::Peer(id) => (7, id),
            Self::Admin(id) => (8, id),
            Self::Room(id) => (9, id),
        };
        EventData::new_u64(kind << ID_BITS | id)
    }

    fn from_data(data: u64) -> Self {
        let id = data & ((1 << ID_BITS) - 1);
        match data >> ID_BITS {
            0 => Self::Listener,
            1 => Self::AdminListener,
            2 => Self::Wake,
            3 => Self::Signals,
            4 => Self::Timer,
            5 => Self::Host,
            6 => Self::Guest(id),
            7 => Self::Peer(id),
            8 => Self::Admin(id),
            _ => Self::Room(id),
        }
    }
}

/// What is waited for on one descriptor; hanging up is always reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Interest {
    /// Something to read.
    pub read: bool,
    /// Room to write.
    pub write: bool,
}

impl Interest {
    /// Something to read.
    pub(super) const READ: Self = Self {
        read: true,
        write: false,
    };

    /// The same for two descriptors that are both read from: one for messages, one for room.
    fn by_direction(self) -> (Self, Self) {
        let read = |read| Self { read, write: false };
        (read(self.read), read(self.write))
    }

    fn flags(self) -> EventFlags {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, self.read);
        flags.set(EventFlags::OUT, self.write);
        flags
    }
}

/// One event.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    pub source: Source,
    pub read: bool,
    pub write: bool,
    pub hung_up: bool,
}

/// See the module.
pub(super) struct Poller {
    epoll: OwnedFd,
    timer: OwnedFd,
    armed_ms: Option<u64>,
}

impl Poller {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Boottime, flags)?;
        let poller = Self {
            epoll,
            timer,
            armed_ms: None,
        };
        poller.add(&poller.timer, Source::Timer, Interest::READ)?;
        Ok(poller)
    }

    pub(super) fn add(&self, fd: impl AsFd, source: Source, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(
            &self.epoll,
            fd,
            source.data(),
            interest.flags(),
        )?)
    }

    pub(super) fn change(
        &self,
        fd: impl AsFd,
        source: Source,
        interest: Interest,
    ) -> io::Result<()> {
        Ok(epoll::modify(
            &self.epoll,
            fd,
            source.data(),
            interest.flags(),
        )?)
    }

    /// Waits for what a guest's channel is ready for: on a ring by a descriptor for each direction.
    pub(super) fn add_channel(
        &self,
        channel: &Channel,
        id: u64,
        interest: Interest,
    ) -> io::Result<()> {
        if channel.carries_descriptors() {
            return self.add(channel, Source::Guest(id), interest);
        }
        let (read, write) = interest.by_direction();
        self.add(channel.read_fd(), Source::Guest(id), read)?;
        let added = self.add(channel.write_fd(), Source::Room(id), write);
        if added.is_err() {
            self.remove(channel.read_fd());
        }
        added
    }

    /// Changes what a guest's channel is waited for.
    pub(super) fn change_channel(
        &self,
        channel: &Channel,
        id: u64,
        interest: Interest,
    ) -> io::Result<()> {
        if channel.carries_descriptors() {
            return self.change(channel, Source::Guest(id), interest);
        }
        let (read, write) = interest.by_direction();
        self.change(channel.read_fd(), Source::Guest(id), read)?;
        self.change(channel.write_fd(), Source::Room(id), write)
    }

    /// Ends the waiting on a guest's channel.
    pub(super) fn remove_channel(&self, channel: &Channel) {
        self.remove(channel.read_fd());
        if !channel.carries_descriptors() {
            self.remove(channel.write_fd());
        }
    }

    /// Ends the waiting on a descriptor. Closing it would not do where a copy of it is open.
    pub(super) fn remove(&self, fd: impl AsFd) {
        // It is there: only this removes, once.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Sets the timer to a time of the daemon's clock, or off.
    pub(super) fn arm(&mut self, at_ms: Option<u64>) -> io::Result<()> {
        if self.armed_ms == at_ms {
            return Ok(());
        }
        // 0 would turn the timer off; the past rings at once.
        let it_value = match at_ms {
            None => Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            Some(ms) => Timespec {
                tv_sec: i64::try_from(ms / 1000).unwrap_or(i64::MAX),
                // Below a thousand million: it fits every width that the field has.
                tv_nsec: ((ms % 1000) * 1_000_000).max(1) as _,
            },
        };
        let it_interval = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let new = Itimerspec {
            it_interval,
            it_value,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &new)?;
        self.armed_ms = at_ms;
        Ok(())
    }

    /// The timer rang: it is off, and is armed again by the next [`Self::arm`].
    pub(super) fn rang(&mut self) {
        // Read so that it is not reported again; what it counts does not matter.
        let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
        self.armed_ms = None;
    }

    /// Waits for events, without end. `events` is room that is used again.
    pub(super) fn wait(
        &self,
        events: &mut Vec<epoll::Event>,
        out: &mut Vec<Ready>,
    ) -> io::Result<()> {
        out.clear();
        events.clear();
        events.reserve(EVENTS_PER_ROUND);
        let room = rustix::buffer::spare_capacity(events);
        match epoll::wait(&self.epoll, room, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        out.extend(events.iter().map(|event| {
            let (flags, data) = (event.flags, event.data);
            let ready = Ready {
                source: Source::from_data(data.u64()),
                read: flags.contains(EventFlags::IN),
                write: flags.contains(EventFlags::OUT),
                hung_up: flags.intersects(EventFlags::HUP | EventFlags::ERR),
            };
            match ready.source {
                Source::Room(id) => Ready {
                    source: Source::Guest(id),
                    read: false,
                    write: ready.read,
                    hung_up: ready.hung_up,
                },
                _ => ready,
            }
        }));
        Ok(())
    }
}
