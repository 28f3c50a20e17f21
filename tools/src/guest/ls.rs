//! `copage ls`.

use super::{Where, show};
use anyhow::{Context, Result};
use copage_mmap::{Attr, Export, FileKind, LastLink, Node};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;

/// Bytes of directory entries asked for at once.
const DIR_BYTES: u32 = 64 << 10;

/// Lists directories of an export, or the exports.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage ls                          the exports that you may use
  copage ls usr                      the root of the export usr
  copage ls usr -l lib bin/ls
  copage ls usr --json bin | jq '.[].entries[].name'")]
pub struct Args {
    #[command(flatten)]
    at: Where,
    /// The export; without one, the exports are listed
    export: Option<String>,
    /// Files and directories of the export [default: its root]
    #[arg(value_name = "PATH")]
    paths: Vec<OsString>,
    /// One line for each with mode, links, owner, bytes and time of change (UTC)
    #[arg(short, long)]
    long: bool,
    /// Names that begin with a dot too
    #[arg(short, long)]
    all: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// One listed file.
struct Row {
    name: Vec<u8>,
    attr: Option<Attr>,
    target: Option<Vec<u8>>,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let result = match &args.export {
        None => exports(args, &mut out).map(|()| ExitCode::SUCCESS),
        Some(export) => paths(&args.at.attach(export)?, args, &mut out),
    };
    match result.and_then(|code| Ok(out.flush().map(|()| code)?)) {
        Err(e) if super::cat::is_broken_pipe(&e) => Ok(ExitCode::SUCCESS),
        other => other,
    }
}

fn exports(args: &Args, out: &mut impl Write) -> Result<()> {
    let names = args.at.connect()?.exports()?;
    if args.json {
        writeln!(out, "{}", json!(names))?;
    } else {
        for name in names {
            writeln!(out, "{name}")?;
        }
    }
    Ok(())
}

fn paths(export: &Export, args: &Args, out: &mut impl Write) -> Result<ExitCode> {
    let root = [OsString::from("/")];
    let paths = if args.paths.is_empty() {
        &root[..]
    } else {
        &args.paths
    };
    let mut code = ExitCode::SUCCESS;
    let mut all = Vec::new();
    for (number, path) in paths.iter().enumerate() {
        let rows = match list(export, path, args) {
            Ok(rows) => rows,
            Err(e) => {
                eprintln!("copage ls: {}: {e:#}", path.display());
                code = ExitCode::FAILURE;
                continue;
            }
        };
        if args.json {
            let entries: Vec<Value> = rows.iter().map(row_json).collect();
            all.push(json!({ "path": path.to_string_lossy(), "entries": entries }));
            continue;
        }
        if paths.len() > 1 {
            writeln!(
                out,
                "{}{}:",
                if number > 0 { "\n" } else { "" },
                path.display()
            )?;
        }
        print(&rows, args.long, out)?;
    }
    if args.json {
        writeln!(out, "{}", Value::from(all))?;
    }
    Ok(code)
}

fn row_json(row: &Row) -> Value {
    let mut value = match &row.attr {
        Some(attr) => show::json(&row.name, attr),
        None => json!({ "name": String::from_utf8_lossy(&row.name) }),
    };
    if let Some(target) = &row.target {
        value["target"] = String::from_utf8_lossy(target).into();
    }
    value
}

fn row(name: Vec<u8>, node: Option<&Node>) -> Row {
    let link = node.filter(|node| node.kind() == FileKind::Symlink);
    let target = link.and_then(|node| node.readlink().ok());
    Row {
        name,
        attr: node.map(|node| *node.known_attr()),
        target,
    }
}

fn list(export: &Export, path: &OsString, args: &Args) -> Result<Vec<Row>> {
    let mut node = export.find(path.as_bytes(), LastLink::Keep)?.node;
    // As ls does: a link to a directory is looked into, unless links are to be shown.
    if node.kind() == FileKind::Symlink
        && !args.long
        && let Ok(target) = export.resolve(path.as_bytes())
    {
        node = target;
    }
    if node.kind() != FileKind::Directory {
        return Ok(vec![row(path.as_bytes().to_vec(), Some(&node))]);
    }
    let mut rows = Vec::new();
    let mut cookie = 0;
    loop {
        let page = node.readdir_page(cookie, DIR_BYTES, args.long || args.json)?;
        let Some(last) = page.entries.last() else {
            break;
        };
        cookie = last.cookie;
        for entry in page.entries {
            let dots = entry.name == b"." || entry.name == b"..";
            if !dots && (args.all || !entry.name.starts_with(b".")) {
                rows.push(row(entry.name, entry.node.as_ref()));
            }
        }
        if page.end {
            break;
        }
    }
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(rows)
}

fn print(rows: &[Row], long: bool, out: &mut impl Write) -> Result<()> {
    let width = |of: fn(&Attr) -> u64| {
        rows.iter()
            .filter_map(|r| r.attr.as_ref())
            .map(of)
            .max()
            .unwrap_or(0)
            .to_string()
            .len()
    };
    let links = width(|a| a.nlink.into());
    let (uid, gid, bytes) = (
        width(|a| a.uid.into()),
        width(|a| a.gid.into()),
        width(|a| a.bytes),
    );
    for row in rows {
        if long {
            match &row.attr {
                Some(a) => write!(
                    out,
                    "{} {:links$} {:uid$} {:gid$} {:bytes$} {} ",
                    show::mode(a),
                    a.nlink,
                    a.uid,
                    a.gid,
                    a.bytes,
                    show::time(a.mtime)
                )?,
                None => write!(out, "?????????? (cannot be looked up) ")?,
            }
        }
        out.write_all(&show::name(&row.name))?;
        if let Some(target) = row.target.as_ref().filter(|_| long) {
            out.write_all(b" -> ")?;
            out.write_all(&show::name(target))?;
        }
        writeln!(out).context("standard output")?;
    }
    Ok(())
}
