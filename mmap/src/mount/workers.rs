//! The mount's own threads: those that open files, and the one that looks for changes.

use super::core::Core;
use super::limits::CHANGES_PAUSE;
use super::open::{Form, Opens, too_large};
use super::table::same_content;
use copage_coherence::msg::{FileKind, OpenHow};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use fuser::{Errno, ReplyOpen, ReplyXattr};
use std::sync::atomic::Ordering;

/// Work for the openers.
pub(super) enum Job {
    /// The first open of a node id.
    Open(u64, ReplyOpen),
    /// Another open, where something may have changed.
    Again(u64, ReplyOpen),
    /// Which form would it be?
    Form(u64, u32, ReplyXattr),
}

/// News for the watcher.
pub(super) enum Change {
    /// The kernel must ask for this node id's attributes anew. Also wakes the watcher, which sleeps while
    /// no file is open in page-cache form.
    Attributes(u64),
    /// A file on frames lingers.
    Lingers,
}

/// Until all senders of jobs are gone.
pub(super) fn opener(core: &Core, jobs: &Receiver<Job>, changes: &Sender<Change>) {
    while let Ok(job) = jobs.recv() {
        match job {
            Job::Open(id, reply) => core.open_first(id, reply, changes),
            Job::Again(id, reply) => core.open_again(id, reply, changes),
            Job::Form(id, size, reply) => match core.form(id) {
                Ok(form) => reply_xattr(reply, size, form.name().as_bytes()),
                Err(errno) => reply.error(errno),
            },
        }
    }
}

/// Tells the kernel of files whose attributes it must ask for anew, until all senders are gone; and,
/// while files are open in page-cache form, of those that the host has changed: the daemon says nothing
/// of its own accord about a file that is only read. Unpins what has lingered.
pub(super) fn watch_changes(core: &Core, changes: &Receiver<Change>) {
    loop {
        let looks = core.page_cache_opens.load(Ordering::Relaxed) > 0;
        let message = if looks || core.lingers() {
            changes.recv_timeout(CHANGES_PAUSE)
        } else {
            changes.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        match message {
            Ok(Change::Attributes(id)) => core.invalidate(id, false),
            Ok(Change::Lingers) => {}
            Err(RecvTimeoutError::Timeout) if looks => core.look_for_changes(),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        core.end_lingering(false);
    }
}

/// Answers one getxattr or listxattr.
pub(super) fn reply_xattr(reply: ReplyXattr, size: u32, data: &[u8]) {
    match u32::try_from(data.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(data),
        _ => reply.error(Errno::ERANGE),
    }
}

impl Core {
    /// Compares the files that are open in page-cache form with the host's.
    fn look_for_changes(&self) {
        let open: Vec<u64> = {
            let table = self.table.lock();
            let read = |opens: &Opens| opens.file().is_some_and(|f| f.form() == Form::PageCache);
            table
                .iter()
                .filter(|(_, entry)| read(&entry.open))
                .map(|(id, _)| id)
                .collect()
        };
        for id in open {
            // An error is met by whoever reads.
            let Ok(attr) = self.ask(id, |_, node| node.attr()) else {
                continue;
            };
            let changed = {
                let mut table = self.table.lock();
                table.get_mut(id).is_some_and(|entry| {
                    let old = entry.attr.replace(attr);
                    old.is_none_or(|old| !same_content(&old, &attr))
                })
            };
            if changed {
                self.invalidate(id, true);
            }
        }
    }

    /// The form that `id` is open in, or would be.
    fn form(&self, id: u64) -> Result<Form, Errno> {
        {
            let table = self.table.lock();
            if let Some(file) = table.get(id).and_then(|e| e.open.file()) {
                return Ok(file.form());
            }
        }
        let passthrough = self.passthrough();
        self.ask(id, |_, node| {
            if node.kind() != FileKind::Regular {
                return Ok(None);
            }
            if !passthrough {
                return Ok(Some(Form::PageCache));
            }
            match node.open(OpenHow::Pin) {
                Ok(_) => Ok(Some(Form::Frames)),
                Err(e) if too_large(&e) => Ok(Some(Form::PageCache)),
                Err(e) => Err(e),
            }
        })?
        .ok_or(Errno::ENODATA)
    }
}
