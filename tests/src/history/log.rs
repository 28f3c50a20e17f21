//! A guest's log: one line before each thing it does, one after.

use super::{Call, Clock, Op, Outcome};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{Result, Write};
use std::path::Path;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    Begin(u64, Call),
    End(u64, Outcome),
    /// The guest has found the daemon again: nothing of before is mapped.
    Anew(u64),
}

/// Being written. Every line is one write of what it is written to, which has to outlive the guest.
pub struct Log<'a, W> {
    to: W,
    clock: &'a dyn Clock,
}

/// A file that lines are added to: each by one call of the kernel.
pub fn log_file(path: &Path) -> Result<File> {
    File::options().append(true).create(true).open(path)
}

impl<'a, W: Write> Log<'a, W> {
    /// Empty; what is written down is stamped by `clock`.
    pub const fn new(to: W, clock: &'a dyn Clock) -> Self {
        Self { to, clock }
    }

    /// Before `call` is done.
    pub fn begin(&mut self, call: Call) -> Result<()> {
        self.line(&Line::Begin(self.clock.stamp_ns(), call))
    }

    /// After it.
    pub fn end(&mut self, outcome: Outcome) -> Result<()> {
        self.line(&Line::End(self.clock.stamp_ns(), outcome))
    }

    /// The guest has found the daemon again.
    pub fn anew(&mut self) -> Result<()> {
        self.line(&Line::Anew(self.clock.stamp_ns()))
    }

    fn line(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.to.write_all(&text)
    }
}

/// What a guest did, and when it found the daemon again. A last line that is cut short was not written.
pub(super) fn parse(text: &str, guest: u32) -> (Vec<Op>, Vec<u64>) {
    let (mut ops, mut anew) = (Vec::<Op>::new(), Vec::new());
    for line in text.split_inclusive('\n').filter(|l| l.ends_with('\n')) {
        match serde_json::from_str(line).expect("a line of a guest's log") {
            Line::Begin(begin_ns, call) => ops.push(Op {
                guest,
                call,
                begin_ns,
                end: None,
            }),
            Line::End(at_ns, outcome) => {
                let last = ops.last_mut().expect("an end has a begin");
                last.end = Some((at_ns, outcome));
            }
            Line::Anew(at_ns) => anew.push(at_ns),
        }
    }
    (ops, anew)
}
