//! Starting and stopping.

use super::admin::{AdminServer, bind_admin};
use super::admin_run::Runner;
use super::clock::now_ms;
use super::core::Core;
use super::ctx::Ctx;
use super::exports::{Exports, offer};
use super::identity::Guests;
use super::limits::{GUEST_SESSIONS_MAX, SESSIONS_MAX, WANTS_MAX, WRITABLE_PAGES_MAX};
use super::ready;
use super::run_dir::{RunDir, RunDirError};
use super::wake::Wake;
use super::xen::{self, XenSide};
use crate::config::{Config, mib_to_pages};
use copage_cache::{Cache, CacheConfig, CacheError, EventSink};
use copage_coherence::limits::{DRIFT_PERMILLE, RECALLS_MAX};
use copage_coherence::session::SessionConfig;
use copage_coherence::strict::{Strict, StrictConfig};
use copage_grants::channel::{ChannelError, Listener};
use copage_grants::local::{LocalBackend, LocalConfig};
use copage_grants::sys::{self, SignalFd};
use copage_grants::xen::{XenBackend, XenConfig, XenError};
use copage_grants::{Backend, Epoch, GrantError, PAGE_SIZE_U64, Version};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Guests of any uid may connect; who they are is decided then.
const GUEST_SOCKET_MODE: u32 = 0o666;

/// Why a daemon does not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The run directory cannot be had.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The machine cannot do what the backend needs.
    #[error("the {name} backend: {source}")]
    Backend {
        /// Which.
        name: &'static str,
        /// Why.
        #[source]
        source: GrantError,
    },
    /// Xen is asked for and is not here.
    #[error("{0}")]
    NoXen(String),
    /// Domains cannot be listened to.
    #[error("the control channel of Xen: {0}")]
    Channel(#[from] XenError),
    /// The cache refused its settings or an export.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The guests' socket cannot be made.
    #[error("{}: {source}", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: ChannelError,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Sys {
        /// What was tried.
        what: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The daemon's thread ended by a fault of its own.
    #[error("the daemon's thread panicked")]
    Panicked,
}

fn sys(what: &'static str) -> impl Fn(io::Error) -> ServeError {
    move |source| ServeError::Sys { what, source }
}

/// What only a process that is the daemon, and nothing else, is told.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions {
    /// A descriptor to write `READY` to.
    pub ready_fd: Option<u32>,
}

/// The daemon.
#[derive(Debug)]
pub struct Daemon;

impl Daemon {
    /// Is the daemon until SIGTERM, SIGINT or the administrator says stop. To be called on the main
    /// thread before any other is started: signals are blocked from here on, the process is made
    /// undumpable, and its limit of open files is raised.
    ///
    /// # Errors
    /// When something it needs cannot be had; nothing is left behind then.
    pub fn run(config: &Config, options: RunOptions) -> Result<(), ServeError> {
        Self::run_over(config, options, |backend| backend)
    }

    /// As [`Self::run`], over what `wrap` makes of the backend: for tests, which watch it or make
    /// it fail.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_over(
        config: &Config,
        options: RunOptions,
        wrap: impl FnOnce(Arc<dyn Backend>) -> Arc<dyn Backend>,
    ) -> Result<(), ServeError> {
        let signals = [
            libc::SIGTERM,
            libc::SIGINT,
            libc::SIGIO,
            sys::lease_signal(),
        ];
        let signals = SignalFd::new(&signals).map_err(sys("signalfd"))?;
        sys::make_undumpable().map_err(sys("prctl(PR_SET_DUMPABLE)"))?;
        let mut prepared = prepare(config, Some(signals), wrap)?;
        if let Some(fd) = options.ready_fd {
            ready::write_ready(fd).map_err(sys("--ready-fd"))?;
        }
        ready::notify("READY=1\nSTATUS=serving guests");
        let ran = prepared.core.run();
        ready::notify("STOPPING=1");
        prepared.finish();
        ran.map_err(sys("the daemon's loop"))
    }

    /// Starts a daemon on a thread of this process; when this returns, guests can connect.
    ///
    /// Kernel leases on host files need a signal that the whole process blocks, so they are not
    /// taken here: every file is host-bounded. The process stays dumpable.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn start(config: &Config) -> Result<DaemonHandle, ServeError> {
        let mut prepared = prepare(config, None, |backend| backend)?;
        let wake = prepared.core.wake.clone();
        let thread = std::thread::Builder::new()
            .name("copage-daemon".into())
            .spawn(move || {
                let ran = prepared.core.run();
                prepared.finish();
                ran.map_err(sys("the daemon's loop"))
            })
            .map_err(sys("the daemon's thread"))?;
        Ok(DaemonHandle {
            run_dir: config.run_dir.clone(),
            wake,
            thread: Some(thread),
        })
    }
}

