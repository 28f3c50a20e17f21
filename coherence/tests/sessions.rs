//! The session machine under random events, against a plain model that keeps everything and looks
//! through all of it each time.
//!
//! Cannot show: that the daemon does what the machine says, or that the daemon's clock is right.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use copage_coherence::limits::DRIFT_PERMILLE;
use copage_coherence::msg::{FenceReason, FileToken, Generation, InvalidateReason, PageRange};
use copage_coherence::session::{
    Action, Event, Guest, RecallOutcome, Refusal, SessionConfig, Sessions, Subject,
};
use copage_grants::{DomId, Epoch, PageIndex};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const CONFIG: SessionConfig = SessionConfig {
    lease_ttl_ms: 1000,
    invalidate_deadline_ms: 400,
    sessions_max: 6,
    guest_sessions_max: 3,
    recalls_max: 4,
};
const FIRST: Epoch = Epoch(100);

fn subject() -> Subject {
    Subject::Pages {
        file: FileToken(1),
        generation: Generation(1),
        range: PageRange {
            first: PageIndex(0),
            count: 1,
        },
        reason: InvalidateReason::Reclaim,
    }
}

fn drifted(term_ms: u32) -> u64 {
    let term_ms = u64::from(term_ms);
    term_ms + term_ms * DRIFT_PERMILLE / 1000
}

/// Random inputs name sessions and recalls by where they stand among all there ever were.
#[derive(Clone, Debug)]
enum Input {
    Connect(u32),
    Renew(prop::sample::Index),
    Ack(prop::sample::Index, prop::sample::Index),
    Recall(prop::sample::Index),
    Fence(prop::sample::Index),
    End(prop::sample::Index),
    Drained(prop::sample::Index),
    Stranger(u64),
    Tick,
    /// Jump to just when the next thing is due.
    ToDue,
}

fn input() -> impl Strategy<Value = (u64, Input)> {
    use Input::*;
    let any_index = any::<prop::sample::Index>;
    let what = prop_oneof![
        3 => (0u32..4).prop_map(Connect),
        4 => any_index().prop_map(Renew),
        3 => (any_index(), any_index()).prop_map(|(a, b)| Ack(a, b)),
        4 => any_index().prop_map(Recall),
        1 => any_index().prop_map(Fence),
        1 => any_index().prop_map(End),
        2 => any_index().prop_map(Drained),
        1 => any::<u64>().prop_map(Stranger),
        1 => Just(Tick),
        1 => Just(ToDue),
    ];
    (prop_oneof![5 => 0u64..50, 1 => 100u64..1500], what)
}

#[derive(Default)]
struct Model {
    live: BTreeMap<u64, Live>,
    busy: BTreeMap<u16, u32>,
    ever: BTreeSet<u64>,
    asked: BTreeSet<u64>,
    settled: BTreeSet<u64>,
}

struct Live {
    dom: u16,
    guest: u32,
    lease_until_ms: u64,
    recalls: BTreeMap<u64, u64>,
}

impl Model {
    fn dues(&self) -> Option<u64> {
        self.live
            .values()
            .flat_map(|s| s.recalls.values().copied().chain([s.lease_until_ms]))
            .min()
    }

