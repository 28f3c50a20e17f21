//! The budget as it moves over a backend that behaves as Xen's, whose memory comes and goes in banks: at
//! random, with guests that map, that keep what they were asked for, that are fenced and that end.
//!
//! Every page that a guest maps has the bytes of the file; what it has mapped never changes; the audit is
//! clean after every step; the stand-in asserts that no bank is ended that holds a page or an entry. Cannot
//! show: that Xen is as the stand-in is; changes of the budget that go on at one time.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
#[path = "common/hypervisor.rs"]
mod hypervisor;

use common::*;
use copage_cache::*;
use copage_grants::*;
use hypervisor::{Hypervisor, TABLE_FRAMES};
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const PAGES: u64 = 200;
const GUESTS: u16 = 3;
const FIRST: u32 = 96;

#[derive(Clone, Debug)]
enum Op {
    Fault {
        guest: u16,
        page: u64,
        count: u32,
    },
    /// Unmaps all but each `keep`-th page.
    Unmap {
        guest: u16,
        keep: usize,
    },
    Budget {
        frames: u32,
    },
    /// So many banks more can be made.
    Room {
        banks: u64,
    },
    Fence {
        guest: u16,
    },
    End {
        guest: u16,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let guest = 1..=GUESTS;
    prop_oneof![
        8 => (guest.clone(), 0..PAGES, 1..40_u32)
            .prop_map(|(guest, page, count)| Op::Fault { guest, page, count }),
        3 => (guest.clone(), 1..4_usize).prop_map(|(guest, keep)| Op::Unmap { guest, keep }),
        4 => (64..=400_u32).prop_map(|frames| Op::Budget { frames }),
        1 => (0..10_u64).prop_map(|banks| Op::Room { banks }),
        1 => guest.clone().prop_map(|guest| Op::Fence { guest }),
        1 => guest.prop_map(|guest| Op::End { guest }),
    ]
}

struct Model {
    rig: Rig,
    xen: Arc<Hypervisor>,
    data: Vec<u8>,
    budget: u32,
    files: HashMap<u16, Arc<CachedFile>>,
    /// By guest: granter, entry, page.
    mapped: HashMap<u16, Vec<(DomId, u32, u64)>>,
}

impl Model {
    fn new() -> Self {
        let xen = Hypervisor::new();
        let rig = Rig::with(xen.clone(), config(FIRST));
        let data = content(1, PAGES as usize * PAGE);
        rig.write("f", &data);
        Self {
            rig,
            xen,
            data,
            budget: FIRST,
            files: HashMap::new(),
            mapped: HashMap::new(),
        }
    }

    fn page(&self, page: u64) -> &[u8] {
        &self.data[page as usize * PAGE..][..PAGE]
    }

    fn fault(&mut self, guest: u16, page: u64, count: u32) {
        if !self.files.contains_key(&guest) {
            let file = self.rig.map("f", who(guest));
            self.files.insert(guest, file);
        }
        let file = self.files[&guest].clone();
        let generation = self.rig.cache.current(&file).generation;
        let range = (page, count);
        let told = match self
            .rig
            .fault_of(&file, who(guest), generation, range, FaultHint::Random)
        {
            Ok(FaultDone::Granted { grants, .. }) => grants.unwrap(),
            Ok(FaultDone::Stale(_)) => return,
            // What guests keep mapped fills the budget.
            Err(CacheError::NoFrames) => return,
            Err(error) => panic!("{error}"),
        };
        for (gref, page) in told.refs.iter().zip(page..) {
            if let Some(seen) = self.xen.map(who(guest).dom, told.granter, *gref) {
                assert!(seen == self.page(page), "page {page}");
                self.note((told.granter, *gref, page), guest);
            }
        }
    }

    fn note(&mut self, mapped: (DomId, u32, u64), guest: u16) {
        let of_guest = self.mapped.entry(guest).or_default();
        if !of_guest.contains(&mapped) {
            of_guest.push(mapped);
        }
    }

    fn unmap(&mut self, guest: u16, keep: usize) {
        let mut n = 0;
        for (granter, gref, _) in self.mapped.entry(guest).or_default().extract_if(.., |_| {
            n += 1;
            n % keep != 0 || keep == 1
        }) {
            self.xen.unmap(granter, gref);
        }
    }

