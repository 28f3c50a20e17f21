//! What a command said and how it ended, in dom0 or in a guest.

use crate::job::Ended;
use anyhow::{Context, Result, bail};
use serde_json::Value;

/// An ended command.
#[derive(Clone, Debug)]
pub struct Output {
    /// What was run, for messages.
    pub what: String,
    /// How it ended.
    pub ended: Ended,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Whether it ended with status 0.
    pub fn success(&self) -> bool {
        self.ended == Ended::Exit(0)
    }

    /// Its standard output without blanks around it; an error with all it said unless it succeeded.
    pub fn text(&self) -> Result<&str> {
        if !self.success() {
            let said = format!("{}{}", self.stdout, self.stderr);
            bail!("{}: {:?}: {}", self.what, self.ended, said.trim());
        }
        Ok(self.stdout.trim())
    }

    /// Its standard output as JSON, whatever its status (`copage audit` and `copage doctor` end with 1
    /// when they found something).
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| {
            let Self {
                what,
                ended,
                stdout,
                stderr,
            } = self;
            format!("{what}: {ended:?}: no JSON: {stdout}{stderr}")
        })
    }
}
