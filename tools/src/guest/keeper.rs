//! The process that keeps an export's private mount while programs run from it: one for each export of a
//! user, so that what runs is copied into the guest once, whoever runs it.
//!
//! It listens at a socket that only its user can reach, gives the mount's root to who asks, and ends when
//! nobody has anything of the mount open for a while. The mount has no place in the file system.

use super::Where;
use anyhow::{Context, Result, bail, ensure};
use copage_grants::channel::{Channel, ChannelError, Listener};
use copage_grants::sys::unblock_signals;
use copage_mmap::DaemonAt;
use copage_mmap::exec::Running;
use copage_mmap::mount::{Detached, Target};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use std::fs::{DirBuilder, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// How long a mount is kept that nobody uses: the next program finds its pages copied.
const LINGER: Duration = Duration::from_secs(10);
/// How long a keeper may take to give its mount's root.
const ANSWER: Duration = Duration::from_secs(10);
/// Said on standard output when programs can run.
const UP: &str = "up";

/// The root of an export's private mount.
pub struct Kept {
    root: OwnedFd,
    /// While this is open the mount is kept.
    _channel: Channel,
}

impl Kept {
    /// Its root directory.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// The private mount of `export`, made if nobody has it.
pub fn private_mount(at: &Where, export: &str) -> Result<Kept> {
    let place = Place::of(at, export)?;
    // One keeper is started at a time, and none ends while it is asked.
    let _lock = place.lock(FlockOperation::LockExclusive)?;
    match place.ask() {
        Ok(kept) => return Ok(kept),
        Err(error) => tracing::debug!("no keeper answers: {error:#}"),
    }
    start(&place, at, export)?;
    place.ask()
}

/// Where a keeper listens: a path without the ends of its names.
#[derive(Clone)]
struct Place(PathBuf);

impl Place {
    fn of(at: &Where, export: &str) -> Result<Self> {
        let dir = at.run_dir().join("exec");
        // A daemon's run directory is for others too.
        std::fs::create_dir_all(at.run_dir()).with_context(|| dir.display().to_string())?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .with_context(|| dir.display().to_string())?;
        let found = std::fs::symlink_metadata(&dir).with_context(|| dir.display().to_string())?;
        let uid = rustix::process::geteuid().as_raw();
        ensure!(
            found.is_dir() && found.uid() == uid && found.mode() & 0o077 == 0,
            "{} is not a directory that only its user can enter",
            dir.display()
        );
        let mut hasher = DefaultHasher::new();
        (at.daemon().to_string(), &at.name, export).hash(&mut hasher);
        let dir = dir.canonicalize()?;
        Ok(Self(dir.join(format!("{:016x}", hasher.finish()))))
    }

    fn socket(&self) -> PathBuf {
        self.0.with_extension("sock")
    }

    /// Held until it is dropped.
    fn lock(&self, how: FlockOperation) -> Result<File> {
        let path = self.0.with_extension("lock");
        let name = || path.display().to_string();
        let mut options = File::options();
        let file = options.create(true).truncate(false).write(true).open(&path);
        let file = file.with_context(name)?;
        flock(&file, how).with_context(name)?;
        Ok(file)
    }

    fn ask(&self) -> Result<Kept> {
        let channel = Channel::connect(&self.socket())?;
        let came = wait(&[channel.read_fd()], Some(ANSWER))?;
        ensure!(came, "the keeper of the private mount does not answer");
        let received = channel.recv(&mut [0; 16])?;
        Ok(Kept {
            root: received.fd.context("no mount came")?,
            _channel: channel,
        })
    }
}

/// Waits until one of them has something to say; `false`: the time is over.
fn wait(fds: &[BorrowedFd<'_>], at_most: Option<Duration>) -> Result<bool> {
    let mut fds: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    let timeout = at_most.map(Timespec::try_from).transpose()?;
    loop {
        match poll(&mut fds, timeout.as_ref()) {
            Ok(came) => return Ok(came > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Starts a keeper and waits until it is up.
fn start(place: &Place, at: &Where, export: &str) -> Result<()> {
    let mut command = Command::new(std::env::current_exe().context("this program's path")?);
    command.arg("exec-keeper");
    command.arg("--connect").arg(match at.daemon() {
        DaemonAt::Xen => PathBuf::from("xen"),
        DaemonAt::Socket(socket) => std::path::absolute(socket)?,
    });
    if let Some(name) = &at.name {
        command.arg("--as").arg(name);
    }
    command
        .arg("--place")
        .arg(&place.0)
        .arg("--")
        .arg(export)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().context("starting the mount's keeper")?;
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout.take(64)).read_line(&mut said)?;
    }
    if said.trim_end() == UP {
        return Ok(());
    }
    let mut why = String::new();
    if let Some(stderr) = child.stderr.take() {
        stderr.take(64 << 10).read_to_string(&mut why)?;
    }
    child.wait()?;
    let why = why.trim().strip_prefix("copage: ").unwrap_or(why.trim());
    bail!("{}", why.trim_start_matches("error: "))
}

/// Keeps the private mount of an export for `copage exec`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    at: Where,
    /// Where to listen, without the ends of the names
    #[arg(long, value_name = "PATH")]
    place: PathBuf,
    /// The export
    export: String,
}

/// Runs it. To be called before other threads are started.
pub fn run(args: &Args) -> Result<ExitCode> {
    // The terminal's keys are for the programs. Not a group's leader, so this works.
    rustix::process::setsid()?;
    // Who started this reads them.
    unblock_signals(&Running::SIGNALS)?;
    let place = Place(args.place.clone());
    let mount = Detached::new(&Target {
        daemon: args.at.daemon(),
        connect: args.at.options(),
        export: args.export.clone(),
    })?;
    let listener = Listener::bind(&place.socket(), 0o600)?;
    listener.set_nonblocking(true)?;
    println!("{UP}");
    std::io::stdout().flush()?;
    // Whoever started this reads no more.
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    keep(&place, &mount, listener)?;
    mount.end()?;
    Ok(ExitCode::SUCCESS)
}

/// Serves until nobody needs the mount, or it was ended by force.
fn keep(place: &Place, mount: &Detached, listener: Listener) -> Result<()> {
    let mut users: Vec<Channel> = Vec::new();
    loop {
        let mut fds = vec![listener.as_fd(), mount.ended()];
        fds.extend(users.iter().map(Channel::read_fd));
        let came = wait(&fds, Some(LINGER))?;
        if wait(&[mount.ended()], Some(Duration::ZERO))? {
            return Ok(());
        }
        // Users send nothing: what there is to read is their end.
        let mut left = Vec::new();
        for user in users {
            if !wait(&[user.read_fd()], Some(Duration::ZERO))? {
                left.push(user);
            }
        }
        users = left;
        users.extend(give(&listener, mount)?);
        if came || !users.is_empty() || mount.in_use() {
            continue;
        }
        let Ok(_lock) = place.lock(FlockOperation::NonBlockingLockExclusive) else {
            continue;
        };
        // Nobody can have come since who does not hold the lock.
        drop(listener);
        return Ok(());
    }
}

/// Gives the mount's root to all who have connected.
fn give(listener: &Listener, mount: &Detached) -> Result<Vec<Channel>> {
    let mut users = Vec::new();
    loop {
        match listener.accept() {
            Ok((channel, peer)) if peer.uid == rustix::process::geteuid().as_raw() => {
                // It may have ended.
                if channel.try_send(b"root", Some(mount.root())).is_ok() {
                    users.push(channel);
                }
            }
            Ok(_) => {}
            Err(ChannelError::WouldBlock) => return Ok(users),
            // Of that connection only, or of a shortage that passes.
            Err(error) => {
                tracing::warn!(%error, "accepting");
                std::thread::sleep(Duration::from_millis(100));
                return Ok(users);
            }
        }
    }
}
