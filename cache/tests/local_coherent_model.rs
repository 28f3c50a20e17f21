//! Coherent files under random work against a plain model, which is one vector of bytes: what is loaded is what
//! was stored last, what a second guest has seen is in the host's file, and in the end all of it is. The audit is
//! clean after every step.
//!
//! Cannot show: guests that store while the daemon copies (mapped memory), a host that writes meanwhile.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
#[path = "common/strict.rs"]
mod strict;

use common::*;
use copage_cache::*;
use copage_grants::*;
use proptest::prelude::*;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use strict::*;

const GUESTS: u16 = 3;
const PAGES: u64 = 150;

#[derive(Clone, Debug)]
enum Op {
    Load {
        guest: u16,
        page: u64,
    },
    Store {
        guest: u16,
        page: u64,
        offset: usize,
        seed: u64,
        shared: bool,
    },
    Daemon {
        page: u64,
        offset: usize,
        seed: u64,
    },
    Sweep {
        guest: u16,
        seed: u64,
        writes: bool,
    },
    Sync {
        durable: bool,
    },
    Take {
        page: u64,
    },
    Resize {
        bytes: u64,
    },
    Fence {
        guest: u16,
    },
    Budget {
        frames: u32,
    },
    Reclaim {
        pages: u64,
    },
    Host {
        page: u64,
        seed: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let (guest, page, offset, seed) = (1..=GUESTS, 0..PAGES, 0..PAGE - 8, 1..u64::MAX);
    let (g, p, o, s) = (guest.clone(), page.clone(), offset.clone(), seed.clone());
    prop_oneof![
        6 => (g, p).prop_map(|(guest, page)| Op::Load { guest, page }),
        8 => (guest.clone(), page.clone(), o, s, prop::bool::weighted(0.3)).prop_map(
            |(guest, page, offset, seed, shared)| Op::Store { guest, page, offset, seed, shared }),
        2 => (page.clone(), offset, seed.clone())
            .prop_map(|(page, offset, seed)| Op::Daemon { page, offset, seed }),
        1 => (guest.clone(), seed.clone(), any::<bool>())
            .prop_map(|(guest, seed, writes)| Op::Sweep { guest, seed, writes }),
        2 => any::<bool>().prop_map(|durable| Op::Sync { durable }),
        2 => page.clone().prop_map(|page| Op::Take { page }),
        2 => (0..PAGES * PAGE as u64).prop_map(|bytes| Op::Resize { bytes }),
        1 => guest.prop_map(|guest| Op::Fence { guest }),
        1 => (64..256_u32).prop_map(|frames| Op::Budget { frames }),
        1 => (1..100_u64).prop_map(|pages| Op::Reclaim { pages }),
        1 => (page, seed).prop_map(|(page, seed)| Op::Host { page, seed }),
    ]
}

struct Model {
    driver: Driver,
    bytes: Vec<u8>,
    force: bool,
}

impl Model {
    fn new(force: bool) -> Self {
        let bytes = content(1, 70 * PAGE + 1234);
        let config = CacheConfig {
            lease_signal: None,
            ..config(128 + Self::more(force))
        };
        let driver = Driver::with(coherent_rig(local(force), config), &bytes, GUESTS);
        Self {
            driver,
            bytes,
            force,
        }
    }

    /// Without force every page may need a second frame when a session is fenced.
    fn more(force: bool) -> u32 {
        if force { 0 } else { 2 * PAGES as u32 }
    }

    /// The page within the file and its bytes; `None`: past the end.
    fn page(&self, page: u64) -> Option<std::ops::Range<usize>> {
        let start = page as usize * PAGE;
        (start < self.bytes.len()).then(|| start..self.bytes.len().min(start + PAGE))
    }

    fn on_host(&self, page: u64) -> bool {
        let range = self.page(page).unwrap();
        let mut seen = vec![0; range.len()];
        let host = std::fs::File::open(self.driver.rig.path("f")).unwrap();
        host.read_exact_at(&mut seen, range.start as u64).unwrap();
        seen == self.bytes[range]
    }

    fn load(&mut self, guest: u16, page: u64) {
        let Some(range) = self.page(page) else {
            assert!(self.driver.load(guest, page).is_err());
            return;
        };
        let seen = self.driver.load(guest, page).unwrap();
        let seen = &seen[..range.len().min(seen.len())];
        assert!(
            *seen == self.bytes[range],
            "page {page} as guest {guest} loads it"
        );
        let held = &self.driver.held[&page];
        if !held.writers.contains(&guest) {
            assert!(self.on_host(page), "page {page} was seen and is not saved");
        }
    }

