//! The one trait between copage and a hypervisor, chosen at run time.
//!
//! The words follow Xen: a frame is granted by an entry that names one domain; the entry, not
//! anybody's word, says whether the frame is still mapped; what is mapped cannot be taken back
//! unless the backend can force it. `local` keeps to the same protocol with processes as guests.

use crate::error::GrantError;
use crate::ids::{DomId, FrameNo, Grant, HomeId, PageIndex, TableId, TrustClass};
use std::os::fd::OwnedFd;

/// What a backend can do, asked at run time. The daemon refuses what it cannot do safely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Guests map the very frame, not a copy of it.
    pub frames_shared: bool,
    /// No guest can write to a frame granted read-only. `false` where guests are only cooperative
    /// (local, guests under the daemon's own uid).
    pub read_only_enforced: bool,
    /// Programs can run straight off granted frames (stock Xen: no).
    pub executable_mappings: bool,
    /// The daemon can unmap a frame from a guest that does not answer (Xen: no).
    pub forced_revoke: bool,
    /// A frame nobody maps can be made writable for one guest in place.
    pub in_place_upgrade: bool,
    /// Guests get a descriptor that plain `mmap`, `read` and `execve` accept (local: yes).
    pub descriptors: bool,
}

/// May the grantee write?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// `GTF_permit_access | GTF_readonly`
    ReadOnly,
    /// `GTF_permit_access`
    ReadWrite,
}

/// Where a page of a home is that guests write, as far as that is a place: on local a descriptor covers a
/// whole file, so pages that are written lie in other files than those that are read. (xen: a frame is
/// always where it is, and these mean nothing.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Where {
    /// In the home: whoever has its descriptor reads it.
    Home,
    /// In the file that this session alone writes.
    Arena(DomId),
    /// In the file that all who have it write.
    Common,
    /// In a file of the daemon's own.
    Spare,
}

/// What a revocation found. Only `Revoked` ends a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Revocation {
    /// The entry is zero now and was not in use: the domain maps the frame no more.
    Revoked,
    /// The domain maps the frame, or may: the entry stays as it was.
    StillMapped,
    /// The domain holds no grant of this frame.
    NotGranted,
}

/// What ended with a domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DomainEnd {
    /// Entries revoked.
    pub revoked: u64,
    /// Frames whose entries still show a mapping: they go to quarantine.
    pub still_mapped: Vec<FrameNo>,
}

/// One live grant, for displays and the audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantInfo {
    /// The entry.
    pub grant: Grant,
    /// Who may map it.
    pub dom: DomId,
    /// What.
    pub frame: FrameNo,
    /// How.
    pub access: Access,
    /// The hypervisor shows it mapped (`GTF_reading` or `GTF_writing`), or it may be.
    pub mapped: bool,
}

/// What the audit of the ledger against the table found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LedgerAudit {
    /// Entries in use in the tables.
    pub entries: u64,
    /// Grants in the ledger.
    pub grants: u64,
    /// Entries of an earlier life of the daemon that are still in use: of frames that
    /// [`Backend::unusable_frames`] tells.
    pub left_over: u64,
    /// One line for each difference, at most a hundred; empty when ledger and tables are equal.
    pub differences: Vec<String>,
}

/// The frames there are. They come and go in *banks* of neighbours, the first of frame 0 (xen: a bank is
/// a cache domain).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FramesThere {
    /// Frames of one bank.
    pub bank_frames: u32,
    /// All that are there are below it.
    pub end: u32,
}

/// A grant table, for displays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableInfo {
    /// Its number; on Xen that of its bank too.
    pub table: TableId,
    /// Whose it is; `None` where guests use descriptors.
    pub granter: Option<DomId>,
    /// Entries that can ever be used.
    pub entries_max: u32,
    /// Entries that cannot be used now: granted, resting, or mapped since an earlier life.
    pub entries_used: u32,
}

/// What is wanted of a home.
#[derive(Clone, Debug)]
pub struct HomeSpec {
    /// For displays; not unique.
    pub label: String,
    /// Length of the file in bytes. Reading and mapping end here: the rest of the last page is
    /// zeros, and pages past it cannot be reached.
    pub bytes: u64,
    /// Whose guests get descriptors of it while it has holes.
    pub class: TrustClass,
}

/// What a backend answers that has no capability `descriptors`.
fn no_descriptors<T>(backend: &'static str) -> Result<T, GrantError> {
    let what = "a descriptor of a file";
    Err(GrantError::Unsupported { backend, what })
}

/// Frames, grant tables and mapping of one host.
///
/// Calls are short and never wait for a guest. All of them may be called from any thread. The
/// caller orders calls for one page (the cache holds the file's lock); for different pages there is
/// no order to keep.
pub trait Backend: Send + Sync {
    /// `local` or `xen`.
    fn name(&self) -> &'static str;

    /// What this backend can do on this machine.
    fn capabilities(&self) -> Capabilities;

