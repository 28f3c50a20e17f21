//! `copage exec`.

use super::Where;
use anyhow::{Context, Result};
use copage_grants::sys::SignalFd;
use copage_mmap::DaemonAt;
use copage_mmap::exec::text::TextReport;
use copage_mmap::exec::{Command, Running, Search};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};
use std::time::{Duration, Instant};

/// How often the text is counted in the first second, so that short programs are seen too.
const COUNT_OFTEN: Duration = Duration::from_millis(2);
/// How often it is counted after that.
const COUNT_SELDOM: Duration = Duration::from_millis(500);

/// Runs a program off an export: no mount, no root.
///
/// The program, its loader and its libraries are pinned on shared frames and run from there. Paths
/// are the export's; those of the host are tried too, so that /usr/bin/ls is found in an export of
/// /usr, and a bare name is looked for in bin and sbin. Scripts run if their interpreter is in the
/// export. The exit status is the program's, 128 + n if signal n ended it, 126 or 127 if it could not
/// be run.
///
/// What comes from this machine and not from the export: libraries that the program opens by itself
/// while it runs (dlopen: plugins, name service) unless --library names them; programs that it
/// starts; all files that it opens. /proc/self/exe is the loader. Set-user-id bits do nothing.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage exec usr bin/ls -l /
  copage exec --show-text usr git --version
  copage exec usr bash -c 'echo $0 $1' hello world
  copage exec --library libnss_myhostname.so.2 usr bin/getent hosts localhost
  copage exec --library-dir /opt/app/lib root /opt/app/bin/app")]
pub struct Args {
    #[command(flatten)]
    at: Where,
    /// Say on standard error how many text pages lay on shared frames
    #[arg(long)]
    show_text: bool,
    /// Take this library off the export too, by name or path (repeatable)
    #[arg(long, value_name = "LIBRARY")]
    library: Vec<OsString>,
    /// Look for libraries in this directory of the export first (repeatable)
    #[arg(long, value_name = "DIR")]
    library_dir: Vec<OsString>,
    /// The export
    export: String,
    /// The program and its arguments: all that follows is its own, `--help` too
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PROGRAM"
    )]
    program: Vec<OsString>,
}

/// Runs it. To be called before other threads are started.
pub fn run(args: &Args) -> Result<ExitCode> {
    // Before the session, whose threads would be struck else.
    let signals = SignalFd::new(&Running::SIGNALS).context("signals")?;
    let (path, rest) = args.program.split_first().context("no program")?;
    let export = args.at.attach(&args.export)?;
    let bytes = |list: &[OsString]| list.iter().cloned().map(OsStringExt::into_vec).collect();
    let command = Command {
        path: path.clone(),
        args: rest.to_vec(),
        search: Search {
            library_dirs: bytes(&args.library_dir),
            also: bytes(&args.library),
        },
    };
    let mut running = match command.start(&export) {
        Ok(running) => running,
        Err(e) => {
            let status = e.exit_status();
            if args.at.daemon() == DaemonAt::Xen {
                eprintln!(
                    "copage exec: in a Xen guest this version cannot run programs from shared frames; \
                     mount the export and run them from there (copage mount {} DIR)",
                    args.export
                );
            }
            eprintln!("copage exec: {:#}", anyhow::Error::from(e));
            return Ok(ExitCode::from(status));
        }
    };
    let began = Instant::now();
    let mut last: Option<TextReport> = None;
    let status = running.wait(&signals, |running| {
        if !args.show_text {
            return None;
        }
        // A program that has just ended has no mappings: what was seen last stands.
        if let Ok(report) = running.text()
            && report.on_frames_pages > 0
        {
            last = Some(report);
        }
        let young = began.elapsed() < Duration::from_secs(1);
        Some(if young { COUNT_OFTEN } else { COUNT_SELDOM })
    })?;
    if args.show_text {
        show(&running, last.as_ref());
    }
    Ok(code(status))
}

fn code(status: ExitStatus) -> ExitCode {
    let number = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 1,
    };
    ExitCode::from(u8::try_from(number & 0xff).unwrap_or(1))
}

fn show(running: &Running, report: Option<&TextReport>) {
    let Some(report) = report else {
        eprintln!("copage exec: the program ended before its text could be counted");
        return;
    };
    eprintln!(
        "copage exec: text pages resident when last looked: {} on shared frames, {} of other files, {} copied",
        report.on_frames_pages, report.elsewhere_pages, report.own_pages
    );
    for file in report.files.iter().filter(|file| file.pages > 0) {
        let (place, name) = match running.path_of(file.id) {
            Some(path) => ("shared frames", path),
            None => ("this machine's", file.name.as_slice()),
        };
        eprintln!(
            "  {:>6}  {place:14}  {}",
            file.pages,
            String::from_utf8_lossy(name)
        );
    }
}
