//! `copage cat`.

use super::Where;
use anyhow::{Context, Result};
use copage_mmap::{Export, FileKind, OpenHow};
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;

/// Bytes read at once: one message's.
pub(super) const CHUNK_BYTES: usize = 128 << 10;

/// Writes files of an export to standard output.
///
/// Links are followed within the export, as in a chroot; paths begin at its root.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage cat usr share/dict/words | head
  copage cat libs a.log b.log > both.log
  copage cat libs big.bin --offset 4096 --bytes 512 | xxd")]
pub struct Args {
    #[command(flatten)]
    at: Where,
    /// The export
    export: String,
    /// Files of the export
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<OsString>,
    /// Begin so many bytes into each file
    #[arg(long, default_value_t = 0, value_name = "BYTES")]
    offset: u64,
    /// Write at most so many bytes of each file
    #[arg(long, value_name = "BYTES")]
    bytes: Option<u64>,
}

/// Runs it. A file that cannot be read does not keep the others from being written.
pub fn run(args: &Args) -> Result<ExitCode> {
    let export = args.at.attach(&args.export)?;
    let mut out = io::stdout().lock();
    let mut code = ExitCode::SUCCESS;
    for path in &args.paths {
        match one(&export, path, args, &mut out) {
            Ok(()) => {}
            // Whoever read it has enough.
            Err(e) if is_broken_pipe(&e) => return Ok(code),
            Err(e) => {
                eprintln!("copage cat: {}: {e:#}", path.display());
                code = ExitCode::FAILURE;
            }
        }
    }
    match out.flush() {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("standard output"),
        _ => Ok(code),
    }
}

fn one(export: &Export, path: &OsString, args: &Args, out: &mut impl Write) -> Result<()> {
    let node = export.resolve(path.as_bytes())?;
    anyhow::ensure!(node.kind() != FileKind::Directory, "is a directory");
    let file = node.open(OpenHow::Read)?;
    let mut at = args.offset;
    let mut rest = args.bytes.unwrap_or(u64::MAX);
    let mut buf = vec![0; CHUNK_BYTES];
    while rest > 0 {
        let want = usize::try_from(rest).map_or(CHUNK_BYTES, |rest| rest.min(CHUNK_BYTES));
        let got = file.read_at(&mut buf[..want], at)?;
        out.write_all(&buf[..got])?;
        if got < want {
            break;
        }
        at += got as u64;
        rest -= got as u64;
    }
    Ok(())
}

pub(super) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}
