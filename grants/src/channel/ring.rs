//! One direction of a ring: a pipe of bytes in memory that the other end can write at any time.
//!
//! A message is its length (u32, little-endian) and its bytes; both run on around the end of the
//! ring, and a message longer than the ring goes in pieces. Pure: no system calls, no waiting.
//! Every shared word is read once per call, checked, and only then used; an end believes nothing
//! that it reads back of its own.

use super::layout::LaneWords;
use super::limits::{RING_MESSAGE_BYTES_MAX, RING_PART_BYTES_KEPT};
use crate::volatile::VolatileBytesMut;
use std::sync::atomic::{Ordering, fence};

/// The bytes of a message's length.
const LENGTH_BYTES: u32 = 4;

/// What the other end wrote that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Nonsense {
    /// It says that more bytes were put in than the ring holds.
    #[error("{bytes} bytes in a ring of {ring_bytes}")]
    Produced {
        /// What its index comes to.
        bytes: u32,
        /// The ring's size.
        ring_bytes: u32,
    },
    /// It says that it took bytes that were not put in.
    #[error("{bytes} bytes not taken out of a ring of {ring_bytes}")]
    Consumed {
        /// What its index comes to.
        bytes: u32,
        /// The ring's size.
        ring_bytes: u32,
    },
    /// A message of no bytes, or of more than there can be.
    #[error("a message of {bytes} bytes (1 to {RING_MESSAGE_BYTES_MAX} can be)")]
    Length {
        /// Its length.
        bytes: u32,
    },
    /// The index page is not that of a ring.
    #[error("no ring: {0}")]
    NotARing(&'static str),
}

/// The memory of one direction.
#[derive(Clone, Copy, Debug)]
pub struct Lane<'m> {
    index: VolatileBytesMut<'m>,
    bytes: VolatileBytesMut<'m>,
    words: LaneWords,
    ring_bytes: u32,
}

impl<'m> Lane<'m> {
    /// A direction whose indexes are at `words` of the page `index` and whose bytes are `bytes`;
    /// `None` when the words are not in the page, or the bytes are no power of two that such
    /// indexes can count.
    pub fn new(
        index: VolatileBytesMut<'m>,
        bytes: VolatileBytesMut<'m>,
        words: LaneWords,
    ) -> Option<Self> {
        let ring_bytes = u32::try_from(bytes.len()).ok()?;
        let fits = |at: usize| at.checked_add(4).is_some_and(|end| end <= index.len());
        let good = ring_bytes.is_power_of_two()
            && (LENGTH_BYTES..=1 << 30).contains(&ring_bytes)
            && fits(words.producer)
            && fits(words.consumer)
            && fits(words.waits);
        good.then_some(Self {
            index,
            bytes,
            words,
            ring_bytes,
        })
    }

    fn word(&self, at: usize) -> u32 {
        // `new` has checked that it is there.
        self.index.read_only().read_u32(at).unwrap_or_default()
    }

    fn publish(&self, at: usize, value: u32) {
        let there = self.index.write_u32(at, value);
        debug_assert!(there, "`new` has checked it");
    }

    /// Copies bytes out, from the free-running index `from` on.
    fn copy_out(&self, from: u32, out: &mut [u8]) {
        let at = (from & (self.ring_bytes - 1)) as usize;
        let view = self.bytes.read_only();
        let first = view.read_into(at, out);
        let rest = out.get_mut(first..).unwrap_or_default();
        view.read_into(0, rest);
    }

    /// Copies bytes in, from the free-running index `to` on.
    fn copy_in(&self, to: u32, bytes: &[u8]) {
        let at = (to & (self.ring_bytes - 1)) as usize;
        let first = self.bytes.write_from(at, bytes);
        let rest = bytes.get(first..).unwrap_or_default();
        self.bytes.write_from(0, rest);
    }
}

/// What came of sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Pushed {
    /// The message is in the ring or kept; `false`: nothing of it was taken.
    pub taken: bool,
    /// Bytes went into the ring: the other end should hear of it.
    pub moved: bool,
}

