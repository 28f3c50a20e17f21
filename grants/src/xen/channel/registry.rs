//! Which domains there are, which of them may have sessions, and what becomes of what they publish.
//!
//! All that is known of a domain by its number is forgotten when the domain ends, and looked at
//! anew when another takes the number.

use super::accept::{Published, published};
use super::limits::{
    DOMAINS_MAX, FLOOD_PAUSE, NODES_LOOKED_AT, REFUSAL_BYTES_MAX, REFUSED_MAX, REFUSED_STAYS,
};
use super::nodes::{self, Changed, DOMAINS, READY, REFUSAL, STATE};
use super::pages::Slot;
use super::rate::Rate;
use crate::channel::{Channel, ChannelError, DomainPeer};
use crate::xen::lib::{Store, XenError};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

/// The calls of xenstore that are used here; tests put a store of their own under them.
pub(super) trait Nodes {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>, XenError>;
    fn write(&self, path: &str, value: &[u8]) -> Result<(), XenError>;
    fn remove(&self, path: &str) -> Result<(), XenError>;
    fn list(&self, path: &str) -> Result<Vec<String>, XenError>;
    fn watch(&self, path: &str, token: &str) -> Result<(), XenError>;
    fn unwatch(&self, path: &str, token: &str) -> Result<(), XenError>;
    fn is_introduced(&self, domid: u16) -> Result<bool, XenError>;
}

impl Nodes for Store {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>, XenError> {
        Self::read(self, path)
    }
    fn write(&self, path: &str, value: &[u8]) -> Result<(), XenError> {
        Self::write(self, path, value)
    }
    fn remove(&self, path: &str) -> Result<(), XenError> {
        Self::remove(self, path)
    }
    fn list(&self, path: &str) -> Result<Vec<String>, XenError> {
        Self::list(self, path)
    }
    fn watch(&self, path: &str, token: &str) -> Result<(), XenError> {
        Self::watch(self, path, token)
    }
    fn unwatch(&self, path: &str, token: &str) -> Result<(), XenError> {
        Self::unwatch(self, path, token)
    }
    fn is_introduced(&self, domid: u16) -> Result<bool, XenError> {
        Self::is_introduced(self, domid)
    }
}

/// A domain that may have sessions, by what the toolstack says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The domain of this name.
    Named(String),
    /// The domain with this uuid.
    Uuid([u8; 16]),
}

impl Wanted {
    fn is(&self, domain: &DomainPeer) -> bool {
        match self {
            Self::Named(name) => *name == domain.name,
            Self::Uuid(uuid) => *uuid == domain.uuid,
        }
    }
}

/// What the daemon is told.
#[derive(Debug)]
pub enum ListenerEvent {
    /// A process of a domain connected.
    Connected {
        /// Its ring, mapped and bound.
        channel: Channel,
        /// The domain.
        domain: DomainPeer,
    },
    /// A domain exists no more: nothing of it is mapped, and its number may be another's next.
    DomainEnded {
        /// Its number.
        domid: u16,
    },
}

/// Counts since the start.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub events: AtomicU64,
    pub accepted: AtomicU64,
    pub refused: AtomicU64,
    pub floods: AtomicU64,
    pub attached_now: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A domain that there is.
#[derive(Debug)]
struct Domain {
    peer: DomainPeer,
    /// The watch of its name.
    name_token: String,
    /// The watch of its sessions, while it may have any and is not paused.
    token: Option<String>,
    rate: Rate,
    paused_until: Option<Instant>,
    slots: Arc<AtomicU32>,
}

/// Maps a guest's ring: [`super::accept::accept`], or a test's.
pub(super) type Accept<'a> =
    &'a mut dyn FnMut(u16, Published, Slot) -> Result<Channel, ChannelError>;

/// What one call works with.
pub(super) struct With<'a> {
    pub store: &'a dyn Nodes,
    pub accept: Accept<'a>,
    pub now: Instant,
    pub out: &'a mut Vec<ListenerEvent>,
}

/// See the module.
pub(super) struct Registry {
    wanted: Vec<Wanted>,
    domains: BTreeMap<u16, Domain>,
    /// Nodes of refused sessions, and when they go.
    refused: VecDeque<(Instant, String)>,
    sessions_max: u32,
    serial: u64,
    counts: Arc<Counts>,
}

/// The watches for domains that come and go.
const INTRODUCED: (&str, &str) = ("@introduceDomain", "introduced");
const RELEASED: (&str, &str) = ("@releaseDomain", "released");

impl Registry {
    pub(super) fn new(wanted: Vec<Wanted>, sessions_max: u32, counts: Arc<Counts>) -> Self {
        Self {
            wanted,
            domains: BTreeMap::new(),
            refused: VecDeque::new(),
            sessions_max,
            serial: 0,
            counts,
        }
    }

