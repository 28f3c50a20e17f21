//! Connecting to a daemon, and what a connected guest can ask.

use crate::connect::{Dialer, channel_error};
use crate::error::{LostWhy, MmapError, Result};
use crate::export::Export;
use crate::limits::RECONNECT_MS;
use crate::node::Node;
use crate::place::Place;
use crate::shared::Shared;
use crate::uffd::Mode;
use copage_coherence::msg::{Reply, Request};
use copage_grants::channel::Channel;
use copage_grants::{DomId, Epoch};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Which userfaultfd a client may use; for tests and for machines where one way is known to fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UserfaultPolicy {
    /// The best that can be had: a full one by system call, by the daemon's `/dev/userfaultfd`, by
    /// an own one; else one for faults of user mode only; else none (then `File::map` fails and
    /// everything else works).
    #[default]
    Best,
    /// User mode only, as an unprivileged process gets it: system calls that touch a page which is
    /// not there fail with EFAULT; [`crate::Mapping::populate`] first.
    UserModeOnly,
    /// None: this client will not map.
    None,
}

/// Where a daemon is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DaemonAt {
    /// On this machine, listening at this socket.
    Socket(PathBuf),
    /// In the control domain of the Xen host that this machine is a guest of.
    Xen,
}

impl fmt::Display for DaemonAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(socket) => write!(f, "{}", socket.display()),
            Self::Xen => f.write_str("the control domain"),
        }
    }
}

impl DaemonAt {
    fn dial(&self) -> Result<Channel> {
        let channel = match self {
            Self::Socket(socket) => Channel::connect(socket),
            Self::Xen => Channel::connect_xen(),
        };
        channel.map_err(|e| channel_error(&e))
    }
}

/// What a client tells of itself, and how long it waits for a daemon that is started again.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// The name by which access lists know the guest; empty: whatever its credentials say.
    pub name: String,
    /// Which userfaultfd to use.
    pub userfault: UserfaultPolicy,
    /// How long the daemon is looked for when it died or stopped, in ms; calls and accesses wait
    /// meanwhile. 0: it is not, and the client is lost with it.
    pub reconnect_ms: u32,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            name: String::new(),
            userfault: UserfaultPolicy::default(),
            reconnect_ms: RECONNECT_MS,
        }
    }
}

impl ConnectOptions {
    /// Options with a name.
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }
}

/// What the daemon said when the session began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The domid given to this process.
    pub dom: DomId,
    /// The session's epoch.
    pub epoch: Epoch,
    /// The session lease, in ms; renewed by the library at a third of it.
    pub lease_ttl_ms: u32,
    /// The longest an invalidate may take, in ms.
    pub invalidate_deadline_ms: u32,
    /// Handles the session may hold.
    pub handles_max: u32,
    /// Open files the session may have.
    pub files_max: u32,
    /// The daemon can take pages back by force.
    pub forced_revoke: bool,
    /// This process cannot write to shared frames whatever it tries.
    pub read_only_enforced: bool,
    /// The name by which the daemon knows this guest.
    pub name: String,
}

/// How faults reach this process's pager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserfaultMode {
    /// Every fault is served, those of system calls too.
    Full,
    /// Faults of user mode only: a system call on a page that is not there fails with EFAULT.
    UserModeOnly,
    /// This machine gives no userfaultfd: files cannot be mapped, only read.
    None,
}

/// Ends it all when the last user is gone. Does not wait for the library's threads.
pub(crate) struct ClientHandle {
    pub(crate) shared: Arc<Shared>,
}

impl Drop for ClientHandle {
    fn drop(&mut self) {
        self.shared.line.close();
    }
}

/// A guest of a daemon. Clones are the same guest; it ends when the last clone, node, file and mapping
/// of it is dropped, or when it is lost.
///
/// All calls may be made from any thread. They are answered by the daemon and can take as long as
/// a disk takes. In a forked child every call fails with [`MmapError::Forked`] and the mappings are
/// not there; note that the child keeps the descriptors open until it execs or exits.
///
/// A client has one session after the other. When the daemon dies or stops, it is looked for, for
/// [`ConnectOptions::reconnect_ms`]. What is mapped stays readable until the session's lease would have
/// ended; from then on, and with whatever is not mapped, accesses wait, and calls wait. When a daemon is
/// there again, exports, directories and files are found again by their names, mappings show what their
/// files hold now, private pages are kept, and everybody goes on. A file that is not there any more, or
/// of whose name another file is there, is [`MmapError::Stale`]: its mappings are SIGBUS, calls on it
/// fail; the others go on. When no daemon comes in time, the client is lost.
#[derive(Clone)]
pub struct Client {
    pub(crate) handle: Arc<ClientHandle>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("welcome", &self.welcome())
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to the daemon that listens at `socket`.
    pub fn connect(socket: &Path, options: &ConnectOptions) -> Result<Self> {
        Self::connect_at(&DaemonAt::Socket(socket.to_owned()), options)
    }

