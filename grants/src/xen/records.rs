//! What the frames of a cache domain hold, written down in the domain itself, so that a daemon that
//! was killed can tell when it is started again.
//!
//! ```text
//! page 0        header, then nothing
//! pages 1..     records of 32 bytes, one a frame, all zeros for a frame that holds nothing
//! the rest      frames
//!
//! header  | "copage.X" 8 | layout 4 | MiB 4 | grant frames 4 | number 4 | checksum 8 |
//! record  | home 8 | page 8, its top bit: dirty | frame 4 | life 4 | checksum 8 |
//! ```
//!
//! All numbers are little-endian. A record is written when the page is in its frame and before any
//! entry of the frame is; it says dirty before there is an entry for writing, until the content is saved;
//! it is cleared before the frame is used for anything else. The memory is mapped by nobody but the daemon.

use crate::ids::{HomeId, PAGE_SIZE};
use crate::volatile::VolatileBytesMut;

/// Bytes of a record.
pub(super) const RECORD_BYTES: usize = 32;
/// Records in one page.
pub(super) const RECORDS_PER_PAGE: u32 = (PAGE_SIZE / RECORD_BYTES) as u32;

const MAGIC: [u8; 8] = *b"copage.X";
/// Rises when header, records, or where frames begin change.
const LAYOUT: u32 = 2;
const HEADER_BYTES: usize = 32;
/// In the number of a page, none of which is so large.
const DIRTY: u64 = 1 << 63;

/// How a cache domain is laid out; in its first page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub mib: u32,
    pub grant_frames: u32,
    /// Of which frames: its place among the cache domains.
    pub number: u32,
}

impl Header {
    fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&LAYOUT.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.mib.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.grant_frames.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.number.to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    /// Writes it into a domain's memory.
    pub(super) fn write(self, memory: VolatileBytesMut<'_>) {
        memory.write_from(0, &self.encode());
    }

    /// Does the memory begin with just this?
    pub(super) fn is_in(self, memory: VolatileBytesMut<'_>) -> bool {
        let mut found = [0; HEADER_BYTES];
        memory.read_only().read_into(0, &mut found) == HEADER_BYTES && found == self.encode()
    }
}

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub home: HomeId,
    pub page: u64,
    /// The frame may have content that is on no disk.
    pub is_dirty: bool,
    /// The frame's number within its domain.
    pub frame: u32,
    /// Tells apart the homes of two daemons: when the daemon began, in ms since 1970, the lower bits.
    pub life: u32,
}

/// What a record's place holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The frame holds nothing.
    Nothing,
    Record(Record),
    /// Neither.
    Torn,
}

impl Found {
    /// The record, dirty or not.
    pub(super) fn is_of(self, record: Record) -> bool {
        let is_dirty = record.is_dirty;
        matches!(self, Self::Record(found) if Record { is_dirty, ..found } == record)
    }
}

impl Record {
    fn encode(self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..8].copy_from_slice(&self.home.0.to_le_bytes());
        let dirty = if self.is_dirty { DIRTY } else { 0 };
        bytes[8..16].copy_from_slice(&(self.page & !DIRTY | dirty).to_le_bytes());
        bytes[16..20].copy_from_slice(&self.frame.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.life.to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    fn decode(bytes: &[u8; RECORD_BYTES]) -> Found {
        if bytes.iter().all(|&byte| byte == 0) {
            return Found::Nothing;
        }
        let record = Self {
            home: HomeId(u64_at(bytes, 0)),
            page: u64_at(bytes, 8) & !DIRTY,
            is_dirty: u64_at(bytes, 8) & DIRTY != 0,
            frame: u64_at(bytes, 16) as u32,
            life: (u64_at(bytes, 16) >> 32) as u32,
        };
        if record.encode() == *bytes {
            Found::Record(record)
        } else {
            Found::Torn
        }
    }
}

/// The records of one cache domain.
#[derive(Clone, Copy)]
pub(super) struct Records<'a>(VolatileBytesMut<'a>);

