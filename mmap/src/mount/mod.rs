//! `copage mount`: an export as a directory, by FUSE.
//!
//! Where the kernel allows it (Linux 6.9, CAP_SYS_ADMIN) a file that is opened is pinned by the daemon
//! and handed to the kernel as a passthrough file: reading, mapping and running it then goes to the
//! shared frames without this process. What is too large for that, everything in an unprivileged
//! mount, and everything of a daemon that grants frames and has no descriptors to give (Xen), is in
//! page-cache form: read by messages into this kernel's page cache ([`Form`]).
//!
//! An export that guests write is mounted for reading and writing; its files are in direct form: every read
//! and write goes to the daemon, so that all guests see one file, and shared mappings are refused. Names and
//! attributes other than the length cannot be changed.
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
mod detached;
mod direct;
mod error;
mod fs;
mod limits;
mod linger;
mod link;
mod open;
mod place;
mod server;
mod table;
mod workers;

pub use detached::Detached;
pub use error::MountError;
pub use fs::FORM_XATTR;
pub use link::Target;
pub use open::Form;
pub use place::umount;
pub(crate) use table::same_content;

use copage_grants::sys::SignalFd;
use fuser::{Config, MountOption, Session, SessionACL};
use rustix::event::{PollFd, PollFlags, poll};
use server::{Prepared, Server};
use std::io;
use std::path::{Path, PathBuf};

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
    server: Server,
}

/// Mounts an export. Returns when the kernel has taken the mount: files can be opened from then on.
pub fn mount(options: &Options) -> Result<Mounted, MountError> {
    let dir = place::check(&options.dir, options.nonempty)?;
    // fuser opens it again; what is wrong with it is said in our words.
    drop(server::device()?);
    let prepared = Prepared::new(options.target.clone(), options.passthrough, None, true)?;
    let writable = prepared.core().is_coherent();
    let config = config(&options.target.export, options.allow_other, writable);
    let session = Session::new(prepared.file_system(), &dir, &config).map_err(mount_error)?;
    let server = prepared.serve(session)?;
    Ok(Mounted { dir, server })
}

fn acl(allow_other: bool) -> SessionACL {
    match allow_other {
        true => SessionACL::All,
        false => SessionACL::Owner,
    }
}

fn config(export: &str, allow_other: bool, writable: bool) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        if writable {
            MountOption::RW
        } else {
            MountOption::RO
        },
        MountOption::DefaultPermissions,
        MountOption::FSName(place::source_name(export)),
        MountOption::CUSTOM("subtype=copage".into()),
    ];
    config.acl = acl(allow_other);
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

impl Mounted {
    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The form of files that are small enough to be pinned; of all, if it is
    /// [`Form::PageCache`].
    pub fn form(&self) -> Form {
        self.server.form
    }

    /// Why files are not on frames.
    pub fn why_page_cache(&self) -> Option<&str> {
        self.server.why.as_deref()
    }

    /// Waits until the mount is over or one of `signals` comes.
    pub fn wait(&self, signals: Option<&SignalFd>) -> io::Result<Event> {
        loop {
            let mut fds = vec![PollFd::new(&self.server.ended, PollFlags::IN)];
            fds.extend(signals.map(|signals| PollFd::new(signals, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            let ended = !fds[0].revents().is_empty();
            if ended {
                return Ok(Event::Ended(self.server.join()));
            }
            if let Some(came) = signals.map(SignalFd::read).transpose()?.flatten() {
                return Ok(Event::Signal(came.signal));
            }
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
        if self.server.is_running()
            && let Err(error) = self.unmount(true)
        {
            tracing::warn!(dir = %self.dir.display(), %error, "left mounted");
        }
    }
}
