//! The set of cache domains: found again or made at the start, ended at the stop.

use super::config::{Layout, XenConfig};
use super::frames::{Bindings, CacheDomain, Spread};
use super::lib::{ForeignMemory, GrantTableMap};
use super::records::Found;
use super::toolstack::Toolstack;
use super::{XenBackend, XenError};
use crate::entry::EntryMemory;
use crate::error::GrantError;
use crate::ids::FrameNo;
use crate::limits::ENTRIES_RESERVED;
use crate::table::GrantTables;
use parking_lot::{Mutex, RwLock};
use rustix::fs::FlockOperation;
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{SystemTime, UNIX_EPOCH};

/// A cache domain and its table, as opened.
type Opened = (CacheDomain, GrantTableMap);

impl XenBackend {
    /// Finds the cache domains that an earlier life of the daemon left, or makes them: as many as hold
    /// `frames_max` frames. Takes seconds for each that is made. Domains beyond these are ended, if
    /// nobody maps anything of them.
    ///
    /// # Errors
    /// [`XenError::Missing`] where there is no Xen. [`GrantError::CacheDomain`] when the toolstack
    /// refuses (no memory, a limit: the text says which), or when domains that are laid out otherwise
    /// are in use.
    pub fn new(config: XenConfig) -> Result<Self, GrantError> {
        let layout = Layout::of(&config)?;
        let xen = ForeignMemory::open()?;
        let toolstack = Toolstack::new(&config)?;
        let lock = lock_run_dir(&config)?;
        let is_allowed = toolstack.allow_grant_frames(layout.grant_frames)?;
        let mut found = toolstack.find()?;
        let bindings = Arc::new(Bindings::new());
        let tables = GrantTables::new(Spread {
            layout,
            bindings: Arc::clone(&bindings),
        })
        .resting_ms(config.gref_rest_ms);
        let mut domains = Vec::new();
        let mut made = Vec::new();
        for number in 0..layout.domains(config.frames_max) {
            let opener = Opener {
                xen: &xen,
                toolstack: &toolstack,
                layout,
                number,
            };
            let opened = opener.open(found.remove(&number));
            if opened.is_err() {
                // Nobody has heard of the new ones, and the host may need their memory.
                for &(number, domid) in &made {
                    toolstack.destroy(number, domid)?;
                }
            }
            let (domain, table, is_new) = opened.map_err(|error| match error {
                GrantError::CacheDomain { name, why } if !is_allowed => GrantError::CacheDomain {
                    name,
                    why: format!(
                        "{why} (if it is for the grant table: add gnttab_max_frames={} to Xen's \
                         command line)",
                        layout.grant_frames
                    ),
                },
                error => error,
            })?;
            if is_new {
                made.push((number, domain.domid));
                tables.add_table(table)?;
            } else {
                let first = number * layout.frames;
                let frame_of = |gfn| layout.frame_of(gfn).map(|n| FrameNo(first + n));
                // Entries that are not in use end here, those of domains that died among them.
                tables.add_found_table(table, frame_of)?;
            }
            domains.push(domain);
        }
        let backend = Self {
            frames_max: config.frames_max,
            layout,
            bindings,
            domains,
            tables,
            homes: RwLock::new(HashMap::new()),
            next_home: AtomicU64::new(1),
            life: life_now(),
            left: Mutex::default(),
            toolstack,
            surplus: found.into_iter().collect(),
            _lock: lock,
        };
        backend.end_surplus(&xen)?;
        backend.clear_records()?;
        Ok(backend)
    }

