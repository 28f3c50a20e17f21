//! Memory that others may write while we read it: a view without references into it.
//!
//! A `&[u8]` promises the compiler that nobody writes; of granted memory nobody can promise that.
//! Every access here is a volatile copy, and what was copied is what is checked and used.

use std::marker::PhantomData;
use std::ops::{Bound, RangeBounds};
use std::sync::atomic::{AtomicU64, Ordering};

/// A readable view of `len` bytes that others may write at any time.
#[derive(Clone, Copy)]
pub struct VolatileBytes<'a> {
    start: *const u8,
    len: usize,
    memory: PhantomData<&'a ()>,
}

// SAFETY: the view only reads, by volatile accesses that are each whole for one byte or one aligned
// word; that another thread reads or writes the same memory at the same time is what it is for.
unsafe impl Send for VolatileBytes<'_> {}
// SAFETY: as for Send; the view has no state besides.
unsafe impl Sync for VolatileBytes<'_> {}

impl<'a> VolatileBytes<'a> {
    /// A view of `len` bytes from `start`.
    ///
    /// # Safety
    /// The range must be mapped for reading for all of `'a` (a fault in it may end the process, as
    /// the mapping's owner documents it), must not wrap around, and no Rust reference may claim any
    /// of it exclusively meanwhile.
    pub const unsafe fn new(start: *const u8, len: usize) -> Self {
        Self {
            start,
            len,
            memory: PhantomData,
        }
    }

    /// Bytes in the view.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// No bytes.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the view begins, for system calls and displays.
    pub const fn as_ptr(&self) -> *const u8 {
        self.start
    }

    /// Part of the view; `None` when the range is not within it.
    pub fn range(&self, range: impl RangeBounds<usize>) -> Option<Self> {
        let from = match range.start_bound() {
            Bound::Included(&from) => from,
            Bound::Excluded(&before) => before.checked_add(1)?,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&last) => last.checked_add(1)?,
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.len,
        };
        let len = end.checked_sub(from)?;
        (end <= self.len).then(|| Self {
            start: self.start.wrapping_add(from),
            len,
            memory: PhantomData,
        })
    }

    /// Copies the bytes from `offset` into `out`; gives how many there were (fewer than `out` has
    /// room for only at the view's end). Whole where nobody writes; else each aligned word of eight
    /// bytes is.
    pub fn read_into(&self, offset: usize, out: &mut [u8]) -> usize {
        let count = out.len().min(self.len.saturating_sub(offset));
        let out = &mut out[..count];
        let from = self.start.wrapping_add(offset);
        let head = from.align_offset(8).min(count);
        let (bytes, rest) = out.split_at_mut(head);
        read_bytes(from, bytes);
        let mut at = from.wrapping_add(head);
        let mut words = rest.chunks_exact_mut(8);
        for word in &mut words {
            // SAFETY: `at` is within the view (the chunk is within `count`) and was aligned to 8
            // above; the view's maker answers for its being readable.
            let value = unsafe { at.cast::<u64>().read_volatile() };
            word.copy_from_slice(&value.to_ne_bytes());
            at = at.wrapping_add(8);
        }
        read_bytes(at, words.into_remainder());
        count
    }

    /// The byte at `offset`; `None` past the end.
    pub fn read_u8(&self, offset: usize) -> Option<u8> {
        let view = self.range(offset..offset.checked_add(1)?)?;
        // SAFETY: within the view, whose maker answers for its being readable.
        Some(unsafe { view.start.read_volatile() })
    }

    /// Four bytes at `offset` as a little-endian number; `None` when they are not all in the view.
    /// One access when the address is aligned.
    pub fn read_u32(&self, offset: usize) -> Option<u32> {
        let view = self.range(offset..offset.checked_add(4)?)?;
        if view.start.align_offset(4) == 0 {
            // SAFETY: four bytes within the view, aligned; its maker answers for its being readable.
            return Some(u32::from_le(unsafe {
                view.start.cast::<u32>().read_volatile()
            }));
        }
        let mut bytes = [0; 4];
        view.read_into(0, &mut bytes);
        Some(u32::from_le_bytes(bytes))
    }

    /// Eight bytes at `offset` as a little-endian number; `None` when they are not all in the view.
    /// One access when the address is aligned.
    pub fn read_u64(&self, offset: usize) -> Option<u64> {
        let view = self.range(offset..offset.checked_add(8)?)?;
        if view.start.align_offset(8) == 0 {
            // SAFETY: eight bytes within the view, aligned; its maker answers for its being
            // readable.
            return Some(u64::from_le(unsafe {
                view.start.cast::<u64>().read_volatile()
            }));
        }
        let mut bytes = [0; 8];
        view.read_into(0, &mut bytes);
        Some(u64::from_le_bytes(bytes))
    }

    /// A copy of all of it.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read_into(0, &mut bytes);
        bytes
    }
}

