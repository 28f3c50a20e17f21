//! `copage stat`.

use super::{Where, show};
use anyhow::Result;
use copage_mmap::{Export, FileKind, LastLink, OpenHow};
use serde_json::Value;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;

/// Shows what an export says of files.
///
/// Of a regular file also the version of its content, and whether it is host-bounded: whether
/// the daemon has no kernel lease on it, so that changes on the host are noticed at open and on
/// notification only.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage stat usr bin/ls
  copage stat usr --json lib bin | jq '.[].bytes'
  copage stat usr -L bin/sh          of what the link leads to")]
pub struct Args {
    #[command(flatten)]
    at: Where,
    /// The export
    export: String,
    /// Files and directories of the export
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<OsString>,
    /// Follow a link at the end of a path
    #[arg(short = 'L', long)]
    dereference: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let export = args.at.attach(&args.export)?;
    let mut out = io::stdout().lock();
    let mut code = ExitCode::SUCCESS;
    let mut all = Vec::new();
    for path in &args.paths {
        match one(&export, path, args.dereference) {
            Ok(value) if args.json => all.push(value),
            Ok(value) => print(&value, &mut out)?,
            Err(e) => {
                eprintln!("copage stat: {}: {e:#}", path.display());
                code = ExitCode::FAILURE;
            }
        }
    }
    if args.json {
        writeln!(out, "{}", Value::from(all))?;
    }
    Ok(code)
}

fn one(export: &Export, path: &OsString, follow: bool) -> Result<Value> {
    let last = if follow {
        LastLink::Follow
    } else {
        LastLink::Keep
    };
    let found = export.find(path.as_bytes(), last)?;
    let attr = found.node.attr()?;
    let mut value = show::json(&found.path, &attr);
    value["permissions"] = show::mode(&attr).into();
    match attr.kind {
        FileKind::Symlink => {
            value["target"] = String::from_utf8_lossy(&found.node.readlink()?).into();
        }
        FileKind::Regular => {
            let file = found.node.open(OpenHow::Read)?;
            value["version"] = file.version().to_string().into();
            value["host_bounded"] = file.host_bounded().into();
        }
        FileKind::Directory | FileKind::Other => {}
    }
    Ok(value)
}

fn print(value: &Value, out: &mut impl Write) -> Result<()> {
    let text = |key: &str| match &value[key] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let time = |key: &str| show::time((value[key].as_i64().unwrap_or(0), 0));
    let name = show::name(text("name").as_bytes());
    writeln!(out, "{}: {}", String::from_utf8_lossy(&name), text("kind"))?;
    if value.get("target").is_some() {
        let target = show::name(text("target").as_bytes());
        writeln!(out, "  leads to {}", String::from_utf8_lossy(&target))?;
    }
    writeln!(
        out,
        "  {} bytes in {} blocks of 512",
        text("bytes"),
        text("blocks_512")
    )?;
    writeln!(
        out,
        "  {} ({}), uid {}, gid {}, {} links, inode {} of device {}",
        text("permissions"),
        text("mode"),
        text("uid"),
        text("gid"),
        text("links"),
        text("inode"),
        text("device")
    )?;
    writeln!(
        out,
        "  content changed {}, anything {}, last read {}",
        time("mtime_s"),
        time("ctime_s"),
        time("atime_s")
    )?;
    if value.get("version").is_some() {
        let bounded = value["host_bounded"].as_bool() == Some(true);
        let lease = if bounded {
            "host-bounded (no kernel lease)"
        } else {
            "under a kernel lease"
        };
        writeln!(out, "  version {}, {lease}", text("version"))?;
    }
    Ok(())
}
