//! `copage doctor`: what this machine can do, found by trying it; what it lacks, what that costs, and
//! how to get it.

mod files;
mod fuse;
mod kernel;
mod process;
mod sharing;

use crate::output;
use anyhow::Result;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Tries out what copage needs of this machine, as this user, and says what is lacking.
///
/// Nothing is changed. Exit code 1: something is lacking without which files cannot be shared at all.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage doctor
  copage doctor /srv/images                   kernel leases and direct reads on that file system
  sudo copage doctor                          what the daemon gets when root runs it
  copage doctor --json | jq -r '.findings[] | select(.state == \"lack\") | .fix'")]
pub struct Args {
    /// A directory that is to be exported: its file system is tried
    #[arg(value_name = "DIR", default_value = "/usr")]
    dir: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// How something was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// It works.
    Have,
    /// It works in part, or more slowly.
    Limited,
    /// It does not.
    Lack,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Have => "have",
            Self::Limited => "part",
            Self::Lack => "LACK",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// What.
    name: &'static str,
    state: State,
    /// Nothing can be shared without it.
    needed: bool,
    /// What was tried and seen.
    found: String,
    /// What it costs to lack it.
    #[serde(skip_serializing_if = "Option::is_none")]
    cost: Option<String>,
    /// How to get it.
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Finding {
    fn have(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, State::Have, found)
    }

    fn new(name: &'static str, state: State, found: impl Into<String>) -> Self {
        Self {
            name,
            state,
            needed: false,
            found: found.into(),
            cost: None,
            fix: None,
        }
    }

    fn limited(name: &'static str, found: impl Into<String>, cost: &str, fix: &str) -> Self {
        Self::new(name, State::Limited, found).with(cost, fix)
    }

    fn lack(name: &'static str, found: impl Into<String>, cost: &str, fix: &str) -> Self {
        Self::new(name, State::Lack, found).with(cost, fix)
    }

    fn with(self, cost: &str, fix: &str) -> Self {
        Self {
            cost: Some(cost.to_owned()),
            fix: Some(fix.to_owned()),
            ..self
        }
    }

    fn needed(self) -> Self {
        Self {
            needed: true,
            ..self
        }
    }

    /// It keeps files from being shared at all.
    fn stops(&self) -> bool {
        self.needed && self.state == State::Lack
    }
}

#[derive(Serialize)]
struct Report<'r> {
    /// Files can be shared among processes here.
    local_sharing: bool,
    kernel: String,
    uid: u32,
    findings: &'r [Finding],
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let findings = findings(&args.dir);
    let works = !findings.iter().any(Finding::stops);
    let uid = rustix::process::geteuid();
    if args.json {
        let kernel = kernel::release();
        let report = Report {
            local_sharing: works,
            kernel,
            uid: uid.as_raw(),
            findings: &findings,
        };
        output::json(&report)?;
    } else {
        let who = if uid.is_root() {
            "root".into()
        } else {
            format!("uid {}", uid.as_raw())
        };
        output::line(&format!("As {who}:"))?;
        for finding in &findings {
            output::line(&text(finding))?;
        }
        output::line(if works {
            "Files can be shared on this machine."
        } else {
            "Files cannot be shared on this machine until the needed things above are there."
        })?;
    }
    Ok(if works {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn findings(dir: &Path) -> Vec<Finding> {
    let mut found = vec![kernel::version()];
    found.extend(sharing::all());
    found.push(kernel::huge_policy());
    found.extend(fuse::all());
    found.extend(files::all(dir));
    found.extend(process::all());
    found.extend(kernel::xen());
    found
}

fn text(finding: &Finding) -> String {
    let mut text = format!(
        "  {}  {:18} {}",
        finding.state.word(),
        finding.name,
        output::printable(&finding.found)
    );
    let mut add = |head: &str, what: &Option<String>| {
        if let Some(what) = what {
            text.push_str(&format!("\n        {:18} {head}: {what}", ""));
        }
    };
    add(
        if finding.stops() { "needed" } else { "costs" },
        &finding.cost,
    );
    add("to get it", &finding.fix);
    text
}

/// The number in a file of /proc or /sys.
fn number(path: &str) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the machine: each finding says what it saw, each that lacks says what to do.
    #[test]
    fn findings_are_complete() {
        let found = findings(Path::new("/usr"));
        let mut names: Vec<_> = found.iter().map(|f| f.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), found.len(), "{names:?}");
        for finding in &found {
            assert!(!finding.found.is_empty(), "{finding:?}");
            let lacks = matches!(finding.state, State::Lack | State::Limited);
            assert_eq!(
                lacks,
                finding.cost.is_some() && finding.fix.is_some(),
                "{finding:?}"
            );
            assert!(
                !text(finding).contains("\n\n") && finding.found.len() < 300,
                "{finding:?}"
            );
        }
        for name in [
            "kernel",
            "frame files",
            "userfaultfd",
            "fuse",
            "leases",
            "inotify",
            "pidfd",
        ] {
            assert!(names.contains(&name), "{name}");
        }
    }

    #[test]
    fn only_what_is_needed_stops() {
        let lack = Finding::lack("x", "not there", "all of it", "get it");
        assert!(!lack.stops());
        assert!(lack.clone().needed().stops());
        assert!(!Finding::have("x", "there").needed().stops());
        let text = text(&lack.needed());
        assert!(
            text.starts_with("  LACK  x ") && text.contains("needed: all of it"),
            "{text}"
        );
    }
}