    /// Takes in what the machine said after `event` at `now_ms`, and objects.
    fn check(
        &mut self,
        now_ms: u64,
        event: Event,
        actions: &[Action],
    ) -> Result<(), TestCaseError> {
        let late: BTreeSet<u64> = self
            .live
            .iter()
            .filter(|(_, s)| s.lease_until_ms <= now_ms || s.recalls.values().any(|&d| d <= now_ms))
            .map(|(&e, _)| e)
            .collect();
        let mut gone = BTreeSet::new();
        for action in actions {
            match *action {
                Action::Welcome { dom, epoch, conn } => {
                    let Event::Connect { guest, conn: asked } = event else {
                        return Err(TestCaseError::fail("welcome without connect"));
                    };
                    prop_assert_eq!(conn, asked);
                    prop_assert!(self.ever.insert(epoch.0), "an epoch came twice");
                    prop_assert!(epoch >= FIRST);
                    prop_assert!(self.live.values().all(|s| s.dom != dom.0));
                    prop_assert!(
                        !self.busy.contains_key(&dom.0),
                        "a domid was reused while busy"
                    );
                    let lease_until_ms = now_ms + drifted(CONFIG.lease_ttl_ms);
                    self.live.insert(
                        epoch.0,
                        Live {
                            dom: dom.0,
                            guest: guest.0,
                            lease_until_ms,
                            recalls: BTreeMap::new(),
                        },
                    );
                    prop_assert!(self.live.len() + self.busy.len() <= CONFIG.sessions_max);
                }
                Action::Refuse { why, .. } => {
                    let Event::Connect { guest, .. } = event else {
                        return Err(TestCaseError::fail("refusal without connect"));
                    };
                    let of_guest = self.live.values().filter(|s| s.guest == guest.0).count()
                        + self.busy.values().filter(|&&g| g == guest.0).count();
                    match why {
                        Refusal::GuestSessions(n) => {
                            prop_assert_eq!(n, of_guest);
                            prop_assert!(n >= CONFIG.guest_sessions_max);
                        }
                        Refusal::Sessions(n) => prop_assert!(n >= CONFIG.sessions_max),
                    }
                }
                Action::Renewed { epoch } => {
                    prop_assert_eq!(event, Event::Renew { epoch });
                    let s = self.live.get_mut(&epoch.0);
                    prop_assert!(s.is_some(), "a dead session renewed");
                    s.unwrap().lease_until_ms = now_ms + drifted(CONFIG.lease_ttl_ms);
                }
                Action::Ask { epoch, recall, .. } => {
                    let for_it = matches!(event, Event::Recall { epoch: e, .. } if e == epoch);
                    prop_assert!(for_it, "asked unasked");
                    prop_assert!(self.asked.insert(recall), "a recall number came twice");
                    let s = self.live.get_mut(&epoch.0);
                    prop_assert!(s.is_some(), "a dead session was asked");
                    let s = s.unwrap();
                    s.recalls
                        .insert(recall, now_ms + drifted(CONFIG.invalidate_deadline_ms));
                    prop_assert!(s.recalls.len() <= CONFIG.recalls_max);
                }
                Action::Settled {
                    epoch,
                    recall,
                    outcome,
                } => {
                    prop_assert!(self.settled.insert(recall), "a recall ended twice");
                    let s = self.live.get_mut(&epoch.0).unwrap();
                    prop_assert!(s.recalls.remove(&recall).is_some());
                    if outcome == RecallOutcome::Acked {
                        let for_it = matches!(event,
                            Event::Ack { epoch: e, recall: r }
                            | Event::Settle { epoch: e, recall: r }
                            if e == epoch && r == recall);
                        prop_assert!(for_it, "settled by something else");
                        prop_assert!(!late.contains(&epoch.0), "a late ack counted");
                    }
                }
                Action::Fenced {
                    epoch, dom, guest, ..
                }
                | Action::Ended { epoch, dom, guest } => {
                    let s = self.live.remove(&epoch.0);
                    prop_assert!(s.is_some(), "a session ended twice");
                    let s = s.unwrap();
                    prop_assert_eq!((s.dom, s.guest), (dom.0, guest.0));
                    prop_assert!(s.recalls.is_empty(), "a recall was forgotten at the end");
                    self.busy.insert(dom.0, guest.0);
                    gone.insert(epoch.0);
                    if let Action::Fenced { reason, .. } = *action {
                        match reason {
                            FenceReason::LeaseExpired => prop_assert!(s.lease_until_ms <= now_ms),
                            FenceReason::DeadlineMissed => prop_assert!(late.contains(&epoch.0)),
                            _ => {}
                        }
                    }
                }
            }
        }
        prop_assert!(
            late.is_subset(&gone),
            "a session outlived its term or a deadline"
        );
        if let Event::Drained { dom } = event {
            self.busy.remove(&dom.0);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn sessions_keep_their_rules(inputs in proptest::collection::vec(input(), 1..200)) {
        let mut machine = Sessions::new(CONFIG, FIRST);
        let mut model = Model::default();
        let mut now_ms = 1;
        let mut out = Vec::new();
        for (conn, (later_ms, input)) in inputs.into_iter().enumerate() {
            now_ms += later_ms;
            let epochs: Vec<u64> = model.ever.iter().copied().collect();
            let pick = |i: &prop::sample::Index| {
                Epoch(if epochs.is_empty() { 7 } else { epochs[i.index(epochs.len())] })
            };
            let event = match &input {
                Input::Connect(guest) => Event::Connect { conn: conn as u64, guest: Guest(*guest) },
                Input::Renew(i) => Event::Renew { epoch: pick(i) },
                Input::Ack(i, r) => {
                    let asked: Vec<u64> = model.asked.iter().copied().collect();
                    let recall = if asked.is_empty() { 0 } else { asked[r.index(asked.len())] };
                    Event::Ack { epoch: pick(i), recall }
                }
                Input::Recall(i) => Event::Recall { epoch: pick(i), subject: subject() },
                Input::Fence(i) => Event::Fence { epoch: pick(i), reason: FenceReason::Removed },
                Input::End(i) => Event::End { epoch: pick(i) },
                Input::Drained(i) => {
                    let busy: Vec<u16> = model.busy.keys().copied().collect();
                    Event::Drained { dom: DomId(if busy.is_empty() { 3 } else { busy[i.index(busy.len())] }) }
                }
                Input::Stranger(epoch) => Event::Renew { epoch: Epoch(*epoch) },
                Input::Tick => Event::Tick,
                Input::ToDue => {
                    now_ms = machine.next_due_ms().unwrap_or(now_ms).max(now_ms);
                    Event::Tick
                }
            };
            prop_assert_eq!(machine.next_due_ms(), model.dues());
            out.clear();
            machine.step(now_ms, event, &mut out);
            model.check(now_ms, event, &out)?;
            prop_assert_eq!(machine.len(), model.live.len());
            let draining: BTreeMap<u16, u32> = machine.draining().map(|(d, g)| (d.0, g.0)).collect();
            prop_assert_eq!(&draining, &model.busy);
            for &epoch in &model.ever {
                let live = model.live.get(&epoch);
                prop_assert_eq!(machine.counts(now_ms, Epoch(epoch)), live.is_some());
            }
        }
    }
}

/// A machine with one session of guest 0, begun at 0 ms.
fn one() -> (Sessions, DomId, Epoch) {
    let mut machine = Sessions::new(CONFIG, FIRST);
    let mut out = Vec::new();
    machine.step(
        0,
        Event::Connect {
            conn: 5,
            guest: Guest(0),
        },
        &mut out,
    );
    let [
        Action::Welcome {
            conn: 5,
            dom,
            epoch,
        },
    ] = out[..]
    else {
        unreachable!("{out:?}")
    };
    (machine, dom, epoch)
}

fn step(machine: &mut Sessions, now_ms: u64, event: Event) -> Vec<Action> {
    let mut out = Vec::new();
    machine.step(now_ms, event, &mut out);
    out
}

#[test]
fn a_lease_lasts_its_term_and_the_drift() {
    let (mut machine, dom, epoch) = one();
    assert_eq!(machine.next_due_ms(), Some(1010));
    assert_eq!(step(&mut machine, 1009, Event::Tick), []);
    let fenced = Action::Fenced {
        epoch,
        dom,
        guest: Guest(0),
        reason: FenceReason::LeaseExpired,
    };
    // A renewal that comes late is too late even though no timer rang before it.
    assert_eq!(step(&mut machine, 1010, Event::Renew { epoch }), [fenced]);
    assert_eq!(step(&mut machine, 1010, Event::Renew { epoch }), []);
    assert_eq!(machine.next_due_ms(), None);
}

#[test]
fn renewing_does_not_excuse_from_a_recall() {
    let (mut machine, dom, epoch) = one();
    let asked = step(
        &mut machine,
        10,
        Event::Recall {
            epoch,
            subject: subject(),
        },
    );
    let [Action::Ask { recall, .. }] = asked[..] else {
        unreachable!("{asked:?}")
    };
    for at in [100, 200, 300, 400] {
        assert_eq!(
            step(&mut machine, at, Event::Renew { epoch }),
            [Action::Renewed { epoch }]
        );
    }
    assert_eq!(
        step(&mut machine, 414, Event::Renew { epoch }),
        [
            Action::Settled {
                epoch,
                recall,
                outcome: RecallOutcome::Fenced
            },
            Action::Fenced {
                epoch,
                dom,
                guest: Guest(0),
                reason: FenceReason::DeadlineMissed
            },
        ]
    );
}

#[test]
fn a_guest_that_never_acks_has_a_bound() {
    let (mut machine, _, epoch) = one();
    for _ in 0..CONFIG.recalls_max {
        let asked = step(
            &mut machine,
            1,
            Event::Recall {
                epoch,
                subject: subject(),
            },
        );
        assert!(matches!(asked[..], [Action::Ask { .. }]));
    }
    let over = step(
        &mut machine,
        1,
        Event::Recall {
            epoch,
            subject: subject(),
        },
    );
    assert!(matches!(
        over.last(),
        Some(Action::Fenced {
            reason: FenceReason::Protocol,
            ..
        })
    ));
    assert_eq!(over.len(), CONFIG.recalls_max + 1);
}

#[test]
fn domids_wait_until_they_are_drained() {
    let mut machine = Sessions::new(CONFIG, FIRST);
    let mut doms = Vec::new();
    for i in 0..CONFIG.guest_sessions_max as u64 {
        let out = step(
            &mut machine,
            0,
            Event::Connect {
                conn: i,
                guest: Guest(0),
            },
        );
        let [Action::Welcome { dom, epoch, .. }] = out[..] else {
            unreachable!("{out:?}")
        };
        step(&mut machine, 0, Event::End { epoch });
        doms.push(dom);
    }
    let again = Event::Connect {
        conn: 9,
        guest: Guest(0),
    };
    let refused = step(&mut machine, 0, again);
    assert!(matches!(
        refused[..],
        [Action::Refuse {
            why: Refusal::GuestSessions(3),
            ..
        }]
    ));
    // Others are not kept out by it.
    let other = step(
        &mut machine,
        0,
        Event::Connect {
            conn: 1,
            guest: Guest(1),
        },
    );
    assert!(matches!(other[..], [Action::Welcome { .. }]));
    assert_eq!(step(&mut machine, 0, Event::Drained { dom: doms[1] }), []);
    let back = step(&mut machine, 0, again);
    assert!(matches!(back[..], [Action::Welcome { dom, .. }] if !doms.contains(&dom)));
}

#[test]
fn time_that_goes_back_stands_still() {
    let (mut machine, _, epoch) = one();
    step(&mut machine, 900, Event::Renew { epoch });
    step(&mut machine, 100, Event::Renew { epoch });
    assert_eq!(machine.next_due_ms(), Some(1910));
}

#[test]
fn equal_histories_are_equal_states() {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let hash = |m: &Sessions| {
        let mut hasher = DefaultHasher::new();
        m.hash(&mut hasher);
        hasher.finish()
    };
    let (a, b) = (one().0, one().0);
    assert_eq!((hash(&a), &a), (hash(&b), &b));
}
