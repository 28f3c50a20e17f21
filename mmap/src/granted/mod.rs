//! Mappings of granted frames: how a file is mapped where the daemon has no descriptor to give.
//!
//! A mapping is a range of anonymous memory, registered with userfaultfd (MISSING) before anybody sees
//! it. Nothing is ever put into it: over it lie *windows*, batches of grants mapped whole
//! ([`window::Window`]), or pages that are SIGBUS. Private mappings hold copies instead
//! ([`private`]).
//!
//! # Why a reader never sees zeros, a gap, or another page
//!
//! *Zeros.* The only memory that could give zeros is the anonymous range, and every part of it is
//! registered from before it is in place: a first mapping is entered after UFFDIO_REGISTER, and what
//! is put back over a window is a scratch range that was registered where nobody knew it. mremap(2)
//! keeps the registration (UFFD_FEATURE_EVENT_REMAP). A touch there waits for the pager.
//!
//! *A gap coming.* The kernel unmaps what lies below MAP_FIXED before it asks the device to map, and
//! when the device refuses (one bad entry of a batch is enough) the range stays unmapped: a reader
//! would get SIGSEGV, and another thread's mmap(2) could land there. So a batch is mapped elsewhere
//! first, where failing harms nobody. In a PVH or HVM guest that mapping is then moved over the
//! range, one step for every other thread. In a PV guest it must not be moved (the hypervisor
//! remembers where the page table entries lie): the same entries are mapped a second time with
//! MAP_FIXED *while the first mapping stands*, since an entry in use can be mapped again by the same
//! domain whatever becomes of it. mmap(2) holds the address space's lock until the pages are in, so
//! a reader that comes between waits for it. Where the process never had so much mapped, a second trial
//! shows first that the hypervisor can track it. What can fail then is memory for the kernel itself, or
//! the hypervisor's tracking just filled by another process: the pages are SIGBUS from then on
//! ([`crate::sys::Region::refuse_unmapped`]) until they are populated.
//!
//! *A gap going.* A window is taken back by moving armed scratch over it, again one step. Only then is
//! it forgotten (UNMAP_GRANT_REF), so that its entries are out of use, and only then does the daemon
//! hear Unmapped and Ack. Windows are taken back whole, also for an Invalidate of a part of one:
//! gntdev cannot unmap a part. A reader that still wants the page faults and asks.
//!
//! *Another page.* A reference is a number, and the daemon may use it again for another page once this
//! session said Unmapped or Ack of the first. An answer can cross such a word. So all requests for
//! pages and all such words of a session leave by one thread, the pager, which remembers the
//! requests that are not mapped yet and *spoils* those that a word covers before it sends it. The
//! worker maps a batch where nobody sees it; from then on its entries are in use and stay what they
//! are; then it looks whether the batch was spoiled, whether the session's lease still runs by its
//! own clock, and whether the mapping still shows that generation, and only then is the batch shown.
//! Spoiled batches are asked for again. Generations and pages are compared without the file, since
//! two opens may be of one file.
//!
//! # When a batch cannot be mapped
//!
//! The range stays armed and the waiters wait. The pages are asked for again; the second time the
//! oldest windows are given back first, because gntdev reports a full maptrack as EINVAL, like a bad
//! entry, and then each page that somebody waits for is asked for by itself. If that fails too, the
//! page is SIGBUS and [`crate::Mapping::last_error`] says why.
//!
//! # What is left to the program
//!
//! A fork in the instant between a device mapping and its MADV_DONTFORK gives the child a mapping that
//! it does not know of (PVH only; Linux never copies PV ones). It keeps entries in use until the child
//! execs or ends: the daemon looks at the table, not at the ack.

pub(crate) mod device;
mod private;
mod range;
#[cfg(test)]
pub(crate) mod standin;
pub(crate) mod window;

pub(crate) use range::{Cover, MapOutcome, Windows, map};

use crate::limits::{GIVE_BACK_PART, GRANTED_PAGES_MAX, WINDOWS_MAX};
use crate::mapped::Mapped;
use crate::quiet::Leaf;
use crate::session::Session;
use crate::shared::Shared;
use crate::stamp::Stamp;
use device::Device;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use window::{Held, Window};

/// Opens the device; the error is the text for who wants to map.
pub(crate) type Opener = Box<dyn Fn() -> Result<Arc<dyn Device>, String> + Send + Sync>;

/// The kernel's device.
pub(crate) fn kernel_device() -> Opener {
    Box::new(|| device::Gntdev::open().map(|device| Arc::new(device) as Arc<dyn Device>))
}

/// Pages of a file, counted in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pages {
    pub(crate) stamp: Stamp,
    pub(crate) first: u64,
    pub(crate) count: u64,
}

impl Pages {
    pub(crate) fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }
}

/// How bringing pages went, for who called populate.
#[derive(Debug)]
pub(crate) enum Brought {
    /// They are there, up to this page of the file.
    Until(u64),
    /// Something changed on the way: look again.
    Again,
    /// They cannot be had.
    Failed(crate::MmapError),
}

