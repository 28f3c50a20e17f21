//! What a guest asks.

use super::{FileToken, Generation, Handle, PageRange};
use copage_grants::Access;

/// What a guest tells of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HelloFlags {
    /// Send a `/dev/userfaultfd` descriptor if you have one: I may not make a full userfaultfd.
    pub wants_userfaultfd: bool,
}

/// What an open is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenHow {
    /// To map with a fault handler; pages come by Fault. The reply carries the home's descriptor.
    Map,
    /// To map or run without a fault handler (the mount, exec): answered when every page is there
    /// and pinned. The reply carries the home's descriptor.
    Pin,
    /// To read by Read messages only; no descriptor.
    Read,
}

/// Why pages are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultHint {
    /// Exactly these; nothing is known of the next.
    Random,
    /// The guest goes on behind them.
    Sequential,
    /// Asked for ahead of use.
    Populate,
}

/// A request. All but `Forget`, `Ack`, `Unmapped` and `Bye` are answered by one reply with the same
/// request number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Begins a session. Reply: Welcome.
    Hello {
        /// The guest's [`super::PROTOCOL_VERSION`].
        version: u16,
        /// Flags.
        flags: HelloFlags,
        /// The name by which access lists know the guest; empty: whatever its credentials say.
        name: &'a [u8],
        /// Its uuid on Xen; zero on local.
        uuid: [u8; 16],
    },
    /// The exports this guest may use. Reply: Exports.
    Exports,
    /// Uses an export. Reply: Attached.
    Attach {
        /// Its name.
        export: &'a [u8],
    },
    /// One name in a directory. Reply: Entry; it counts as one reference to the handle.
    Lookup {
        /// The directory.
        parent: Handle,
        /// One name: no `/`, no NUL, not `.` or `..`.
        name: &'a [u8],
    },
    /// Reply: Attr.
    Getattr {
        /// Of what.
        node: Handle,
    },
    /// Reply: Bytes.
    Readlink {
        /// A symbolic link.
        node: Handle,
    },
    /// Reply: Dir; each entry (but `.` and `..`) with a handle that counts as one reference when
    /// `handles` is set.
    Readdir {
        /// The directory.
        node: Handle,
        /// 0, or the cookie of the last entry that was received.
        cookie: u64,
        /// At most this many bytes of entries.
        bytes_max: u32,
        /// Look up every entry too.
        handles: bool,
    },
    /// Reply: Bytes.
    Getxattr {
        /// Of what.
        node: Handle,
        /// The attribute.
        name: &'a [u8],
    },
    /// Reply: Bytes: names, each ended by NUL.
    Listxattr {
        /// Of what.
        node: Handle,
    },
    /// Gives back references to a handle. No reply.
    Forget {
        /// Which.
        node: Handle,
        /// How many.
        count: u64,
    },
    /// Opens a regular file. Reply: Opened.
    Open {
        /// Which.
        node: Handle,
        /// What for.
        how: OpenHow,
        /// To write too: of a `coherent` export only, and never to pin.
        write: bool,
    },
    /// Ends an open: its grants and pins. Reply: Done.
    Close {
        /// Which.
        file: FileToken,
    },
    /// Wants pages. Reply: Granted, or Stale when the generation is not the file's newest.
    Fault {
        /// Of what.
        file: FileToken,
        /// The generation that the guest maps.
        generation: Generation,
        /// Which pages; `count` at most [`super::FAULT_PAGES_MAX`].
        range: PageRange,
        /// Why.
        hint: FaultHint,
        /// How. Writing: of a file that is open for it.
        access: Access,
    },
    /// Copies bytes. Reply: Bytes; fewer than asked only at the end of the file.
    Read {
        /// From what.
        file: FileToken,
        /// From where, in bytes.
        offset: u64,
        /// At most [`super::DATA_BYTES_MAX`].
        len: u32,
    },
    /// Stores bytes in a file that is open for writing, beyond its end too. Reply: Wrote, when no crash of the
    /// daemon can undo it any more.
    Write {
        /// In what.
        file: FileToken,
        /// Where, in bytes.
        offset: u64,
        /// 1 to [`super::DATA_BYTES_MAX`] bytes.
        data: &'a [u8],
    },
    /// Gives a file that is open for writing another length. Reply: Done, when nobody can use what was cut off.
    Truncate {
        /// Which.
        file: FileToken,
        /// Its length from then on, in bytes.
        bytes: u64,
    },
    /// Wants everything that anybody has stored in the file by now on the disk. Reply: Done.
    Sync {
        /// Which.
        file: FileToken,
    },
    /// Wants the file that pages for writing are mapped from, where guests use descriptors. Reply: Arena.
    Arena {
        /// Of which file, open for writing.
        file: FileToken,
        /// The one of several writers, not the session's own.
        common: bool,
    },
    /// The guest did what a notice asked. No reply.
    Ack {
        /// The notice's number.
        recall: u64,
    },
    /// The guest has unmapped pages (local: stands for what Xen sees by itself). No reply.
    Unmapped {
        /// Of what.
        file: FileToken,
        /// Of which generation.
        generation: Generation,
        /// Which pages.
        range: PageRange,
    },
    /// Renews the session lease. Reply: Renewed.
    Renew,
    /// Sizes and quotas. Reply: StatFs.
    Statfs {
        /// Any node of the export.
        node: Handle,
    },
    /// Ends the session. No reply; the channel closes.
    Bye,
}