    /// Sees to it that frames `0..frames` are there, in whole banks: what is missing is made, which can
    /// take seconds for each bank. On error what this call made is given back. Those that are there
    /// already stay, also beyond `frames`.
    fn make_frames(&self, frames: u32) -> Result<FramesThere, GrantError>;

    /// Gives a bank back whose frames hold nothing and are not used before they are made again. `true`: it
    /// is gone. `false`: not yet, an entry of its table is in use or rests. Can take seconds.
    fn end_bank(&self, bank: u32) -> Result<bool, GrantError>;

    /// The grant tables there are.
    fn tables(&self) -> Vec<TableInfo>;

    /// Opens a home for the pages of one generation of a file. It holds no frames yet.
    fn open_home(&self, spec: &HomeSpec) -> Result<HomeId, GrantError>;

    /// Ends a home. All its frames must have been discarded; a home that anybody still has open
    /// goes on existing, empty, for them.
    fn close_home(&self, home: HomeId) -> Result<(), GrantError>;

    /// A new descriptor of the home that reads, maps and executes and can be made to write by
    /// nobody. For capability `descriptors`; else [`GrantError::Unsupported`].
    fn home_descriptor(&self, _home: HomeId) -> Result<OwnedFd, GrantError> {
        no_descriptors(self.name())
    }

    /// Lets programs run from the home, all of whose pages are there, from now until
    /// [`Self::home_in_use`] says that it is not in use. While one runs, nothing can be taken out of
    /// the home: only for homes that stay whole as long as they are in use.
    fn make_runnable(&self, home: HomeId) -> Result<(), GrantError>;

    /// Does anybody but the daemon have the home open or mapped by a plain descriptor? The
    /// kernel's own answer. `true` where it cannot be told.
    fn home_in_use(&self, home: HomeId) -> Result<bool, GrantError>;

    /// Puts pages into frames: page `first + i` into `frames[i]`, from `data`, which is
    /// `frames.len()` whole pages with everything past the end of the file zeroed. Each page
    /// appears whole or not at all. On error none of `frames` holds a page (those that were put
    /// have been discarded again).
    fn store(
        &self,
        home: HomeId,
        first: PageIndex,
        frames: &[FrameNo],
        data: &[u8],
    ) -> Result<(), GrantError>;

    /// Reads back one page (`buf` is one page long).
    fn load(
        &self,
        home: HomeId,
        page: PageIndex,
        frame: FrameNo,
        buf: &mut [u8],
    ) -> Result<(), GrantError>;

    /// Empties frames: pages `first..first + frames.len()`. Every entry of every frame must have
    /// been revoked, else [`GrantError::StillGranted`] and nothing is discarded.
    fn discard(&self, home: HomeId, first: PageIndex, frames: &[FrameNo])
    -> Result<(), GrantError>;

    /// A new writable descriptor of the file for pages of the home that `dom` alone writes; as long as the
    /// home, page for page. Made, empty, at the first call. What else a guest does with it (it can write,
    /// truncate and fill all of it, up to a limit) it does to itself: of such a file nothing is believed but
    /// the bytes of pages that were placed there. For capability `descriptors`; else
    /// [`GrantError::Unsupported`].
    fn arena(&self, _home: HomeId, _dom: DomId) -> Result<OwnedFd, GrantError> {
        no_descriptors(self.name())
    }

    /// Ends `dom`'s arena, if there is one. No page may be in it, else [`GrantError::StillGranted`].
    fn end_arena(&self, _home: HomeId, _dom: DomId) -> Result<(), GrantError> {
        Ok(())
    }

    /// The same for pages that several write: whoever has it writes all of them. The number rises with each
    /// [`Self::renew_common`].
    fn common(&self, _home: HomeId) -> Result<(u32, OwnedFd), GrantError> {
        no_descriptors(self.name())
    }

    /// From now on there is another common file, of which those who had the one before have nothing. No page
    /// may be in it, else [`GrantError::StillGranted`].
    fn renew_common(&self, _home: HomeId) -> Result<(), GrantError> {
        Ok(())
    }

    /// Moves a page's bytes, and takes them out of the file where they were, from under whoever maps it.
    /// With `leave` they stay there too, in the frame that they were in, until that is discarded, and `frame`
    /// is another one, for the copy. Nothing may be at `to`. On error nothing has changed. (xen: does
    /// nothing; a copy is what [`Self::load`] gave, stored in another frame.)
    fn place(
        &self,
        _home: HomeId,
        _page: PageIndex,
        _frame: FrameNo,
        _from: Where,
        _to: Where,
        _leave: bool,
    ) -> Result<(), GrantError> {
        Ok(())
    }

    /// As [`Self::load`], of a frame that is at `at`; zeros past the end of the file, whatever a guest put
    /// there.
    fn load_at(
        &self,
        home: HomeId,
        page: PageIndex,
        frame: FrameNo,
        at: Where,
        buf: &mut [u8],
    ) -> Result<(), GrantError>;