/// A daemon on a thread of this process. Dropping it stops the daemon and waits for it.
#[derive(Debug)]
pub struct DaemonHandle {
    run_dir: PathBuf,
    wake: Arc<Wake>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl DaemonHandle {
    /// Where its sockets are.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// The socket that guests connect to.
    pub fn guest_socket(&self) -> PathBuf {
        self.run_dir.join(super::GUEST_SOCKET)
    }

    /// The socket that the administrator connects to.
    pub fn admin_socket(&self) -> PathBuf {
        self.run_dir.join(super::ADMIN_SOCKET)
    }

    /// Stops it: says Goodbye to all, removes the sockets, and waits until that is done.
    ///
    /// # Errors
    /// When it had ended by a fault before.
    pub fn stop(mut self) -> Result<(), ServeError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), ServeError> {
        self.wake.stop();
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| ServeError::Panicked)?,
            None => Ok(()),
        }
    }
}

impl Drop for DaemonHandle {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "the daemon had failed");
        }
    }
}

/// All that the loop needs. Fields are dropped in order: sockets before the directory's lock.
struct Prepared {
    core: Core,
    cache: Arc<Cache>,
    backend: Arc<dyn Backend>,
    run_dir: RunDir,
}

impl Prepared {
    fn finish(mut self) {
        let sessions = self.core.ctx.machine.sessions();
        if sessions.is_empty() && !sessions.is_draining() {
            self.run_dir.leave_nobody();
        }
        self.core.ctx.last_sync();
        // Nobody connects any more, and every ring is unmapped.
        drop(self.core);
        self.cache.shutdown();
        if let Err(error) = self.backend.stop() {
            tracing::warn!(%error, "not all could be given back");
        }
    }
}

fn local_backend(config: &Config) -> Result<Arc<dyn Backend>, ServeError> {
    // What a session may write, and as much that it was asked back a moment ago.
    let arena_pages = (2 * WRITABLE_PAGES_MAX as u64).min(config.frames_max().into());
    let local = LocalConfig {
        force: config.force,
        arena_size_max_bytes: Some(arena_pages * PAGE_SIZE_U64),
        class_size_max_bytes: Some(u64::from(config.frames_max()) * PAGE_SIZE_U64),
        ..LocalConfig::default()
    };
    match LocalBackend::new(local) {
        Ok(backend) => Ok(Arc::new(backend)),
        Err(source) => Err(ServeError::Backend {
            name: "local",
            source,
        }),
    }
}

fn xen_backend(config: &Config) -> Result<Arc<dyn Backend>, ServeError> {
    let xen = XenConfig {
        frames_max: config.frames_max(),
        // Its range ends far below 2^32.
        cache_domain_mib: config.xen.cache_domain_mib as u32,
        run_dir: config.run_dir.clone(),
        // A guest maps nothing more when its lease is over; the daemon counts 1 % longer.
        gref_rest_ms: u64::from(config.lease_ttl_ms) * 102 / 100,
        ..XenConfig::default()
    };
    match XenBackend::new(xen) {
        Ok(backend) => Ok(Arc::new(backend)),
        Err(source) => Err(ServeError::Backend {
            name: "xen",
            source,
        }),
    }
}

