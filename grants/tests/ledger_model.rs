//! Tables and ledger against a plain model, over two tables as Xen would have them, the test
//! standing in for the hypervisor: it maps and unmaps entries as guests would. What it cannot show:
//! two threads at once (loom shows that for one entry, the lock covers the rest), and that Xen
//! itself behaves as the stand-in does.
#![allow(clippy::unwrap_used, clippy::panic)] // Tests.

use copage_grants::entry::{Entry, EntryMemory, OwnEntries};
use copage_grants::limits::ENTRIES_RESERVED;
use copage_grants::table::{GrantTables, Placement};
use copage_grants::{Access, DomId, FrameNo, Grant, GrantError, Revocation, TableId};
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;

const ENTRIES: u32 = 22 + ENTRIES_RESERVED;
const FRAMES: u32 = 16;
const DOMS: u16 = 4;

/// Memory that the test, as the hypervisor, sees too.
#[derive(Clone)]
struct Shared(Arc<OwnEntries>);

impl EntryMemory for Shared {
    fn entries(&self) -> &[Entry] {
        self.0.entries()
    }
}

/// Two tables, the frames under names of their own.
#[derive(Clone, Copy, Debug)]
enum Spread {
    /// In turn in one table and the other: no two neighbours in one.
    InTurn,
    /// The lower half and the upper: rows of neighbours.
    Halves,
}

impl Spread {
    fn table(self, frame: u32) -> u32 {
        match self {
            Self::InTurn => frame % 2,
            Self::Halves => frame / (FRAMES / 2),
        }
    }
}

impl Placement for Spread {
    fn place(&self, frame: FrameNo) -> (TableId, u32) {
        (TableId(self.table(frame.0) as u16), 1000 + frame.0)
    }
}

#[derive(Clone, Debug)]
enum Op {
    Grant {
        dom: u16,
        frames: Vec<u32>,
        access: Access,
    },
    Revoke {
        dom: u16,
        frames: Vec<u32>,
    },
    Map {
        dom: u16,
        frame: u32,
        access: Access,
    },
    Unmap {
        dom: u16,
        frame: u32,
    },
    ClearMapped {
        dom: u16,
        frames: Vec<u32>,
    },
    EndAll {
        frames: Vec<u32>,
    },
    DomainEnded {
        dom: u16,
        unmapped: bool,
    },
    SetMax {
        dom: u16,
        max: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let dom = 0..DOMS;
    let frames = || {
        prop_oneof![
            proptest::collection::vec(0..FRAMES, 0..8),
            (0..FRAMES, 1..8u32)
                .prop_map(|(first, count)| (first..FRAMES.min(first + count)).collect()),
        ]
    };
    let access = || prop_oneof![3 => Just(Access::ReadOnly), 1 => Just(Access::ReadWrite)];
    prop_oneof![
        6 => (dom.clone(), frames(), access())
            .prop_map(|(dom, frames, access)| Op::Grant { dom, frames, access }),
        4 => (dom.clone(), frames()).prop_map(|(dom, frames)| Op::Revoke { dom, frames }),
        3 => (dom.clone(), 0..FRAMES, access())
            .prop_map(|(dom, frame, access)| Op::Map { dom, frame, access }),
        2 => (dom.clone(), 0..FRAMES).prop_map(|(dom, frame)| Op::Unmap { dom, frame }),
        1 => (dom.clone(), frames()).prop_map(|(dom, frames)| Op::ClearMapped { dom, frames }),
        1 => frames().prop_map(|frames| Op::EndAll { frames }),
        1 => (dom.clone(), any::<bool>())
            .prop_map(|(dom, unmapped)| Op::DomainEnded { dom, unmapped }),
        1 => (dom, 0..20u64).prop_map(|(dom, max)| Op::SetMax { dom, max }),
    ]
}

/// One grant as the model has it.
struct Held {
    grant: Grant,
    access: Access,
    mapped: bool,
    /// Rises with each grant.
    age: u64,
}

#[derive(Default)]
struct Model {
    held: HashMap<(u16, u32), Held>,
    max: HashMap<u16, u64>,
    ages: u64,
}

impl Model {
    fn count(&self, dom: u16) -> u64 {
        self.held.keys().filter(|key| key.0 == dom).count() as u64
    }

