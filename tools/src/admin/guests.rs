//! `copage guests`.

use super::client::{AdminError, Where};
use crate::output::{self, Table, duration_ms, pages, printable};
use crate::serve::admin_types::{AdminReply, AdminRequest, ChargesEntry, GuestEntry, StatsEntry};
use anyhow::{Result, bail};
use serde_json::json;
use std::process::ExitCode;

/// Shows the guests that are connected: who they are, what they hold, what is left of their leases.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage guests
  copage guests --json | jq -r '.guests[] | select(.lease_left_ms < 1000) | .name'
  COPAGE_RUN_DIR=/run/other copage guests
  watch -n1 copage guests")]
pub struct Args {
    #[command(flatten)]
    at: Where,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut admin = args.at.connect()?;
    let AdminReply::Guests { guests } = admin.ask(&AdminRequest::Guests)? else {
        bail!(AdminError::Other);
    };
    // Memory is charged by name, over all sessions.
    let AdminReply::Stats(StatsEntry { charges, .. }) = admin.ask(&AdminRequest::Stats)? else {
        bail!(AdminError::Other);
    };
    if args.json {
        output::json(&json!({ "guests": guests, "charges": charges }))?;
        return Ok(ExitCode::SUCCESS);
    }
    if guests.is_empty() {
        output::line("no guests are connected")?;
    } else {
        table(&guests, &charges).print()?;
    }
    for charge in charges
        .iter()
        .filter(|charge| guests.iter().all(|g| g.name != charge.guest))
    {
        output::line(&format!(
            "not connected, still charged: {} with {}, {} pinned, {} in quarantine",
            printable(&charge.guest),
            pages(charge.frames),
            pages(charge.pinned_pages),
            pages(charge.quarantined_pages)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(guests: &[GuestEntry], charges: &[ChargesEntry]) -> Table {
    let mut table = Table::new(&[
        "NAME",
        "DOMAIN",
        "DOM",
        "PID",
        "UID",
        "EPOCH",
        "SINCE",
        "LEASE LEFT",
        "FRAMES",
        "PINNED",
        "QUARANTINE",
        "GRANTS",
        "HANDLES",
        "FILES",
        "RECALLS",
    ]);
    let nothing = ChargesEntry::default();
    let nothing_known = || "-".to_owned();
    let domain = |guest: &GuestEntry| {
        let domain = guest.domain.as_ref();
        domain.map_or_else(nothing_known, |d| format!("{} ({})", d.name, d.domid))
    };
    let mut last = None;
    for guest in guests {
        let charge = charges
            .iter()
            .find(|c| c.guest == guest.name)
            .unwrap_or(&nothing);
        // Once for each name: sessions of one guest share its charges.
        let charged = |count: u64| match last == Some(&guest.name) {
            true => "-".to_owned(),
            false => pages(count),
        };
        table.row(vec![
            guest.name.clone(),
            domain(guest),
            guest.dom.to_string(),
            guest.pid.map_or_else(nothing_known, |pid| pid.to_string()),
            guest.uid.map_or_else(nothing_known, |uid| uid.to_string()),
            // The daemon's own epoch is the upper half, of all of them.
            (guest.epoch & u64::from(u32::MAX)).to_string(),
            duration_ms(guest.connected_ms),
            format!("{} ms", guest.lease_left_ms),
            charged(charge.frames),
            charged(charge.pinned_pages),
            charged(charge.quarantined_pages),
            guest.grants.to_string(),
            guest.handles.to_string(),
            guest.files.to_string(),
            guest.recalls.to_string(),
        ]);
        last = Some(&guest.name);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_of_one_guest_share_its_charges() {
        let guest = |name: &str, dom| GuestEntry {
            name: name.into(),
            dom,
            epoch: (9 << 32) + 3,
            uid: Some(1),
            pid: Some(2),
            domain: None,
            connected_ms: 0,
            lease_left_ms: 5,
            handles: 0,
            files: 0,
            grants: 7,
            recalls: 0,
            in_flight: 0,
            requests: 0,
        };
        let charge = ChargesEntry {
            guest: "a".into(),
            frames: 256,
            ..ChargesEntry::default()
        };
        let text = table(&[guest("a", 1), guest("a", 2), guest("b", 3)], &[charge]).text();
        let lines: Vec<_> = text.lines().collect();
        assert!(
            lines[1].contains("1.0 MiB") && !lines[2].contains("MiB"),
            "{text}"
        );
        assert!(
            lines[2].starts_with("a") && lines[2].contains(" - "),
            "{text}"
        );
        assert!(
            lines[3].starts_with("b") && lines[3].contains("0 B"),
            "{text}"
        );
        assert_eq!(lines[1].split_whitespace().nth(5), Some("3"), "{text}");
    }
}