/// The sending end of one direction.
#[derive(Debug, Default)]
pub struct Producer {
    at: u32,
    /// The one message that did not fit, its length before it, and how much of it went.
    rest: Vec<u8>,
    gone: usize,
}

impl Producer {
    /// An end that has sent so many bytes, modulo 2^32; both ends and both words begin there. Rings
    /// of ours begin at 0.
    pub fn from_index(at: u32) -> Self {
        Self {
            at,
            ..Self::default()
        }
    }

    /// Part of a message is kept until there is room.
    pub fn has_rest(&self) -> bool {
        !self.rest.is_empty()
    }

    fn room(&self, lane: &Lane<'_>) -> Result<u32, Nonsense> {
        let used = self.at.wrapping_sub(lane.word(lane.words.consumer));
        // What the other end read is written over only after its word was seen.
        fence(Ordering::Acquire);
        if used > lane.ring_bytes {
            return Err(Nonsense::Consumed {
                bytes: used,
                ring_bytes: lane.ring_bytes,
            });
        }
        Ok(lane.ring_bytes - used)
    }

    /// Puts in what fits of `bytes`.
    fn put(&mut self, lane: &Lane<'_>, room: u32, bytes: &[u8]) -> usize {
        let count = bytes.len().min(room as usize);
        lane.copy_in(self.at, bytes.get(..count).unwrap_or_default());
        // At most the ring's size.
        self.at = self.at.wrapping_add(count as u32);
        count
    }

    fn publish(&self, lane: &Lane<'_>) {
        // The bytes are there before the index says so.
        fence(Ordering::Release);
        lane.publish(lane.words.producer, self.at);
    }

    /// Puts in what is kept, as far as there is room. `true`: bytes went.
    ///
    /// # Errors
    /// The other end's index is nonsense.
    pub fn flush(&mut self, lane: &Lane<'_>) -> Result<bool, Nonsense> {
        let mut moved = self.put_rest(lane)?;
        if self.has_rest() {
            // Said before the index is read once more, so that whoever makes room after that sees it.
            lane.publish(lane.words.waits, 1);
            fence(Ordering::SeqCst);
            moved |= self.put_rest(lane)?;
        }
        if !self.has_rest() {
            lane.publish(lane.words.waits, 0);
        }
        Ok(moved)
    }

    fn put_rest(&mut self, lane: &Lane<'_>) -> Result<bool, Nonsense> {
        if !self.has_rest() {
            return Ok(false);
        }
        let room = self.room(lane)?;
        let rest = std::mem::take(&mut self.rest);
        let went = self.put(lane, room, rest.get(self.gone..).unwrap_or_default());
        self.gone += went;
        if self.gone < rest.len() {
            self.rest = rest;
        } else {
            self.gone = 0;
        }
        if went > 0 {
            self.publish(lane);
        }
        Ok(went > 0)
    }

    /// Sends a message of 1 to [`RING_MESSAGE_BYTES_MAX`] bytes: takes it whole, keeping what the
    /// ring has no room for, or, with an earlier one still kept or the ring full, takes nothing.
    ///
    /// # Errors
    /// The message's length, or the other end's index, is nonsense.
    pub fn push(&mut self, lane: &Lane<'_>, message: &[u8]) -> Result<Pushed, Nonsense> {
        let bytes = u32::try_from(message.len()).unwrap_or(u32::MAX);
        if message.is_empty() || message.len() > RING_MESSAGE_BYTES_MAX {
            return Err(Nonsense::Length { bytes });
        }
        let mut moved = self.flush(lane)?;
        let mut taken = false;
        if !self.has_rest() {
            let mut room = self.room(lane)?;
            if room < LENGTH_BYTES {
                lane.publish(lane.words.waits, 1);
                fence(Ordering::SeqCst);
                room = self.room(lane)?;
            }
            if room >= LENGTH_BYTES {
                self.put(lane, room, &bytes.to_le_bytes());
                let went = self.put(lane, room - LENGTH_BYTES, message);
                self.publish(lane);
                self.rest = message.get(went..).unwrap_or_default().to_vec();
                (taken, moved) = (true, true);
                // Says that it waits for room, or that it does no more.
                moved |= self.flush(lane)?;
            }
        }
        Ok(Pushed { taken, moved })
    }
}

