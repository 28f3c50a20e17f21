//! Sessions and pages together: what a daemon drives.

use super::{Action, DAEMON, Event, Pages, Place, StrictConfig, Table};
use crate::msg::FenceReason;
use crate::session;
use crate::session::{RecallOutcome, SessionConfig, Sessions, Subject};
use copage_grants::{Epoch, Version};
use std::collections::{BTreeMap, VecDeque};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// To a session.
    Session(session::Event),
    /// To a page. What a session says counts only while the session does.
    Page(Event),
}

/// What is to be done, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// For a session. Never `Settled` of a recall of a page.
    Session(session::Action),
    /// For a page. Never `Recall` or `Fence`, which the sessions' machine turns into its own.
    Page(Action),
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Strict {
    sessions: Sessions,
    pages: Pages,
    /// Which page each unanswered recall is for.
    asked: BTreeMap<(Epoch, u64), Place>,
    recalls: BTreeMap<Epoch, Recalls>,
}

/// Recalls of pages from one session. No more are unanswered at a time than half of what a session may
/// leave unanswered before it is fenced for that; the rest waits here, while its deadline runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Recalls {
    unanswered: usize,
    later: VecDeque<Place>,
}

enum Step {
    Session(session::Event),
    Page(Event),
}

impl Strict {
    /// No sessions and no pages; see [`Sessions::new`] and [`Pages::new`].
    pub fn new(
        sessions: SessionConfig,
        pages: StrictConfig,
        (first_epoch, first_version): (Epoch, Version),
        grace_until_ms: u64,
    ) -> Self {
        Self {
            sessions: Sessions::new(sessions, first_epoch),
            pages: Pages::new(pages, first_version, grace_until_ms),
            asked: BTreeMap::new(),
            recalls: BTreeMap::new(),
        }
    }

    /// The sessions.
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// The pages.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// When something falls due, in ms.
    pub fn next_due_ms(&self) -> Option<u64> {
        let (a, b) = (self.sessions.next_due_ms(), self.pages.next_due_ms());
        a.into_iter().chain(b).min()
    }

    /// Takes one input at a time `now_ms`; appends what is to be done to `out`.
    pub fn step(
        &mut self,
        now_ms: u64,
        input: Input,
        table: &mut impl Table,
        out: &mut Vec<Output>,
    ) {
        // Who fell due is fenced before what it says is looked at.
        let mut steps =
            VecDeque::from([Step::Session(session::Event::Tick), Step::Page(Event::Tick)]);
        steps.push_back(match input {
            Input::Session(event) => Step::Session(event),
            Input::Page(event) => Step::Page(event),
        });
        let (mut of_sessions, mut of_pages) = (Vec::new(), Vec::new());
        while let Some(step) = steps.pop_front() {
            // What comes of a step is dealt with before the next.
            let mut then = VecDeque::new();
            match step {
                Step::Session(event) => self.sessions.step(now_ms, event, &mut of_sessions),
                Step::Page(event) if self.counts(now_ms, &event) => {
                    self.pages.step(now_ms, event, table, &mut of_pages);
                }
                Step::Page(_) => {}
            }
            for action in of_sessions.drain(..) {
                self.of_session(action, &mut then, out);
            }
            for action in of_pages.drain(..) {
                self.of_page(action, &mut then, out);
            }
            then.append(&mut steps);
            steps = then;
        }
    }

    fn counts(&self, now_ms: u64, event: &Event) -> bool {
        match *event {
            Event::Want { epoch, .. }
            | Event::Acked { epoch, .. }
            | Event::Released { epoch, .. } => {
                epoch == DAEMON || self.sessions.counts(now_ms, epoch)
            }
            _ => true,
        }
    }

    fn of_session(
        &mut self,
        action: session::Action,
        then: &mut VecDeque<Step>,
        out: &mut Vec<Output>,
    ) {
        match action {
            session::Action::Ask {
                epoch,
                recall,
                subject: Subject::Place(place),
            } => {
                self.asked.insert((epoch, recall), place);
            }
            session::Action::Settled {
                epoch,
                recall,
                outcome,
            } => {
                if let Some(place) = self.asked.remove(&(epoch, recall)) {
                    if outcome == RecallOutcome::Acked {
                        then.push_back(Step::Page(Event::Acked { epoch, place }));
                        self.recall_next(epoch, then);
                    }
                    return;
                }
            }
            session::Action::Fenced { epoch, .. } | session::Action::Ended { epoch, .. } => {
                self.recalls.remove(&epoch);
                self.pages.end_wants(epoch);
                then.push_back(Step::Page(Event::Gone { epoch }));
            }
            _ => {}
        }
        out.push(Output::Session(action));
    }

    fn of_page(&mut self, action: Action, then: &mut VecDeque<Step>, out: &mut Vec<Output>) {
        match action {
            Action::Recall { epoch, place } => {
                let unanswered_max = (self.sessions.config().recalls_max / 2).max(1);
                let recalls = self.recalls.entry(epoch).or_default();
                if recalls.unanswered >= unanswered_max {
                    recalls.later.push_back(place);
                    return;
                }
                recalls.unanswered += 1;
                let subject = Subject::Place(place);
                then.push_back(Step::Session(session::Event::Recall { epoch, subject }));
            }
            Action::Fence { epoch } => {
                let reason = FenceReason::DeadlineMissed;
                then.push_back(Step::Session(session::Event::Fence { epoch, reason }));
            }
            action => out.push(Output::Page(action)),
        }
    }

    /// A recall was answered: what waited for that is asked for, unless the session let go of it by itself.
    fn recall_next(&mut self, epoch: Epoch, then: &mut VecDeque<Step>) {
        let Some(recalls) = self.recalls.get_mut(&epoch) else {
            return;
        };
        recalls.unanswered -= 1;
        while let Some(place) = recalls.later.pop_front() {
            if self.pages.is_leaving(epoch, place) {
                recalls.unanswered += 1;
                let subject = Subject::Place(place);
                then.push_back(Step::Session(session::Event::Recall { epoch, subject }));
                return;
            }
        }
        if recalls.unanswered == 0 {
            self.recalls.remove(&epoch);
        }
    }
}
