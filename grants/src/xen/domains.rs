//! Cache domains: found again at the start; how one is opened or made.

use super::XenBackend;
use super::config::{Layout, XenConfig};
use super::frames::{Bindings, CacheDomain, Domains, Spread};
use super::lib::{ForeignMemory, GrantTableMap};
use super::records::Found;
use super::toolstack::Toolstack;
use crate::entry::EntryMemory;
use crate::error::GrantError;
use crate::ids::FrameNo;
use crate::limits::{CACHE_DOMAINS_MAX, ENTRIES_RESERVED};
use crate::table::GrantTables;
use parking_lot::{Mutex, RwLock};
use rustix::fs::FlockOperation;
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{SystemTime, UNIX_EPOCH};

/// A cache domain and its table, as opened.
pub(super) type Opened = (CacheDomain, GrantTableMap);

impl XenBackend {
    /// Finds the cache domains that an earlier life of the daemon left, or makes them: as many as hold
    /// `frames_max` frames. Takes seconds for each that is made. Domains beyond these are ended, unless
    /// somebody maps something of them: those are kept until they can be ([`crate::Backend::end_bank`]).
    ///
    /// # Errors
    /// [`crate::XenError::Missing`] where there is no Xen. [`GrantError::CacheDomain`] when the toolstack
    /// refuses (no memory, a limit: the text says which), or when domains that are laid out otherwise
    /// are in use.
    pub fn new(config: XenConfig) -> Result<Self, GrantError> {
        let layout = Layout::of(&config)?;
        let xen = ForeignMemory::open()?;
        let toolstack = Toolstack::new(&config)?;
        let lock = lock_run_dir(&config)?;
        toolstack.wait_for_earlier()?;
        let tables_allowed = toolstack.allow_grant_frames(layout.grant_frames)?;
        let bindings = Arc::new(Bindings::new());
        let tables = GrantTables::new(Spread {
            layout,
            bindings: Arc::clone(&bindings),
        })
        .resting_ms(config.gref_rest_ms);
        let backend = Self {
            layout,
            bindings,
            domains: RwLock::new(Domains::new(layout)),
            tables,
            homes: RwLock::new(HashMap::new()),
            next_home: AtomicU64::new(1),
            life: life_now(),
            left: Mutex::default(),
            xen,
            toolstack,
            tables_allowed,
            resize: Mutex::default(),
            is_stopping: AtomicBool::new(false),
            _lock: lock,
        };
        let wanted = layout.domains(config.frames_max)?;
        backend.find_domains(wanted)?;
        // Nobody has heard of those that are made here, should one of them fail.
        backend.make_domains(config.frames_max)?;
        backend.clear_records()?;
        Ok(backend)
    }

    /// Takes up the domains of an earlier life: those below `wanted`, and of the others those in use.
    fn find_domains(&self, wanted: u32) -> Result<(), GrantError> {
        let mut domains = self.domains.write();
        let found = self.toolstack.find()?;
        let (ours, strange): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|(n, _)| *n < CACHE_DOMAINS_MAX);
        for (number, domid) in strange {
            tracing::warn!(
                domid,
                number,
                "a domain is called as a cache domain that cannot be"
            );
        }
        let mut next = 0;
        for (number, domid) in ours {
            let opener = self.opener(number);
            let Some((domain, table)) = opener.find(domid, number < wanted)? else {
                continue;
            };
            while next < number {
                self.tables.add_hole(self.layout.entries())?;
                next += 1;
            }
            let first = number * self.layout.frames;
            let frame_of = |gfn| self.layout.frame_of(gfn).map(|n| FrameNo(first + n));
            // Entries that are not in use end here, those of domains that died among them.
            self.tables.add_found_table(table, frame_of)?;
            domains.put(domain);
            next = number + 1;
        }
        Ok(())
    }

    pub(super) fn opener(&self, number: u32) -> Opener<'_> {
        Opener {
            xen: &self.xen,
            toolstack: &self.toolstack,
            layout: self.layout,
            tables_allowed: self.tables_allowed,
            number,
        }
    }

    /// Frees entries of an earlier life that are not in use any more, and says in their frames' records
    /// that these hold nothing; gives the frames of the others, in order.
    pub(super) fn retry_left(&self, domains: &Domains) -> Vec<FrameNo> {
        let mut left = self.left.lock();
        if left.is_empty() {
            return Vec::new();
        }
        let mut still = Vec::new();
        self.tables.retry_left_over(&mut still);
        // With the lock: nobody stores into them before this is done.
        for frame in left.iter().filter(|f| still.binary_search(f).is_err()) {
            if let Ok((domain, within)) = domains.of(*frame)
                && let Ok(records) = domain.records()
            {
                records.clear(within);
            }
        }
        left.clone_from(&still);
        still
    }

    /// Frames that nobody has mapped hold nothing; records of the others are kept.
    fn clear_records(&self) -> Result<(), GrantError> {
        let mut left = Vec::new();
        self.tables.retry_left_over(&mut left);
        self.left.lock().clone_from(&left);
        let domains = self.domains.read();
        let mut lost = 0_u32;
        for frame in domains.there().flat_map(CacheDomain::frames) {
            let (domain, within) = domains.of(frame)?;
            let records = domain.records()?;
            match (records.get(within), left.binary_search(&frame)) {
                (Found::Nothing, Err(_)) => {}
                (found, Err(_)) => {
                    lost += u32::from(matches!(found, Found::Record(record) if record.is_dirty));
                    records.clear(within);
                }
                (Found::Record(record), Ok(_)) => {
                    tracing::info!(?record, "a frame is mapped since an earlier life");
                }
                (found, Ok(_)) => {
                    tracing::warn!(
                        frame = frame.0,
                        ?found,
                        "a frame is mapped, of what is not known"
                    );
                }
            }
        }
        if lost > 0 {
            tracing::warn!(
                frames = lost,
                "what guests stored there and did not sync ended with the daemon"
            );
        }
        Ok(())
    }
}