    /// Frees entries of an earlier life that are not in use any more, and says in their frames' records
    /// that these hold nothing; gives the frames of the others, in order.
    pub(super) fn retry_left(&self) -> Vec<FrameNo> {
        let mut left = self.left.lock();
        if left.is_empty() {
            return Vec::new();
        }
        let mut still = Vec::new();
        self.tables.retry_left_over(&mut still);
        // With the lock: nobody stores into them before this is done.
        for frame in left.iter().filter(|f| still.binary_search(f).is_err()) {
            let (number, within) = Spread::locate(self.layout, *frame);
            let domain = self.domains.get(number as usize);
            if let Some(Ok(records)) = domain.map(CacheDomain::records) {
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
        for frame in (0..self.layout.frames * self.domains.len() as u32).map(FrameNo) {
            let (number, within) = Spread::locate(self.layout, frame);
            let Some(domain) = self.domains.get(number as usize) else {
                continue;
            };
            let records = domain.records()?;
            match (records.get(within), left.binary_search(&frame)) {
                (Found::Nothing, Err(_)) => {}
                (_, Err(_)) => records.clear(within),
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
        Ok(())
    }

    /// Ends domains that an earlier, larger budget needed.
    fn end_surplus(&self, xen: &ForeignMemory) -> Result<(), GrantError> {
        for &(number, domid) in &self.surplus {
            let name = self.toolstack.name(number);
            if is_in_use(&whole_table(xen, domid)?) {
                tracing::warn!(name, "a cache domain beyond the budget is in use and stays");
            } else {
                self.toolstack.destroy(number, domid)?;
            }
        }
        Ok(())
    }

    /// Frees all entries and ends the domains of which none is in use.
    pub(super) fn end_domains(&self) -> Result<(), GrantError> {
        let in_use = self.tables.abandon();
        let mut stay = Vec::new();
        for (number, domain) in self.domains.iter().enumerate() {
            if in_use.iter().any(|table| usize::from(table.0) == number) {
                stay.push(self.toolstack.name(domain.number));
            } else {
                self.toolstack.destroy(domain.number, domain.domid)?;
            }
        }
        if stay.is_empty() {
            return Ok(());
        }
        Err(GrantError::CacheDomain {
            name: stay.join(", "),
            why: "guests map pages of it: it stays, and the next start finds it".to_owned(),
        })
    }
}

struct Opener<'a> {
    xen: &'a ForeignMemory,
    toolstack: &'a Toolstack,
    layout: Layout,
    number: u32,
}

impl Opener<'_> {
    /// The domain, its table, and whether it is new.
    fn open(&self, found: Option<u16>) -> Result<(CacheDomain, GrantTableMap, bool), GrantError> {
        let new = |(domain, table)| (domain, table, true);
        let Some(domid) = found else {
            return self.make().map(new);
        };
        let found = self.map(domid);
        let as_wanted = |(domain, table): &Opened| {
            let header = self.layout.header(self.number);
            let wanted = domain.whole().is_ok_and(|memory| header.is_in(memory));
            // One that was being made when the daemon was killed has no header yet.
            wanted || !is_in_use(table)
        };
        match found {
            Ok(opened) if as_wanted(&opened) => {
                self.layout.header(self.number).write(opened.0.whole()?);
                Ok((opened.0, opened.1, false))
            }
            _ if !is_in_use(&whole_table(self.xen, domid)?) => {
                self.toolstack.destroy(self.number, domid)?;
                self.make().map(new)
            }
            found => Err(GrantError::CacheDomain {
                name: self.toolstack.name(self.number),
                why: match found {
                    Err(error) => format!("it is in use and cannot be used by us: {error}"),
                    Ok(_) => {
                        "it is in use, and was made with other sizes or by somebody else: start \
                              with the settings of before, or have its guests let go"
                            .to_owned()
                    }
                },
            }),
        }
    }

    fn make(&self) -> Result<Opened, GrantError> {
        let Layout {
            mib, grant_frames, ..
        } = self.layout;
        let domid = self.toolstack.create(self.number, mib, grant_frames)?;
        let (domain, table) = self.map(domid)?;
        self.layout.header(self.number).write(domain.whole()?);
        Ok((domain, table))
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

fn whole_table(xen: &ForeignMemory, domid: u16) -> Result<GrantTableMap, XenError> {
    xen.grant_table(domid, xen.grant_table_frames(domid)?)
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