    /// Begins, on a connection without watches.
    pub(super) fn start(&mut self, with: &mut With<'_>) -> Result<(), XenError> {
        for domain in self.domains.values_mut() {
            (domain.token, domain.paused_until) = (None, None);
            with.store.watch(
                &nodes::domain(domain.peer.domid, "name"),
                &domain.name_token,
            )?;
        }
        with.store.watch(INTRODUCED.0, INTRODUCED.1)?;
        with.store.watch(RELEASED.0, RELEASED.1)?;
        self.rescan(with)
    }

    /// Other domains may have sessions now.
    pub(super) fn set_wanted(
        &mut self,
        wanted: Vec<Wanted>,
        with: &mut With<'_>,
    ) -> Result<(), XenError> {
        self.wanted = wanted;
        self.settle(with)
    }

    /// Takes an event of xenstore.
    pub(super) fn event(
        &mut self,
        path: &str,
        token: &str,
        with: &mut With<'_>,
    ) -> Result<(), XenError> {
        count(&self.counts.events);
        if token == INTRODUCED.1 || token == RELEASED.1 {
            return self.rescan(with);
        }
        let named = self.domains.values().find(|d| d.name_token == token);
        if let Some(domid) = named.map(|d| d.peer.domid) {
            return self.renamed(domid, with);
        }
        let watched = self
            .domains
            .values_mut()
            .find(|d| d.token.as_deref() == Some(token));
        // Of a watch that has ended.
        let Some(domain) = watched else { return Ok(()) };
        let domid = domain.peer.domid;
        if !domain.rate.take(with.now) {
            return self.pause(domid, with);
        }
        match nodes::changed(domid, path) {
            Changed::State(session) => self.session(domid, session, with),
            Changed::All => {
                let mut found = with.store.list(&nodes::sessions(domid))?;
                found.truncate(NODES_LOOKED_AT);
                for session in found.iter().filter(|name| nodes::is_session(name)) {
                    let domain = self.domains.get_mut(&domid);
                    if !domain.is_some_and(|d| d.rate.take(with.now)) {
                        return self.pause(domid, with);
                    }
                    self.session(domid, session, with)?;
                }
                Ok(())
            }
            Changed::Other => Ok(()),
        }
    }

    /// A domain writes more than anybody should: it is not listened to for a while.
    fn pause(&mut self, domid: u16, with: &mut With<'_>) -> Result<(), XenError> {
        let Some(domain) = self.domains.get_mut(&domid) else {
            return Ok(());
        };
        count(&self.counts.floods);
        tracing::warn!(domain = %domain.peer.name, domid, "too many changes of its nodes: not listened to for a while");
        domain.paused_until = Some(with.now + FLOOD_PAUSE);
        match domain.token.take() {
            Some(token) => with.store.unwatch(&nodes::sessions(domid), &token),
            None => Ok(()),
        }
    }

    /// A session may be ready.
    fn session(&mut self, domid: u16, session: &str, with: &mut With<'_>) -> Result<(), XenError> {
        let Some(domain) = self.domains.get(&domid) else {
            return Ok(());
        };
        let dir = nodes::session(domid, session);
        let state = with.store.read(&format!("{dir}/{STATE}"))?;
        if state.as_deref() != Some(READY) {
            return Ok(());
        }
        let accepted = match Slot::take(&domain.slots, self.sessions_max) {
            Some(slot) => published(with.store, domid, session)
                .and_then(|published| (with.accept)(domid, published, slot)),
            None => {
                let most = self.sessions_max;
                let text = format!("this domain has {most} sessions, as many as it may");
                Err(ChannelError::Refused(text))
            }
        };
        match accepted {
            Ok(channel) => {
                count(&self.counts.accepted);
                let domain = domain.peer.clone();
                with.out.push(ListenerEvent::Connected { channel, domain });
                with.store.remove(&dir)
            }
            Err(error) => {
                count(&self.counts.refused);
                let text = match error {
                    ChannelError::Refused(text) => text,
                    other => other.to_string(),
                };
                // The guest can do this as often as it likes; the count says how often.
                tracing::debug!(domain = %domain.peer.name, domid, "refused: {text}");
                self.refuse(dir, &text, with)
            }
        }
    }

    /// Says why to the guest; when it does not remove the nodes, they are later.
    fn refuse(&mut self, dir: String, text: &str, with: &mut With<'_>) -> Result<(), XenError> {
        let text = text.as_bytes();
        // Nothing of it is ready any more, so that it is not looked at again.
        with.store.write(&format!("{dir}/{STATE}"), b"refused")?;
        with.store.write(
            &format!("{dir}/{REFUSAL}"),
            text.get(..REFUSAL_BYTES_MAX).unwrap_or(text),
        )?;
        if self.refused.iter().any(|(_, known)| *known == dir) {
            return Ok(());
        }
        if self.refused.len() >= REFUSED_MAX
            && let Some((_, oldest)) = self.refused.pop_front()
        {
            with.store.remove(&oldest)?;
        }
        self.refused.push_back((with.now + REFUSED_STAYS, dir));
        Ok(())
    }

