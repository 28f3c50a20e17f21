//! `copage export list`, `add`, `remove`.

use super::client::{AdminError, Where, order};
use crate::config::{ExportConfig, Mode, check_name};
use crate::output::{self, Table, Usage};
use crate::serve::admin_types::{AdminReply, AdminRequest, ExportEntry};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;

/// Shows and changes the directories that guests may use.
///
/// Changes last until the daemon stops; what is to last is in the configuration file.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage export list
  copage export add usr /usr
  copage export add --allow web --allow db images /srv/images
  copage export remove usr
  copage export list --json | jq -r '.exports[].path'")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Command {
    /// Shows the exports.
    #[command(
        visible_alias = "ls",
        after_help = "\
Examples:
  copage export list
  copage export list --json | jq -r '.exports[] | select(.allow == [\"*\"]) | .name'"
    )]
    List(List),
    /// Exports a directory.
    #[command(after_help = "\
Examples:
  copage export add usr /usr
  copage export add --allow web images ./images
  copage export add --group libs libs-a /opt/a/lib     one share group for two exports of one file")]
    Add(Add),
    /// Ends an export: its guests' files become unusable and its pages are taken back.
    #[command(
        visible_alias = "rm",
        after_help = "\
Examples:
  copage export remove usr
  copage export list && copage export remove images"
    )]
    Remove(Remove),
}

#[derive(Clone, Debug, clap::Args)]
struct List {
    #[command(flatten)]
    at: Where,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug, clap::Args)]
struct Add {
    #[command(flatten)]
    at: Where,
    /// What guests call it: letters, digits, '-', '_', '.'
    #[arg(value_parser = name)]
    name: String,
    /// The directory
    #[arg(value_name = "DIR")]
    path: PathBuf,
    /// A guest that may use it (repeatable) [default: all]
    #[arg(long, value_name = "GUEST", value_parser = guest)]
    allow: Vec<String>,
    /// The share group [default: one of its own]
    #[arg(long, value_parser = name)]
    group: Option<String>,
    /// What guests may do: ro or coherent
    #[arg(long, default_value = "ro")]
    mode: Mode,
    /// Of a coherent export: how long what guests store stays out of the host's file [default: 1000]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(50..=60_000))]
    writeback_ms: Option<u32>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug, clap::Args)]
struct Remove {
    #[command(flatten)]
    at: Where,
    /// Its name
    name: String,
    /// As JSON
    #[arg(long)]
    json: bool,
}

fn name(text: &str) -> Result<String, String> {
    check_name(text).map(|()| text.to_owned())
}

fn guest(text: &str) -> Result<String, String> {
    if text == "*" {
        Ok(text.to_owned())
    } else {
        name(text)
    }
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.command {
        Command::List(args) => list(args),
        Command::Add(args) => add(args),
        Command::Remove(args) => remove(args),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn list(args: &List) -> Result<()> {
    let AdminReply::Exports { exports } = args.at.ask(&AdminRequest::ExportList)? else {
        bail!(AdminError::Other);
    };
    if args.json {
        return output::json(&json!({ "exports": exports }));
    }
    if exports.is_empty() {
        return output::line("nothing is exported; copage export add NAME DIR");
    }
    let mut table = Table::new(&["NAME", "MODE", "ALLOW", "GROUP", "PATH"]);
    for export in exports {
        let group = export.group.unwrap_or_else(|| export.name.clone());
        let allow = if export.allow.is_empty() {
            "(nobody)".into()
        } else {
            export.allow.join(",")
        };
        let path = export.path.display().to_string();
        table.row(vec![export.name, export.mode, allow, group, path]);
    }
    table.print()
}

fn add(args: &Add) -> Result<()> {
    let path = std::path::absolute(&args.path).context("this directory")?;
    let mut export = ExportConfig::new(&args.name, path);
    export.mode = args.mode;
    if let Some(writeback_ms) = args.writeback_ms {
        if args.mode != Mode::Coherent {
            bail!(Usage(
                "--writeback-ms is of coherent exports only".to_owned()
            ));
        }
        export.writeback_ms = writeback_ms;
    }
    export.group.clone_from(&args.group);
    if !args.allow.is_empty() {
        export.allow.clone_from(&args.allow);
    }
    if export.path.to_str().is_none() {
        bail!(Usage(format!(
            "{}: paths on the admin socket are UTF-8",
            export.path.display()
        )));
    }
    let entry = ExportEntry::from(&export);
    order(&args.at, &AdminRequest::ExportAdd(entry.clone()))?;
    if args.json {
        return output::json(&json!({ "added": entry }));
    }
    output::line(&format!(
        "exported {} as {}",
        entry.path.display(),
        entry.name
    ))
}

fn remove(args: &Remove) -> Result<()> {
    order(
        &args.at,
        &AdminRequest::ExportRemove {
            name: args.name.clone(),
        },
    )?;
    if args.json {
        return output::json(&json!({ "removed": { "name": args.name } }));
    }
    output::line(&format!("{} is exported no more", args.name))
}
