//! The backend for one host without a hypervisor: processes are the guests, pages of tmpfs files
//! the frames.
//!
//! Each home is a *frame file*. Guests get descriptors of it that nobody can make writable. A
//! descriptor covers a whole file, so the ledger here records the protocol rather than enforcing
//! it: what a guest with a descriptor can read is whatever pages the file holds. Taking a page back
//! is punching it out of the file, which unmaps it everywhere, also from a stopped process.
//!
//! Since a guest may map at any moment what it was granted, entries show a mapping from the moment
//! they are written. The bit goes when the guest says that it unmapped (which is its word, where
//! Xen has the hypervisor's), when it ends, or by force.
//!
//! **Pages that guests write** are not in the home but in files beside it ([`Where`](crate::Where)), which
//! their writers have writable descriptors of: an arena for each session and home, one common file for each
//! home. What is placed there is taken out of the home, which is what takes it from those that read it; what
//! comes back is read once, as the bytes are at that moment.
//!
//! **A hole in a frame file reads as zeros** to whoever maps it without a fault handler, and the
//! kernel then keeps the page of zeros in the file, where others find it. Guests that use the
//! library never do that. A hostile guest can, to those that have the same descriptor: a home belongs
//! to one [`TrustClass`], and only guests of that class are given it while it has holes. See also [`LocalBackend::foreign_pages`] and the
//! [`frames`] module.

mod backend;
mod beside;
#[cfg(test)]
mod containment;
#[cfg(test)]
mod containment_writing;
mod file;
mod frames;
mod guest_file;
mod handle;
mod home;
mod huge;
mod place;
mod sweeper;
mod twin;
mod window;

pub use frames::FrameStore;

use crate::backend::HomeSpec;
use crate::entry::OwnEntries;
use crate::error::GrantError;
use crate::ids::{DomId, FrameNo, HomeId, TableId, TrustClass};
use crate::limits::{HUGE_PAGES, LOCAL_ENTRIES_DEFAULT, SESSION_ARENAS_MAX};
use crate::table::{GrantTables, Placement};
use frames::FrameFiles;
use guest_file::{GuestFile, GuestFiles};
use home::Home;
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use sweeper::{Sweeper, SweptFile};

/// How the local backend is to be.
#[derive(Clone, Debug)]
pub struct LocalConfig {
    /// Take pages back by punching them out from under whoever maps them. `false`: behave as Xen
    /// does, where what is mapped cannot be taken back.
    pub force: bool,
    /// Every guest runs as another user than the daemon, none as root: then permission bits alone
    /// keep guests from writing, also where no private mount is to be had.
    pub guests_other_uid: bool,
    /// The most bytes that all frame files together may hold; `None`: what the machine has. For
    /// tests of a full tmpfs; only with a private mount.
    pub size_max_bytes: Option<u64>,
    /// Entries of the grant table: the most grants that can be live at one time.
    pub entries: u32,
    /// The same for the frame files of one class that is not the daemon's own; `None`: as
    /// `size_max_bytes`. Without a private mount there is no such limit.
    pub class_size_max_bytes: Option<u64>,
    /// The most bytes that the arenas of one session may hold together, and the common file of one home;
    /// `None`: what the machine has. A guest can fill them. Without a private mount there is no such limit.
    pub arena_size_max_bytes: Option<u64>,
    /// Where frame files are made.
    pub store: FrameStore,
}

impl Default for LocalConfig {
    fn default() -> Self {
        Self {
            force: true,
            guests_other_uid: false,
            size_max_bytes: None,
            class_size_max_bytes: None,
            entries: LOCAL_ENTRIES_DEFAULT,
            arena_size_max_bytes: None,
            store: FrameStore::Auto,
        }
    }
}

/// All frames are in the one table, and entries call them by their number.
struct OneTable;

impl Placement for OneTable {
    #[inline]
    fn place(&self, frame: FrameNo) -> (TableId, u32) {
        (TableId(0), frame.0)
    }
}

/// See the module.
pub struct LocalBackend {
    config: LocalConfig,
    /// Where the frame files of each class are made. A class of its own memory limit: what a hostile
    /// guest fills with zeros is its own class's.
    files: RwLock<HashMap<TrustClass, Arc<FrameFiles>>>,
    /// Those of the daemon's own class, which also say what kind all are.
    own_files: Arc<FrameFiles>,
    homes: RwLock<HashMap<HomeId, Arc<Home>>>,
    next_home: AtomicU64,
    /// Where the arenas of each session are made, as long as it has any.
    sessions: Mutex<HashMap<DomId, Weak<GuestFiles>>>,
    /// One for each class whose guests write.
    sweepers: Mutex<HashMap<TrustClass, Arc<Sweeper>>>,
    tables: GrantTables<OwnEntries, OneTable>,
    foreign_pages: AtomicU64,
    /// What the frame files of one class that is not the daemon's own may hold, now.
    class_size_max_bytes: Mutex<Option<u64>>,
}