/// A readable and writable view of `len` bytes that others may read and write at any time.
#[derive(Clone, Copy)]
pub struct VolatileBytesMut<'a> {
    start: *mut u8,
    len: usize,
    memory: PhantomData<&'a ()>,
}

// SAFETY: all accesses are volatile and each whole for one byte or one aligned word; that others
// read and write the same memory at the same time is what the view is for.
unsafe impl Send for VolatileBytesMut<'_> {}
// SAFETY: as for Send; the view has no state besides.
unsafe impl Sync for VolatileBytesMut<'_> {}

impl<'a> VolatileBytesMut<'a> {
    /// A view of `len` bytes from `start`.
    ///
    /// # Safety
    /// The range must be mapped for reading and writing for all of `'a`, must not wrap around, and
    /// no Rust reference may point into it meanwhile.
    pub const unsafe fn new(start: *mut u8, len: usize) -> Self {
        Self {
            start,
            len,
            memory: PhantomData,
        }
    }

    /// The same memory, for reading.
    pub const fn read_only(&self) -> VolatileBytes<'a> {
        VolatileBytes {
            start: self.start.cast_const(),
            len: self.len,
            memory: PhantomData,
        }
    }

    /// Bytes in the view.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// No bytes.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the view begins, for system calls and displays.
    pub const fn as_mut_ptr(&self) -> *mut u8 {
        self.start
    }

    /// Part of the view; `None` when the range is not within it.
    pub fn range(&self, range: impl RangeBounds<usize>) -> Option<Self> {
        let part = self.read_only().range(range)?;
        Some(Self {
            start: part.start.cast_mut(),
            len: part.len,
            memory: PhantomData,
        })
    }

    /// Copies `bytes` to `offset`; gives how many there was room for. Each aligned word of eight
    /// bytes appears whole.
    pub fn write_from(&self, offset: usize, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.len.saturating_sub(offset));
        let bytes = &bytes[..count];
        let to = self.start.wrapping_add(offset);
        let head = to.align_offset(8).min(count);
        let (first, rest) = bytes.split_at(head);
        write_bytes(to, first);
        let mut at = to.wrapping_add(head);
        let mut words = rest.chunks_exact(8);
        for word in &mut words {
            let mut value = [0; 8];
            value.copy_from_slice(word);
            // SAFETY: `at` is within the view (the chunk is within `count`) and was aligned to 8
            // above; the view's maker answers for its being writable.
            unsafe { at.cast::<u64>().write_volatile(u64::from_ne_bytes(value)) };
            at = at.wrapping_add(8);
        }
        write_bytes(at, words.remainder());
        count
    }

    /// Writes the byte at `offset`. `false`: it is past the end.
    #[must_use]
    pub fn write_u8(&self, offset: usize, value: u8) -> bool {
        self.write_from(offset, &[value]) == 1
    }

    /// Writes four bytes at `offset` as a little-endian number, in one access when the address is
    /// aligned. `false`: they are not all in the view, and nothing was written.
    #[must_use]
    pub fn write_u32(&self, offset: usize, value: u32) -> bool {
        let Some(view) = offset
            .checked_add(4)
            .and_then(|end| self.range(offset..end))
        else {
            return false;
        };
        if view.start.align_offset(4) == 0 {
            // SAFETY: four bytes within the view, aligned; its maker answers for its being
            // writable.
            unsafe { view.start.cast::<u32>().write_volatile(value.to_le()) };
            return true;
        }
        view.write_from(0, &value.to_le_bytes()) == 4
    }

    /// Writes eight bytes at `offset` as a little-endian number, in one access when the address is
    /// aligned. `false`: they are not all in the view, and nothing was written.
    #[must_use]
    pub fn write_u64(&self, offset: usize, value: u64) -> bool {
        let Some(view) = offset
            .checked_add(8)
            .and_then(|end| self.range(offset..end))
        else {
            return false;
        };
        view.write_from(0, &value.to_le_bytes()) == 8
    }

    /// Puts `new` in the place of `old` at `offset`, little-endian numbers of eight bytes, in one step that nobody
    /// who does the same comes between. Gives what was there: `old` when it was done. `None`: these are not
    /// eight aligned bytes of the view.
    pub fn swap_if_u64(&self, offset: usize, old: u64, new: u64) -> Option<u64> {
        let view = self.range(offset..offset.checked_add(8)?)?;
        if view.start.align_offset(8) != 0 {
            return None;
        }
        // SAFETY: eight bytes within the view, aligned; its maker answers for their being readable and
        // writable, and what others write there at the same time is what the view is for.
        let word = unsafe { AtomicU64::from_ptr(view.start.cast()) };
        let done =
            word.compare_exchange(old.to_le(), new.to_le(), Ordering::SeqCst, Ordering::SeqCst);
        Some(u64::from_le(done.unwrap_or_else(|found| found)))
    }
}

impl std::fmt::Debug for VolatileBytesMut<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VolatileBytesMut({:p}, {} bytes)", self.start, self.len)
    }
}

