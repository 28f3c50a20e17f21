//! Many pages asked back from one session at once.
//!
//! Cannot show: orders of messages, which the model goes through.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_coherence::session::{
    Action as SessionAction, Event as SessionEvent, Guest, SessionConfig,
};
use copage_coherence::strict::{Event, Input, Output, Place, Strict, StrictConfig, Table};
use copage_grants::{Access, Epoch, FrameNo, PageIndex, Version};

const PAGES: u64 = 50;
const RECALLS_MAX: usize = 8;

/// What is granted stays mapped until its session lets go.
#[derive(Default)]
struct Mapped(Vec<(Epoch, Place)>);

impl Table for Mapped {
    fn grant(
        &mut self,
        epoch: Epoch,
        place: Place,
        _: FrameNo,
        _: Access,
        _: bool,
    ) -> Result<(), i32> {
        self.0.push((epoch, place));
        Ok(())
    }

    fn revoke(&mut self, epoch: Epoch, place: Place, _: FrameNo) -> bool {
        !self.0.contains(&(epoch, place))
    }
}

fn place(page: u64) -> Place {
    Place {
        file: 1,
        page: PageIndex(page),
    }
}

/// A session that writes all pages, and each of them wanted back.
fn all_wanted_back(machine: &mut Strict, table: &mut Mapped) -> (Epoch, Vec<u64>) {
    let mut out = Vec::new();
    let connect = SessionEvent::Connect {
        conn: 1,
        guest: Guest(1),
    };
    machine.step(1, Input::Session(connect), table, &mut out);
    let Some(Output::Session(SessionAction::Welcome { epoch, .. })) = out.pop() else {
        panic!("no session");
    };
    for page in 0..PAGES {
        let (place, access) = (place(page), Access::ReadWrite);
        let want = Event::Want {
            epoch,
            ticket: page,
            place,
            access,
        };
        machine.step(1, Input::Page(want), table, &mut out);
        let frame = FrameNo(page as u32);
        let placed = Event::Placed { place, frame };
        machine.step(1, Input::Page(placed), table, &mut out);
    }
    out.clear();
    for page in 0..PAGES {
        let (ticket, place) = (page, place(page));
        machine.step(
            2,
            Input::Page(Event::Take { ticket, place }),
            table,
            &mut out,
        );
    }
    (epoch, asks(&out))
}

fn machine() -> Strict {
    let sessions = SessionConfig {
        lease_ttl_ms: 20_000,
        invalidate_deadline_ms: 20_000,
        sessions_max: 8,
        guest_sessions_max: 8,
        recalls_max: RECALLS_MAX,
    };
    Strict::new(sessions, StrictConfig::default(), (Epoch(1), Version(1)), 0)
}

fn asks(out: &[Output]) -> Vec<u64> {
    let ask = |output: &Output| match output {
        Output::Session(SessionAction::Ask { recall, .. }) => Some(*recall),
        _ => None,
    };
    out.iter().filter_map(ask).collect()
}

fn is_fenced(out: &[Output]) -> bool {
    let fenced = |output: &Output| matches!(output, Output::Session(SessionAction::Fenced { .. }));
    out.iter().any(fenced)
}

#[test]
fn a_session_is_asked_for_no_more_than_it_may_owe() {
    let (mut machine, mut table) = (machine(), Mapped::default());
    let (epoch, mut unanswered) = all_wanted_back(&mut machine, &mut table);
    assert_eq!(unanswered.len(), RECALLS_MAX / 2);
    // It lets go of a few that it was not asked for yet.
    for page in 40..PAGES {
        table.0.retain(|(_, at)| *at != place(page));
        let released = Event::Released {
            epoch,
            place: place(page),
        };
        machine.step(3, Input::Page(released), &mut table, &mut Vec::new());
    }
    let mut answered = 0;
    while let Some(recall) = unanswered.pop() {
        // The table stands for what the guest unmapped, whichever it was.
        table.0.clear();
        let mut out = Vec::new();
        let ack = SessionEvent::Ack { epoch, recall };
        machine.step(4, Input::Session(ack), &mut table, &mut out);
        assert!(!is_fenced(&out), "fenced though it answers");
        answered += 1;
        unanswered.extend(asks(&out));
        assert!(unanswered.len() <= RECALLS_MAX / 2);
    }
    assert_eq!(answered, 40, "it was asked for what it let go of by itself");
    for page in 0..PAGES {
        assert_eq!(machine.pages().holders(place(page)).count(), 0);
    }
}

#[test]
fn the_deadline_of_what_is_not_asked_yet_runs() {
    let (mut machine, mut table) = (machine(), Mapped::default());
    let (epoch, unanswered) = all_wanted_back(&mut machine, &mut table);
    let mut out = Vec::new();
    table.0.retain(|(_, at)| *at != place(0));
    let recall = unanswered[0];
    let ack = SessionEvent::Ack { epoch, recall };
    machine.step(5000, Input::Session(ack), &mut table, &mut out);
    assert!(!is_fenced(&out) && asks(&out).len() == 1);
    // The one that it was asked for just now has been wanted for as long as the others.
    for recall in unanswered.into_iter().skip(1) {
        let ack = SessionEvent::Ack { epoch, recall };
        machine.step(5001, Input::Session(ack), &mut table, &mut out);
    }
    assert!(!is_fenced(&out));
    machine.step(5060, Input::Page(Event::Tick), &mut table, &mut out);
    assert!(is_fenced(&out), "it keeps pages beyond their term");
}
