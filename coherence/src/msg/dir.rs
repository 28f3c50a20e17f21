//! The entries of a Dir reply: packed one behind the other, each its fixed part, then handle and
//! attributes when it has them, then its name.

use super::codec::{DecodeError, EncodeError};
use super::reply::DirEntry;
use super::wire::{WAttr, WDirEntry, WEntry, file_kind, file_kind_code, take, zero};
use super::{DATA_BYTES_MAX, NAME_BYTES_MAX};
use zerocopy::IntoBytes;

/// Packs entries up to a size.
#[derive(Debug)]
pub struct DirWriter {
    entries: Vec<u8>,
    bytes_max: usize,
}

impl DirWriter {
    /// A writer of at most `bytes_max` bytes; more than [`DATA_BYTES_MAX`] counts as that.
    pub const fn new(bytes_max: u32) -> Self {
        let bytes_max = if bytes_max > DATA_BYTES_MAX {
            DATA_BYTES_MAX
        } else {
            bytes_max
        };
        Self {
            entries: Vec::new(),
            bytes_max: bytes_max as usize,
        }
    }

    /// Bytes that an entry takes: what [`Self::push`] will ask for.
    pub const fn entry_bytes(name_bytes: usize, with_node: bool) -> usize {
        let node = if with_node { size_of::<WEntry>() } else { 0 };
        size_of::<WDirEntry>() + node + name_bytes
    }

    /// Adds an entry; `false` when it does not fit any more (nothing is added then).
    pub fn push(&mut self, entry: &DirEntry<'_>) -> Result<bool, EncodeError> {
        let name_bytes = match u16::try_from(entry.name.len()) {
            Ok(n) if (1..=NAME_BYTES_MAX).contains(&entry.name.len()) => n,
            _ => return Err(EncodeError::Value("entry name")),
        };
        if !self.has_room(entry.name.len(), entry.node.is_some()) {
            return Ok(false);
        }
        let node = match &entry.node {
            Some((handle, attr)) => Some(WEntry {
                node: (*handle).into(),
                attr: WAttr::new(attr)?,
            }),
            None => None,
        };
        let fixed = WDirEntry {
            cookie: entry.cookie.into(),
            ino: entry.ino.into(),
            kind: file_kind_code(entry.kind),
            has_node: u8::from(node.is_some()),
            name_bytes: name_bytes.into(),
            reserved: 0.into(),
        };
        self.entries.extend_from_slice(fixed.as_bytes());
        if let Some(node) = node {
            self.entries.extend_from_slice(node.as_bytes());
        }
        self.entries.extend_from_slice(entry.name);
        Ok(true)
    }

    /// Would an entry with a name of that length fit?
    pub fn has_room(&self, name_bytes: usize, with_node: bool) -> bool {
        self.entries.len() + Self::entry_bytes(name_bytes, with_node) <= self.bytes_max
    }

    /// Nothing was added.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The packed entries, for [`super::Reply::Dir`].
    pub fn finish(self) -> Vec<u8> {
        self.entries
    }
}

/// Reads packed entries. After the first error there is nothing more.
#[derive(Clone, Debug)]
pub struct DirReader<'a> {
    rest: &'a [u8],
}

impl<'a> DirReader<'a> {
    /// Reads the `entries` of a [`super::Reply::Dir`].
    pub const fn new(entries: &'a [u8]) -> Self {
        Self { rest: entries }
    }

    fn entry(&mut self) -> Result<DirEntry<'a>, DecodeError> {
        let (fixed, mut rest): (&WDirEntry, _) = take(self.rest)?;
        zero(fixed.reserved.get().into())?;
        let node = match fixed.has_node {
            0 => None,
            1 => {
                let (node, behind): (&WEntry, _) = take(rest)?;
                rest = behind;
                Some((node.node.into(), node.attr.get()?))
            }
            _ => return Err(DecodeError::Value("entry flags")),
        };
        let name_bytes = usize::from(fixed.name_bytes.get());
        if !(1..=NAME_BYTES_MAX).contains(&name_bytes) {
            return Err(DecodeError::Value("entry name"));
        }
        let Some((name, rest)) = rest.split_at_checked(name_bytes) else {
            return Err(DecodeError::TooShort {
                bytes: rest.len(),
                needed: name_bytes,
            });
        };
        if name.iter().any(|&b| b == b'/' || b == 0) {
            return Err(DecodeError::Value("entry name"));
        }
        self.rest = rest;
        Ok(DirEntry {
            cookie: fixed.cookie.get(),
            kind: file_kind(fixed.kind)?,
            ino: fixed.ino.get(),
            node,
            name,
        })
    }
}

impl<'a> Iterator for DirReader<'a> {
    type Item = Result<DirEntry<'a>, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let entry = self.entry();
        if entry.is_err() {
            self.rest = &[];
        }
        Some(entry)
    }
}
