//! Mappings: a range of a file as plain memory.

use crate::client::Client;
use crate::error::{MmapError, Result};
use crate::file::File;
use crate::limits::HUGE_BYTES;
use crate::mapped::{Form, Mapped, fresh};
use crate::pager::worker::Job;
use copage_coherence::msg::{Generation, OpenHow};
use copage_grants::volatile::{VolatileBytes, VolatileBytesMut};
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64};
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Whose stores a mapping shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MapKind {
    /// The file's pages as everybody sees them; see [`MapOptions::writable`].
    #[default]
    Shared,
    /// Readable and writable; a page that is stored to becomes a copy of this mapping's own, and
    /// stays as it is whatever happens to the file.
    Private,
}

/// What to map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapOptions {
    /// From where, in bytes: a multiple of the page size.
    pub offset: u64,
    /// How much, in bytes; `None`: up to the end of the file as it is now.
    pub len: Option<u64>,
    /// Whose stores it shows.
    pub kind: MapKind,
    /// Stores to a `Shared` mapping go to the file, and everybody sees them: of files that were opened with
    /// [`crate::Node::open_for_writing`]. A `Private` mapping is writable anyway.
    pub writable: bool,
}

impl MapOptions {
    /// The whole file, shared.
    pub fn shared() -> Self {
        Self::default()
    }

    /// The whole file, with stores of one's own.
    pub fn private() -> Self {
        Self {
            kind: MapKind::Private,
            ..Self::default()
        }
    }

    /// The whole file, shared, with stores that everybody sees.
    pub fn written() -> Self {
        Self {
            writable: true,
            ..Self::default()
        }
    }

    /// `len` bytes from `offset`, which is a multiple of the page size.
    #[must_use]
    pub fn range(self, offset: u64, len: u64) -> Self {
        Self {
            offset,
            len: Some(len),
            ..self
        }
    }
}

/// Why an access to a mapping was SIGBUS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageError {
    /// The page, in bytes from the start of the mapping; `None`: the whole mapping.
    pub offset: Option<usize>,
    /// What was wrong; its [`MmapError::errno`] is the errno.
    pub error: MmapError,
}

/// A range of a file in memory.
///
/// The memory is at [`Mapping::as_ptr`] for [`Mapping::len`] bytes as long as this lives, also as
/// the file changes: then pages of the new content take the place of the old ones.
///
/// An access is **SIGBUS**
/// - behind the page that holds the file's last byte (as POSIX has it), also when the file has
///   shrunk; bytes behind the end in the last page are zero;
/// - on a page that the daemon refused (an I/O error, a limit): [`Mapping::last_error`] says why,
///   [`Mapping::populate`] of the page tries again;
/// - anywhere, when the client is lost, in pages stored to privately too;
/// - anywhere, when the file was not found again with a daemon that was started again
///   ([`MmapError::Stale`]), in pages stored to privately too;
/// - anywhere, when the machine would not let a change of the file be mapped (more than
///   vm.max_map_count parts): [`Mapping::last_error`].
///
/// Never wrong bytes. A page that is being taken back or replaced makes the access wait, and so does one
/// that is not there while the daemon is away.
///
/// With [`crate::UserfaultMode::UserModeOnly`] a system call that reads or writes a page which is
/// not there fails with EFAULT: [`Mapping::populate`] (or [`Mapping::populate_write`]) first, and
/// again when it still does, as pages can be taken back at any time.
///
/// The range is not there in a forked child (an access is SIGSEGV). Do not mprotect, mremap, munmap
/// or madvise it: the library relies on it being as it made it.
///
/// `Drop` unmaps: no pointer into it may be used then.
pub struct Mapping {
    pub(crate) client: Client,
    pub(crate) mapped: Arc<Mapped>,
    pub(crate) len: usize,
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("addr", &self.as_ptr())
            .field("len", &self.len)
            .field("kind", &self.kind())
            .finish_non_exhaustive()
    }
}

