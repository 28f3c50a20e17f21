//! Calls on one file of pages.

use super::frames::sys;
use crate::error::GrantError;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// Reads all of `buf`; past the end of the file come zeros.
pub(super) fn read(file: &OwnedFd, from: u64, buf: &mut [u8]) -> Result<(), GrantError> {
    let mut have = 0;
    while have < buf.len() {
        let at = from + have as u64;
        let rest = &mut buf[have..];
        match rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut *rest, at)) {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(n) => have += n,
            Err(errno) => return Err(sys("pread of a frame")(errno)),
        }
    }
    Ok(())
}

/// Writes all of `data`.
pub(super) fn write(file: &OwnedFd, from: u64, data: &[u8]) -> Result<(), GrantError> {
    let mut at = from;
    let mut rest = data;
    while !rest.is_empty() {
        match rustix::io::retry_on_intr(|| rustix::io::pwrite(file, rest, at)) {
            Ok(0) => return Err(sys("pwrite of a frame")(Errno::IO)),
            Ok(written) => {
                rest = &rest[written..];
                at += written as u64;
            }
            Err(errno) => return Err(sys("pwrite of a frame")(errno)),
        }
    }
    Ok(())
}

/// Takes the bytes out: they are unmapped everywhere.
pub(super) fn punch(file: &OwnedFd, from: u64, end: u64) -> Result<(), GrantError> {
    if from == end {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, flags, from, end - from))
        .map_err(sys("fallocate(punch) of a frame file"))
}

/// The first byte from `from` on that is in a page; `None`: nothing comes behind it.
pub(super) fn next_data(file: &OwnedFd, from: u64) -> Result<Option<u64>, GrantError> {
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(sys("lseek(SEEK_DATA)")(errno)),
    }
}

/// The first byte from `from` on that is in no page: the end of the file, if no other.
pub(super) fn next_hole(file: &OwnedFd, from: u64) -> Result<u64, GrantError> {
    match rustix::fs::seek(file, SeekFrom::Hole(from)) {
        // At the end already (an empty file).
        Err(Errno::NXIO) => Ok(from),
        hole => hole.map_err(sys("lseek(SEEK_HOLE)")),
    }
}