impl LocalBackend {
    /// Makes the table and the place for frame files, and tries the latter out.
    ///
    /// # Errors
    /// `Unsupported` when this machine's settings would put huge pages under frame files (pages
    /// that were never filled would then read as zeros), or when something was asked for that only
    /// a private mount has.
    pub fn new(config: LocalConfig) -> Result<Self, GrantError> {
        let own_files = Arc::new(FrameFiles::new(config.store, config.size_max_bytes)?);
        let tables = GrantTables::new(OneTable);
        let entries = u64::from(config.entries);
        tables
            .add_table(OwnEntries::new(config.entries).ok_or(GrantError::TableFull { entries })?)?;
        let class_size_max_bytes =
            Mutex::new(config.class_size_max_bytes.or(config.size_max_bytes));
        let backend = Self {
            config,
            class_size_max_bytes,
            files: RwLock::new(HashMap::from([(TrustClass::OWN, Arc::clone(&own_files))])),
            own_files,
            homes: RwLock::new(HashMap::new()),
            next_home: AtomicU64::new(1),
            sessions: Mutex::default(),
            sweepers: Mutex::default(),
            tables,
            foreign_pages: AtomicU64::new(0),
        };
        backend.probe()?;
        Ok(backend)
    }

    /// Where frame files of `class` are made; made ready at the class's first home.
    fn files_of(&self, class: TrustClass) -> Result<Arc<FrameFiles>, GrantError> {
        if let Some(files) = self.files.read().get(&class) {
            return Ok(Arc::clone(files));
        }
        // Held until it is in the map: it grows with the others.
        let size_max_bytes = self.class_size_max_bytes.lock();
        let limit = match self.own_files.kind() {
            FrameStore::Memfd => None,
            _ => *size_max_bytes,
        };
        let fresh = Arc::new(FrameFiles::new(self.own_files.kind(), limit)?);
        Ok(Arc::clone(self.files.write().entry(class).or_insert(fresh)))
    }

    /// Lets the frame files of each class hold so much, if they may hold less. (Those of the daemon's own
    /// are bounded by the budget alone.)
    fn make_room(&self, bytes: u64) -> Result<(), GrantError> {
        let mut size_max_bytes = self.class_size_max_bytes.lock();
        let Some(now) = *size_max_bytes else {
            return Ok(());
        };
        if self.config.class_size_max_bytes.is_none() || bytes <= now {
            return Ok(());
        }
        for (class, files) in &*self.files.read() {
            if *class != TrustClass::OWN {
                files.set_size(bytes)?;
            }
        }
        *size_max_bytes = Some(bytes);
        Ok(())
    }

    /// Which kind of frame files were to be had: never [`FrameStore::Auto`].
    pub fn store_kind(&self) -> FrameStore {
        self.own_files.kind()
    }

    /// Runs of pages found in frame files that the daemon never put there, when it came to fill
    /// them: somebody mapped a home without a fault handler and read a hole. They were zeros, and
    /// were removed before the right content came.
    pub fn foreign_pages(&self) -> u64 {
        self.foreign_pages.load(Ordering::Relaxed)
    }

    /// A write of one page must allocate one page: with huge pages its neighbours would be there
    /// too, as zeros, without ever having been filled.
    fn probe(&self) -> Result<(), GrantError> {
        const PROBE_PAGES: u64 = 2 * HUGE_PAGES;
        let spec = HomeSpec {
            label: "probe".to_owned(),
            bytes: PROBE_PAGES * crate::ids::PAGE_SIZE_U64,
            class: TrustClass::OWN,
        };
        let home = Home::create(&self.own_files, 0, &spec)?;
        home.store(1, &[1u8; crate::ids::PAGE_SIZE])?;
        let present = home.present_pages()?;
        home.close()?;
        if present == [(1, 1)] {
            Ok(())
        } else {
            Err(GrantError::Unsupported {
                backend: "local",
                what: "a frame file (set /sys/kernel/mm/transparent_hugepage/shmem_enabled to \
                       never: it puts huge pages under every tmpfs file)",
            })
        }
    }

    /// Where files for guests of one session, or one home, are made.
    fn guest_files(&self) -> Result<Arc<GuestFiles>, GrantError> {
        let size_max_bytes = self.config.arena_size_max_bytes;
        GuestFiles::new(self.store_kind(), size_max_bytes).map(Arc::new)
    }

    /// Where arenas of a session are made.
    fn guest_files_of(&self, dom: DomId) -> Result<Arc<GuestFiles>, GrantError> {
        let sessions = &mut *self.sessions.lock();
        if let Some(files) = sessions.get(&dom).and_then(Weak::upgrade) {
            // Each file has it, and we.
            if Arc::strong_count(&files) > SESSION_ARENAS_MAX {
                let many = std::io::Error::from_raw_os_error(libc::EMFILE);
                return Err(GrantError::NoMemory(many));
            }
            return Ok(files);
        }
        sessions.retain(|_, files| files.strong_count() > 0);
        let files = self.guest_files()?;
        sessions.insert(dom, Arc::downgrade(&files));
        Ok(files)
    }

    /// A file that guests of a class write.
    fn guest_file(
        &self,
        class: TrustClass,
        files: &Arc<GuestFiles>,
    ) -> Result<SweptFile, GrantError> {
        let sweepers = &mut *self.sweepers.lock();
        let sweeper = match sweepers.entry(class) {
            Entry::Occupied(sweeper) => sweeper.into_mut(),
            Entry::Vacant(place) => place.insert(Arc::new(Sweeper::new()?)),
        };
        sweeper.take_up(GuestFile::create(files)?)
    }

    /// Waits until all that was taken from guests is out of their files too; `false`: some guest holds it up
    /// for longer than `patience`.
    pub fn wait_swept(&self, patience: Duration) -> bool {
        let sweepers: Vec<_> = self.sweepers.lock().values().cloned().collect();
        sweepers.iter().all(|sweeper| sweeper.wait(patience))
    }

    fn home(&self, home: HomeId) -> Result<Arc<Home>, GrantError> {
        self.homes
            .read()
            .get(&home)
            .cloned()
            .ok_or(GrantError::NoSuchHome(home))
    }
}
