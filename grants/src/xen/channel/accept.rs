//! The daemon's end: what a guest published is read once, checked, mapped and bound.

use super::limits::VERSION;
use super::nodes::{self, PORT_TO_DAEMON, PORT_TO_GUEST, RING_REF, VERSION_NODE};
use super::pages::{DaemonMemory, Port, Ports, Slot};
use super::registry::Nodes;
use crate::channel::layout::DAEMON_LIVES_AT;
use crate::channel::ring::Nonsense;
use crate::channel::{Channel, ChannelError, RingEnd, Side, announced};
use crate::xen::lib::Gnttab;

/// The numbers that a guest published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Published {
    pub ring_ref: u32,
    pub port_to_daemon: u32,
    pub port_to_guest: u32,
}

/// Reads a session's nodes, each once.
pub(super) fn published(
    store: &dyn Nodes,
    domid: u16,
    session: &str,
) -> Result<Published, ChannelError> {
    let dir = nodes::session(domid, session);
    let number = |node: &'static str| {
        let value = store.read(&format!("{dir}/{node}"))?;
        let number = value.as_deref().and_then(nodes::number);
        number.ok_or_else(|| ChannelError::Refused(format!("{node} is no number")))
    };
    let version = number(VERSION_NODE)?;
    if version != VERSION {
        return Err(ChannelError::Refused(format!(
            "the daemon speaks version {VERSION} of the ring, the guest {version}"
        )));
    }
    Ok(Published {
        ring_ref: number(RING_REF)?,
        port_to_daemon: number(PORT_TO_DAEMON)?,
        port_to_guest: number(PORT_TO_GUEST)?,
    })
}

/// Maps a guest's ring, binds its ports and says that it is accepted.
pub(super) fn accept(
    gnttab: &Gnttab,
    domid: u16,
    published: Published,
    slot: Slot,
) -> Result<Channel, ChannelError> {
    let receives = Port::bound(domid, published.port_to_daemon)?;
    let sends = Port::bound(domid, published.port_to_guest)?;
    // When this process ends, the guest's ring says so and its port rings.
    let clear = DAEMON_LIVES_AT as u32;
    let index = gnttab.map_notifying(domid, published.ring_ref, true, clear, sends.number())?;
    let words = index.bytes_mut();
    let words = words.ok_or(Nonsense::NotARing("its index page cannot be written"))?;
    let refs = announced(words)?;
    let bytes = gnttab.map(domid, &refs, true)?;
    let memory = DaemonMemory {
        index,
        bytes,
        _slot: slot,
    };
    let ports = Ports { receives, sends };
    Ok(RingEnd::new(Side::Daemon, Box::new(memory), Box::new(ports))?.into())
}
