//! `copage grants`.

use super::client::{AdminError, Where};
use crate::output::{self, Table};
use crate::serve::admin_types::{AdminReply, AdminRequest, GrantsEntry};
use anyhow::{Result, bail};
use std::process::ExitCode;

/// Shows who was granted what: for each guest how much, and with --list entry by entry.
///
/// On the local backend the ledger records the protocol: a descriptor covers a whole file, so a guest
/// may read pages of it that another guest was granted.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage grants
  copage grants --guest web
  copage grants --guest web --list 50
  copage grants --json --list 100000 | jq '[.entries[].frame] | unique | length'")]
pub struct Args {
    #[command(flatten)]
    at: Where,
    /// Only this guest's
    #[arg(long, value_name = "NAME")]
    guest: Option<String>,
    /// List entries of the grant tables too, at most so many
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "1000",
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    list: Option<u32>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let entries_max = Some(args.list.unwrap_or(0));
    let request = AdminRequest::Grants {
        guest: args.guest.clone(),
        entries_max,
    };
    let AdminReply::Grants(grants) = args.at.ask(&request)? else {
        bail!(AdminError::Other);
    };
    if args.json {
        output::json(&grants)?;
    } else {
        show(&grants, args.list.is_some())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(grants: &GrantsEntry, list: bool) -> Result<()> {
    if grants.total == 0 {
        return output::line("nothing is granted");
    }
    let mut table = Table::new(&["GUEST", "DOM", "GRANTS", "MAPPED", "BYTES"]);
    for guest in &grants.guests {
        table.row(vec![
            guest.guest.clone(),
            guest.dom.to_string(),
            guest.grants.to_string(),
            guest.mapped.to_string(),
            output::pages(guest.grants),
        ]);
    }
    table.print()?;
    output::line(&format!(
        "{} grants in all, {} mapped",
        grants.total, grants.mapped
    ))?;
    if !list {
        return Ok(());
    }
    let mut table = Table::new(&["GUEST", "DOM", "TABLE", "GREF", "FRAME", "ACCESS", "MAPPED"]);
    for entry in &grants.entries {
        table.row(vec![
            entry.guest.clone(),
            entry.dom.to_string(),
            entry.granter.map_or_else(
                || entry.table.to_string(),
                |domid| format!("{} (domain {domid})", entry.table),
            ),
            entry.gref.to_string(),
            entry.frame.to_string(),
            if entry.writable { "rw" } else { "ro" }.to_owned(),
            if entry.mapped { "yes" } else { "no" }.to_owned(),
        ]);
    }
    output::line("")?;
    table.print()?;
    let listed = grants.entries.len() as u64;
    if listed < grants.total {
        output::line(&format!("… and {} more (--list N)", grants.total - listed))?;
    }
    Ok(())
}
