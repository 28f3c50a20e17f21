//! A cache over the local backend against a plain model: what is in the files, who has what open.
//! After each step the audit is clean; every page read has the bytes of the file.
//!
//! Cannot show: changes by a host that go on during a fault (they are whole steps here), mappings.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::*;
use copage_cache::*;
use proptest::prelude::*;
use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

const FILES: usize = 3;
const GUESTS: u16 = 3;

#[derive(Clone, Debug)]
enum Op {
    Open {
        file: usize,
        guest: u16,
        pin: bool,
    },
    Close {
        file: usize,
        guest: u16,
        pin: bool,
    },
    Fault {
        file: usize,
        guest: u16,
        page: u64,
        count: u32,
        sequential: bool,
    },
    Read {
        file: usize,
        guest: u16,
        offset: u64,
        len: u32,
    },
    Write {
        file: usize,
        page: u64,
        seed: u64,
    },
    Truncate {
        file: usize,
        bytes: u64,
    },
    Reclaim {
        pages: u64,
    },
    Budget {
        frames: u32,
    },
    End {
        guest: u16,
    },
    Fence {
        guest: u16,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let file = 0..FILES;
    let guest = 1..=GUESTS;
    prop_oneof![
        3 => (file.clone(), guest.clone(), prop::bool::weighted(0.2))
            .prop_map(|(file, guest, pin)| Op::Open { file, guest, pin }),
        1 => (file.clone(), guest.clone(), any::<bool>())
            .prop_map(|(file, guest, pin)| Op::Close { file, guest, pin }),
        8 => (file.clone(), guest.clone(), 0..80_u64, 1..20_u32, any::<bool>())
            .prop_map(|(file, guest, page, count, sequential)| Op::Fault { file, guest, page, count, sequential }),
        2 => (file.clone(), guest.clone(), 0..300_000_u64, 0..50_000_u32)
            .prop_map(|(file, guest, offset, len)| Op::Read { file, guest, offset, len }),
        2 => (file.clone(), 0..70_u64, 1..u64::MAX).prop_map(|(file, page, seed)| Op::Write { file, page, seed }),
        1 => (file, 1..300_000_u64).prop_map(|(file, bytes)| Op::Truncate { file, bytes }),
        1 => (1..100_u64).prop_map(|pages| Op::Reclaim { pages }),
        1 => (64..=256_u32).prop_map(|frames| Op::Budget { frames }),
        1 => guest.clone().prop_map(|guest| Op::End { guest }),
        1 => guest.prop_map(|guest| Op::Fence { guest }),
    ]
}

#[derive(Default)]
struct Model {
    data: Vec<Vec<u8>>,
    /// (file, guest, pinned) to the open file and how many such opens there are.
    opens: HashMap<(usize, u16, bool), (Arc<CachedFile>, u32)>,
}

impl Model {
    fn any(&self, file: usize, guest: u16) -> Option<Arc<CachedFile>> {
        [false, true]
            .iter()
            .find_map(|pin| self.opens.get(&(file, guest, *pin)))
            .map(|o| o.0.clone())
    }
}

fn name(file: usize) -> String {
    format!("f{file}")
}

fn step(rig: &mut Rig, model: &mut Model, op: Op) {
    match op {
        Op::Open { file, guest, pin } => {
            let how = if pin { OpenHow::Pin } else { OpenHow::Map };
            match rig.open(&name(file), how, who(guest)) {
                Ok(done) => {
                    assert_eq!(done.state.bytes, model.data[file].len() as u64);
                    let slot = model
                        .opens
                        .entry((file, guest, pin))
                        .or_insert((done.file.clone(), 0));
                    slot.1 += 1;
                    if pin {
                        let generation = done.state.generation;
                        for page in 0..model.data[file].len().div_ceil(PAGE) {
                            let seen = rig.page(&done.file, generation, page as u64).unwrap();
                            let start = page * PAGE;
                            let end = model.data[file].len().min(start + PAGE);
                            assert!(seen == model.data[file][start..end], "pinned page {page}");
                        }
                    }
                }
                Err(e) => assert!(pin && e.is_pin_refusal(), "{e}"),
            }
        }
        Op::Close { file, guest, pin } => {
            let how = if pin { OpenHow::Pin } else { OpenHow::Map };
            if let Some((open, count)) = model.opens.get_mut(&(file, guest, pin)) {
                rig.cache.close(open, how, who(guest));
                *count -= 1;
                if *count == 0 {
                    model.opens.remove(&(file, guest, pin));
                }
            }
        }
        Op::Fault {
            file,
            guest,
            page,
            count,
            sequential,
        } => {
            let Some(open) = model.any(file, guest) else {
                return;
            };
            let pages = model.data[file].len().div_ceil(PAGE) as u64;
            let hint = if sequential {
                FaultHint::Sequential
            } else {
                FaultHint::Random
            };
            let generation = rig.cache.current(&open).generation;
            let result = rig.fault_of(&open, who(guest), generation, (page, count), hint);
            match result {
                Err(CacheError::BadRange(_)) => assert!(page >= pages, "{page} of {pages}"),
                Err(CacheError::NoFrames) => no_room_for(rig, count.into()),
                Err(e) => panic!("{e}"),
                Ok(_) if page < pages => rig.check(&open, who(guest), page, &model.data[file]),
                Ok(FaultDone::Stale(_)) => {}
                Ok(done) => panic!("{done:?} of {pages} pages"),
            }
        }
        Op::Read {
            file,
            guest,
            offset,
            len,
        } => {
            let Some(open) = model.any(file, guest) else {
                return;
            };
            let data = &model.data[file];
            let from = data.len().min(offset as usize);
            let to = data.len().min(offset as usize + len as usize);
            let expected = data[from..to].to_vec();
            match rig.read(&open, who(guest), offset, len) {
                Ok(seen) => assert!(
                    seen == expected,
                    "{} bytes for {}",
                    seen.len(),
                    expected.len()
                ),
                Err(CacheError::NoFrames) => {
                    let pages = to.div_ceil(PAGE) - from / PAGE;
                    no_room_for(rig, pages as u64);
                }
                Err(e) => panic!("{e}"),
            }
        }
        Op::Write { file, page, seed } => {
            let new = content(seed, PAGE);
            let start = page as usize * PAGE;
            let data = &mut model.data[file];
            let old = data.len();
            data.resize(old.max(start + PAGE), 0);
            // No hole is left that would read as zeros.
            if old < start {
                let between = content(seed ^ 1, start - old);
                data[old..start].copy_from_slice(&between);
            }
            data[start..start + PAGE].copy_from_slice(&new);
            let (path, data) = (rig.path(&name(file)), data.clone());
            let from = old.min(start);
            rig.host(|| {
                let host = std::fs::File::options().write(true).open(&path).unwrap();
                host.write_all_at(&data[from..], from as u64).unwrap();
            });
            rig.cache.host_events();
        }
        Op::Truncate { file, bytes } => {
            let bytes = (bytes as usize).min(model.data[file].len());
            model.data[file].truncate(bytes);
            let path = rig.path(&name(file));
            rig.host(|| {
                std::fs::File::options()
                    .write(true)
                    .open(&path)
                    .unwrap()
                    .set_len(bytes as u64)
                    .unwrap();
            });
            rig.cache.host_events();
        }
        Op::Reclaim { pages } => {
            rig.cache.reclaim(pages);
        }
        Op::Budget { frames } => match rig.cache.set_frames_max(frames) {
            Ok(()) => rig.until("the budget", |s| {
                s.frames_resident + s.frames_quarantined <= frames
            }),
            Err(e) => assert!(matches!(e, CacheError::BudgetBelowPinned { .. }), "{e}"),
        },
        Op::End { guest } => {
            rig.cache.guest_ended(who(guest));
            model.opens.retain(|(_, g, _), _| *g != guest);
            assert_eq!(rig.backend.grant_count(who(guest).dom), 0);
        }
        Op::Fence { guest } => {
            rig.cache.guest_fenced(who(guest));
            model.opens.retain(|(_, g, _), _| *g != guest);
        }
    }
}

/// A request may be refused for want of frames only when those that cannot be given back, pinned or
/// in quarantine, leave less room than it needs at once.
fn no_room_for(rig: &Rig, pages: u64) {
    let stats = rig.cache.stats();
    let held = u64::from(stats.frames_pinned) + u64::from(stats.frames_quarantined);
    assert!(
        held + pages > u64::from(stats.frames_max),
        "{pages} pages: {stats:?}"
    );
}

fn run(force: bool, ops: Vec<Op>) {
    let mut rig = Rig::with(
        local(force),
        CacheConfig {
            collapse: false,
            ..config(128)
        },
    );
    let mut model = Model::default();
    for file in 0..FILES {
        let data = content(file as u64 + 1, (file * 40 + 10) * PAGE + file * 100);
        rig.write(&name(file), &data);
        model.data.push(data);
    }
    for op in ops {
        step(&mut rig, &mut model, op);
        rig.pump(Duration::ZERO);
        rig.audit();
    }
    for guest in 1..=GUESTS {
        rig.cache.guest_ended(who(guest));
    }
    rig.until("old homes end", |s| s.homes_retired == 0);
    rig.cache.drop_all();
    rig.audit();
    let stats = rig.cache.stats();
    assert_eq!(
        (stats.frames_resident, stats.frames_quarantined),
        (0, 0),
        "{stats:?}"
    );
    assert!(
        stats
            .guests
            .iter()
            .all(|g| (g.frames, g.pinned_pages, g.quarantined_pages) == (0, 0, 0)),
        "{stats:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn local_with_force_equals_the_model(ops in prop::collection::vec(op(), 1..60)) {
        run(true, ops);
    }

    #[test]
    fn local_without_force_equals_the_model(ops in prop::collection::vec(op(), 1..60)) {
        run(false, ops);
    }
}