/// Checks a range; its length in bytes and in whole pages' bytes.
fn check_range(options: &MapOptions, file_bytes: u64) -> Result<(usize, usize)> {
    let invalid = |text: String| Err(MmapError::Invalid(text));
    let offset = options.offset;
    if !offset.is_multiple_of(PAGE_SIZE_U64) {
        return invalid(format!("offset {offset} is not a multiple of {PAGE_SIZE}"));
    }
    let Some(len) = options.len.or_else(|| file_bytes.checked_sub(offset)) else {
        return invalid(format!(
            "offset {offset} is past the end of the file, {file_bytes}"
        ));
    };
    if len == 0 {
        return invalid("nothing to map: the range is empty".into());
    }
    // loff_t is signed; the last page must be addressable too.
    let end = offset
        .checked_add(len)
        .filter(|&end| end <= i64::MAX as u64 - PAGE_SIZE_U64);
    let too_long =
        || MmapError::Invalid(format!("{len} bytes from {offset} are no range of a file"));
    if end.is_none() {
        return Err(too_long());
    }
    let bytes = usize::try_from(len).map_err(|_| too_long())?;
    let whole = bytes
        .checked_next_multiple_of(PAGE_SIZE)
        .ok_or_else(too_long)?;
    Ok((bytes, whole))
}

impl Mapping {
    pub(crate) fn new(file: &File, options: &MapOptions) -> Result<Self> {
        let client = file.client().clone();
        let shared = client.shared();
        shared.line.check_process()?;
        if let Some(why) = shared.line.lost() {
            return Err(MmapError::Lost(why));
        }
        let inner = file.inner();
        if inner.how() != OpenHow::Map {
            return Err(MmapError::Access(
                "the file was not opened with OpenHow::Map".into(),
            ));
        }
        let form = Form::new(options.kind, options.writable);
        if form == Form::Write && !inner.writes() {
            return Err(MmapError::Access(
                "the file was not opened for writing: a shared mapping of it cannot be writable"
                    .into(),
            ));
        }
        let uffd = shared.uffd()?;
        if inner.granted() {
            shared.granted()?;
        }
        if form.is_armed() && !uffd.can_protect() {
            return Err(MmapError::NoUserfaultfd(
                "this kernel cannot write-protect mapped files (before 5.19): no writable mappings"
                    .into(),
            ));
        }
        // Waits while the daemon is away: from here on the content is of its session, or one more on its
        // way will be.
        shared.in_session(|session| inner.token(session))?;
        loop {
            let content = inner.content.lock().clone();
            let (len, bytes) = check_range(options, content.bytes)?;
            let align = if bytes >= HUGE_BYTES {
                HUGE_BYTES
            } else {
                PAGE_SIZE
            };
            let region = fresh(uffd, &content, options.offset, bytes, form, align)?;
            let stamp = content.stamp;
            let mapped = Arc::new(Mapped::new(
                Arc::clone(inner),
                form,
                options.offset / PAGE_SIZE_U64,
                &content,
                region,
            ));
            // Entered while the content is held still: a rebase that comes later finds it.
            let now = inner.content.lock();
            if now.stamp != stamp {
                drop(now);
                mapped.unmap(shared);
                continue;
            }
            let entered = shared.space.lock().insert(&mapped);
            drop(now);
            if !entered {
                mapped.unmap(shared);
                return Err(shared.line.lost_error());
            }
            return Ok(Self {
                client,
                mapped,
                len,
            });
        }
    }

    /// The client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Counts a page as stored to although it is not.
    #[cfg(test)]
    pub(crate) fn mark_private_for_tests(&self, page: usize) {
        self.mapped
            .make_private(self.client.shared(), page, page + 1)
            .unwrap();
    }

