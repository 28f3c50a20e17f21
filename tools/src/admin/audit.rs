//! `copage audit`.

use super::client::{AdminError, Where};
use crate::output::{self, printable};
use crate::serve::admin_types::{AdminReply, AdminRequest, AuditEntry};
use anyhow::{Result, bail};
use std::process::ExitCode;

/// Compares ledger, grant tables and cache with each other and with the frame files, entry by entry.
///
/// Exit code 1: something differs. That is a mistake in copage or a guest that tampered; please keep
/// the output.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage audit
  copage audit --json | jq '.checks[] | select(.differences != [])'
  copage audit >/dev/null || systemctl stop copage")]
pub struct Args {
    #[command(flatten)]
    at: Where,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let AdminReply::Audit(audit) = args.at.ask(&AdminRequest::Audit)? else {
        bail!(AdminError::Other);
    };
    if args.json {
        output::json(&audit)?;
    } else {
        output::line(&text(&audit))?;
    }
    Ok(if agrees(&audit) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// `ok` alone is one word of the daemon's; the differences are what it stands for.
fn agrees(audit: &AuditEntry) -> bool {
    audit.ok
        && audit
            .checks
            .iter()
            .all(|check| check.differences.is_empty())
}

fn text(audit: &AuditEntry) -> String {
    let mut lines = Vec::new();
    for check in &audit.checks {
        let count = check.differences.len();
        let result = if count == 0 { "ok  " } else { "BAD " };
        let said = match count {
            0 => format!("{} compared", check.checked),
            1 => format!("{} compared, 1 difference", check.checked),
            // The daemon says no more than a hundred.
            100.. => format!("{} compared, 100 differences or more", check.checked),
            _ => format!("{} compared, {count} differences", check.checked),
        };
        lines.push(format!("{result} {}: {said}", printable(&check.name)));
        lines.extend(
            check
                .differences
                .iter()
                .map(|line| format!("       {}", printable(line))),
        );
    }
    let verdict = if agrees(audit) {
        "everything agrees"
    } else {
        "NOT everything agrees"
    };
    lines.push(format!("{verdict} ({} ms)", audit.took_ms));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::admin_types::AuditCheck;

    fn audit(differences: &[&str]) -> AuditEntry {
        AuditEntry {
            ok: differences.is_empty(),
            checks: vec![AuditCheck {
                name: "ledger against tables".into(),
                checked: 7,
                differences: differences.iter().map(|&line| line.into()).collect(),
            }],
            took_ms: 3,
        }
    }

    #[test]
    fn each_check_has_a_line() {
        let good = audit(&[]);
        assert!(agrees(&good));
        assert_eq!(
            text(&good),
            "ok   ledger against tables: 7 compared\neverything agrees (3 ms)"
        );
        let bad = audit(&["frame 3: d1 has it, the table has not"]);
        assert!(!agrees(&bad));
        assert!(
            text(&bad)
                .contains("BAD  ledger against tables: 7 compared, 1 difference\n       frame 3")
        );
        assert!(!agrees(&AuditEntry { ok: true, ..bad }));
    }
}
