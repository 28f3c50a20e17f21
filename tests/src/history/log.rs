//! A guest's log: one line before each thing it does, one after.

use super::{Call, Op, Outcome};
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

/// Being written. Every line is one call of the kernel, so that what is in it survives the process.
pub struct Log(File);

impl Log {
    /// A new one.
    pub fn create(path: &Path) -> Result<Self> {
        File::options()
            .append(true)
            .create(true)
            .open(path)
            .map(Self)
    }

    /// Before `call` is done.
    pub fn begin(&mut self, at_ns: u64, call: Call) -> Result<()> {
        self.line(&Line::Begin(at_ns, call))
    }

    /// After it.
    pub fn end(&mut self, at_ns: u64, outcome: Outcome) -> Result<()> {
        self.line(&Line::End(at_ns, outcome))
    }

    /// The guest has found the daemon again.
    pub fn anew(&mut self, at_ns: u64) -> Result<()> {
        self.line(&Line::Anew(at_ns))
    }

    fn line(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.0.write_all(&text)
    }
}

/// What a guest did, and when it found the daemon again. A last line that is cut short was not written.
pub fn read_log(path: &Path, guest: u32) -> (Vec<Op>, Vec<u64>) {
    let text = std::fs::read_to_string(path).expect("a guest's log");
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
