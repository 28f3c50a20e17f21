//! `copage mount`: an export as a directory, by FUSE.
//!
//! Where the kernel allows it (Linux 6.9, CAP_SYS_ADMIN) a file that is opened is pinned by the daemon
//! and handed to the kernel as a passthrough file: reading, mapping and running it then goes to the
//! shared frames without this process. What is too large for that, everything in an unprivileged
//! mount, and everything of a daemon that grants frames and has no descriptors to give (Xen), is in
//! page-cache form: read by messages into this kernel's page cache ([`Form`]).
//!
//! A file that the host changes: what is open or mapped on frames keeps the whole old content; a new
//! open gets the new. In page-cache form a file follows the host as on any network file system: within
//! a second, and at each open.
//!
//! A file on frames stays pinned for a second after its last close, and names that are not there are
//! remembered as long: starting a program asks the daemon for what it has not just been asked.
//!
//! When the daemon dies, files that are open on frames go on; everything else waits for the next one, as
//! the library does ([`crate::ConnectOptions::reconnect_ms`]). When none came in time, it is EIO until one
//! is there, which is tried at most twice a second when somebody asks.

mod core;
mod error;
mod fs;
mod limits;
mod linger;
mod link;
mod open;
mod place;
mod table;
mod workers;

pub use error::MountError;
pub use fs::FORM_XATTR;
pub use link::Target;
pub use open::Form;
pub use place::umount;

use self::core::Core;
use crate::export::ExportMode;
use copage_grants::sys::SignalFd;
use fs::ShareFs;
use fuser::{BackingId, Config, MountOption, Session, SessionACL};
use link::Link;
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, poll};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use workers::{opener, watch_changes};

/// What to mount where.
#[derive(Clone, Debug)]
pub struct Options {
    /// The daemon and the export.
    pub target: Target,
    /// Where.
    pub dir: PathBuf,
    /// Other users may enter. Root's mounts usually want it; other users need `user_allow_other` in
    /// /etc/fuse.conf.
    pub allow_other: bool,
    /// The directory may have entries, which are hidden then.
    pub nonempty: bool,
    /// Use passthrough where it can be had.
    pub passthrough: bool,
}

/// What [`Mounted::wait`] saw.
#[derive(Debug)]
pub enum Event {
    /// The mount is over: unmounted by whomever.
    Ended(io::Result<()>),
    /// A signal came.
    Signal(i32),
}

/// A mount that is up. Dropping it detaches it: it is out of sight at once and ends with its last
/// use, at the latest with this process.
#[derive(Debug)]
pub struct Mounted {
    dir: PathBuf,
    form: Form,
    why: Option<String>,
    server: Mutex<Option<JoinHandle<io::Result<()>>>>,
    /// Hung up when the server has ended.
    ended: OwnedFd,
}

/// Mounts an export. Returns when the kernel has taken the mount: files can be opened from then on.
pub fn mount(options: &Options) -> Result<Mounted, MountError> {
    let dir = place::check(&options.dir, options.nonempty)?;
    let sys = |call| move |source| MountError::Sys { call, source };
    File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => MountError::NoDevice { source },
            _ => MountError::NoFuse { source },
        })?;
    let link = Link::new(options.target.clone())?;
    if link.last().export.mode() != ExportMode::ReadOnly {
        return Err(MountError::Mode {
            export: link.target().export.clone(),
        });
    }
    let core = Arc::new(Core::new(link));
    let (jobs, job_queue) = crossbeam_channel::unbounded();
    let (changes, change_queue) = crossbeam_channel::unbounded();
    let fs = ShareFs {
        core: core.clone(),
        jobs,
        changes: changes.clone(),
        want_passthrough: options.passthrough,
    };
    let session = Session::new(fs, &dir, &config(options)).map_err(mount_error)?;
    let why = no_passthrough(&session, &core, options.passthrough);
    let _ = core.notifier.set(session.notifier());
    // Ended by the file system's end, which drops the senders.
    for number in 0..limits::OPENERS {
        let (core, queue, changes) = (core.clone(), job_queue.clone(), changes.clone());
        thread::Builder::new()
            .name(format!("copage-open-{number}"))
            .spawn(move || opener(&core, &queue, &changes))
            .map_err(sys("starting a thread"))?;
    }
    drop(changes);
    let watched = core.clone();
    thread::Builder::new()
        .name("copage-changes".into())
        .spawn(move || watch_changes(&watched, &change_queue))
        .map_err(sys("starting a thread"))?;
    let (ended, running) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| sys("pipe")(e.into()))?;
    let server = thread::Builder::new()
        .name("copage-mount".into())
        .spawn(move || {
            let result = session.run();
            drop(running);
            result
        })
        .map_err(sys("starting a thread"))?;
    let form = if core.passthrough() {
        Form::Frames
    } else {
        Form::PageCache
    };
    Ok(Mounted {
        dir,
        form,
        why,
        server: Mutex::new(Some(server)),
        ended,
    })
}

