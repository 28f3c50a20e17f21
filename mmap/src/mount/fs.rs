//! The kernel's requests.

use super::core::{Core, parent_of, unknown_attr};
use super::limits::{BACKGROUND_MAX, DIR_BYTES};
use super::open::Form;
use super::table::ROOT;
use super::workers::{Change, Job, reply_xattr};
use crate::node::Entry;
use copage_coherence::msg::FileKind;
use crossbeam_channel::Sender;
use fuser::{
    BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

/// The extended attribute that shows a file's [`super::Form`]. It is not listed: to answer it, a file
/// may have to be pinned, which copying tools that read every listed attribute must not cause.
pub const FORM_XATTR: &str = "user.copage.form";

/// Node ids are never used again, so one generation does for all.
const GENERATION: Generation = Generation(0);

pub(super) struct ShareFs {
    pub(super) core: Arc<Core>,
    pub(super) jobs: Sender<Job>,
    pub(super) changes: Sender<Change>,
    /// Passthrough is wanted, and this process may have it.
    pub(super) want_passthrough: bool,
    /// The most that the kernel may read ahead.
    pub(super) readahead_bytes: Option<u32>,
}

impl Filesystem for ShareFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each by itself: an old kernel lacks some and the mount works without.
        for wanted in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_AUTO_INVAL_DATA,
        ] {
            let _ = config.add_capabilities(wanted);
        }
        let _ = config.set_max_background(BACKGROUND_MAX);
        if let Some(bytes) = self.readahead_bytes {
            // It may have a lower bound of its own.
            let _ = config.set_max_readahead(bytes);
        }
        // Frame files are on a file system that is stacked on none: depth 1 does.
        let passthrough = self.want_passthrough
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok();
        self.core.passthrough.store(passthrough, Ordering::Relaxed);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.core.ask(parent.0, |live, node| {
            let node = node.lookup(name.as_bytes())?;
            Ok(self
                .core
                .enter(parent.0, name.as_bytes(), live.number, node))
        });
        match found {
            Ok(attr) => reply.entry(&self.core.ttl(), &attr, GENERATION),
            // Programs look for their libraries under many names that are not there; the kernel
            // remembers those too.
            Err(errno) if errno.code() == libc::ENOENT => {
                let nothing = unknown_attr(0, FileKind::Regular);
                reply.entry(&self.core.ttl(), &nothing, GENERATION);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        // Dropped outside the lock.
        let _gone = self.core.table.lock().forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.core.attr(ino.0) {
            Ok(attr) => reply.attr(&self.core.ttl(), &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self.core.ask(ino.0, |_, node| node.readlink()) {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let write = flags.acc_mode() != fuser::OpenAccMode::O_RDONLY;
        if self.core.is_coherent() {
            return match self.core.open_direct(ino.0, write) {
                // Closing flushes nothing: what was written is where everybody reads it.
                Ok(handle) => reply.opened(
                    handle,
                    FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH,
                ),
                Err(errno) => reply.error(errno),
            };
        }
        // The mount is read-only, so the kernel lets none through; a remount might.
        if write {
            return reply.error(Errno::EROFS);
        }
        self.core.open(ino.0, reply, &self.jobs);
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        // The kernel asks for at most 1 MiB (max_pages, fuse_i.h).
        let mut buf = vec![0; size as usize];
        let read = match fh.0 {
            0 => self.core.read(ino.0, offset, &mut buf),
            _ => self.core.read_direct(fh, offset, &mut buf),
        };
        match read {
            Ok(got) => reply.data(&buf[..got]),
            Err(errno) => reply.error(errno),
        }
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        match fh.0 {
            0 => self.core.release(ino.0, &self.changes),
            _ => self.core.release_direct(fh),
        }
        reply.ok();
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let append = flags.0 & libc::O_APPEND != 0;
        // At most what the kernel gave, which is at most 1 MiB.
        match self.core.write_direct(fh, data, offset, append) {
            Ok(wrote) => reply.written(wrote as u32),
            Err(errno) => reply.error(errno),
        }
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        // Of files that nobody writes there is nothing to be put anywhere.
        match if fh.0 == 0 {
            Ok(())
        } else {
            self.core.sync_direct(fh)
        } {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        // Times change with the length by themselves; alone they cannot be set.
        let (Some(bytes), None, None, None) = (size, mode, uid, gid) else {
            return reply.error(Errno::EOPNOTSUPP);
        };
        let resized = self.core.resize_direct(ino.0, fh, bytes);
        match resized.and_then(|()| self.core.attr(ino.0)) {
            Ok(attr) => reply.attr(&self.core.ttl(), &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let mut cookie = offset;
        loop {
            let page = self.core.ask(ino.0, |live, node| {
                let page = node.readdir_page(cookie, DIR_BYTES, true)?;
                Ok((page, live.number))
            });
            let (page, session) = match page {
                Ok(page) => page,
                Err(errno) if cookie == offset => return reply.error(errno),
                // What is there is right; the next request meets the error.
                Err(_) => return reply.ok(),
            };
            let end = page.end || page.entries.is_empty();
            for entry in page.entries {
                cookie = entry.cookie;
                if self.add_entry(ino.0, session, entry, &mut reply) {
                    return reply.ok();
                }
            }
            if end {
                return reply.ok();
            }
        }
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.core.ask(ROOT, |_, node| node.statfs()) {
            Ok(statfs) => {
                let block = copage_grants::PAGE_SIZE as u32;
                let blocks = |bytes: u64| bytes / u64::from(block);
                let (all, free, available) = statfs.bytes;
                let (inodes, inodes_free) = statfs.inodes;
                reply.statfs(
                    blocks(all),
                    blocks(free),
                    blocks(available),
                    inodes,
                    inodes_free,
                    block,
                    statfs.name_bytes_max,
                    block,
                );
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if name == FORM_XATTR && self.core.is_coherent() {
            return reply_xattr(reply, size, Form::Direct.name().as_bytes());
        }
        if name == FORM_XATTR {
            let _ = self.jobs.send(Job::Form(ino.0, size, reply));
            return;
        }
        match self
            .core
            .ask(ino.0, |_, node| node.getxattr(name.as_bytes()))
        {
            Ok(value) => reply_xattr(reply, size, &value),
            Err(errno) => reply.error(errno),
        }
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.core.ask(ino.0, |_, node| node.listxattr()) {
            Ok(names) => {
                let list: Vec<u8> = names
                    .into_iter()
                    .flat_map(|name| name.into_iter().chain([0]))
                    .collect();
                reply_xattr(reply, size, &list);
            }
            Err(errno) => reply.error(errno),
        }
    }

    // Names cannot be changed: no message does it.

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn link(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _newparent: INodeNo,
        _newname: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }
}

impl ShareFs {
    /// Adds an entry of directory `dir`; `true`: it has no room any more.
    fn add_entry(
        &self,
        dir: u64,
        session: u64,
        entry: Entry,
        reply: &mut ReplyDirectoryPlus,
    ) -> bool {
        let name = OsStr::from_bytes(&entry.name);
        // The kernel takes no reference for these two.
        let dots = match entry.name.as_slice() {
            b"." => Some(dir),
            b".." => Some(parent_of(&self.core.table.lock(), dir)),
            _ => None,
        };
        if let Some(id) = dots {
            let attr = unknown_attr(id, entry.kind);
            return reply.add(
                attr.ino,
                entry.cookie,
                name,
                &Duration::ZERO,
                &attr,
                GENERATION,
            );
        }
        let (attr, ttl) = match entry.node {
            Some(node) => (
                self.core.enter(dir, &entry.name, session, node),
                self.core.ttl(),
            ),
            None => {
                let id = self.core.table.lock().enter_unknown(dir, &entry.name);
                (unknown_attr(id, entry.kind), Duration::ZERO)
            }
        };
        let full = reply.add(attr.ino, entry.cookie, name, &ttl, &attr, GENERATION);
        if full {
            let _gone = self.core.table.lock().forget(attr.ino.0, 1);
        }
        full
    }
}
