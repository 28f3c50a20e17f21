//! `copage attach`, `copage detach`.

use super::client::{AdminError, Where};
use crate::output::{self, printable};
use crate::serve::admin_types::{AdminReply, AdminRequest};
use anyhow::{Result, bail};
use serde_json::json;
use std::process::ExitCode;

/// Lets a Xen domain use exports.
///
/// It lasts until the daemon stops; what is to last is a guest with domain or uuid in the
/// configuration file. The domain need not run yet.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage attach web-vm usr
  copage attach web-vm usr images
  copage attach 6ba7b810-9dad-11d1-80b4-00c04fd430c8 usr
  xl create web.cfg && copage attach web-vm usr --json")]
pub struct AttachArgs {
    #[command(flatten)]
    at: Where,
    /// The domain's name or uuid; never its domid, which is used again
    domain: String,
    /// The exports
    #[arg(required = true, value_name = "EXPORT")]
    exports: Vec<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs `copage attach`.
pub fn attach(args: &AttachArgs) -> Result<ExitCode> {
    let AdminReply::Attached { guest } = args.at.ask(&AdminRequest::Attach {
        domain: args.domain.clone(),
        exports: args.exports.clone(),
    })?
    else {
        bail!(AdminError::Other);
    };
    if args.json {
        output::json(&json!({ "domain": args.domain, "guest": guest, "exports": args.exports }))?;
    } else {
        output::line(&format!(
            "domain {} may use {}, as guest {}",
            printable(&args.domain),
            printable(&args.exports.join(", ")),
            printable(&guest)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Lets a Xen domain use exports no more.
///
/// Its sessions are fenced; with exports named it may connect again and use the others. What it goes on
/// reading in mapped pages is in quarantine until it unmaps or ends.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage detach web-vm
  copage detach web-vm images
  copage guests && copage detach web-vm --json")]
pub struct DetachArgs {
    #[command(flatten)]
    at: Where,
    /// The domain, as it was attached or as the configuration says
    domain: String,
    /// The exports [default: all, and no session any more]
    #[arg(value_name = "EXPORT")]
    exports: Vec<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs `copage detach`.
pub fn detach(args: &DetachArgs) -> Result<ExitCode> {
    let AdminReply::Fenced { sessions } = args.at.ask(&AdminRequest::Detach {
        domain: args.domain.clone(),
        exports: args.exports.clone(),
    })?
    else {
        bail!(AdminError::Other);
    };
    if args.json {
        output::json(&json!({ "domain": args.domain, "fenced_sessions": sessions }))?;
    } else {
        let what = match args.exports.is_empty() {
            true => "is detached".to_owned(),
            false => format!("may not use {} any more", args.exports.join(", ")),
        };
        output::line(&format!(
            "domain {} {what} ({sessions} sessions fenced)",
            printable(&args.domain)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