fn prepare(
    config: &Config,
    signals: Option<SignalFd>,
    wrap: impl FnOnce(Arc<dyn Backend>) -> Arc<dyn Backend>,
) -> Result<Prepared, ServeError> {
    sys::raise_open_files().map_err(sys("RLIMIT_NOFILE"))?;
    let run_dir = RunDir::claim(&config.run_dir, config.lease_ttl_ms)?;
    let wake = Arc::new(Wake::new().map_err(sys("eventfd"))?);
    let is_xen = xen::is_wanted(config)?;
    let backend = wrap(if is_xen {
        xen_backend(config)?
    } else {
        local_backend(config)?
    });

    let (sender, events) = crossbeam_channel::unbounded();
    let waker = wake.clone();
    let sink = EventSink::new(sender, Arc::new(move || waker.wake()));
    let cache_config = CacheConfig {
        frames_max: config.frames_max(),
        fill_threads: config.fill_threads as usize,
        readahead_pages_max: config.readahead_kib / 4,
        pin_file_pages_max: mib_to_pages(config.pin_file_mib),
        host_settle_ms: config.host_settle_ms,
        recall_deadline_ms: config.invalidate_deadline_ms,
        epoch: run_dir.epoch,
        collapse: config.huge,
        lease_signal: signals.is_some().then(sys::lease_signal),
    };
    let cache = Cache::new(backend.clone(), cache_config, sink)?;
    let mut exports = Exports::default();
    for export in &config.exports {
        let entry = export.into();
        exports.insert(offer(&cache, &entry)?, entry);
    }

    // Who was a guest of an earlier daemon may use what it had until its lease ends; nobody writes before.
    let grace_until_ms = match run_dir.left_ms {
        0 => 0,
        left_ms => now_ms() + u64::from(left_ms) * (1000 + DRIFT_PERMILLE) / 1000 + 1,
    };
    let machine = Strict::new(
        SessionConfig {
            lease_ttl_ms: config.lease_ttl_ms,
            invalidate_deadline_ms: config.invalidate_deadline_ms,
            sessions_max: SESSIONS_MAX,
            guest_sessions_max: GUEST_SESSIONS_MAX,
            recalls_max: RECALLS_MAX,
        },
        StrictConfig {
            unmap_deadline_ms: config.invalidate_deadline_ms,
            wants_max: WANTS_MAX,
            writable_max: WRITABLE_PAGES_MAX,
            share_in_place: backend.capabilities().in_place_upgrade,
            bounces_max: match config.share_bounced {
                Some(true) => StrictConfig::default().bounces_max,
                None if backend.capabilities().in_place_upgrade => {
                    StrictConfig::default().bounces_max
                }
                _ => u32::MAX,
            },
            ..StrictConfig::default()
        },
        (
            Epoch((u64::from(run_dir.epoch) << 32) + 1),
            Version::new(run_dir.epoch, 1),
        ),
        grace_until_ms,
    );
    let own_uid = rustix::process::geteuid().as_raw();
    let guests = Guests::new(own_uid, config.limits, &config.guests);
    let mut ctx = Ctx::new(cache.clone(), backend.clone(), machine, guests, exports);
    ctx.now_ms = now_ms();
    let numbers: Vec<u32> = ctx.guests.all().map(|(id, _)| id).collect();
    for guest in numbers {
        ctx.limit_guest(guest);
    }
    ctx.userfaultfd = userfaultfd_device();

    let runner =
        Runner::start(&cache, &backend, &wake).map_err(sys("the thread for admin requests"))?;
    // The admin's comes last: where it answers, guests can connect too.
    let path = run_dir.guest_socket();
    let listener = Listener::bind(&path, GUEST_SOCKET_MODE)
        .map_err(|source| ServeError::Socket { path, source })?;
    let admin = bind_admin(&run_dir.admin_socket()).map_err(sys("the admin socket"))?;
    let admin = AdminServer::new(admin, runner);
    let wanted = ctx.guests.domains().map(Into::into).collect();
    let xen = match is_xen {
        true => Some(XenSide::start(config, wanted, &wake)?),
        false => None,
    };
    let backend = ctx.backend.clone();
    let mut core = Core::new(ctx, admin, wake, events, listener, signals, run_dir.epoch)
        .map_err(sys("epoll"))?;
    core.xen = xen;
    Ok(Prepared {
        core,
        cache,
        backend,
        run_dir,
    })
}

/// `/dev/userfaultfd`, for guests that may not make a full userfaultfd themselves.
fn userfaultfd_device() -> Option<std::os::fd::OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open("/dev/userfaultfd", flags, Mode::empty()).ok()
}