    /// Writes into a page where it is: `bytes` at `offset` of it, which end within it. Those past the end of
    /// the file are zeros. (xen: a guest that had the frame for writing may have left others there.)
    fn write_at(
        &self,
        home: HomeId,
        page: PageIndex,
        frame: FrameNo,
        at: Where,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), GrantError>;

    /// The content of a frame that was granted for writing, or written, is on the disk: what a later life
    /// of the daemon finds says so, as long as no grant for writing is there. (local: nothing outlives the
    /// daemon.)
    fn note_saved(&self, home: HomeId, page: PageIndex, frame: FrameNo) -> Result<(), GrantError>;

    /// The file has another length: the home, and all files beside it. Pages from the first on that is not
    /// whole before or afterwards hold nothing, neither here nor there.
    fn resize_home(&self, home: HomeId, bytes: u64) -> Result<(), GrantError>;

    /// Backs `pages` (2 MiB, aligned, all stored) by one 2 MiB frame where the machine can.
    /// `Ok(false)`: not here, nothing changed.
    fn make_huge(&self, home: HomeId, first: PageIndex) -> Result<bool, GrantError>;

    /// From now on entries of the session `dom` name the domain `domid` of the hypervisor; said before
    /// its first grant. Several sessions may be of one domain. Refused while entries of `dom` are left
    /// that name another. (local: a session is all there is.)
    fn bind(&self, dom: DomId, domid: u16) -> Result<(), GrantError>;

    /// The domain that guests map entries of a table from; `None` where they use descriptors.
    fn granter(&self, table: TableId) -> Option<DomId>;

    /// How many of the first of `frames` have their entries in one table.
    fn in_one_table(&self, frames: &[FrameNo]) -> usize;

    /// Writes one entry for each frame that `dom` has no grant of yet and puts the entry of each
    /// frame in `out`, in order. All or nothing: on error no entry is new.
    fn grant(
        &self,
        dom: DomId,
        access: Access,
        frames: &[FrameNo],
        out: &mut Vec<Grant>,
    ) -> Result<(), GrantError>;

    /// Tries to revoke `dom`'s grants of `frames`; one answer for each, in order.
    fn revoke(&self, dom: DomId, frames: &[FrameNo], out: &mut Vec<Revocation>);

    /// Unmaps pages everywhere, in stopped processes too, revokes every grant of them and empties
    /// them: `revoke` from all, then `discard`. `evicted` is called for each (frame, domain) whose
    /// grant ended. For capability `forced_revoke`; else [`GrantError::Unsupported`].
    fn force_out(
        &self,
        home: HomeId,
        first: PageIndex,
        frames: &[FrameNo],
        evicted: &mut dyn FnMut(FrameNo, DomId),
    ) -> Result<(), GrantError>;

    /// The domains that hold a grant of `frame`, put in `out`.
    fn holders(&self, frame: FrameNo, out: &mut Vec<DomId>);

    /// How many grants of `frame` there are.
    fn holder_count(&self, frame: FrameNo) -> u32;

    /// How many grants `dom` holds.
    fn grant_count(&self, dom: DomId) -> u64;

    /// The frames of which `dom` holds grants, oldest grant first, at most `max`.
    fn oldest_grants(&self, dom: DomId, max: usize, out: &mut Vec<FrameNo>);

    /// Does the table show that `dom` maps `frame`, or may? `true` where only the guest could tell (local).
    fn is_mapped(&self, dom: DomId, frame: FrameNo) -> bool;

    /// local without force: the guest says that it unmapped `frames`; this stands for the
    /// hypervisor clearing `GTF_reading`. On Xen the hypervisor does it and this does nothing.
    fn note_unmapped(&self, dom: DomId, frames: &[FrameNo]);

    /// `dom` exists no more: its mappings are gone with it. Revokes all its entries.
    fn domain_ended(&self, dom: DomId) -> DomainEnd;

    /// Sets how many grants `dom` may hold; replaces an earlier limit.
    fn set_grants_max(&self, dom: DomId, grants_max: u64);

    /// Puts the frames in `out` that must not be used yet, because a domain has them mapped since an
    /// earlier life of the daemon: they are in quarantine from the start. Looks at the entries anew
    /// and frees those that are not in use any more. (local: none; the frames ended with the daemon.)
    fn unusable_frames(&self, out: &mut Vec<FrameNo>);

    /// The daemon stops for good: gives back what would outlive its process, as far as nobody has it
    /// mapped. The backend is not used afterwards. An error tells what must stay.
    fn stop(&self) -> Result<(), GrantError>;

    /// Calls `visit` for every live grant.
    fn each_grant(&self, visit: &mut dyn FnMut(GrantInfo));

    /// Compares ledger and tables, entry by entry.
    fn audit(&self) -> LedgerAudit;

    /// For a live home: the pages that hold something, as the backend itself sees it (local: the
    /// data of the frame file, and what was placed elsewhere), for the audit. Ranges `(first, count)`, in order.
    fn present_pages(&self, home: HomeId) -> Result<Vec<(PageIndex, u64)>, GrantError>;
}
