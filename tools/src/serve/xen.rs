//! The Xen side of the daemon: whether there is one, domains that connect, domains that end.

use super::core::Core;
use super::identity::DomainIs;
use super::start::ServeError;
use super::wake::Wake;
use crate::config::{BackendChoice, Config};
use copage_coherence::session::Event;
use copage_grants::channel::Peer;
use copage_grants::xen::channel::{ListenerEvent, Wanted, XenListener};
use copage_grants::xen::{Presence, Role, XenError, here};
use copage_grants::{DomId, Epoch};
use crossbeam_channel::{Receiver, unbounded};
use std::sync::Arc;

/// Is the backend to be xen? Says why not when it has to be and cannot.
pub(super) fn is_wanted(config: &Config) -> Result<bool, ServeError> {
    decide(config, &here()).map_err(ServeError::NoXen)
}

fn decide(config: &Config, presence: &Presence) -> Result<bool, String> {
    let lacks = match (presence.role, &presence.missing) {
        (Role::Control, None) => None,
        (Role::Control, Some(missing)) => Some(format!(
            "this is Xen's control domain, and not all is there: {missing}"
        )),
        (Role::Guest, _) => {
            Some("this is a Xen guest; the daemon runs in the control domain (dom0)".to_owned())
        }
        (Role::None, _) => Some("there is no Xen under this kernel".to_owned()),
    };
    let domains = config
        .guests
        .iter()
        .find(|guest| guest.domain.is_some() || guest.uuid.is_some());
    match (config.backend, lacks, domains) {
        (BackendChoice::Local, _, Some(guest)) => Err(format!(
            "guest {:?} is a Xen domain, and backend = \"local\" serves processes only",
            guest.name
        )),
        (BackendChoice::Local, _, None) => Ok(false),
        (_, None, _) => Ok(true),
        (BackendChoice::Xen, Some(lacks), _) => {
            Err(format!("backend = \"xen\" cannot be had: {lacks}"))
        }
        (BackendChoice::Auto, Some(lacks), Some(guest)) => Err(format!(
            "guest {:?} is a Xen domain, and the xen backend cannot be had: {lacks}",
            guest.name
        )),
        (BackendChoice::Auto, Some(lacks), None) => {
            if presence.role == Role::Control {
                tracing::warn!("the local backend serves processes of this domain only: {lacks}");
            }
            Ok(false)
        }
    }
}

impl From<&DomainIs> for Wanted {
    fn from(is: &DomainIs) -> Self {
        match is {
            DomainIs::Named(name) => Self::Named(name.clone()),
            DomainIs::Uuid(uuid) => Self::Uuid(uuid.0),
        }
    }
}

/// The listener for domains and what it says.
pub(super) struct XenSide {
    pub listener: XenListener,
    events: Receiver<ListenerEvent>,
}

impl XenSide {
    pub(super) fn start(
        config: &Config,
        wanted: Vec<Wanted>,
        wake: &Arc<Wake>,
    ) -> Result<Self, XenError> {
        let (sender, events) = unbounded();
        let wake = Arc::clone(wake);
        let told = Box::new(move || wake.wake());
        let sessions_max = config.xen.domain_sessions_max;
        let listener = XenListener::start(wanted, sessions_max, sender, told)?;
        Ok(Self { listener, events })
    }
}

impl Core {
    /// Takes what the listener for domains says.
    pub(super) fn xen_events(&mut self) {
        while let Some(event) = self.xen.as_ref().and_then(|xen| xen.events.try_recv().ok()) {
            match event {
                ListenerEvent::Connected { channel, domain } => {
                    self.begin(channel, Peer::Domain(domain));
                }
                ListenerEvent::DomainEnded { domid } => self.domain_ended(domid),
            }
            self.act();
        }
    }

    /// Tells the listener which domains may have sessions.
    pub(super) fn set_wanted(&self) {
        if let Some(xen) = &self.xen {
            let wanted = self.ctx.guests.domains().map(Wanted::from).collect();
            xen.listener.set_wanted(wanted);
        }
    }

    /// A domain exists no more. All entries that name its number are revoked here, those of fenced
    /// sessions too, before anything else is done: the number may be another domain's next.
    fn domain_ended(&mut self, domid: u16) {
        let of_domain = |peer: &Peer| matches!(peer, Peer::Domain(d) if d.domid == domid);
        let conns: Vec<(u64, Option<Epoch>)> = self
            .conns
            .values()
            .filter(|conn| of_domain(&conn.peer))
            .map(|conn| (conn.id, conn.session.as_ref().map(|s| s.epoch)))
            .collect();
        for (id, epoch) in conns {
            match epoch {
                Some(epoch) => {
                    self.ctx.event(Event::End { epoch });
                    self.act();
                }
                None => self.drop_conn(id),
            }
        }
        let late: Vec<DomId> = self
            .ctx
            .bound
            .iter()
            .filter(|(_, bound)| bound.domid == domid)
            .map(|(dom, _)| *dom)
            .collect();
        for dom in late {
            if let Some(bound) = self.ctx.bound.get(&dom) {
                self.ctx.cache.guest_ended(bound.who);
            }
        }
        self.drained();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{GuestConfig, Limits};

    fn config(backend: BackendChoice, domain: Option<&str>) -> Config {
        Config {
            backend,
            guests: vec![GuestConfig {
                name: "web".into(),
                uid: None,
                domain: domain.map(str::to_owned),
                uuid: None,
                limits: Limits::default(),
            }],
            ..Config::default()
        }
    }

    #[test]
    fn the_backend_is_what_was_asked_for_or_what_there_is() {
        let none = Presence {
            role: Role::None,
            missing: None,
        };
        let guest = Presence {
            role: Role::Guest,
            ..none.clone()
        };
        let control = Presence {
            role: Role::Control,
            ..none.clone()
        };
        let lacks = Presence {
            missing: Some("missing: libxengnttab.so.1".into()),
            ..control.clone()
        };
        use BackendChoice::{Auto, Local, Xen};
        for (presence, auto) in [
            (&none, false),
            (&guest, false),
            (&control, true),
            (&lacks, false),
        ] {
            assert_eq!(decide(&config(Auto, None), presence), Ok(auto));
            assert_eq!(decide(&config(Local, None), presence), Ok(false));
            assert!(decide(&config(Local, Some("vm")), presence).is_err());
            let xen = decide(&config(Xen, None), presence);
            assert_eq!(xen.is_ok(), auto, "{xen:?}");
            // Who names domains wants Xen.
            assert_eq!(decide(&config(Auto, Some("vm")), presence).is_ok(), auto);
        }
        let text = decide(&config(Xen, None), &lacks).unwrap_err();
        assert!(text.contains("libxengnttab.so.1"), "{text}");
    }
}
