//! A backend that behaves as Xen's does, the test standing in for the hypervisor: guests map entries
//! when they like, and bits go when the test says so, not when a guest does.

#![allow(dead_code)]
use copage_grants::entry::{Entry, EntryMemory, OwnEntries};
use copage_grants::table::{GrantTables, Placement};
use copage_grants::*;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

/// Frames in one bank, whose table they are in.
pub const TABLE_FRAMES: u32 = 48;
const TABLE_ENTRIES: u32 = 2048;

#[derive(Clone)]
struct Shared(Arc<OwnEntries>);

impl EntryMemory for Shared {
    fn entries(&self) -> &[Entry] {
        self.0.entries()
    }
}

struct Spread;

impl Placement for Spread {
    fn place(&self, frame: FrameNo) -> (TableId, u32) {
        let table = (frame.0 / TABLE_FRAMES) as u16;
        (TableId(table), frame.0 % TABLE_FRAMES + 1000)
    }

    fn domid(&self, dom: DomId) -> DomId {
        DomId(dom.0 + 30)
    }
}

type Pages = BTreeSet<(u64, FrameNo)>;

pub struct Hypervisor {
    /// A domain each, numbered from 90 on as they are made.
    domains: RwLock<Vec<Shared>>,
    /// By bank, the number of the domain.
    banks: RwLock<Vec<Option<u16>>>,
    /// So many domains can be made.
    pub room: AtomicU64,
    tables: GrantTables<Shared, Spread>,
    frames: Mutex<HashMap<FrameNo, Vec<u8>>>,
    homes: Mutex<HashMap<HomeId, Pages>>,
    next: AtomicU64,
}

impl Hypervisor {
    /// `memory` is what an earlier life left: a bank each.
    pub fn over(memory: Vec<Arc<OwnEntries>>) -> Arc<Self> {
        let memory: Vec<Shared> = memory.into_iter().map(Shared).collect();
        let tables = GrantTables::new(Spread);
        for (n, table) in (0..).zip(&memory) {
            let frame_of = |gfn: u32| Some(FrameNo(gfn.checked_sub(1000)? + n * TABLE_FRAMES));
            tables.add_found_table(table.clone(), frame_of).unwrap();
        }
        Arc::new(Self {
            banks: RwLock::new((0..memory.len() as u16).map(Some).collect()),
            domains: RwLock::new(memory),
            room: AtomicU64::new(100),
            tables,
            frames: Mutex::default(),
            homes: Mutex::default(),
            next: AtomicU64::new(1),
        })
    }

    pub fn new() -> Arc<Self> {
        Self::over(Vec::new())
    }

    /// The entries of each bank.
    pub fn memory(&self) -> Vec<Arc<OwnEntries>> {
        let domains = self.domains.read().unwrap();
        let banks = self.banks.read().unwrap();
        let there = banks.iter().map(|bank| bank.unwrap());
        there
            .map(|n| Arc::clone(&domains[usize::from(n)].0))
            .collect()
    }

    /// Banks that are there.
    pub fn there(&self) -> Vec<u32> {
        let banks = self.banks.read().unwrap();
        (0..)
            .zip(&*banks)
            .filter(|(_, b)| b.is_some())
            .map(|(n, _)| n)
            .collect()
    }

    fn make_bank(&self, bank: usize) -> Result<(), GrantError> {
        let left = self
            .room
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        if left.is_err() {
            return Err(GrantError::CacheDomain {
                name: format!("bank {bank}"),
                why: "there is no memory".into(),
            });
        }
        let table = Shared(Arc::new(OwnEntries::new(TABLE_ENTRIES).unwrap()));
        while self.tables.count() <= bank {
            self.tables.add_hole(TABLE_ENTRIES as usize).unwrap();
        }
        let mut domains = self.domains.write().unwrap();
        self.tables
            .put_table(TableId(bank as u16), table.clone())
            .unwrap();
        domains.push(table);
        let mut banks = self.banks.write().unwrap();
        if banks.len() <= bank {
            banks.resize(bank + 1, None);
        }
        assert_eq!(banks[bank], None);
        banks[bank] = Some(domains.len() as u16 - 1);
        Ok(())
    }

    fn with_entry<T>(&self, granter: DomId, gref: u32, f: impl FnOnce(&Entry) -> T) -> T {
        let domains = self.domains.read().unwrap();
        f(&domains[usize::from(granter.0 - 90)].entries()[gref as usize])
    }

    fn bank_of(&self, frame: FrameNo) -> usize {
        let bank = (frame.0 / TABLE_FRAMES) as usize;
        assert!(
            self.banks.read().unwrap()[bank].is_some(),
            "{frame:?} is not there"
        );
        bank
    }

    /// A guest maps by what it was told; the page, if Xen lets it.
    pub fn map(&self, dom: DomId, granter: DomId, gref: u32) -> Option<Vec<u8>> {
        let number = granter.0 - 90;
        let banks = self.banks.read().unwrap();
        let bank = banks.iter().position(|bank| *bank == Some(number))? as u32;
        let gfn = self.with_entry(granter, gref, |entry| {
            entry.map(Spread.domid(dom), Access::ReadOnly)
        })?;
        let frame = FrameNo(bank * TABLE_FRAMES + gfn - 1000);
        Some(self.frames.lock().unwrap()[&frame].clone())
    }