    fn store(&mut self, guest: u16, page: u64, offset: usize, seed: u64, shared: bool) {
        let Some(range) = self.page(page) else {
            return;
        };
        self.driver.reserve(page, 1).unwrap();
        let access = Access::ReadWrite;
        let granted = self.driver.grant(guest, page, access, shared).unwrap();
        let bytes = seed.to_le_bytes();
        self.driver
            .store_at(guest, granted.at, page, offset, &bytes);
        let room = range.len().saturating_sub(offset).min(8);
        let at = range.start + offset.min(range.len());
        self.bytes[at..at + room].copy_from_slice(&bytes[..room]);
        if range.len() < PAGE {
            // Nobody keeps it from storing behind the end, and nobody is to see it.
            self.driver.store_at(
                guest,
                granted.at,
                page,
                range.len(),
                &vec![7; PAGE - range.len()],
            );
        }
    }

    fn daemon(&mut self, page: u64, offset: usize, seed: u64) {
        let Some(range) = self.page(page).filter(|range| offset + 8 <= range.len()) else {
            return;
        };
        self.driver.let_go(page);
        let frame = self.driver.frame(page).unwrap();
        let (cache, index) = (self.driver.cache(), PageIndex(page));
        let bytes = seed.to_le_bytes();
        let mut seen = vec![0; range.len()];
        let file = self.driver.file.clone();
        cache
            .strict_read(&file, index, frame, 0, &mut seen)
            .unwrap();
        assert!(seen == self.bytes[range.clone()]);
        cache
            .strict_write(&file, index, frame, offset, &bytes)
            .unwrap();
        self.bytes[range.start + offset..][..8].copy_from_slice(&bytes);
        self.driver.save(page).unwrap();
        assert!(self.on_host(page));
    }

    fn resize(&mut self, bytes: u64) {
        let state = self.driver.resize(bytes).unwrap();
        assert_eq!(state.bytes, bytes);
        self.bytes.resize(bytes as usize, 0);
        let host = std::fs::metadata(self.driver.rig.path("f")).unwrap();
        assert_eq!(host.len(), bytes);
    }

    fn fence(&mut self, guest: u16) {
        self.driver.fence(guest);
        self.driver.rig.audit();
        // It comes back, and what it had mapped before is gone.
        self.driver.end(guest);
        let again = self.driver.rig.open_to("f", OpenHow::Map, who(guest), true);
        self.driver.file = again.unwrap().file;
    }

    fn host(&mut self, page: u64, seed: u64) {
        let Some(range) = self.page(page) else {
            return;
        };
        self.driver.take_from(0);
        self.driver.rig.pump(Duration::from_millis(1));
        self.driver.serve();
        let before = self.driver.host_changed;
        let host = std::fs::OpenOptions::new()
            .write(true)
            .open(self.driver.rig.path("f"))
            .unwrap();
        let fresh = content(seed, range.len());
        host.write_all_at(&fresh, range.start as u64).unwrap();
        self.bytes[range].copy_from_slice(&fresh);
        for _ in 0..2000 {
            if self.driver.host_changed > before {
                return;
            }
            self.driver.rig.pump(Duration::from_millis(1));
            self.driver.serve();
        }
        panic!("nobody was told that the host wrote");
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Load { guest, page } => self.load(guest, page),
            Op::Store {
                guest,
                page,
                offset,
                seed,
                shared,
            } => {
                self.store(guest, page, offset, seed, shared);
            }
            Op::Daemon { page, offset, seed } => self.daemon(page, offset, seed),
            Op::Sweep {
                guest,
                seed,
                writes,
            } => {
                for page in 0..pages_for(self.bytes.len() as u64) {
                    match writes && page % 2 == 0 {
                        true => self.store(guest, page, 9, seed ^ page, false),
                        false => self.load(guest, page),
                    }
                }
            }
            Op::Sync { durable } => self.driver.sync(Some(1), durable).unwrap(),
            Op::Take { page } => self.driver.take(page),
            Op::Resize { bytes } => self.resize(bytes),
            Op::Fence { guest } => self.fence(guest),
            Op::Budget { frames } => {
                let cache = self.driver.cache();
                // Refused where too much is in quarantine.
                let _ = cache.set_frames_max(frames + Self::more(self.force));
            }
            Op::Reclaim { pages } => {
                self.driver.cache().reclaim(pages);
            }
            Op::Host { page, seed } => self.host(page, seed),
        }
        self.driver.rig.pump(Duration::ZERO);
        self.driver.serve();
        self.driver.rig.audit();
    }

    fn end(&mut self) {
        self.driver.take_from(0);
        assert!(self.driver.host() == self.bytes, "something was lost");
        self.driver.rig.audit();
        let stats = self.driver.cache().stats();
        assert_eq!(stats.frames_resident, 0, "{stats:?}");
    }
}

fn run(force: bool, ops: Vec<Op>) {
    let mut model = Model::new(force);
    ops.into_iter().for_each(|op| model.run(op));
    model.end();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn local_coherent_files_are_as_the_model(ops in prop::collection::vec(op(), 1..60)) {
        run(true, ops);
    }

    #[test]
    fn local_coherent_files_are_as_the_model_without_force(ops in prop::collection::vec(op(), 1..60)) {
        run(false, ops);
    }
}
