//! A ring within one process: its memory on the heap, eventfds as its event channels.

use super::end::{RingEvents, RingMemory, begin};
use super::limits::RING_ORDER_MAX;
use super::message::ChannelError;
use super::ring::Nonsense;
use crate::PAGE_SIZE;
use crate::volatile::VolatileBytesMut;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use std::cell::UnsafeCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// What an end is made of.
pub(super) struct Parts {
    pub memory: Box<dyn RingMemory>,
    pub events: Box<dyn RingEvents>,
}

/// Memory of this process that two ends read and write, as pages are that two domains map.
pub struct HeapMemory {
    words: Box<[UnsafeCell<u64>]>,
}

// SAFETY: the words are only reached by volatile views, which is what those are for.
unsafe impl Send for HeapMemory {}
// SAFETY: as for Send.
unsafe impl Sync for HeapMemory {}

impl HeapMemory {
    /// So many bytes of zeros, aligned to 8; a multiple of that.
    pub fn new(bytes: usize) -> Self {
        let words = (0..bytes / 8).map(|_| UnsafeCell::new(0)).collect();
        Self { words }
    }

    /// All of it.
    pub fn all(&self) -> VolatileBytesMut<'_> {
        // Of all of it, so that the pointer may be used for all of it.
        let start = self.words.as_ptr().cast::<u8>().cast_mut();
        // SAFETY: the boxed words live as long as `self`; they are in cells, so that writing through
        // a shared reference is allowed; no reference to a cell's content is ever made.
        unsafe { VolatileBytesMut::new(start, self.words.len() * 8) }
    }

    fn part(&self, from: usize, to: usize) -> VolatileBytesMut<'_> {
        let all = self.all();
        // Within what `end` has made.
        all.range(from..to).unwrap_or(all)
    }
}

struct Memory(Arc<HeapMemory>);

impl RingMemory for Memory {
    fn index(&self) -> VolatileBytesMut<'_> {
        self.0.part(0, PAGE_SIZE)
    }

    fn bytes(&self) -> VolatileBytesMut<'_> {
        self.0.part(PAGE_SIZE, self.0.words.len() * 8)
    }
}

/// Four eventfds: messages and room, each way; an end waits on two and writes the other two.
struct Events {
    read: Arc<OwnedFd>,
    write: Arc<OwnedFd>,
    messages: Arc<OwnedFd>,
    room: Arc<OwnedFd>,
}

fn take(fd: &OwnedFd) -> io::Result<bool> {
    match rustix::io::read(fd, &mut [0u8; 8]) {
        Ok(_) => Ok(true),
        Err(Errno::AGAIN) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn tell(fd: &OwnedFd) {
    // It can only fail when the count is at its end, and then it is readable.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

impl RingEvents for Events {
    fn read_fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }

    fn write_fd(&self) -> BorrowedFd<'_> {
        self.write.as_fd()
    }

    fn take_read(&self) -> io::Result<bool> {
        take(&self.read)
    }

    fn take_write(&self) -> io::Result<bool> {
        take(&self.write)
    }

    fn notify_messages(&self) {
        tell(&self.messages);
    }

    fn notify_room(&self) {
        tell(&self.room);
    }
}

/// The guest's and the daemon's parts of a ring.
pub(super) fn end(order: u32) -> Result<(Parts, Parts), ChannelError> {
    if order > RING_ORDER_MAX {
        return Err(Nonsense::NotARing("it has too many pages").into());
    }
    let pages = 2usize << order;
    let memory = Arc::new(HeapMemory::new((1 + pages) * PAGE_SIZE));
    begin(memory.part(0, PAGE_SIZE), order, &vec![0; pages])?;
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    let new = || {
        let fd = eventfd(0, flags).map_err(ChannelError::sys("eventfd"))?;
        Ok::<_, ChannelError>(Arc::new(fd))
    };
    let (to_daemon, to_guest) = (new()?, new()?);
    let (room_to_daemon, room_to_guest) = (new()?, new()?);
    let guest = Parts {
        memory: Box::new(Memory(memory.clone())),
        events: Box::new(Events {
            read: to_guest.clone(),
            write: room_to_daemon.clone(),
            messages: to_daemon.clone(),
            room: room_to_guest.clone(),
        }),
    };
    let daemon = Parts {
        memory: Box::new(Memory(memory)),
        events: Box::new(Events {
            read: to_daemon,
            write: room_to_guest,
            messages: to_guest,
            room: room_to_daemon,
        }),
    };
    Ok((guest, daemon))
}