/// Copies `bytes` to `to`, where the caller has checked that they are within its view.
fn write_bytes(to: *mut u8, bytes: &[u8]) {
    for (at, &byte) in bytes.iter().enumerate() {
        // SAFETY: within the view, as the caller has checked; its maker answers for its being
        // writable.
        unsafe { to.wrapping_add(at).write_volatile(byte) };
    }
}

/// Copies `out.len()` bytes from `from`, which the caller has checked to be within its view.
fn read_bytes(from: *const u8, out: &mut [u8]) {
    for (at, byte) in out.iter_mut().enumerate() {
        // SAFETY: within the view, as the caller has checked; its maker answers for its being
        // readable.
        *byte = unsafe { from.wrapping_add(at).read_volatile() };
    }
}

impl std::fmt::Debug for VolatileBytes<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VolatileBytes({:p}, {} bytes)", self.start, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(bytes: &[u8]) -> VolatileBytes<'_> {
        // SAFETY: the slice is readable for its lifetime and nobody writes to it here.
        unsafe { VolatileBytes::new(bytes.as_ptr(), bytes.len()) }
    }

    #[test]
    fn every_offset_and_length_is_copied_right() {
        let bytes: Vec<u8> = (0..64).collect();
        for from in 0..bytes.len() {
            for len in 0..=bytes.len() - from {
                let mut out = vec![0xff; len];
                assert_eq!(view(&bytes).read_into(from, &mut out), len);
                assert_eq!(out, bytes[from..from + len]);
            }
        }
    }

    #[test]
    fn nothing_past_the_end_is_read() {
        let bytes: Vec<u8> = (1..=9).collect();
        let view = view(&bytes);
        let mut out = [0; 4];
        assert_eq!(view.read_into(7, &mut out), 2);
        assert_eq!(view.read_into(usize::MAX, &mut out), 0);
        assert_eq!(view.read_u8(8), Some(9));
        assert_eq!(view.read_u8(9), None);
        assert_eq!(view.read_u32(5), Some(0x0908_0706));
        assert_eq!(view.read_u32(6), None);
        assert_eq!(view.read_u64(1), Some(0x0908_0706_0504_0302));
        assert_eq!(view.read_u64(usize::MAX), None);
        assert!(view.range(3..10).is_none());
        assert_eq!(
            view.range(3..).map(|part| part.to_vec()),
            Some(bytes[3..].to_vec())
        );
        assert_eq!(view.range(..=1).map(|part| part.len()), Some(2));
        assert!(view.range(9..).is_some_and(|part| part.is_empty()));
    }

    #[test]
    fn what_is_written_is_read_back_and_nothing_beside_it() {
        let mut memory = [0u64; 8];
        // SAFETY: the array is readable and writable while the view is used, and nobody else uses
        // it meanwhile.
        let view = unsafe { VolatileBytesMut::new(memory.as_mut_ptr().cast(), 64) };
        let bytes: Vec<u8> = (1..=64).collect();
        for from in 0..64 {
            for len in 0..=64 - from {
                assert_eq!(view.write_from(0, &[0; 64]), 64);
                assert_eq!(view.write_from(from, &bytes[..len]), len);
                let all = view.read_only().to_vec();
                assert_eq!(all[from..from + len], bytes[..len]);
                assert!(all[..from].iter().all(|&b| b == 0));
                assert!(all[from + len..].iter().all(|&b| b == 0));
            }
        }
        assert_eq!(view.write_from(60, &bytes), 4);
        assert_eq!(view.write_from(usize::MAX, &bytes), 0);
        assert!(view.write_u32(60, 7) && !view.write_u32(61, 7));
        assert!(!view.write_u32(usize::MAX, 7) && !view.write_u64(57, 7));
        assert!(view.write_u64(3, 0x0102_0304_0506_0708) && view.write_u32(1, 9));
        assert_eq!(view.read_only().read_u64(3), Some(0x0102_0304_0506_0000));
        assert!(view.range(3..65).is_none() && view.range(63..).is_some());
    }

    #[test]
    fn a_word_is_swapped_by_who_knows_it() {
        let mut memory = [5u64, 0];
        // SAFETY: the array is readable and writable while the view is used, and only the threads below use
        // it meanwhile, through the view.
        let view = unsafe { VolatileBytesMut::new(memory.as_mut_ptr().cast(), 16) };
        assert_eq!(view.swap_if_u64(0, 4, 7), Some(5));
        assert_eq!(view.swap_if_u64(0, 5, 7), Some(5));
        assert_eq!(view.read_only().read_u64(0), Some(7));
        for at in [1, 4, 9, 16, usize::MAX] {
            assert_eq!(view.swap_if_u64(at, 0, 1), None);
        }
        let add = || {
            for _ in 0..1000 {
                let mut last = 0;
                while let Some(found) = view.swap_if_u64(8, last, last + 1)
                    && found != last
                {
                    last = found;
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(add);
            scope.spawn(add);
        });
        assert_eq!(view.read_only().read_u64(8), Some(2000));
    }
}