    fn by_age(&self, dom: u16) -> Vec<FrameNo> {
        let mut own: Vec<_> = self.held.iter().filter(|(key, _)| key.0 == dom).collect();
        own.sort_by_key(|(_, held)| held.age);
        own.into_iter().map(|(key, _)| FrameNo(key.1)).collect()
    }
}

struct World {
    spread: Spread,
    tables: GrantTables<Shared, Spread>,
    memory: [Shared; 2],
    model: Model,
}

fn numbers(frames: &[u32]) -> Vec<FrameNo> {
    frames.iter().copied().map(FrameNo).collect()
}

impl World {
    fn new(spread: Spread) -> Self {
        let memory = [(), ()].map(|()| Shared(Arc::new(OwnEntries::new(ENTRIES).unwrap())));
        let tables = GrantTables::new(spread);
        for table in &memory {
            tables.add_table(table.clone()).unwrap();
        }
        Self {
            spread,
            tables,
            memory,
            model: Model::default(),
        }
    }

    fn entry(&self, grant: Grant) -> &Entry {
        &self.memory[usize::from(grant.table.0)].entries()[grant.gref.0 as usize]
    }

    fn grant(&mut self, dom: u16, frames: &[u32], access: Access) {
        let held = |frame: &u32| self.model.held.get(&(dom, *frame));
        let is_other = |held: &Held| held.access != access;
        let otherwise = frames.iter().filter_map(held).any(is_other);
        let mut new: Vec<u32> = frames.to_vec();
        new.retain(|&frame| !self.model.held.contains_key(&(dom, frame)));
        new.sort_unstable();
        new.dedup();
        let wanted = self.model.count(dom) + new.len() as u64;
        let over = wanted > self.model.max.get(&dom).copied().unwrap_or(u64::MAX);
        let full = (0..2).any(|table| {
            let used = self
                .model
                .held
                .keys()
                .filter(|key| self.spread.table(key.1) == table)
                .count();
            used + new
                .iter()
                .filter(|&&frame| self.spread.table(frame) == table)
                .count()
                > ENTRIES as usize - ENTRIES_RESERVED as usize
        });
        let mut out = vec![];
        let numbers = numbers(frames);
        let result = self
            .tables
            .grant(DomId(dom), access, &numbers, false, &mut out);
        match result {
            Ok(()) => {
                assert!(!over && !full && !otherwise);
                assert_eq!(out.len(), frames.len());
                for (&frame, &grant) in frames.iter().zip(&out) {
                    assert!(grant.gref.0 >= ENTRIES_RESERVED);
                    assert_eq!(u32::from(grant.table.0), self.spread.table(frame));
                    self.model.ages += 1;
                    let held = Held {
                        grant,
                        access,
                        mapped: false,
                        age: self.model.ages,
                    };
                    let there = self.model.held.entry((dom, frame)).or_insert(held);
                    assert_eq!(there.grant, grant);
                }
            }
            Err(GrantError::BadRange(_)) => assert!(otherwise),
            Err(GrantError::GrantsOverLimit { .. }) => assert!(over && !otherwise),
            Err(GrantError::TableFull { .. }) => assert!(full && !over && !otherwise),
            Err(e) => panic!("{e}"),
        }
    }

    fn revoke(&mut self, dom: u16, frames: &[u32]) {
        let mut answers = vec![];
        self.tables
            .revoke(DomId(dom), &numbers(frames), &mut answers);
        assert_eq!(answers.len(), frames.len());
        for (&frame, answer) in frames.iter().zip(answers) {
            let key = (dom, frame);
            let expected = match self.model.held.get(&key).map(|held| held.mapped) {
                None => Revocation::NotGranted,
                Some(true) => Revocation::StillMapped,
                Some(false) => Revocation::Revoked,
            };
            assert_eq!(answer, expected);
            if expected == Revocation::Revoked {
                self.model.held.remove(&key);
            }
        }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Grant {
                dom,
                frames,
                access,
            } => self.grant(dom, &frames, access),
            Op::Revoke { dom, frames } => self.revoke(dom, &frames),
            Op::Map { dom, frame, access } => {
                if let Some(held) = self.model.held.get_mut(&(dom, frame)) {
                    let may = access == Access::ReadOnly || held.access == access;
                    held.mapped |= may;
                    let entry = held.grant;
                    let entry = self.entry(entry);
                    let mapped = entry.map(DomId(dom), access);
                    assert_eq!(mapped, may.then_some(1000 + frame));
                    assert_eq!(entry.map(DomId(dom + 1), Access::ReadOnly), None);
                }
            }
            Op::Unmap { dom, frame } => {
                if let Some(held) = self.model.held.get_mut(&(dom, frame)) {
                    held.mapped = false;
                    let grant = held.grant;
                    self.entry(grant).clear_mapped();
                }
            }
            Op::ClearMapped { dom, frames } => {
                self.tables.clear_mapped(DomId(dom), &numbers(&frames));
                for frame in frames {
                    if let Some(held) = self.model.held.get_mut(&(dom, frame)) {
                        held.mapped = false;
                    }
                }
            }
            Op::EndAll { frames } => {
                let mut ended = vec![];
                self.tables.end_all(&numbers(&frames), &mut |frame, dom| {
                    ended.push((dom.0, frame.0))
                });
                for key in ended {
                    assert!(frames.contains(&key.1) && self.model.held.remove(&key).is_some());
                }
                assert!(self.model.held.keys().all(|key| !frames.contains(&key.1)));
            }
            Op::DomainEnded { dom, unmapped } => self.domain_ended(dom, unmapped),
            Op::SetMax { dom, max } => {
                self.tables.set_grants_max(DomId(dom), max);
                self.model.max.insert(dom, max);
            }
        }
    }

