//! `copage pages FILE`.

use super::client::{AdminError, Where};
use crate::config::check_name;
use crate::output::{self, Table, Usage, pages, printable};
use crate::serve::admin_types::{AdminReply, AdminRequest, FilePagesEntry};
use anyhow::{Context, Result, bail};
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

/// Shows what the daemon holds of a file: which pages, of which version, who was granted them; of a file that
/// guests write also the state of each (`copage leases` shows who waits).
///
/// FILE is a path of this machine or EXPORT:PATH. A file that is `host-bounded` is compared at open and
/// on notification only: the daemon has no kernel lease on it, because a process of this machine has it
/// open for writing or the file system knows no leases.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage pages /usr/bin/bash
  copage pages usr:bin/bash
  copage pages ./odd:name                    a path of this machine with a colon in it
  copage pages --json usr:bin/bash | jq '.runs | map(.count) | add'")]
pub struct Args {
    #[command(flatten)]
    at: Where,
    /// A path of this machine, or EXPORT:PATH
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut admin = args.at.connect()?;
    let (asked, real) = paths(&args.file)?;
    let reply = match (
        admin.ask(&AdminRequest::Pages {
            path: asked.clone(),
        }),
        real,
    ) {
        // An export may have been named by another way to the same directory.
        (Err(AdminError::Refused { .. }), Some(real)) if real != asked => {
            admin.ask(&AdminRequest::Pages { path: real })
        }
        (reply, _) => reply,
    };
    let AdminReply::Pages(entry) = reply? else {
        bail!(AdminError::Other);
    };
    if args.json {
        output::json(&entry)?;
    } else {
        show(&entry)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What to ask for, and for a path of the host the same with symbolic links resolved.
pub(super) fn paths(file: &Path) -> Result<(PathBuf, Option<PathBuf>)> {
    let Some(text) = file.to_str() else {
        bail!(Usage(format!(
            "{}: paths on the admin socket are UTF-8",
            file.display()
        )));
    };
    if let Some((export, path)) = text.split_once(':')
        && check_name(export).is_ok()
    {
        return Ok((in_export(export, path)?, None));
    }
    let asked = std::path::absolute(file).with_context(|| format!("{}", file.display()))?;
    Ok((asked, std::fs::canonicalize(file).ok()))
}

/// `EXPORT/path` as the daemon takes it: nothing that leads out, nothing empty.
fn in_export(export: &str, path: &str) -> Result<PathBuf> {
    let mut whole = PathBuf::from(export);
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => whole.push(name),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                bail!(Usage(format!(
                    "{export}:{path}: write the path without '..'"
                )));
            }
        }
    }
    Ok(whole)
}

fn show(entry: &FilePagesEntry) -> Result<()> {
    let path = printable(&entry.path.display().to_string());
    if !entry.cached {
        return output::line(&format!("{path}: nothing of it is held"));
    }
    let all = copage_grants::ids::pages_for(entry.bytes);
    output::line(&format!(
        "{path}: {}, generation {}, version {}",
        output::bytes(entry.bytes),
        entry.generation,
        entry.version
    ))?;
    output::line(&format!(
        "  {} of {all} pages held ({}), {} in 2 MiB frames, {} grants",
        entry.resident_pages,
        pages(entry.resident_pages),
        entry.huge_pages,
        entry.grants
    ))?;
    output::line(if entry.host_bounded {
        "  host-bounded: changes are noticed at open and on notification (no kernel lease to be had)"
    } else {
        "  under a kernel lease: whoever opens it for writing waits until guests let go"
    })?;
    if entry.pinned {
        output::line("  pinned by a mount or a program")?;
    }
    if entry.quarantined_pages > 0 {
        let count = entry.quarantined_pages;
        output::line(&format!(
            "  {count} pages of earlier versions in quarantine"
        ))?;
    }
    if entry.runs.is_empty() {
        return Ok(());
    }
    let mut heads = vec!["PAGES", "COUNT", "BYTES", "VERSION", "FRAMES", "HOLDERS"];
    let strict = entry.runs.iter().any(|run| run.strict.is_some());
    if strict {
        heads.push("STATE");
    }
    let mut table = Table::new(&heads);
    for run in &entry.runs {
        let last = run.first.saturating_add(run.count.saturating_sub(1));
        let range = if run.count == 1 {
            run.first.to_string()
        } else {
            format!("{}-{last}", run.first)
        };
        let holders = if run.holders.is_empty() {
            "-".to_owned()
        } else {
            run.holders.join(" ")
        };
        let version = run.strict.as_ref().map(|strict| &strict.version);
        let mut row = vec![
            range,
            run.count.to_string(),
            pages(run.count),
            version.unwrap_or(&entry.version).clone(),
            if run.huge { "2 MiB" } else { "4 KiB" }.to_owned(),
            holders,
        ];
        if strict {
            let state = run.strict.as_ref().map_or("", |strict| &strict.state);
            row.push(state.to_owned());
        }
        table.row(row);
    }
    table.print()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_and_host_paths() {
        let asked = |text: &str| paths(Path::new(text)).map(|(asked, _)| asked).ok();
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(asked("usr:bin/ls"), path("usr/bin/ls"));
        assert_eq!(asked("usr:/bin//./ls"), path("usr/bin/ls"));
        assert_eq!(asked("usr:"), path("usr"));
        assert_eq!(asked("usr:a:b"), path("usr/a:b"));
        assert_eq!(asked("/usr/bin/ls"), path("/usr/bin/ls"));
        assert_eq!(asked("/odd:name"), path("/odd:name"));
        assert_eq!(asked("usr:../etc"), None);
        let here = std::env::current_dir().unwrap();
        assert_eq!(asked("./usr:x"), Some(here.join("usr:x")));
        assert_eq!(asked("file"), Some(here.join("file")));
        assert_eq!(
            paths(Path::new("/proc/self")).unwrap().1,
            std::fs::canonicalize("/proc/self").ok()
        );
    }
}
