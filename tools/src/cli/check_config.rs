//! `copage check-config`.

use crate::config::{Config, DEFAULT_FILE, Problem};
use crate::output;
use anyhow::Result;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Reads a configuration as the daemon would and says everything that is wrong with it.
///
/// Nothing is started or changed. Exit code 2: the daemon would not start with it.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage check-config                          the default, /etc/copage/copage.toml
  copage check-config ./copage.toml
  copage check-config ./copage.toml && systemctl restart copage
  copage check-config --json ./copage.toml | jq -r '.problems[] | [.line, .key] | @tsv'")]
pub struct Args {
    /// The file
    #[arg(value_name = "FILE", default_value = DEFAULT_FILE)]
    file: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'r> {
    file: &'r Path,
    ok: bool,
    problems: &'r [Problem],
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let loaded = Config::load(&args.file);
    if args.json {
        let (ok, problems) = match &loaded {
            Ok(loaded) => (true, &loaded.warnings),
            Err(errors) => (false, &errors.problems),
        };
        output::json(&Report {
            file: &args.file,
            ok,
            problems,
        })?;
        return Ok(match ok {
            true => ExitCode::SUCCESS,
            false => ExitCode::from(super::errors::WRONG_USAGE),
        });
    }
    let loaded = loaded?;
    for line in loaded.lines() {
        eprintln!("copage: {line}");
    }
    let config = &loaded.config;
    output::line(&format!(
        "{}: good: {} exports, {} guests, {} MiB of frames, sockets in {}",
        args.file.display(),
        config.exports.len(),
        config.guests.len(),
        config.frames_mib,
        config.run_dir.display()
    ))?;
    Ok(ExitCode::SUCCESS)
}