    /// The first byte. Reading is allowed for [`Mapping::len`] bytes as [`Mapping`] says, storing
    /// for a mapping that [`Mapping::is_writable`] only (else SIGSEGV). Never make a reference from it: other processes
    /// change the bytes, and a reference promises that nobody does. Use volatile or atomic
    /// accesses, or hand it to system calls.
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.mapped.addr())
    }

    /// The bytes, to be copied out. An access to a page that is refused ends the process, as it does
    /// with every mapping of a file ([`Mapping`] says when).
    pub fn as_volatile(&self) -> VolatileBytes<'_> {
        // SAFETY: the range is mapped for reading until this mapping is dropped, which the borrow
        // does not let happen; accesses that are SIGBUS are documented; no reference into it is made
        // anywhere in this crate, and `as_ptr` tells others not to.
        unsafe { VolatileBytes::new(self.as_ptr(), self.len) }
    }

    /// The bytes of a mapping that may be stored to; `None` of others.
    pub fn as_volatile_mut(&self) -> Option<VolatileBytesMut<'_>> {
        if !self.is_writable() {
            return None;
        }
        // SAFETY: as in `as_volatile`; such a mapping is writable for all its length.
        Some(unsafe { VolatileBytesMut::new(self.as_ptr(), self.len) })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty range cannot be mapped.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Whose stores it shows.
    pub fn kind(&self) -> MapKind {
        self.mapped.form().kind()
    }

    /// May it be stored to? `Private` ones always.
    pub fn is_writable(&self) -> bool {
        self.mapped.form() != Form::Read
    }

    /// The content that it shows now, as the present daemon counts them.
    pub fn generation(&self) -> Generation {
        self.mapped.stamp().generation()
    }

    /// Pages that were stored to privately.
    pub fn private_pages(&self) -> u64 {
        match self.client.shared().line.check_process() {
            Ok(()) => self.mapped.private_pages(),
            Err(_) => 0,
        }
    }

    /// Why the last access that was SIGBUS was, if one was that the library had a say in.
    pub fn last_error(&self) -> Option<PageError> {
        self.client.shared().line.check_process().ok()?;
        self.mapped.last_error()
    }

    /// Brings the pages of `range` (bytes of the mapping) and maps them, so that the accesses that
    /// follow do not fault, if the budget lets them stay. Tries pages again that were refused.
    pub fn populate(&self, range: Range<usize>) -> Result<()> {
        self.bring(range, false)
    }

    /// Like [`Mapping::populate`], and makes each page ready for stores (of a `Private` mapping: a copy): for
    /// system calls that store to the mapping where userfaultfd is of user mode only.
    pub fn populate_write(&self, range: Range<usize>) -> Result<()> {
        if !self.is_writable() {
            return Err(MmapError::Access("the mapping is read-only".into()));
        }
        self.bring(range, true)
    }

    /// Takes the pages of `range` out of this process's page tables; they fault again by
    /// themselves. Pages stored to privately stay. For tests and benches.
    pub fn unmap_pages(&self, range: Range<usize>) -> Result<()> {
        let shared = self.client.shared();
        shared.line.check_process()?;
        if range.start > range.end || range.end > self.len {
            return Err(MmapError::Invalid("not a range of the mapping".into()));
        }
        let end = range.end.div_ceil(PAGE_SIZE);
        self.mapped
            .discard(shared, range.start / PAGE_SIZE, end)
            .map_err(|e: io::Error| MmapError::sys("madvise(MADV_DONTNEED)", &e))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let shared = self.client.shared();
        if shared.line.check_process().is_err() {
            // Not mapped in a child, and what is there now may be something else.
            self.mapped.abandon();
            return;
        }
        if self.mapped.is_counted() {
            // Unmapped before it leaves the table: what is asked back is looked for there, and must
            // not be acked while it is mapped.
            if self.mapped.try_unmap(shared) {
                shared.space.lock().remove(&self.mapped);
            } else {
                let _ = shared.jobs.send(Job::Unmap(Arc::clone(&self.mapped)));
            }
            return;
        }
        shared.space.lock().remove(&self.mapped);
        if !self.mapped.try_unmap(shared) {
            // Somebody is replacing its pages: the worker unmaps it when that is done.
            let _ = shared.jobs.send(Job::Unmap(Arc::clone(&self.mapped)));
        }
    }
}
