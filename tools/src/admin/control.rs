//! `copage reclaim`, `budget`, `fence`, `stop`.

use super::client::{AdminError, Where, order};
use crate::config::limits::FRAMES_MIB;
use crate::output;
use crate::serve::admin_types::{AdminReply, AdminRequest};
use anyhow::{Result, bail};
use serde_json::json;
use std::process::ExitCode;

/// Takes frames back from whoever holds them; they fault again when they need them.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage reclaim 64             64 MiB, the coldest pages
  copage reclaim --unused       every page that is neither granted nor pinned
  copage reclaim 64 --json")]
pub struct ReclaimArgs {
    #[command(flatten)]
    at: Where,
    /// How much, in MiB
    #[arg(required_unless_present = "unused", conflicts_with = "unused",
          value_parser = clap::value_parser!(u64).range(1..=*FRAMES_MIB.end()))]
    mib: Option<u64>,
    /// Everything that nobody holds
    #[arg(long)]
    unused: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs `copage reclaim`.
pub fn reclaim(args: &ReclaimArgs) -> Result<ExitCode> {
    let request = match args.mib {
        Some(mib) => AdminRequest::Reclaim {
            pages: crate::config::mib_to_pages(mib),
        },
        None => AdminRequest::Drop,
    };
    let AdminReply::Reclaimed { pages } = args.at.ask(&request)? else {
        bail!(AdminError::Other);
    };
    if args.json {
        output::json(&json!({ "reclaimed_pages": pages }))?;
    } else {
        output::line(&format!(
            "{} taken back ({pages} pages)",
            output::pages(pages)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Changes the budget of frames while the daemon runs; until it stops.
///
/// A smaller budget takes frames back at once, as fast as guests let go of them; on Xen, cache domains
/// that it does not need are then ended (`copage stats` shows them draining). A larger one has cache domains
/// made, seconds for each; when Xen has no memory for them nothing is changed.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage budget 512
  copage budget 512 && copage stats --watch
  copage budget 2048 --json")]
pub struct BudgetArgs {
    #[command(flatten)]
    at: Where,
    /// The budget, in MiB
    #[arg(value_parser = clap::value_parser!(u64).range(*FRAMES_MIB.start()..=*FRAMES_MIB.end()))]
    mib: u64,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs `copage budget`.
pub fn budget(args: &BudgetArgs) -> Result<ExitCode> {
    order(
        &args.at,
        &AdminRequest::SetBudget {
            frames_mib: args.mib,
        },
    )?;
    if args.json {
        output::json(&json!({ "frames_mib": args.mib }))?;
    } else {
        output::line(&format!("the budget is {} MiB", args.mib))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Ends all sessions of a guest and takes its pages back, also from a stopped process.
///
/// Its next access is SIGBUS, its next call an error; it may connect again.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage fence web
  copage fence uid-1001 --json
  copage guests && copage fence web")]
pub struct FenceArgs {
    #[command(flatten)]
    at: Where,
    /// The guest's name
    guest: String,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs `copage fence`.
pub fn fence(args: &FenceArgs) -> Result<ExitCode> {
    let AdminReply::Fenced { sessions } = args.at.ask(&AdminRequest::Fence {
        guest: args.guest.clone(),
    })?
    else {
        bail!(AdminError::Other);
    };
    if args.json {
        output::json(&json!({ "guest": args.guest, "fenced_sessions": sessions }))?;
    } else {
        output::line(&format!(
            "{} fenced ({sessions} sessions)",
            output::printable(&args.guest)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Stops the daemon cleanly, as SIGTERM does: guests are told, sockets removed.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage stop
  copage stop --run-dir /run/other")]
pub struct StopArgs {
    #[command(flatten)]
    at: Where,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs `copage stop`.
pub fn stop(args: &StopArgs) -> Result<ExitCode> {
    order(&args.at, &AdminRequest::Stop)?;
    if args.json {
        output::json(&json!({ "stopped": true }))?;
    } else {
        output::line("the daemon stops")?;
    }
    Ok(ExitCode::SUCCESS)
}
