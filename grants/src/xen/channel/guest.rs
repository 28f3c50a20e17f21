//! The guest's end: sharing, publishing, waiting.

use super::limits::{ACCEPT_TIMEOUT, CONTROL_DOMID, REFUSAL_BYTES_MAX, REFUSED_EVERY, VERSION};
use super::nodes::{
    BASE, PORT_TO_DAEMON, PORT_TO_GUEST, READY, REFUSAL, RING_REF, STATE, VERSION_NODE,
};
use super::pages::{GuestMemory, Port, Ports};
use crate::channel::layout::GUEST_LIVES_AT;
use crate::channel::limits::RING_ORDER;
use crate::channel::{Channel, ChannelError, RingEnd, RingMemory, Side, begin, is_accepted};
use crate::xen::lib::{GrantShare, Store};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A name that no other session of this domain has.
fn session_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let now = clock_gettime(ClockId::Boottime);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let (pid, seconds, nanos) = (std::process::id(), now.tv_sec, now.tv_nsec);
    format!("{pid}-{seconds:x}-{nanos:x}-{count}")
}

/// The nodes of one session; removed with it, if the daemon has not.
struct Nodes {
    store: Store,
    dir: String,
}

impl Nodes {
    fn write(&self, node: &str, value: &[u8]) -> Result<(), ChannelError> {
        let path = format!("{}/{node}", self.dir);
        Ok(self.store.write(&path, value)?)
    }

    fn number(&self, node: &str, number: u32) -> Result<(), ChannelError> {
        self.write(node, number.to_string().as_bytes())
    }

    /// What the daemon says against it.
    fn refusal(&self) -> Option<String> {
        let path = format!("{}/{REFUSAL}", self.dir);
        let mut text = self.store.read(&path).ok()??;
        text.truncate(REFUSAL_BYTES_MAX);
        Some(String::from_utf8_lossy(&text).into_owned())
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        // Gone already when it was accepted.
        let _ = self.store.remove(&self.dir);
    }
}

/// Connects to the daemon in the control domain. Waits a bounded time for it to accept.
///
/// # Errors
/// No Xen here; the daemon refused; nobody answered.
pub fn connect() -> Result<Channel, ChannelError> {
    let (receives, sends) = (Port::unbound(CONTROL_DOMID)?, Port::unbound(CONTROL_DOMID)?);
    let shares = GrantShare::open()?;
    let index =
        shares.share_notifying(CONTROL_DOMID, true, GUEST_LIVES_AT as u32, sends.number())?;
    let bytes = shares.share(CONTROL_DOMID, 2 << RING_ORDER, true)?;
    let memory = GuestMemory { index, bytes };
    begin(memory.index(), RING_ORDER, memory.bytes.refs())?;
    let nodes = Nodes {
        store: Store::open()?,
        dir: format!("{BASE}/{}", session_name()),
    };
    let ring_ref = memory.index.refs().first().copied().unwrap_or_default();
    nodes.number(VERSION_NODE, VERSION)?;
    nodes.number(RING_REF, ring_ref)?;
    nodes.number(PORT_TO_DAEMON, sends.number())?;
    nodes.number(PORT_TO_GUEST, receives.number())?;
    nodes.write(STATE, READY)?;
    wait(&memory, &receives, &nodes)?;
    let ports = Ports { receives, sends };
    Ok(RingEnd::new(Side::Guest, Box::new(memory), Box::new(ports))?.into())
}

fn wait(memory: &GuestMemory, receives: &Port, nodes: &Nodes) -> Result<(), ChannelError> {
    let until = Instant::now() + ACCEPT_TIMEOUT;
    loop {
        // Taken before the look, so that no event is lost.
        receives.take().map_err(|source| ChannelError::Sys {
            call: "waiting for the daemon",
            source,
        })?;
        if is_accepted(memory.index()) {
            return Ok(());
        }
        if let Some(text) = nodes.refusal() {
            return Err(ChannelError::Refused(text));
        }
        let left = until.saturating_duration_since(Instant::now());
        if left == Duration::ZERO {
            return Err(ChannelError::Sys {
                call: "no daemon answered: is copage running in the control domain, and this domain attached there (copage attach)?",
                source: io::Error::from_raw_os_error(libc::ETIMEDOUT),
            });
        }
        let wait = left.min(REFUSED_EVERY);
        let timeout = Timespec {
            tv_sec: wait.as_secs() as i64,
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        let mut fds = [PollFd::from_borrowed_fd(receives.fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                return Err(ChannelError::Sys {
                    call: "poll",
                    source: errno.into(),
                });
            }
        }
    }
}
