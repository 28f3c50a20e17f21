//! Is what guests saw what one file would have shown, each operation at one moment between its begin and
//! its end?
//!
//! Each word of the file is a register of its own: a history is linearizable if and only if that of every
//! register is.

use super::{Call, Op, Outcome};
use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Operations on one word beyond which trying all orders takes too long.
const OPS_MAX: usize = 64;
/// Stores to one word that may be lost, beyond which trying all sets of them takes too long.
const LOST_MAX: usize = 10;

/// Something happened to the guests or the daemon while the history was made.
#[derive(Clone, Copy, Debug)]
pub enum Trouble {
    /// The daemon was killed. What a guest stored before it found the next daemon, at `anew_ns`, may be
    /// lost unless it was synced before the daemon died, and the guest may have read it meanwhile.
    Killed {
        /// Whose stores.
        guest: u32,
        /// When the daemon died, or before.
        at_ns: u64,
        /// When the guest had found the next.
        anew_ns: u64,
    },
    /// A guest was stopped for so long that it was fenced: from `from_ns` on, what it stores is lost
    /// or not, and what it reads may be old.
    Fenced {
        /// Which.
        guest: u32,
        /// See above.
        from_ns: u64,
    },
}

/// What a history is like, so that a test can see that there was something to check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Words that anybody used.
    pub words: usize,
    /// Operations on them.
    pub ops: usize,
    /// Reads of what another guest stored.
    pub of_others: usize,
    /// Operations without an answer, or with an error.
    pub unknown: usize,
    /// Stores that might have been lost.
    pub doubtful: usize,
    /// Words not looked at, because too much of them is in doubt.
    pub skipped: usize,
}

/// What no file would have shown.
pub struct Violation {
    /// Page and word.
    pub place: (u64, u64),
    /// What was done to it.
    pub ops: Vec<Op>,
}

impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (page, word) = self.place;
        let begin_ns = self.ops.first().map_or(0, |op| op.begin_ns);
        writeln!(f, "word {word} of page {page} is not that of one file:")?;
        for op in &self.ops {
            let us = |ns: u64| ns.saturating_sub(begin_ns) / 1000;
            write!(f, "  guest {} {:>8} us", op.guest, us(op.begin_ns))?;
            match op.end {
                Some((end_ns, how)) => {
                    writeln!(f, " to {:>8} us: {:x?}: {how:x?}", us(end_ns), op.call)?;
                }
                None => writeln!(f, ", no end: {:x?}", op.call)?,
            }
        }
        Ok(())
    }
}

/// One word; `None`: past the end of the file.
#[derive(Clone, Debug)]
struct Word(Option<u64>);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Do {
    Write(u64),
    Read,
    Cut,
    Extend,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Did {
    Done,
    Value(Option<u64>),
}

impl SequentialSpec for Word {
    type Op = Do;
    type Ret = Did;

    fn invoke(&mut self, op: &Do) -> Did {
        match op {
            Do::Write(value) => self.0 = self.0.and(Some(*value)),
            Do::Read => return Did::Value(self.0),
            Do::Cut => self.0 = None,
            Do::Extend => self.0 = self.0.or(Some(0)),
        }
        Did::Done
    }