    fn gone(&mut self, guest: u16) {
        self.files.remove(&guest);
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Fault { guest, page, count } => self.fault(guest, page, count),
            Op::Unmap { guest, keep } => self.unmap(guest, keep),
            Op::Budget { frames } => match self.rig.cache.set_frames_max(frames) {
                Ok(()) => self.budget = frames,
                Err(CacheError::BudgetBelowPinned { .. }) => {}
                Err(CacheError::Grant(error)) => {
                    assert!(error.to_string().contains("no memory"), "{error}");
                }
                Err(error) => panic!("{error}"),
            },
            Op::Room { banks } => self.xen.room.store(banks, Ordering::Relaxed),
            Op::Fence { guest } => {
                self.rig.cache.guest_fenced(who(guest));
                self.gone(guest);
            }
            Op::End { guest } => {
                self.unmap(guest, 1);
                self.rig.cache.guest_ended(who(guest));
                self.gone(guest);
            }
        }
        let stats = self.rig.cache.stats();
        assert_eq!(stats.frames_max, self.budget);
        for bank in &stats.banks {
            let needed = bank.bank < self.budget.div_ceil(TABLE_FRAMES);
            assert_eq!(bank.is_leaving, !needed, "{stats:?}");
        }
    }

    /// What guests have mapped is as it was.
    fn check_mapped(&self) {
        for (guest, pages) in &self.mapped {
            for (granter, gref, page) in pages {
                let seen = self.xen.seen(who(*guest).dom, *granter, *gref);
                assert!(seen.unwrap() == self.page(*page), "page {page} of {guest}");
            }
        }
    }
}

fn run(ops: Vec<Op>) {
    let mut model = Model::new();
    for op in ops {
        model.step(op);
        model.rig.pump(Duration::ZERO);
        model.rig.audit();
        model.check_mapped();
    }
    for guest in 1..=GUESTS {
        model.unmap(guest, 1);
        model.rig.cache.guest_ended(who(guest));
    }
    let needed = model.budget.div_ceil(TABLE_FRAMES) as usize;
    model.rig.until("banks that are not needed to go", |s| {
        s.frames_quarantined == 0 && s.banks.len() == needed
    });
    assert_eq!(model.xen.there(), (0..needed as u32).collect::<Vec<_>>());
    model.rig.audit();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_time: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn local_banks_come_and_go_as_the_budget_moves(ops in prop::collection::vec(op(), 1..50)) {
        run(ops);
    }
}

/// Guests that want a page back at once, as all do that read on, do not keep a bank for ever.
#[test]
fn local_a_page_that_all_want_back_leaves_its_bank() {
    let mut model = Model::new();
    model.rig.cache.set_frames_max(190).unwrap();
    model.budget = 190;
    for page in (0..180).step_by(30) {
        (1..=GUESTS).for_each(|guest| model.fault(guest, page, 30));
    }
    model.rig.cache.set_frames_max(64).unwrap();
    let begin = Instant::now();
    for round in 0.. {
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "{:?}",
            model.rig.cache.stats()
        );
        // One after the other unmaps, acks and faults again: never do all let go at one time.
        let guest = round % GUESTS + 1;
        model.rig.acks = false;
        model.rig.pump(Duration::from_millis(1));
        model.unmap(guest, 1);
        let file = model.files[&guest].clone();
        let generation = model.rig.cache.current(&file).generation;
        let cache = model.rig.cache.clone();
        cache.unmapped(&file, who(guest), generation, PageIndex(0), PAGES as u32);
        cache.recall_done(
            &file,
            generation,
            PageIndex(0),
            PAGES as u32,
            who(guest).dom,
            RecallEnd::Acked,
        );
        for page in [0, 60, 120, 170] {
            let ticket = model.rig.ticket();
            let outcome = cache.fault(
                ticket,
                &file,
                who(guest),
                generation,
                PageIndex(page),
                1,
                FaultHint::Random,
            );
            if let FaultOutcome::Ready(Ok(FaultDone::Granted { grants, .. })) = outcome {
                let told = grants.unwrap();
                if model
                    .xen
                    .map(who(guest).dom, told.granter, told.refs[0])
                    .is_some()
                {
                    model.note((told.granter, told.refs[0], page), guest);
                }
            }
        }
        if model.xen.there() == [0, 1] {
            return model.rig.audit();
        }
    }
}
