//! The beginning of a session, and of a client with its first one.

use crate::client::{ConnectOptions, UserfaultPolicy, Welcome};
use crate::error::{LostWhy, MmapError, Result};
use crate::granted::Opener;
use crate::limits::WELCOME_TIMEOUT;
use crate::line::Line;
use crate::pager::{Pager, now_ms, worker};
use crate::quiet::Quiet;
use crate::session::{Answer, Common, Session};
use crate::shared::{Parts, Shared};
use crate::stamp::SessionNo;
use crate::sys::{EventFd, empty_file};
use crate::uffd::Uffd;
use copage_coherence::msg::{
    HelloFlags, MESSAGE_BYTES_MAX, PROTOCOL_VERSION, Reply, Request, WelcomeFlags,
};
use copage_grants::Epoch;
use copage_grants::channel::{Channel, ChannelError, Received};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Hello's request number; calls go on behind it.
const HELLO: u64 = 1;

pub(crate) fn channel_error(error: &ChannelError) -> MmapError {
    match error {
        ChannelError::Refused(text) => MmapError::Refused {
            errno: libc::EACCES,
            text: text.clone(),
        },
        ChannelError::Xen(error) => MmapError::Refused {
            errno: error.errno(),
            text: error.to_string(),
        },
        ChannelError::Sys { call, source } => MmapError::sys(call, source),
        ChannelError::Closed => MmapError::Lost(LostWhy::HungUp),
        other => MmapError::Protocol(other.to_string()),
    }
}

/// Waits for the first message.
fn first_message(channel: &Channel, buf: &mut [u8]) -> Result<Received> {
    let until = now_ms() + WELCOME_TIMEOUT.as_millis() as u64;
    loop {
        let rest = until.saturating_sub(now_ms());
        let timeout = Timespec {
            tv_sec: (rest / 1000) as i64,
            tv_nsec: (rest % 1000 * 1_000_000) as i64,
        };
        match poll(&mut [PollFd::new(channel, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => {
                return Err(MmapError::Sys {
                    call: "waiting for the daemon's Welcome",
                    errno: libc::ETIMEDOUT,
                });
            }
            Ok(_) => match channel.try_recv(buf) {
                Err(ChannelError::WouldBlock) => {}
                Err(e) => return Err(channel_error(&e)),
                Ok(received) => return Ok(received),
            },
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(MmapError::sys("poll", &e.into())),
        }
    }
}

/// How a client reaches its daemon, the first time and again.
pub(crate) struct Dialer {
    pub(crate) dial: Box<dyn Fn() -> Result<Channel> + Send + Sync>,
    /// The name to say.
    pub(crate) name: String,
    /// How long the daemon is looked for, in ms; not 0.
    pub(crate) reconnect_ms: u64,
}

/// What the daemon said to Hello.
pub(crate) struct Begun {
    pub(crate) welcome: Welcome,
    /// When Hello was sent: the lease counts from here.
    pub(crate) hello_ms: u64,
    /// The daemon's `/dev/userfaultfd`.
    device: Option<OwnedFd>,
}

/// Says Hello and waits for Welcome, a bounded time.
pub(crate) fn hello(channel: &Channel, name: &str, wants_userfaultfd: bool) -> Result<Begun> {
    let hello = Request::Hello {
        version: PROTOCOL_VERSION,
        flags: HelloFlags { wants_userfaultfd },
        name: name.as_bytes(),
        uuid: [0; 16],
    };
    let mut bytes = Vec::new();
    hello.encode(HELLO, Epoch(0), &mut bytes)?;
    let hello_ms = now_ms();
    channel.send(&bytes, None).map_err(|e| channel_error(&e))?;
    let mut buf = vec![0; MESSAGE_BYTES_MAX];
    let received = first_message(channel, &mut buf)?;
    let answer = Answer::new(buf[..received.len].to_vec(), received.fd);
    let welcome = match answer.reply()? {
        Reply::Welcome {
            dom,
            epoch,
            lease_ttl_ms,
            invalidate_deadline_ms,
            handles_max,
            files_max,
            flags:
                WelcomeFlags {
                    forced_revoke,
                    read_only_enforced,
                    userfaultfd: _,
                },
            name,
        } => Welcome {
            dom,
            epoch,
            lease_ttl_ms,
            invalidate_deadline_ms,
            handles_max,
            files_max,
            forced_revoke,
            read_only_enforced,
            name: String::from_utf8_lossy(name).into_owned(),
        },
        other => return Err(crate::client::unexpected("Welcome", &other)),
    };
    Ok(Begun {
        welcome,
        hello_ms,
        device: answer.fd,
    })
}

/// Begins a client over its first channel: says Hello and starts its two threads.
pub(crate) fn begin(
    channel: Channel,
    dialer: Option<Dialer>,
    options: &ConnectOptions,
    opener: Opener,
) -> Result<Arc<Shared>> {
    let sys = |call| move |e: io::Error| MmapError::sys(call, &e);
    let wake = EventFd::new().map_err(sys("eventfd"))?;
    let empty = empty_file().map_err(sys("memfd_create"))?;
    let full = match options.userfault {
        UserfaultPolicy::Best => Uffd::full().ok(),
        UserfaultPolicy::UserModeOnly | UserfaultPolicy::None => None,
    };
    let wants_userfaultfd = options.userfault == UserfaultPolicy::Best && full.is_none();
    let begun = hello(&channel, &options.name, wants_userfaultfd)?;
    let device = begun.device.as_ref().map(AsFd::as_fd);
    let uffd = Uffd::open(options.userfault, full, device);
    let (jobs, todo) = crossbeam_channel::unbounded();
    let (tell, told) = crossbeam_channel::unbounded();
    let common = Common::new(wake, HELLO + 1);
    let session = Session::new(SessionNo::FIRST, begun.welcome, channel, common.clone());
    let session = Arc::new(session);
    let shared = Arc::new(Shared::new(
        Line::new(Arc::clone(&session), common),
        Parts {
            dialer,
            uffd,
            jobs,
            told: tell,
            empty,
            opener,
        },
    ));
    let finished = Arc::new(AtomicBool::new(false));

    let pager = Pager::new(
        Arc::clone(&shared),
        session,
        begun.hello_ms,
        Arc::clone(&finished),
        told,
    );
    // Handlers of signals that come while the threads start must not run in them.
    let _quiet = Quiet::new();
    // Should the second thread not start, the first one ends the session when it is told to.
    std::thread::Builder::new()
        .name("copage-pager".into())
        .spawn(move || pager.run())
        .map_err(sys("starting the pager thread"))?;
    let worker = Arc::clone(&shared);
    let started = std::thread::Builder::new()
        .name("copage-worker".into())
        .spawn({
            let finished = Arc::clone(&finished);
            move || worker::run(&worker, &todo, &finished)
        });
    if let Err(e) = started {
        shared.line.lose(LostWhy::Closed);
        finished.store(true, std::sync::atomic::Ordering::Release);
        shared.line.common.wake.signal();
        return Err(MmapError::sys("starting the worker thread", &e));
    }
    Ok(shared)
}
