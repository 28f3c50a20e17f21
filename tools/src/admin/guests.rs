//! `copage guests`.

use super::client::{AdminError, Where};
use crate::output::{self, Table, duration_ms};
use crate::serve::admin_types::{AdminReply, AdminRequest, GuestEntry};
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
    let AdminReply::Guests { guests } = args.at.ask(&AdminRequest::Guests)? else {
        bail!(AdminError::Other);
    };
    if args.json {
        output::json(&json!({ "guests": guests }))?;
    } else if guests.is_empty() {
        output::line("no guests are connected")?;
    } else {
        table(&guests).print()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(guests: &[GuestEntry]) -> Table {
    let mut table = Table::new(&[
        "NAME", "DOM", "PID", "UID", "EPOCH", "SINCE", "LEASE LEFT", "GRANTS", "HANDLES", "FILES",
        "RECALLS", "WAITING", "REQUESTS",
    ]);
    for guest in guests {
        table.row(vec![
            guest.name.clone(),
            guest.dom.to_string(),
            guest.pid.to_string(),
            guest.uid.to_string(),
            guest.epoch.to_string(),
            duration_ms(guest.connected_ms),
            format!("{} ms", guest.lease_left_ms),
            guest.grants.to_string(),
            guest.handles.to_string(),
            guest.files.to_string(),
            guest.recalls.to_string(),
            guest.in_flight.to_string(),
            guest.requests.to_string(),
        ]);
    }
    table
}
