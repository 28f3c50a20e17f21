//! All that is known of one run: what guests wrote down, what was done to them, what the file had at last.

use super::check::{Summary, Trouble, check};
use super::log::parse;
use super::{Call, Op, Outcome, Plan};
use copage_grants::PAGE_SIZE_U64;
use std::collections::BTreeMap;

/// See the module. It is made while the run goes on, and judged when it is over.
#[derive(Debug, Default)]
pub struct History {
    ops: Vec<Op>,
    troubles: Vec<Trouble>,
    kills_ns: Vec<u64>,
}

impl History {
    /// What a guest does from now on is not asked about: it will be fenced, or may be.
    pub fn will_be_fenced(&mut self, guest: u32, from_ns: u64) {
        self.troubles.push(Trouble::Fenced { guest, from_ns });
    }

    /// How many guests may have been.
    pub fn fenced(&self) -> usize {
        let fenced = |trouble: &&Trouble| matches!(trouble, Trouble::Fenced { .. });
        self.troubles.iter().filter(fenced).count()
    }

    /// The daemon is killed, not before now.
    pub fn daemon_killed(&mut self, at_ns: u64) {
        self.kills_ns.push(at_ns);
    }

    /// What a guest wrote down, when it does nothing more and the daemon is killed no more.
    pub fn add(&mut self, guest: u32, log: &str) {
        let (ops, anew) = parse(log, guest);
        self.ops.extend(ops);
        for &at_ns in &self.kills_ns {
            let anew_ns = anew.iter().copied().find(|anew_ns| *anew_ns > at_ns);
            self.troubles.push(Trouble::Killed {
                guest,
                at_ns,
                anew_ns: anew_ns.unwrap_or(u64::MAX),
            });
        }
    }

    /// What the host's file has when all is over and synced, read where no guest and no daemon is asked.
    pub fn at_last(&mut self, bytes: &[u8], plan: &Plan, (begin_ns, end_ns): (u64, u64)) {
        let words = bytes.chunks_exact(8).zip(0..);
        self.ops.extend(words.filter_map(|(bytes, n)| {
            let (page, word) = (n * 8 / PAGE_SIZE_U64, n % (PAGE_SIZE_U64 / 8));
            let value = u64::from_le_bytes(bytes.try_into().ok()?);
            // What is past the file's end now and then has too many changes of that for the checker.
            (page < plan.pages && word < plan.slots).then_some(Op {
                guest: u32::MAX,
                call: Call::Read { page, word },
                begin_ns,
                end: Some((end_ns, Outcome::Value(Some(value)))),
            })
        }));
    }

    /// Is it what one file would have shown, and was there something to see? In words when not.
    /// `seen_is_kept`: see [`check`].
    pub fn judge(&self, seen_is_kept: bool) -> Result<(Summary, String), String> {
        let summary =
            check(&self.ops, &self.troubles, seen_is_kept).map_err(|v| format!("{v:?}"))?;
        let mut failed = BTreeMap::<(&str, i32), usize>::new();
        for op in &self.ops {
            if let Some((_, Outcome::Failed(errno))) = op.end {
                *failed.entry((op.call.name(), errno)).or_default() += 1;
            }
        }
        let mut told = format!("{} operations: {summary:?}", self.ops.len());
        if !failed.is_empty() {
            told += &format!("; failed, by errno: {failed:?}");
        }
        let wrong = if !failed.is_empty() && self.troubles.is_empty() {
            "something failed though nothing was wrong"
        } else if summary.of_others <= 20 {
            "the guests hardly met: there was nothing to check"
        } else if summary.skipped * 10 >= summary.words {
            "too much of it could not be checked"
        } else {
            return Ok((summary, told));
        };
        Err(format!("{wrong}: {told}"))
    }
}