fn config(options: &Options) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::RO,
        MountOption::DefaultPermissions,
        MountOption::FSName(place::source_name(&options.target.export)),
        MountOption::CUSTOM("subtype=copage".into()),
    ];
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(limits::THREADS);
    config
}

fn mount_error(source: io::Error) -> MountError {
    let root = rustix::process::geteuid().is_root();
    match source.kind() {
        // fuser starts fusermount3 when mount(2) says EPERM.
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => MountError::NoRight { source },
        _ if !root && !place::in_path("fusermount3") => MountError::NoRight { source },
        _ => MountError::Sys {
            call: "mounting",
            source,
        },
    }
}

/// Turns passthrough off where the kernel will refuse it, and says why in words for the user.
fn no_passthrough(session: &Session<ShareFs>, core: &Core, wanted: bool) -> Option<String> {
    if !wanted {
        return Some("passthrough was not wanted".into());
    }
    if !core.passthrough() {
        return Some("this kernel has no FUSE passthrough (Linux 6.9 and later have it)".into());
    }
    // The kernel looks at the right to do it before it looks at the file, and takes no device: EPERM
    // says no, anything else that it would do.
    let answer = BackingId::create_raw(session.as_fd(), session.as_fd());
    let refused = matches!(&answer, Err(e) if e.raw_os_error() == Some(libc::EPERM));
    refused.then(|| {
        core.passthrough.store(false, Ordering::Relaxed);
        "passthrough needs CAP_SYS_ADMIN in the first user namespace (root outside containers)"
            .into()
    })
}

impl Mounted {
    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The form of files that are small enough to be pinned; of all, if it is
    /// [`Form::PageCache`].
    pub fn form(&self) -> Form {
        self.form
    }

    /// Why files are not on frames.
    pub fn why_page_cache(&self) -> Option<&str> {
        self.why.as_deref()
    }

    /// Waits until the mount is over or one of `signals` comes.
    pub fn wait(&self, signals: Option<&SignalFd>) -> io::Result<Event> {
        loop {
            let mut fds = vec![PollFd::new(&self.ended, PollFlags::IN)];
            fds.extend(signals.map(|signals| PollFd::new(signals, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            let ended = !fds[0].revents().is_empty();
            if ended {
                return Ok(Event::Ended(self.join()));
            }
            if let Some(came) = signals.map(SignalFd::read).transpose()?.flatten() {
                return Ok(Event::Signal(came.signal));
            }
        }
    }

    fn join(&self) -> io::Result<()> {
        match self.server.lock().take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("the mount's server panicked")),
            None => Ok(()),
        }
    }

    /// Takes the mount away; [`MountError::Busy`] when it is in use, unless `lazy`. When it is over
    /// [`Mounted::wait`] says so.
    pub fn unmount(&self, lazy: bool) -> Result<(), MountError> {
        match umount(&self.dir, lazy) {
            // Somebody was faster.
            Err(MountError::NotMounted { .. } | MountError::Dir { .. }) => Ok(()),
            other => other,
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let running = self
            .server
            .lock()
            .as_ref()
            .is_some_and(|server| !server.is_finished());
        if running && let Err(error) = self.unmount(true) {
            tracing::warn!(dir = %self.dir.display(), %error, "left mounted");
        }
    }
}
