//! `copage exec`.

use super::Where;
use super::keeper::{self, Kept};
use anyhow::{Context, Result};
use copage_grants::sys::SignalFd;
use copage_mmap::Export;
use copage_mmap::exec::text::TextReport;
use copage_mmap::exec::{Command, ExecError, Resident, Running, Search, Text};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};
use std::time::{Duration, Instant};

/// How often the text is counted in the first second, so that short programs are seen too.
const COUNT_OFTEN: Duration = Duration::from_millis(2);
/// How often it is counted after that.
const COUNT_SELDOM: Duration = Duration::from_millis(500);

/// Runs a program off an export: no mount to make, no root.
///
/// The program, its loader and its libraries are pinned on shared frames and run from there. Paths
/// are the export's; those of the host are tried too, so that /usr/bin/ls is found in an export of
/// /usr, and a bare name is looked for in bin and sbin. Scripts run if their interpreter is in the
/// export. The exit status is the program's, 128 + n if signal n ended it, 126 or 127 if it could not
/// be run.
///
/// In a Xen guest, where no shared page can be executed, what runs is copied: the pages that are
/// touched, into the guest's page cache, once for all programs that root runs off the export; for
/// other users whole files, for each program. One line at the end says how much (--quiet: it does not).
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
    /// Say on standard error how many text pages lay on shared frames, or in copies
    #[arg(long)]
    show_text: bool,
    /// Do not say that pages were copied, and how many
    #[arg(long, short, conflicts_with = "show_text")]
    quiet: bool,
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
    let started = match Started::new(&command, export, args) {
        Ok(started) => started,
        Err(e) => {
            let status = e.exit_status();
            eprintln!("copage exec: {:#}", anyhow::Error::from(e));
            return Ok(ExitCode::from(status));
        }
    };
    let Started {
        mut running, form, ..
    } = started;
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
        show(&running, &form, last.as_ref());
    }
    if !args.quiet {
        form.say(&running);
    }
    Ok(code(status))
}

/// Where the pages of a program lie.
enum Form {
    /// On shared frames, as far as that goes.
    Frames,
    /// In this machine's page cache, by a private mount.
    PageCache,
    /// In memory of its own, and why not in the page cache.
    Copies(anyhow::Error),
}

/// A program that runs, and what it needs to.
struct Started {
    running: Running,
    form: Form,
    /// Its session holds the pins of frames.
    _export: Option<Export>,
    /// What it runs from when not from frames.
    _kept: Option<Kept>,
}

impl Started {
    fn new(command: &Command, export: Export, args: &Args) -> Result<Self, ExecError> {
        match command.start(&export) {
            Err(e) if e.no_frames_to_run() => {}
            started => {
                return Ok(Self {
                    running: started?,
                    form: Form::Frames,
                    _export: Some(export),
                    _kept: None,
                });
            }
        }
        let (running, form, kept) = match keeper::private_mount(&args.at, &args.export) {
            Ok(kept) => {
                let text = Text::PageCache(kept.root());
                let running = command.start_from(&export, text)?;
                (running, Form::PageCache, Some(kept))
            }
            Err(why) => {
                let running = command.start_from(&export, Text::Copies)?;
                (running, Form::Copies(why), None)
            }
        };
        // The files are open: this process asks the daemon for nothing more.
        Ok(Self {
            running,
            form,
            _export: None,
            _kept: kept,
        })
    }
}

impl Form {
    /// One line of what was copied.
    fn say(&self, running: &Running) {
        let Ok(resident) = running.resident() else {
            return;
        };
        let Resident {
            files,
            pages,
            of_pages,
        } = resident;
        let how_many = pages.map_or("an unknown number".into(), |pages| pages.to_string());
        match self {
            Self::Frames => {}
            Self::PageCache => eprintln!(
                "copage exec: Xen executes no shared page: {how_many} of the {of_pages} pages of {files} \
                 files are copied into this guest, once for all that runs off the export here; none \
                 is shared with other guests"
            ),
            Self::Copies(why) => eprintln!(
                "copage exec: Xen executes no shared page, and no mount can be made here ({why:#}): all \
                 {of_pages} pages of {files} files were copied for this program alone"
            ),
        }
    }
}

fn code(status: ExitStatus) -> ExitCode {
    let number = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 1,
    };
    ExitCode::from(u8::try_from(number & 0xff).unwrap_or(1))
}

fn show(running: &Running, form: &Form, report: Option<&TextReport>) {
    let Some(report) = report else {
        eprintln!("copage exec: the program ended before its text could be counted");
        return;
    };
    let place = match form {
        Form::Frames => "shared frames",
        Form::PageCache => "the page cache",
        Form::Copies(_) => "copies",
    };
    eprintln!(
        "copage exec: text pages resident when last looked: {} in {place}, {} of other files, {} copied",
        report.on_frames_pages, report.elsewhere_pages, report.own_pages
    );
    for file in report.files.iter().filter(|file| file.pages > 0) {
        let (place, name) = match running.path_of(file.id) {
            Some(path) => (place, path),
            None => ("this machine's", file.name.as_slice()),
        };
        eprintln!(
            "  {:>6}  {place:14}  {}",
            file.pages,
            String::from_utf8_lossy(name)
        );
    }
}