/// What it takes to have the cache domain with a number.
pub(super) struct Opener<'a> {
    xen: &'a ForeignMemory,
    toolstack: &'a Toolstack,
    layout: Layout,
    tables_allowed: bool,
    number: u32,
}

impl Opener<'_> {
    /// A domain that an earlier life left, if it can be used, and with `is_wanted` or in use at that. One
    /// that is not in use is ended else.
    fn find(&self, domid: u16, is_wanted: bool) -> Result<Option<Opened>, GrantError> {
        let found = self.map(domid);
        if let Ok((domain, table)) = &found {
            let header = self.layout.header(self.number);
            let memory = domain.whole()?;
            // One that was being made when the daemon was killed has no header yet.
            let is_usable = header.is_in(memory) || !is_in_use(table);
            if is_usable && (is_wanted || is_in_use(table)) {
                header.write(memory);
                return found.map(Some);
            }
        }
        if self.end_unused(domid)? {
            return Ok(None);
        }
        let name = self.toolstack.name(self.number);
        let why = match found {
            Err(error) => format!("it is in use and cannot be used by us: {error}"),
            Ok(_) => "it is in use, and was made with other sizes or by somebody else: start \
                      with the settings of before, or have its guests let go"
                .to_owned(),
        };
        if is_wanted {
            return Err(GrantError::CacheDomain { name, why });
        }
        tracing::warn!(name, why, "a cache domain beyond the budget stays");
        Ok(None)
    }

    /// Ends a domain of whose entries none is in use; `false`: it stays.
    pub(super) fn end_unused(&self, domid: u16) -> Result<bool, GrantError> {
        let table = self.xen.grant_table_frames(domid);
        let table = table.and_then(|frames| self.xen.grant_table(domid, frames))?;
        if is_in_use(&table) {
            return Ok(false);
        }
        self.toolstack.destroy(self.number, domid)?;
        Ok(true)
    }

    /// A new domain.
    pub(super) fn make(&self) -> Result<Opened, GrantError> {
        let Layout {
            mib, grant_frames, ..
        } = self.layout;
        let made = self.toolstack.create(self.number, mib, grant_frames);
        let domid = made.map_err(|error| self.explained(error))?;
        let opened = self.map(domid).and_then(|(domain, table)| {
            self.layout.header(self.number).write(domain.whole()?);
            Ok((domain, table))
        });
        if opened.is_err() {
            // The error is told; that it cannot be ended either would add nothing.
            let _ = self.toolstack.destroy(self.number, domid);
        }
        opened
    }

    fn explained(&self, error: GrantError) -> GrantError {
        match error {
            GrantError::CacheDomain { name, why } if !self.tables_allowed => {
                GrantError::CacheDomain {
                    name,
                    why: format!(
                        "{why} (if it is for the grant table: add gnttab_max_frames={} to Xen's \
                         command line)",
                        self.layout.grant_frames
                    ),
                }
            }
            error => error,
        }
    }

    /// Maps memory and table; an error when either is not as large as it should be.
    fn map(&self, domid: u16) -> Result<Opened, GrantError> {
        let frames = self.xen.grant_table_frames(domid)?;
        if frames != self.layout.grant_frames {
            return Err(GrantError::CacheDomain {
                name: self.toolstack.name(self.number),
                why: format!(
                    "its grant table has {frames} frames, not {}",
                    self.layout.grant_frames
                ),
            });
        }
        let table = self.xen.grant_table(domid, frames)?;
        let gfns: Vec<u64> = self.layout.gfns().collect();
        let memory = self.xen.map(domid, &gfns)?;
        let domain = CacheDomain {
            number: self.number,
            domid,
            layout: self.layout,
            memory,
        };
        Ok((domain, table))
    }
}

/// Does the hypervisor show any of our entries mapped?
fn is_in_use(table: &GrantTableMap) -> bool {
    let ours = table.entries().iter().skip(ENTRIES_RESERVED as usize);
    ours.map(|entry| entry.state())
        .any(|state| state.is_mapped())
}

/// One daemon at a time.
fn lock_run_dir(config: &XenConfig) -> Result<File, GrantError> {
    let path = config.run_dir.join(format!("{}.lock", config.name_prefix));
    let lock = File::create(&path).map_err(|source| GrantError::Sys {
        call: "making the lock of the cache domains",
        source,
    })?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|errno| {
        GrantError::CacheDomain {
            name: config.name_prefix.clone(),
            why: format!("another daemon has them ({}: {errno})", path.display()),
        }
    })?;
    Ok(lock)
}

/// For telling lives apart, not for time: the lower bits of the ms since 1970.
fn life_now() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_millis() as u32)
}
