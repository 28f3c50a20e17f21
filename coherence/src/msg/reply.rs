//! What the daemon answers.

use super::{FileToken, Generation, Handle, PageRange};
use copage_grants::{Access, DomId, Epoch, Version};

/// What a daemon tells of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WelcomeFlags {
    /// The daemon can take pages back by force ([`copage_grants::Capabilities::forced_revoke`]).
    pub forced_revoke: bool,
    /// Frames cannot be written by this guest whatever it tries.
    pub read_only_enforced: bool,
    /// A `/dev/userfaultfd` descriptor is beside this message.
    pub userfaultfd: bool,
}

/// The kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// Anything else: shown, never opened.
    Other,
}

/// What `stat` shows. Times are (seconds, nanoseconds) since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Kind.
    pub kind: FileKind,
    /// Permission bits, 0o7777.
    pub perm: u16,
    /// Links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number on the host's file system.
    pub ino: u64,
    /// The host's device number.
    pub dev: u64,
    /// For device files.
    pub rdev: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// 512-byte blocks on the host's disk.
    pub blocks: u64,
    /// Last read.
    pub atime: (i64, u32),
    /// Last change of content.
    pub mtime: (i64, u32),
    /// Last change of anything.
    pub ctime: (i64, u32),
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Pass it to the next Readdir to go on behind this entry.
    pub cookie: u64,
    /// Kind.
    pub kind: FileKind,
    /// Number.
    pub ino: u64,
    /// Handle and attributes when they were asked for and could be had.
    pub node: Option<(Handle, Attr)>,
    /// One name; any bytes but `/` and NUL.
    pub name: &'a [u8],
}

/// What `statfs` shows: the budget as this guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatFs {
    /// The host's file system, in bytes: all, free, free for users.
    pub bytes: (u64, u64, u64),
    /// Its inodes: all, free.
    pub inodes: (u64, u64),
    /// Longest name in bytes.
    pub name_bytes_max: u32,
}

/// What came with an open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenedFlags {
    /// The home's descriptor is beside the message.
    pub descriptor: bool,
    /// All pages are there and stay until Close.
    pub pinned: bool,
    /// The daemon has no kernel lease on the host's file: changes are noticed at open and on
    /// notification only.
    pub host_bounded: bool,
    /// It is of a `coherent` export: its pages change one by one, not by generations.
    pub coherent: bool,
}

/// What a page is mapped from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GrantedPlace {
    /// The home, or what the references name.
    Home,
    /// The session's own file for pages that it writes ([`super::Request::Arena`]).
    Arena,
    /// The file of pages that several write; a guest that has another serial of it asks for it again.
    Common {
        /// Which of them.
        serial: u32,
    },
}

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    /// To Hello.
    Welcome {
        /// The domid given to the guest.
        dom: DomId,
        /// The session's epoch; every later message of the guest carries it.
        epoch: Epoch,
        /// The session lease, in ms; renew at a third.
        lease_ttl_ms: u32,
        /// The longest an invalidate may take, in ms.
        invalidate_deadline_ms: u32,
        /// Handles the session may hold.
        handles_max: u32,
        /// Open files the session may have.
        files_max: u32,
        /// Flags.
        flags: WelcomeFlags,
        /// The name by which the daemon knows the guest.
        name: &'a [u8],
    },
    /// To Exports: names, each ended by NUL.
    Exports {
        /// The list.
        names: &'a [u8],
    },
    /// To Attach.
    Attached {
        /// The export's root directory.
        root: Handle,
        /// Its attributes.
        attr: Attr,
        /// The mode: 0 ro, 1 coherent, 2 cow, 3 shm.
        mode: u8,
    },
    /// To Lookup.
    Entry {
        /// The node.
        node: Handle,
        /// Its attributes.
        attr: Attr,
    },
    /// To Getattr.
    Attr {
        /// The attributes.
        attr: Attr,
    },
    /// To Readlink, Getxattr, Listxattr, Read.
    Bytes {
        /// The bytes.
        data: &'a [u8],
    },
    /// To Readdir: read with [`super::DirReader`].
    Dir {
        /// Nothing comes behind these.
        end: bool,
        /// Encoded entries.
        entries: &'a [u8],
    },
    /// To Open.
    Opened {
        /// Names the open file from now on.
        file: FileToken,
        /// The newest generation.
        generation: Generation,
        /// Its version.
        version: Version,
        /// Its length in bytes.
        bytes: u64,
        /// Flags.
        flags: OpenedFlags,
    },
    /// To Fault: the pages may be used.
    Granted {
        /// Of which generation.
        generation: Generation,
        /// Which: begins at or before the page asked for and holds at least that one.
        range: PageRange,
        /// Xen: the domid of the cache domain; local: 0.
        granter: DomId,
        /// Xen: one grant reference for each page, each four bytes; local: empty.
        refs: &'a [u8],
        /// How they may be mapped. Writing: they may be read too.
        access: Access,
        /// What from.
        place: GrantedPlace,
        /// The version of the first of them; 0 where all pages of a generation have one, which Opened said.
        version: Version,
    },
    /// To Fault: the file has a newer content. The new home's descriptor is beside the message.
    Stale {
        /// The newest generation.
        generation: Generation,
        /// Its version.
        version: Version,
        /// Its length in bytes.
        bytes: u64,
    },
    /// To Statfs.
    StatFs(StatFs),
    /// To Renew.
    Renewed {
        /// The lease from the moment the daemon got the request, in ms.
        lease_ttl_ms: u32,
    },
    /// To Write.
    Wrote {
        /// How many bytes, from the first on: fewer than asked when the rest failed.
        count: u32,
        /// The file's length now, in bytes.
        bytes: u64,
    },
    /// To Arena: the descriptor is beside the message.
    Arena {
        /// See [`GrantedPlace::Common`]; 0 of a session's own.
        serial: u32,
    },
    /// To Close, Truncate, Sync.
    Done,
    /// To anything.
    Error {
        /// The errno.
        errno: i32,
        /// What was wrong and what to do, UTF-8, at most 512 bytes.
        text: &'a [u8],
    },
}