    fn begin(
        channel: Channel,
        dialer: Option<Dialer>,
        options: &ConnectOptions,
        device: crate::granted::Opener,
    ) -> Result<Self> {
        let shared = crate::connect::begin(channel, dialer, options, device)?;
        Ok(Self {
            handle: Arc::new(ClientHandle { shared }),
        })
    }

    fn dial(
        daemon: &DaemonAt,
        options: &ConnectOptions,
        device: crate::granted::Opener,
    ) -> Result<Self> {
        let channel = daemon.dial()?;
        let daemon = daemon.clone();
        let dialer = (options.reconnect_ms > 0).then(|| Dialer {
            dial: Box::new(move || daemon.dial()),
            name: options.name.clone(),
            reconnect_ms: options.reconnect_ms.into(),
        });
        Self::begin(channel, dialer, options, device)
    }

    /// Connects over a channel. There is no way to another one: the client is lost when the daemon dies,
    /// whatever [`ConnectOptions::reconnect_ms`] says.
    pub fn connect_over(channel: Channel, options: &ConnectOptions) -> Result<Self> {
        Self::begin(channel, None, options, crate::granted::kernel_device())
    }

    /// Connects to a daemon wherever it is.
    pub fn connect_at(daemon: &DaemonAt, options: &ConnectOptions) -> Result<Self> {
        Self::dial(daemon, options, crate::granted::kernel_device())
    }

    /// As [`Self::connect`], with another device for grants than the kernel's.
    #[cfg(test)]
    pub(crate) fn connect_with_device(
        socket: &Path,
        options: &ConnectOptions,
        device: Arc<dyn crate::granted::device::Device>,
    ) -> Result<Self> {
        let daemon = DaemonAt::Socket(socket.to_owned());
        Self::dial(&daemon, options, Box::new(move || Ok(Arc::clone(&device))))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    /// What the daemon said when the present session began (or the last, while the daemon is away).
    pub fn welcome(&self) -> Welcome {
        self.shared().line.welcome()
    }

    /// How often a daemon was found again.
    pub fn reconnects(&self) -> u64 {
        self.shared().line.reconnects()
    }

    /// The daemon is away and looked for: calls wait.
    pub fn is_away(&self) -> bool {
        self.shared().line.is_away()
    }

    /// How faults are served here.
    pub fn userfault_mode(&self) -> UserfaultMode {
        match self.shared().uffd.as_ref().map(|u| u.mode()) {
            Ok(Mode::Full) => UserfaultMode::Full,
            Ok(Mode::UserModeOnly) => UserfaultMode::UserModeOnly,
            Err(_) => UserfaultMode::None,
        }
    }

    /// The names of the exports that this guest may use.
    pub fn exports(&self) -> Result<Vec<String>> {
        self.shared().in_session(|session| {
            let answer = session.call(&Request::Exports)?;
            match answer.reply()? {
                Reply::Exports { names } => Ok(names
                    .split(|&b| b == 0)
                    .filter(|name| !name.is_empty())
                    .map(|name| String::from_utf8_lossy(name).into_owned())
                    .collect()),
                other => Err(unexpected("Exports", &other)),
            }
        })
    }

    /// Uses an export.
    pub fn attach(&self, name: &str) -> Result<Export> {
        self.shared().in_session(|session| {
            let answer = session.call(&Request::Attach {
                export: name.as_bytes(),
            })?;
            match answer.reply()? {
                Reply::Attached { root, attr, mode } => {
                    let held = (session.number(), root);
                    let place = Place::root(name.as_bytes());
                    let root = Node::new(self.clone(), held, attr, place);
                    Ok(Export::new(name.to_owned(), mode, root))
                }
                other => Err(unexpected("Attached", &other)),
            }
        })
    }

    /// Calls `callback` once when the client is lost, after every mapping has become SIGBUS; at
    /// once if it is lost already. It runs on a thread of the library (or on the caller's): it may
    /// drop or use anything of this client, which fails with [`MmapError::Lost`], and connect
    /// again. All signals are blocked in it. It is not called when the client ends by dropping or [`Client::close`].
    pub fn on_lost(&self, callback: impl FnOnce(&LostWhy) + Send + 'static) {
        self.shared().line.on_lost(Box::new(callback));
    }

    /// Why the client is lost, if it is: calls fail from now on, and mappings become SIGBUS within moments
    /// ([`Self::on_lost`] tells when all have). While the daemon is away and looked for, it is not.
    pub fn lost(&self) -> Option<LostWhy> {
        self.shared().line.lost()
    }

    /// Ends the client now, whoever still uses it: every mapping becomes SIGBUS, every call fails
    /// with [`LostWhy::Closed`].
    pub fn close(&self) {
        self.shared().line.close();
    }
}

/// The error for a reply that does not fit the request.
pub(crate) fn unexpected(wanted: &str, got: &Reply<'_>) -> MmapError {
    // The variant's name is enough; the data may be long.
    let text = format!("{got:?}");
    let name = text.split([' ', '(', '{']).next().unwrap_or_default();
    MmapError::Protocol(format!("{wanted} was expected, {name} came"))
}
