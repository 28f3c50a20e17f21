//! A page that a session was given and has not mapped yet is left to it for a while: taken at once, two
//! that want it would take it from each other for ever, and neither would store anything.
//!
//! Cannot show: how long mapping takes.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_coherence::strict::{Action, Event, Pages, Place, StrictConfig, Table};
use copage_grants::{Access, Epoch, FrameNo, PageIndex, Version};

const A: Epoch = Epoch(7);
const B: Epoch = Epoch(8);
const PLACE: Place = Place {
    file: 1,
    page: PageIndex(3),
};

/// Entries as a hypervisor shows them: one that is not in use can be revoked.
#[derive(Default)]
struct Entries {
    mapped: Vec<Epoch>,
}

impl Table for Entries {
    fn grant(&mut self, _: Epoch, _: Place, _: FrameNo, _: Access, _: bool) -> Result<(), i32> {
        Ok(())
    }

    fn revoke(&mut self, epoch: Epoch, _: Place, _: FrameNo) -> bool {
        !self.mapped.contains(&epoch)
    }

    fn is_mapped(&mut self, epoch: Epoch, _: Place, _: FrameNo) -> bool {
        self.mapped.contains(&epoch)
    }
}

struct Bench {
    pages: Pages,
    table: Entries,
}

impl Bench {
    /// A has the page for writing since 10 ms, B wants it.
    fn new() -> Self {
        let config = StrictConfig {
            hold_ms: 2,
            map_ms: 200,
            look_again_ms: 5,
            ..StrictConfig::default()
        };
        let mut bench = Self {
            pages: Pages::new(config, Version(1), 0),
            table: Entries::default(),
        };
        assert_eq!(bench.want(10, A), [Action::Fill { place: PLACE }]);
        let placed = Event::Placed {
            place: PLACE,
            frame: FrameNo(1),
        };
        assert!(matches!(
            bench.step(10, placed)[..],
            [Action::Grant { epoch: A, .. }]
        ));
        assert_eq!(bench.want(11, B), []);
        bench
    }

    fn step(&mut self, now_ms: u64, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        self.pages.step(now_ms, event, &mut self.table, &mut out);
        out
    }

    fn want(&mut self, now_ms: u64, epoch: Epoch) -> Vec<Action> {
        let (place, access, ticket) = (PLACE, Access::ReadWrite, epoch.0);
        self.step(
            now_ms,
            Event::Want {
                epoch,
                ticket,
                place,
                access,
            },
        )
    }

    /// Lets time pass, looking whenever something is due; the first thing that is done, and when.
    fn until(&mut self, end_ms: u64) -> Option<(u64, Action)> {
        while let Some(due_ms) = self.pages.next_due_ms().filter(|at| *at <= end_ms) {
            if let Some(first) = self.step(due_ms, Event::Tick).into_iter().next() {
                return Some((due_ms, first));
            }
        }
        None
    }
}

#[test]
fn who_has_not_mapped_it_yet_keeps_it() {
    let mut bench = Bench::new();
    assert_eq!(bench.until(100), None, "nothing is taken");
    bench.table.mapped.push(A);
    let (at_ms, action) = bench.until(150).unwrap();
    assert_eq!(
        action,
        Action::Recall {
            epoch: A,
            place: PLACE
        }
    );
    // From when it was seen, at the next look, and not from when it was given.
    assert!((102..=108).contains(&at_ms), "{at_ms}");
}

#[test]
fn who_never_maps_it_loses_it() {
    let mut bench = Bench::new();
    let (at_ms, action) = bench.until(1000).unwrap();
    assert!((210..=212).contains(&at_ms), "{at_ms}");
    // What A may have stored by then is saved first.
    assert!(matches!(action, Action::Save { .. }), "{action:?}");
}