    /// When [`Self::tick`] has something to do.
    pub(super) fn due(&self) -> Option<Instant> {
        let paused = self.domains.values().filter_map(|d| d.paused_until).min();
        let refused = self.refused.front().map(|(at, _)| *at);
        paused.into_iter().chain(refused).min()
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, with: &mut With<'_>) -> Result<(), XenError> {
        while let Some((at, _)) = self.refused.front()
            && *at <= with.now
            && let Some((_, dir)) = self.refused.pop_front()
        {
            with.store.remove(&dir)?;
        }
        for domain in self.domains.values_mut() {
            if domain.paused_until.is_some_and(|until| until <= with.now) {
                domain.paused_until = None;
            }
        }
        self.settle(with)
    }

    /// Who a domain is, as the toolstack says; `None`: not yet, or no more.
    fn look(domid: u16, store: &dyn Nodes) -> Result<Option<DomainPeer>, XenError> {
        if !store.is_introduced(domid)? {
            return Ok(None);
        }
        let vm = store.read(&nodes::domain(domid, "vm"))?;
        let uuid = vm.as_deref().and_then(nodes::uuid);
        let name = store.read(&nodes::domain(domid, "name"))?;
        let name = name.and_then(|name| String::from_utf8(name).ok());
        Ok(uuid
            .zip(name)
            .map(|(uuid, name)| DomainPeer { domid, name, uuid }))
    }

    /// Domains came or went.
    fn rescan(&mut self, with: &mut With<'_>) -> Result<(), XenError> {
        let known: Vec<(u16, [u8; 16])> = self
            .domains
            .values()
            .map(|d| (d.peer.domid, d.peer.uuid))
            .collect();
        for (domid, uuid) in known {
            let now = Self::look(domid, with.store)?;
            if now.is_none_or(|now| now.uuid != uuid) {
                self.ended(domid, with)?;
            }
        }
        let there = with.store.list(DOMAINS)?;
        for domid in there.iter().filter_map(|name| nodes::domid(name)) {
            if domid == super::limits::CONTROL_DOMID
                || self.domains.contains_key(&domid)
                || self.domains.len() >= DOMAINS_MAX
            {
                continue;
            }
            let Some(peer) = Self::look(domid, with.store)? else {
                continue;
            };
            self.serial += 1;
            let name_token = format!("name-{domid}-{}", self.serial);
            with.store
                .watch(&nodes::domain(domid, "name"), &name_token)?;
            let domain = Domain {
                peer,
                name_token,
                token: None,
                rate: Rate::new(with.now),
                paused_until: None,
                slots: Arc::default(),
            };
            self.domains.insert(domid, domain);
        }
        self.settle(with)
    }

    fn renamed(&mut self, domid: u16, with: &mut With<'_>) -> Result<(), XenError> {
        match Self::look(domid, with.store)? {
            Some(peer) => {
                if let Some(domain) = self.domains.get_mut(&domid)
                    && domain.peer.uuid == peer.uuid
                {
                    domain.peer.name = peer.name;
                    return self.settle(with);
                }
                self.rescan(with)
            }
            None => self.rescan(with),
        }
    }

    fn ended(&mut self, domid: u16, with: &mut With<'_>) -> Result<(), XenError> {
        let Some(domain) = self.domains.remove(&domid) else {
            return Ok(());
        };
        // Told first: whatever fails below, the daemon must know.
        with.out.push(ListenerEvent::DomainEnded { domid });
        let prefix = nodes::session(domid, "");
        self.refused.retain(|(_, dir)| !dir.starts_with(&prefix));
        // The nodes are gone with the domain; the watches are not.
        let _ = with
            .store
            .unwatch(&nodes::domain(domid, "name"), &domain.name_token);
        if let Some(token) = &domain.token {
            let _ = with.store.unwatch(&nodes::sessions(domid), token);
        }
        Ok(())
    }

    /// Watches the sessions of those that may have any, and of nobody else.
    fn settle(&mut self, with: &mut With<'_>) -> Result<(), XenError> {
        let mut attached = 0;
        for (domid, domain) in &mut self.domains {
            let path = nodes::sessions(*domid);
            let wanted = self.wanted.iter().any(|w| w.is(&domain.peer));
            attached += u64::from(wanted);
            if wanted && domain.token.is_none() && domain.paused_until.is_none() {
                self.serial += 1;
                let token = format!("sessions-{domid}-{}", self.serial);
                with.store.watch(&path, &token)?;
                domain.token = Some(token);
            } else if !wanted {
                domain.paused_until = None;
                if let Some(token) = domain.token.take() {
                    with.store.unwatch(&path, &token)?;
                }
            }
        }
        self.counts.attached_now.store(attached, Ordering::Relaxed);
        Ok(())
    }
}
