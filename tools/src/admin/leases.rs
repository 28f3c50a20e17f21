//! `copage leases`.

use super::client::{AdminError, Where};
use super::pages::paths;
use crate::output::{self, Table, printable};
use crate::serve::admin_types::{AdminReply, AdminRequest, LeasesEntry};
use anyhow::{Result, bail};
use std::path::PathBuf;
use std::process::ExitCode;

/// Shows who has which page of coherent files, and how: of each page its state, its version, who holds it,
/// who waits for it, and since when.
///
/// A page is `free` (in a frame, nobody has it), `shared` (some read it), `exclusive` (one writes it),
/// `shared-rw` (some write it together) or `away` (in no frame, and somebody waits). A holder in brackets was
/// asked for the page and has not let go yet.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage leases
  copage leases data:db/table
  copage leases --json | jq '.pages[] | select(.waiting != [])'")]
pub struct Args {
    #[command(flatten)]
    at: Where,
    /// Only of this file: a path of this machine, or EXPORT:PATH
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// List at most so many pages
    #[arg(long, value_name = "N", default_value_t = 1000,
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    list: u32,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let path = match &args.file {
        Some(file) => {
            let (asked, real) = paths(file)?;
            Some(real.unwrap_or(asked))
        }
        None => None,
    };
    let request = AdminRequest::Leases {
        path,
        pages_max: Some(args.list),
    };
    let AdminReply::Leases(leases) = args.at.ask(&request)? else {
        bail!(AdminError::Other);
    };
    if args.json {
        output::json(&leases)?;
    } else {
        show(&leases)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(leases: &LeasesEntry) -> Result<()> {
    if leases.pages.is_empty() {
        return output::line("no page of a coherent file is held");
    }
    let head = [
        "PAGE", "STATE", "VERSION", "DIRTY", "HOLDERS", "WAITING", "SINCE", "FILE",
    ];
    let mut table = Table::new(&head);
    for page in &leases.pages {
        let holder = |holder: &crate::serve::admin_types::LeaseHolder| {
            let access = if holder.writable { "rw" } else { "ro" };
            let text = format!("{}:{access}", holder.guest);
            if holder.leaving {
                format!("[{text}]")
            } else {
                text
            }
        };
        let list = |all: Vec<String>| match all.is_empty() {
            true => "-".to_owned(),
            false => all.join(" "),
        };
        let dirty = match (page.dirty, &page.work) {
            (_, Some(work)) => work.clone(),
            (true, None) => "yes".to_owned(),
            (false, None) => "no".to_owned(),
        };
        table.row(vec![
            page.page.to_string(),
            page.state.clone(),
            page.version.clone(),
            dirty,
            list(page.holders.iter().map(holder).collect()),
            list(page.waiting.clone()),
            output::duration_ms(page.since_ms),
            printable(&page.file.display().to_string()),
        ]);
    }
    table.print()?;
    if leases.more {
        output::line("… and more (--list N)")?;
    }
    Ok(())
}