    /// A guest maps for writing, if Xen lets it, and stores.
    pub fn write(&self, dom: DomId, granter: DomId, gref: u32, offset: usize, bytes: &[u8]) {
        let number = granter.0 - 90;
        let banks = self.banks.read().unwrap();
        let bank = banks.iter().position(|bank| *bank == Some(number)).unwrap() as u32;
        let gfn = self.with_entry(granter, gref, |entry| {
            entry.map(Spread.domid(dom), Access::ReadWrite)
        });
        let frame = FrameNo(bank * TABLE_FRAMES + gfn.unwrap() - 1000);
        let frames = &mut *self.frames.lock().unwrap();
        frames.get_mut(&frame).unwrap()[offset..][..bytes.len()].copy_from_slice(bytes);
    }

    /// What a guest sees that has the entry mapped.
    pub fn seen(&self, dom: DomId, granter: DomId, gref: u32) -> Option<Vec<u8>> {
        let state = self.with_entry(granter, gref, Entry::state);
        assert!(state.is_mapped() && state.dom == Spread.domid(dom));
        self.map(dom, granter, gref)
    }

    pub fn unmap(&self, granter: DomId, gref: u32) {
        self.with_entry(granter, gref, Entry::clear_mapped);
    }
}

fn no<T>(what: &'static str) -> Result<T, GrantError> {
    Err(GrantError::Unsupported {
        backend: "hypervisor",
        what,
    })
}