    fn domain_ended(&mut self, dom: u16, unmapped: bool) {
        let end = self.tables.domain_ended(DomId(dom), unmapped);
        let before = self.model.held.len();
        self.model
            .held
            .retain(|key, held| key.0 != dom || held.mapped && !unmapped);
        assert_eq!(end.revoked, (before - self.model.held.len()) as u64);
        // What stays does so in its old order.
        assert_eq!(end.still_mapped, self.model.by_age(dom));
        self.model.max.remove(&dom);
    }

    fn check(&self) {
        let model = &self.model;
        for dom in 0..DOMS {
            assert_eq!(self.tables.grant_count(DomId(dom)), model.count(dom));
            let mut oldest = vec![];
            self.tables
                .oldest_grants(DomId(dom), usize::MAX, &mut oldest);
            assert_eq!(oldest, model.by_age(dom));
        }
        for frame in 0..FRAMES {
            let mut holders = vec![];
            self.tables.holders(FrameNo(frame), &mut holders);
            holders.sort_unstable();
            let mut expected: Vec<DomId> = model
                .held
                .keys()
                .filter(|key| key.1 == frame)
                .map(|key| DomId(key.0))
                .collect();
            expected.sort_unstable();
            assert_eq!(holders, expected);
            assert_eq!(
                self.tables.holder_count(FrameNo(frame)) as usize,
                expected.len()
            );
            let writes = model
                .held
                .iter()
                .any(|(key, held)| key.1 == frame && held.access == Access::ReadWrite);
            assert_eq!(self.tables.is_writable(FrameNo(frame)), writes);
            let granted = self.tables.first_granted(&[FrameNo(frame)]);
            assert_eq!(granted.is_some(), !expected.is_empty());
        }
        let mut seen = 0;
        self.tables.each_grant(&mut |info| {
            let held = &model.held[&(info.dom.0, info.frame.0)];
            let told = (info.grant, info.access, info.mapped);
            assert_eq!(told, (held.grant, held.access, held.mapped));
            seen += 1;
        });
        assert_eq!(seen, model.held.len());
        let audit = self.tables.audit();
        assert_eq!(audit.differences, Vec::<String>::new());
        assert_eq!((audit.entries, audit.grants), (seen as u64, seen as u64));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn xen_tables_and_ledger_do_as_the_model(
        spread in prop_oneof![Just(Spread::InTurn), Just(Spread::Halves)],
        ops in proptest::collection::vec(op(), 1..60),
    ) {
        let mut world = World::new(spread);
        for op in ops {
            world.apply(op);
            world.check();
        }
    }
}

/// The audit sees what it is there for: an entry changed behind the ledger's back.
#[test]
fn xen_the_audit_sees_every_kind_of_difference() {
    let mut world = World::new(Spread::InTurn);
    world.grant(1, &[0, 2, 4], Access::ReadOnly);
    let entry = |frame| world.entry(world.model.held[&(1, frame)].grant);
    assert!(entry(0).revoke());
    entry(2).publish(DomId(2), Access::ReadOnly, 1002, false);
    entry(4).publish(DomId(1), Access::ReadWrite, 1004, false);
    world.memory[1].entries()[20].publish(DomId(1), Access::ReadOnly, 1, false);
    let audit = world.tables.audit();
    assert_eq!(audit.differences.len(), 4, "{:#?}", audit.differences);
    assert_eq!((audit.entries, audit.grants), (3, 3));
}