/// What came of receiving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Popped {
    /// A message of so many bytes is in the buffer.
    Message(usize),
    /// A message longer than the buffer came; it is lost.
    TooLong(usize),
    /// No whole message is there.
    Nothing,
}

/// The receiving end of one direction.
#[derive(Debug, Default)]
pub struct Consumer {
    at: u32,
    /// The length of the message that is coming.
    coming: Option<usize>,
    /// What has come of it.
    part: Vec<u8>,
}

impl Consumer {
    /// As [`Producer::from_index`].
    pub fn from_index(at: u32) -> Self {
        Self {
            at,
            ..Self::default()
        }
    }

    /// Takes the next whole message. `moved` is set when bytes were taken out.
    ///
    /// # Errors
    /// The other end's index, or a message's length, is nonsense.
    pub fn pop(
        &mut self,
        lane: &Lane<'_>,
        buf: &mut [u8],
        moved: &mut bool,
    ) -> Result<Popped, Nonsense> {
        let mut there = lane.word(lane.words.producer).wrapping_sub(self.at);
        // The bytes are read only after the index that says that they are there.
        fence(Ordering::Acquire);
        if there > lane.ring_bytes {
            return Err(Nonsense::Produced {
                bytes: there,
                ring_bytes: lane.ring_bytes,
            });
        }
        let before = self.at;
        let popped = self.pop_some(lane, &mut there, buf);
        if self.at != before {
            // Read before the room is given away.
            fence(Ordering::Release);
            lane.publish(lane.words.consumer, self.at);
            *moved = true;
        }
        popped
    }

    /// Does the sender wait for room? To be asked after bytes were taken out.
    pub fn sender_waits(&self, lane: &Lane<'_>) -> bool {
        // The sender says so before it looks at the index once more; here it is the other way round.
        fence(Ordering::SeqCst);
        lane.word(lane.words.waits) != 0
    }

    fn take(&mut self, lane: &Lane<'_>, there: &mut u32, out: &mut [u8]) {
        lane.copy_out(self.at, out);
        // The callers take no more than is there.
        self.at = self.at.wrapping_add(out.len() as u32);
        *there -= out.len() as u32;
    }

    fn pop_some(
        &mut self,
        lane: &Lane<'_>,
        there: &mut u32,
        buf: &mut [u8],
    ) -> Result<Popped, Nonsense> {
        let length = match self.coming {
            Some(length) => length,
            None => {
                if *there < LENGTH_BYTES {
                    return Ok(Popped::Nothing);
                }
                let mut length = [0; LENGTH_BYTES as usize];
                self.take(lane, there, &mut length);
                let bytes = u32::from_le_bytes(length);
                let length = bytes as usize;
                if !(1..=RING_MESSAGE_BYTES_MAX).contains(&length) {
                    return Err(Nonsense::Length { bytes });
                }
                self.coming = Some(length);
                length
            }
        };
        if self.part.is_empty()
            && *there as usize >= length
            && let Some(whole) = buf.get_mut(..length)
        {
            self.take(lane, there, whole);
            self.coming = None;
            return Ok(Popped::Message(length));
        }
        let mut part = std::mem::take(&mut self.part);
        let have = part.len();
        let more = (length - have).min(*there as usize);
        part.resize(have + more, 0);
        self.take(lane, there, part.get_mut(have..).unwrap_or_default());
        if part.len() < length {
            self.part = part;
            return Ok(Popped::Nothing);
        }
        self.coming = None;
        let popped = match buf.get_mut(..length) {
            Some(whole) => {
                whole.copy_from_slice(&part);
                Popped::Message(length)
            }
            None => Popped::TooLong(length),
        };
        part.clear();
        part.shrink_to(RING_PART_BYTES_KEPT);
        self.part = part;
        Ok(popped)
    }
}