impl Backend for Hypervisor {
    fn name(&self) -> &'static str {
        "hypervisor"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            frames_shared: true,
            read_only_enforced: true,
            executable_mappings: false,
            forced_revoke: false,
            in_place_upgrade: true,
            descriptors: false,
        }
    }

    fn make_frames(&self, frames: u32) -> Result<FramesThere, GrantError> {
        let mut made = Vec::new();
        for bank in 0..frames.div_ceil(TABLE_FRAMES) {
            if self.there().contains(&bank) {
                continue;
            }
            if let Err(error) = self.make_bank(bank as usize) {
                made.into_iter()
                    .for_each(|bank| assert!(self.end_bank(bank).unwrap()));
                return Err(error);
            }
            made.push(bank);
        }
        Ok(FramesThere {
            bank_frames: TABLE_FRAMES,
            end: self
                .there()
                .last()
                .map_or(0, |last| (last + 1) * TABLE_FRAMES),
        })
    }

    fn end_bank(&self, bank: u32) -> Result<bool, GrantError> {
        let of_bank = |frame: &FrameNo| frame.0 / TABLE_FRAMES == bank;
        let holds = self.frames.lock().unwrap().keys().any(of_bank);
        assert!(!holds, "bank {bank} is ended and holds pages");
        let banks = &mut *self.banks.write().unwrap();
        let gone = self.tables.take_table(TableId(bank as u16)).is_some();
        if gone {
            banks[bank as usize] = None;
            self.room.fetch_add(1, Ordering::Relaxed);
        }
        Ok(gone)
    }

    fn tables(&self) -> Vec<TableInfo> {
        self.tables.infos()
    }

    fn open_home(&self, _spec: &HomeSpec) -> Result<HomeId, GrantError> {
        let home = HomeId(self.next.fetch_add(1, Ordering::Relaxed));
        self.homes.lock().unwrap().insert(home, Pages::new());
        Ok(home)
    }

    fn close_home(&self, home: HomeId) -> Result<(), GrantError> {
        let pages = self.homes.lock().unwrap().remove(&home);
        assert!(pages.is_some_and(|pages| pages.is_empty()));
        Ok(())
    }

    fn make_runnable(&self, _home: HomeId) -> Result<(), GrantError> {
        no("running")
    }

    fn home_in_use(&self, home: HomeId) -> Result<bool, GrantError> {
        let frames: Vec<_> = self.homes.lock().unwrap()[&home]
            .iter()
            .map(|held| held.1)
            .collect();
        Ok(self.tables.first_granted(&frames).is_some())
    }

    fn store(
        &self,
        home: HomeId,
        first: PageIndex,
        frames: &[FrameNo],
        data: &[u8],
    ) -> Result<(), GrantError> {
        assert_eq!(self.tables.first_granted(frames), None);
        let mut left = Vec::new();
        self.tables.retry_left_over(&mut left);
        for (n, frame) in frames.iter().enumerate() {
            self.bank_of(*frame);
            assert!(!left.contains(frame), "{frame:?} is mapped of old");
            let page = data[n * PAGE_SIZE..][..PAGE_SIZE].to_vec();
            let before = self.frames.lock().unwrap().insert(*frame, page);
            assert_eq!(before, None, "{frame:?} holds a page");
            let mut homes = self.homes.lock().unwrap();
            homes
                .get_mut(&home)
                .unwrap()
                .insert((first.0 + n as u64, *frame));
        }
        Ok(())
    }

    fn load(
        &self,
        home: HomeId,
        page: PageIndex,
        frame: FrameNo,
        buf: &mut [u8],
    ) -> Result<(), GrantError> {
        assert!(self.homes.lock().unwrap()[&home].contains(&(page.0, frame)));
        buf.copy_from_slice(&self.frames.lock().unwrap()[&frame]);
        Ok(())
    }

    fn discard(
        &self,
        home: HomeId,
        first: PageIndex,
        frames: &[FrameNo],
    ) -> Result<(), GrantError> {
        assert_eq!(self.tables.first_granted(frames), None);
        for (page, frame) in (first.0..).zip(frames) {
            self.frames.lock().unwrap().remove(frame).unwrap();
            let mut homes = self.homes.lock().unwrap();
            assert!(homes.get_mut(&home).unwrap().remove(&(page, *frame)));
        }
        Ok(())
    }

    fn load_at(
        &self,
        home: HomeId,
        page: PageIndex,
        frame: FrameNo,
        _at: Where,
        buf: &mut [u8],
    ) -> Result<(), GrantError> {
        self.load(home, page, frame, buf)
    }

    fn write_at(
        &self,
        home: HomeId,
        page: PageIndex,
        frame: FrameNo,
        _at: Where,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), GrantError> {
        assert!(self.homes.lock().unwrap()[&home].contains(&(page.0, frame)));
        let frames = &mut *self.frames.lock().unwrap();
        frames.get_mut(&frame).unwrap()[offset..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn note_saved(
        &self,
        _home: HomeId,
        _page: PageIndex,
        _frame: FrameNo,
    ) -> Result<(), GrantError> {
        Ok(())
    }

    fn resize_home(&self, _home: HomeId, _bytes: u64) -> Result<(), GrantError> {
        Ok(())
    }

    fn make_huge(&self, _home: HomeId, _first: PageIndex) -> Result<bool, GrantError> {
        Ok(false)
    }

    fn bind(&self, _dom: DomId, _domid: u16) -> Result<(), GrantError> {
        Ok(())
    }

    fn granter(&self, table: TableId) -> Option<DomId> {
        let number = self.banks.read().unwrap()[usize::from(table.0)];
        number.map(|number| DomId(90 + number))
    }

    fn in_one_table(&self, frames: &[FrameNo]) -> usize {
        let table = |frame: &FrameNo| frame.0 / TABLE_FRAMES;
        let first = frames.first().map(table);
        frames
            .iter()
            .take_while(|f| Some(table(f)) == first)
            .count()
    }

    fn grant(
        &self,
        dom: DomId,
        access: Access,
        frames: &[FrameNo],
        out: &mut Vec<Grant>,
    ) -> Result<(), GrantError> {
        self.tables.grant(dom, access, frames, false, out)
    }

    fn revoke(&self, dom: DomId, frames: &[FrameNo], out: &mut Vec<Revocation>) {
        self.tables.revoke(dom, frames, out);
    }

    fn force_out(
        &self,
        _home: HomeId,
        _first: PageIndex,
        _frames: &[FrameNo],
        _evicted: &mut dyn FnMut(FrameNo, DomId),
    ) -> Result<(), GrantError> {
        no("force")
    }

    fn holders(&self, frame: FrameNo, out: &mut Vec<DomId>) {
        self.tables.holders(frame, out);
    }

    fn holder_count(&self, frame: FrameNo) -> u32 {
        self.tables.holder_count(frame)
    }

    fn grant_count(&self, dom: DomId) -> u64 {
        self.tables.grant_count(dom)
    }

    fn oldest_grants(&self, dom: DomId, max: usize, out: &mut Vec<FrameNo>) {
        self.tables.oldest_grants(dom, max, out);
    }

    fn is_mapped(&self, dom: DomId, frame: FrameNo) -> bool {
        self.tables.is_mapped(dom, frame)
    }

    fn note_unmapped(&self, _dom: DomId, _frames: &[FrameNo]) {}

    fn domain_ended(&self, dom: DomId) -> DomainEnd {
        self.tables.domain_ended(dom, false)
    }

    fn set_grants_max(&self, dom: DomId, grants_max: u64) {
        self.tables.set_grants_max(dom, grants_max);
    }

    fn unusable_frames(&self, out: &mut Vec<FrameNo>) {
        self.tables.retry_left_over(out);
    }

    fn stop(&self) -> Result<(), GrantError> {
        Ok(())
    }

    fn each_grant(&self, visit: &mut dyn FnMut(GrantInfo)) {
        self.tables.each_grant(visit);
    }

    fn audit(&self) -> LedgerAudit {
        self.tables.audit()
    }

    fn present_pages(&self, home: HomeId) -> Result<Vec<(PageIndex, u64)>, GrantError> {
        let homes = self.homes.lock().unwrap();
        let pages = homes.get(&home).ok_or(GrantError::NoSuchHome(home))?;
        let pages: BTreeSet<u64> = pages.iter().map(|held| held.0).collect();
        Ok(pages.into_iter().map(|page| (PageIndex(page), 1)).collect())
    }
}
