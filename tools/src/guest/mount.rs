//! `copage mount`.

use super::Where;
use anyhow::{Context, Result};
use copage_grants::sys::SignalFd;
use copage_mmap::mount::{Event, Form, MountError, Mounted, Options, Target, mount};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::thread;

/// Signals that end a mount.
const SIGNALS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
/// Begins the line that is printed when the mount is up.
const UP: &str = "mounted ";

/// Mounts an export at a directory, read-only, and serves it until it is unmounted.
///
/// As root on Linux 6.9 or later, files are on shared frames: reading, mapping and running them
/// touches the very frames that every other guest touches. Files larger than the daemon's pin limit,
/// or than what this guest may still pin, and all files of a mount by others than root, go through
/// this kernel's page cache: as right, but a copy. `getfattr -n user.copage.form FILE` says which.
///
/// A file that changes on the host: what is open or mapped on frames keeps its whole old content, new
/// opens get the new one. Names and attributes are believed for one second. If the daemon dies, files
/// open on frames go on, the rest waits until it is back; after a minute it is EIO until then.
///
/// SIGTERM, SIGINT and `copage umount DIR` end it. If it is in use then, a signal detaches it: it is
/// served on until its last use; a second signal ends it at once.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage mount usr /mnt/usr --background && /mnt/usr/bin/ls; copage umount /mnt/usr
  copage mount libs ~/libs           as any user, with fusermount3
  unshare -rm copage mount libs /mnt as any user, in a namespace of one's own")]
pub struct Args {
    #[command(flatten)]
    at: Where,
    /// The export
    export: String,
    /// An empty directory
    dir: PathBuf,
    /// Return when the mount is up and serve it from a process in the background
    #[arg(long)]
    background: bool,
    /// Let only this user enter (default for others than root)
    #[arg(long, conflicts_with = "allow_other")]
    private: bool,
    /// Let other users enter (default for root; others need user_allow_other in /etc/fuse.conf)
    #[arg(long)]
    allow_other: bool,
    /// Mount over a directory that is not empty
    #[arg(long)]
    nonempty: bool,
    /// Everything through the page cache, nothing pinned
    #[arg(long)]
    no_frames: bool,
    /// The process that --background starts
    #[arg(long, hide = true)]
    detached: bool,
}

/// Runs it. To be called before other threads are started.
pub fn run(args: &Args) -> Result<ExitCode> {
    if args.background {
        return start_in_background();
    }
    if args.detached {
        // Not a group leader, having been started by another program: this works, or it is one
        // already and does not matter.
        let _ = rustix::process::setsid();
    }
    // Before the session, whose threads would be struck else.
    let signals = SignalFd::new(&SIGNALS).context("signals")?;
    let root = rustix::process::geteuid().is_root();
    let options = Options {
        target: Target {
            daemon: args.at.daemon(),
            connect: args.at.options(),
            export: args.export.clone(),
        },
        dir: args.dir.clone(),
        allow_other: !args.private && (root || args.allow_other),
        nonempty: args.nonempty,
        passthrough: !args.no_frames,
    };
    let mounted = match mount(&options) {
        // In the words that every command has for this.
        Err(MountError::Share(_)) => {
            args.at.attach(&args.export)?;
            mount(&options)?
        }
        other => other?,
    };
    announce(args, &mounted)?;
    serve(&mounted, &signals)
}

fn announce(args: &Args, mounted: &Mounted) -> Result<()> {
    let form = match mounted.form() {
        Form::Frames => "files on shared frames; what is too large to pin through the page cache",
        Form::PageCache => "files through this kernel's page cache",
        Form::Direct => {
            "for reading and writing, each by a message to the daemon; shared mappings are refused"
        }
    };
    let why = mounted.why_page_cache();
    if let Some(why) = why.filter(|_| !args.no_frames && mounted.form() != Form::Direct) {
        eprintln!("copage mount: every file goes through this kernel's page cache: {why}");
    }
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{UP}{} at {}: {form}",
        args.export,
        mounted.dir().display()
    )?;
    out.flush()?;
    drop(out);
    if args.detached {
        // Whoever started this reads no more, and its terminal is not this process's.
        let null = File::options().read(true).write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
    }
    Ok(())
}

fn serve(mounted: &Mounted, signals: &SignalFd) -> Result<ExitCode> {
    let mut asked = false;
    loop {
        match mounted.wait(Some(signals))? {
            Event::Ended(result) => {
                result.context("the mount ended")?;
                return Ok(ExitCode::SUCCESS);
            }
            Event::Signal(_) if asked => {
                eprintln!("copage mount: ended while in use");
                return Ok(ExitCode::FAILURE);
            }
            Event::Signal(_) => {
                asked = true;
                match mounted.unmount(false) {
                    Ok(()) => {}
                    Err(MountError::Busy { .. }) => {
                        eprintln!(
                            "copage mount: {} is in use: detached, served until its last use; another \
                             signal ends it at once",
                            mounted.dir().display()
                        );
                        mounted.unmount(true)?;
                    }
                    Err(e) => return Err(e.into()),
                }
            }
        }
    }
}

/// Starts this command again with `--detached` instead of `--background` and returns when its mount is
/// up, with what it said, or when it has failed.
fn start_in_background() -> Result<ExitCode> {
    let mut command = Command::new(std::env::current_exe().context("this program's path")?);
    let mut arguments = std::env::args_os();
    command.args(
        arguments
            .by_ref()
            .skip(1)
            .map(|argument| match argument == "--background" {
                true => "--detached".into(),
                false => argument,
            }),
    );
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .context("starting the process in the background")?;
    // Copied, so that this process's caller is not held up by a descriptor of a background process.
    let errors = child.stderr.take().map(|stderr| {
        thread::spawn(move || {
            let mut lines = BufReader::new(stderr);
            let mut text = Vec::new();
            while lines.read_until(b'\n', &mut text).is_ok_and(|n| n > 0) {
                let _ = io::stderr().write_all(&text);
                text.clear();
            }
        })
    });
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout.take(64 << 10)).read_line(&mut said)?;
    }
    if said.starts_with(UP) {
        // Its errors end when it has closed them, just now.
        errors.map(thread::JoinHandle::join);
        println!("{} (process {})", said.trim_end(), child.id());
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait()?;
    errors.map(thread::JoinHandle::join);
    Ok(ExitCode::from(
        status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(1),
    ))
}
