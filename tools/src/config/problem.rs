//! What is wrong with a configuration: which file, which line, which key, and what to do.

use super::limits::PROBLEMS_MAX;
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// Does it keep the daemon from starting?
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// It does.
    Error,
    /// It does not, and is likely not what was meant.
    Warning,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// The line in the file, counted from 1; none for what the command line said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// The key, dotted: `export.path`. Empty where the text is not TOML.
    pub key: String,
    /// What is wrong and what to do, one line.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.severity == Severity::Warning {
            f.write_str("warning: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.text)
    }
}

/// A configuration that cannot be used: everything that is wrong with it, at least one error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    /// The file; none for text and for what the command line said.
    pub file: Option<PathBuf>,
    /// By line. Warnings too.
    pub problems: Vec<Problem>,
}

impl ConfigErrors {
    /// One line for each problem, `FILE:LINE: KEY: TEXT`, as compilers write them.
    pub fn lines(&self) -> Vec<String> {
        lines(self.file.as_deref(), &self.problems)
    }

    /// How many of the problems are errors.
    pub fn errors(&self) -> usize {
        self.problems
            .iter()
            .filter(|p| p.severity == Severity::Error)
            .count()
    }
}

/// One line for each problem; what is beyond a hundred is counted.
pub(super) fn lines(file: Option<&Path>, problems: &[Problem]) -> Vec<String> {
    let place = |problem: &Problem| match (file, problem.line) {
        (Some(file), Some(line)) => format!("{}:{line}: ", file.display()),
        (Some(file), None) => format!("{}: ", file.display()),
        (None, Some(line)) => format!("line {line}: "),
        (None, None) => String::new(),
    };
    let shown = problems.iter().take(PROBLEMS_MAX);
    let mut lines: Vec<String> = shown.map(|p| format!("{}{p}", place(p))).collect();
    if problems.len() > PROBLEMS_MAX {
        lines.push(format!(
            "and {} more like these",
            problems.len() - PROBLEMS_MAX
        ));
    }
    lines
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines().join("\n"))
    }
}

impl std::error::Error for ConfigErrors {}