impl<'a> Records<'a> {
    /// `memory` is the pages of records.
    pub(super) fn new(memory: VolatileBytesMut<'a>) -> Self {
        Self(memory)
    }

    fn offset(frame: u32) -> usize {
        frame as usize * RECORD_BYTES
    }

    /// Writes down what `record.frame` holds.
    pub(super) fn put(self, record: Record) {
        self.0
            .write_from(Self::offset(record.frame), &record.encode());
    }

    /// The frame holds nothing.
    pub(super) fn clear(self, frame: u32) {
        self.0.write_from(Self::offset(frame), &[0; RECORD_BYTES]);
    }

    /// What is written of a frame.
    pub(super) fn get(self, frame: u32) -> Found {
        let mut bytes = [0; RECORD_BYTES];
        let memory = self.0.read_only();
        if memory.read_into(Self::offset(frame), &mut bytes) < RECORD_BYTES {
            return Found::Torn;
        }
        match Record::decode(&bytes) {
            Found::Record(record) if record.frame != frame => Found::Torn,
            found => found,
        }
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Puts the checksum of all before it into the last eight bytes.
fn seal(bytes: &mut [u8; 32]) {
    let sum = checksum(&bytes[..24]);
    bytes[24..].copy_from_slice(&sum.to_le_bytes());
}

/// FNV-1a with 64 bits: against halves of a write and stray ones, not against anybody.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(memory: &mut [u8]) -> VolatileBytesMut<'_> {
        // SAFETY: the slice is readable and writable for its lifetime, and nobody else has it.
        unsafe { VolatileBytesMut::new(memory.as_mut_ptr(), memory.len()) }
    }

    fn record(frame: u32) -> Record {
        Record {
            home: HomeId(7),
            page: 1 << 33,
            is_dirty: frame % 2 == 1,
            frame,
            life: 0xfeed_f00d,
        }
    }

    #[test]
    fn a_record_reads_back_and_every_flipped_bit_is_seen() {
        let mut memory = vec![0; 4 * RECORD_BYTES];
        let records = Records::new(view(&mut memory));
        assert_eq!(records.get(2), Found::Nothing);
        records.put(record(3));
        assert_eq!(records.get(3), Found::Record(record(3)), "dirty");
        assert!(records.get(3).is_of(Record {
            is_dirty: false,
            ..record(3)
        }));
        records.clear(3);
        records.put(record(2));
        assert_eq!(records.get(2), Found::Record(record(2)));
        assert_eq!(
            (records.get(1), records.get(3)),
            (Found::Nothing, Found::Nothing)
        );
        for bit in 0..RECORD_BYTES * 8 {
            let at = 2 * RECORD_BYTES + bit / 8;
            memory[at] ^= 1 << (bit % 8);
            assert_eq!(
                Records::new(view(&mut memory)).get(2),
                Found::Torn,
                "bit {bit}"
            );
            memory[at] ^= 1 << (bit % 8);
        }
        Records::new(view(&mut memory)).clear(2);
        assert!(memory.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_record_of_another_frame_or_past_the_end_is_none() {
        let mut memory = vec![0; 2 * RECORD_BYTES];
        let records = Records::new(view(&mut memory));
        records.put(record(0));
        let (first, second) = memory.split_at_mut(RECORD_BYTES);
        second.copy_from_slice(first);
        let records = Records::new(view(&mut memory));
        assert_eq!(records.get(1), Found::Torn);
        assert_eq!(records.get(2), Found::Torn);
    }

    #[test]
    fn a_header_fits_itself_only() {
        let header = Header {
            mib: 64,
            grant_frames: 128,
            number: 1,
        };
        let mut memory = vec![0; PAGE_SIZE];
        assert!(!header.is_in(view(&mut memory)));
        header.write(view(&mut memory));
        assert!(header.is_in(view(&mut memory)));
        let other = Header { mib: 65, ..header };
        assert!(!other.is_in(view(&mut memory)));
    }
}