/// One batch for the worker to map.
pub(crate) struct MapJob {
    /// The request's.
    pub(crate) number: u64,
    /// What the refs are for.
    pub(crate) pages: Pages,
    pub(crate) granter: u16,
    pub(crate) refs: Vec<u32>,
    /// Where they are waited for, each once.
    pub(crate) mappings: Vec<Arc<Mapped>>,
    /// See the module.
    pub(crate) spoiled: Arc<AtomicBool>,
    /// Whose lease must still run.
    pub(crate) session: Arc<Session>,
    /// Make room first.
    pub(crate) crowded: bool,
}

/// One window by age.
struct Age {
    mapped: Weak<Mapped>,
    /// Its first page, counted in the mapping.
    first: usize,
    alive: Weak<()>,
}

/// What a session has mapped from grants. The worker's, but for the counts.
pub(crate) struct Granted {
    device: Arc<dyn Device>,
    held: Arc<Held>,
    /// Oldest first. A leaf lock.
    ages: Leaf<VecDeque<Age>>,
    windows_max: AtomicUsize,
    pages_max: AtomicUsize,
    /// Seeded mistakes, for the tests that must notice them.
    #[cfg(test)]
    pub(crate) mutants: Mutants,
}

/// See [`Granted::mutants`].
#[cfg(test)]
#[derive(Default)]
pub(crate) struct Mutants {
    /// Tell the daemon that pages are unmapped, then unmap them.
    pub(crate) ack_first: AtomicBool,
    /// Put memory back over windows that is not registered.
    pub(crate) skip_arm: AtomicBool,
    /// Show batches that were spoiled.
    pub(crate) keep_spoiled: AtomicBool,
}

impl Granted {
    pub(crate) fn new(device: Arc<dyn Device>) -> Self {
        Self {
            device,
            held: Arc::default(),
            ages: Leaf::new(VecDeque::new()),
            windows_max: AtomicUsize::new(WINDOWS_MAX),
            pages_max: AtomicUsize::new(GRANTED_PAGES_MAX),
            #[cfg(test)]
            mutants: Mutants::default(),
        }
    }

    /// Windows and pages that are mapped.
    #[cfg(test)]
    pub(crate) fn counts(&self) -> (usize, usize) {
        let held = &self.held;
        (
            held.windows.load(Ordering::Relaxed),
            held.pages.load(Ordering::Relaxed),
        )
    }

    #[cfg(test)]
    pub(crate) fn set_caps(&self, windows: usize, pages: usize) {
        self.windows_max.store(windows, Ordering::Relaxed);
        self.pages_max.store(pages, Ordering::Relaxed);
    }

    /// Remembers a window's age.
    fn remember(&self, mapped: &Arc<Mapped>, first: usize, window: &Window) {
        let mut ages = self.ages.lock();
        // Those of windows that ended otherwise are dropped before they outnumber the living.
        if ages.len() > 64 && ages.len() > 2 * self.held.windows.load(Ordering::Relaxed) {
            ages.retain(|age| age.alive.strong_count() > 0);
        }
        ages.push_back(Age {
            mapped: Arc::downgrade(mapped),
            first,
            alive: Arc::downgrade(window.alive()),
        });
    }

    /// Gives old windows back until `pages` more can be mapped. No lock is held.
    pub(crate) fn make_room(&self, shared: &Shared, pages: usize) {
        let (windows_max, pages_max) = (
            self.windows_max.load(Ordering::Relaxed),
            self.pages_max.load(Ordering::Relaxed),
        );
        let over = |slack: usize| {
            let windows = self.held.windows.load(Ordering::Relaxed) + 1;
            let mapped = self.held.pages.load(Ordering::Relaxed) + pages;
            windows > windows_max - windows_max / GIVE_BACK_PART * slack
                || mapped > pages_max - pages_max / GIVE_BACK_PART * slack
        };
        if over(0) {
            // A little more than needed: the next windows come at once.
            while over(1) && self.give_back_oldest(shared) {}
        }
    }

    /// Gives back a part of what is mapped, oldest first: room for `pages` and a little more.
    pub(crate) fn give_back_part(&self, shared: &Shared, pages: usize) {
        let mapped = self.held.pages.load(Ordering::Relaxed);
        // Where nothing can be moved, a batch is mapped twice for a moment.
        let batch = if self.device.movable() {
            pages
        } else {
            2 * pages
        };
        let until = mapped.saturating_sub(batch + mapped.div_ceil(GIVE_BACK_PART));
        while self.held.pages.load(Ordering::Relaxed) > until && self.give_back_oldest(shared) {}
    }

    /// `false`: there is none.
    fn give_back_oldest(&self, shared: &Shared) -> bool {
        loop {
            let Some(age) = self.ages.lock().pop_front() else {
                return false;
            };
            if age.alive.strong_count() == 0 {
                continue;
            }
            if let Some(mapped) = age.mapped.upgrade()
                && mapped.give_back(shared, age.first, &age.alive)
            {
                return true;
            }
        }
    }
}