    fn is_valid_step(&mut self, op: &Do, ret: &Did) -> bool {
        let past_the_end = matches!(op, Do::Write(_)) && self.0.is_none();
        !past_the_end && self.invoke(op) == *ret
    }
}

/// Accepts or rejects a history of a file whose words were all zero. `seen_is_kept`: what another guest
/// has read was not lost (not so where pages are shared for writing).
pub fn check(ops: &[Op], troubles: &[Trouble], seen_is_kept: bool) -> Result<Summary, Violation> {
    let mut summary = Summary::default();
    for (place, of_word) in by_word(ops) {
        let authors = of_word
            .iter()
            .filter_map(|op| Some((stored(op)?, op.guest)));
        let authors: BTreeMap<u64, u32> = authors.collect();
        summary.words += 1;
        summary.ops += of_word.len();
        let of_others = |op: &&Op| {
            let author = value(op).and_then(|value| authors.get(&value));
            author.is_some_and(|author| *author != op.guest)
        };
        summary.of_others += of_word.iter().filter(of_others).count();
        let unknown = |op: &&Op| !matches!(op.end, Some((_, Outcome::Done | Outcome::Value(_))));
        summary.unknown += of_word.iter().filter(unknown).count();
        let doubtful: Vec<u64> = of_word
            .iter()
            .filter(|op| may_be_lost(op, ops, troubles))
            .filter_map(stored)
            .collect();
        summary.doubtful += doubtful.len();
        if of_word.len() > OPS_MAX || doubtful.len() > LOST_MAX {
            summary.skipped += 1;
            continue;
        }
        // Few are lost, mostly: the smallest sets come first.
        let mut sets: Vec<u32> = (0..1 << doubtful.len()).collect();
        sets.sort_by_key(|set| set.count_ones());
        let holds = sets.into_iter().any(|set| {
            let gone = doubtful.iter().enumerate();
            let gone = gone.filter(|(n, _)| set >> n & 1 == 1).map(|(_, v)| *v);
            let gone: BTreeSet<u64> = gone.collect();
            let counts = |op: &&Op| {
                let lost = stored(op).or(value(op)).is_some_and(|v| gone.contains(&v));
                // To see what is lost afterwards is allowed to who stored it.
                let seen = value(op).is_some_and(|v| authors.get(&v) != Some(&op.guest));
                let kept = !lost || (seen && seen_is_kept);
                kept && !is_blind(op, troubles)
            };
            let ops: Vec<&Op> = of_word.iter().filter(counts).collect();
            is_linearizable(place.0, &ops)
        });
        if !holds {
            let mut ops = of_word;
            ops.sort_by_key(|op| op.begin_ns);
            return Err(Violation { place, ops });
        }
    }
    Ok(summary)
}

/// The operations on each word that anybody stored to or loaded from. A file that becomes shorter or
/// longer is an operation on each of its words.
fn by_word(ops: &[Op]) -> BTreeMap<(u64, u64), Vec<Op>> {
    let mut words: BTreeMap<(u64, u64), Vec<Op>> = BTreeMap::new();
    for op in ops {
        if let Some(place) = place(op) {
            words.entry(place).or_default().push(*op);
        }
    }
    for ((page, _), of_word) in &mut words {
        let longest = ops.iter().filter_map(pages).max().unwrap_or(0);
        if longest <= *page || ops.iter().filter_map(pages).all(|pages| pages > *page) {
            continue;
        }
        // Of what happened long before anybody used the word, the last is enough; what happened after
        // the last use is nothing to it.
        let begin_ns = of_word.iter().map(|op| op.begin_ns).min().unwrap_or(0);
        let end_ns = of_word.iter().map(end_ns).max().unwrap_or(u64::MAX);
        let resizes = ops.iter().filter(|op| pages(op).is_some());
        let (before, after): (Vec<&Op>, Vec<&Op>) =
            resizes.partition(|op| end_ns_of(op) < begin_ns);
        let last = before.into_iter().max_by_key(|op| op.begin_ns);
        let meanwhile = after.into_iter().filter(|op| op.begin_ns <= end_ns);
        let resizes: Vec<Op> = last.into_iter().chain(meanwhile).copied().collect();
        of_word.extend(resizes);
    }
    words
}

fn place(op: &Op) -> Option<(u64, u64)> {
    match op.call {
        Call::Store { page, word, .. }
        | Call::Load { page, word }
        | Call::Write { page, word, .. }
        | Call::Read { page, word } => Some((page, word)),
        Call::Sync | Call::Resize { .. } => None,
    }
}

fn pages(op: &Op) -> Option<u64> {
    match op.call {
        Call::Resize { pages } => Some(pages),
        _ => None,
    }
}

fn end_ns(op: &Op) -> u64 {
    op.end.map_or(u64::MAX, |(end_ns, _)| end_ns)
}

/// When it had its effect at the latest.
fn end_ns_of(op: &Op) -> u64 {
    match op.end {
        Some((end_ns, Outcome::Done | Outcome::Value(_))) => end_ns,
        _ => u64::MAX,
    }
}

/// What it stores.
fn stored(op: &Op) -> Option<u64> {
    match op.call {
        Call::Store { value, .. } | Call::Write { value, .. } => Some(value),
        _ => None,
    }
}

/// What it read.
fn value(op: &Op) -> Option<u64> {
    match op.end {
        Some((_, Outcome::Value(value))) => value,
        _ => None,
    }
}

/// A store that may be gone although it was done.
fn may_be_lost(op: &Op, ops: &[Op], troubles: &[Trouble]) -> bool {
    let Call::Store { .. } = op.call else {
        return false;
    };
    troubles.iter().any(|trouble| match *trouble {
        Trouble::Killed {
            guest,
            at_ns,
            anew_ns,
        } => {
            let synced = |sync: &Op| {
                sync.call == Call::Sync
                    && matches!(sync.end, Some((end_ns, Outcome::Done)) if end_ns < at_ns)
                    && sync.begin_ns > end_ns_of(op)
            };
            guest == op.guest && op.begin_ns < anew_ns && !ops.iter().any(synced)
        }
        Trouble::Fenced { guest, from_ns } => guest == op.guest && end_ns(op) >= from_ns,
    })
}

/// Something read that counts for nothing.
fn is_blind(op: &Op, troubles: &[Trouble]) -> bool {
    let failed = stored(op).is_none()
        && pages(op).is_none()
        && !matches!(op.end, Some((_, Outcome::Value(_))));
    let reads = matches!(op.call, Call::Load { .. } | Call::Read { .. });
    let fenced = troubles.iter().any(|trouble| {
        matches!(*trouble, Trouble::Fenced { guest, from_ns }
            if guest == op.guest && end_ns(op) >= from_ns)
    });
    failed || (reads && fenced)
}

/// Asks the tester, with the begins and ends of one word's operations in the order of their times.
fn is_linearizable(page: u64, ops: &[&Op]) -> bool {
    let mut moments = Vec::new();
    for (n, op) in ops.iter().enumerate() {
        // What begins as another ends may have been before it.
        moments.push((op.begin_ns, 0, n));
        if let Some((end_ns, Outcome::Done | Outcome::Value(_))) = op.end {
            moments.push((end_ns, 1, n));
        }
    }
    moments.sort_unstable();
    let mut tester = LinearizabilityTester::new(Word(Some(0)));
    for (_, ends, n) in moments {
        let op = ops[n];
        // What has no end blocks the one that does it, for the tester: it is somebody else's.
        let who = match op.end {
            Some((_, Outcome::Done | Outcome::Value(_))) => u64::from(op.guest),
            _ => 1 << 32 | n as u64,
        };
        let told = if ends == 0 {
            tester.on_invoke(who, what(page, op)).map(|_| ())
        } else {
            tester.on_return(who, how(op)).map(|_| ())
        };
        told.expect("one operation at a time of each guest");
    }
    tester.is_consistent()
}

fn what(page: u64, op: &Op) -> Do {
    match op.call {
        Call::Store { value, .. } | Call::Write { value, .. } => Do::Write(value),
        Call::Load { .. } | Call::Read { .. } | Call::Sync => Do::Read,
        Call::Resize { pages } if pages <= page => Do::Cut,
        Call::Resize { .. } => Do::Extend,
    }
}

fn how(op: &Op) -> Did {
    match op.end {
        Some((_, Outcome::Value(value))) => Did::Value(value),
        _ => Did::Done,
    }
}
