//! Files of coherent exports in the loop. What guests want of them is split into pages; the machine
//! (`copage_coherence::strict`) decides page by page, the cache moves and fills them, and what belongs to
//! one request is put together here.
//!
//! | word | meaning |
//! |---|---|
//! | work | a request that wants pages, from its first page to its answer |
//! | exclusive | what needs a file for itself: a new length, a new home, letting the host in. It waits for works under way; later ones wait for it, *parked* |
//! | ask | pages that a session has and others want: sent as Invalidate, a run of pages for each of its opens |
//!
//! Two orders matter. An answer holds only pages that the session still has when it is sent, and the asks of
//! one round are sent after its answers: a guest that hears Invalidate for a page was told before that it
//! has it, and no answer behind the Invalidate says so again.

mod counts;
mod displays;
mod events;
mod exclusive;
mod fault;
mod files;
mod recall;
mod request;
mod rw;
mod sync;
mod table;
mod work;

pub(super) use counts::StrictCounts;
pub(super) use fault::{FaultAsked, StrictGranted};
pub(super) use files::CoFile;
pub(super) use work::Answers;

use copage_cache::{Cache, FileId, Holder, StrictGrant};
use copage_coherence::strict::Place;
use copage_grants::Epoch;
use exclusive::Taking;
use recall::{Ask, Asked};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use work::Work;

/// Which pages of which works wait until a page is saved.
type Saving = HashMap<Place, Vec<(u64, usize)>>;

/// A session that is gone and may have frames mapped.
struct Gone {
    who: Holder,
    /// Its process, until that has ended; none of a domain, of which the grant table tells.
    process: Option<OwnedFd>,
    is_dead: bool,
}

/// Everything that the loop knows of coherent files, but what the machine knows. It is the machine's table.
pub(super) struct Coherent {
    cache: Arc<Cache>,
    pub files: HashMap<FileId, CoFile>,
    /// Whose the epochs of live sessions are.
    pub who: HashMap<Epoch, Holder>,
    /// The same of sessions that are gone and may have frames mapped.
    gone: HashMap<Epoch, Gone>,
    /// When it is looked next whether these let go, in ms.
    lost_ms: u64,
    works: HashMap<u64, Work>,
    /// How the entries of this round were written; gone from here when they ended in the same round.
    granted: HashMap<(Epoch, Place), StrictGrant>,
    /// Entries that ended in this step.
    ended: Vec<(Epoch, Place)>,
    /// Pages to be filled.
    fills: Vec<Place>,
    /// What is to be asked, and what was, by the numbers that guests answer with.
    asks: Vec<Ask>,
    asked: HashMap<u64, Asked>,
    /// Parts of writes that wait for the machine to have their page saved.
    saving: Saving,
    /// Pages that the daemon takes, by ticket.
    takes: HashMap<u64, Taking>,
    /// Answers to be sent before the asks.
    answers: Answers,
    /// Files with something due, and works to be tried again, in ms.
    due: BTreeSet<(u64, FileId)>,
    again: VecDeque<(u64, u64)>,
    /// Files whose exclusive work may begin or go on, and when to try again what failed.
    ready: VecDeque<FileId>,
    retries: BTreeSet<(u64, FileId)>,
    /// Files of whose new length, or new home, those who have them open are to be told.
    resized: Vec<FileId>,
    rehomed: Vec<FileId>,
    pub counts: StrictCounts,
}

impl Coherent {
    pub(super) fn new(cache: Arc<Cache>) -> Self {
        Self {
            cache,
            files: HashMap::new(),
            who: HashMap::new(),
            gone: HashMap::new(),
            lost_ms: 0,
            works: HashMap::new(),
            granted: HashMap::new(),
            ended: Vec::new(),
            fills: Vec::new(),
            asks: Vec::new(),
            asked: HashMap::new(),
            saving: HashMap::new(),
            takes: HashMap::new(),
            answers: Answers::default(),
            due: BTreeSet::new(),
            again: VecDeque::new(),
            ready: VecDeque::new(),
            retries: BTreeSet::new(),
            resized: Vec::new(),
            rehomed: Vec::new(),
            counts: StrictCounts::default(),
        }
    }

    /// When something of this falls due, in ms.
    pub(super) fn next_due_ms(&self) -> Option<u64> {
        let file = self.due.first().map(|&(at_ms, _)| at_ms);
        let again = self.again.front().map(|&(at_ms, _)| at_ms);
        let retry = self.retries.first().map(|&(at_ms, _)| at_ms);
        let lost = (!self.gone.is_empty()).then_some(self.lost_ms);
        file.into_iter().chain(again).chain(retry).chain(lost).min()
    }

    /// All that the machine said is done.
    pub(super) fn end_round(&mut self) {
        self.granted.clear();
    }

    fn file_of(&self, place: Place) -> Option<&CoFile> {
        self.files.get(&FileId(place.file))
    }
}
