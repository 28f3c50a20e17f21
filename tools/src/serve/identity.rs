//! Who a guest is: its name, by what the kernel says of the process that connected, or by what the
//! toolstack says of the domain (never by its domid, which is used again).
//!
//! A domain is who the configuration, or `copage attach`, says that its uuid or its name is. Of
//! processes, root and the daemon's own uid may take any name. Everybody else is who the configuration says
//! its uid is; without any `[[guest]]` there, `uid-N`. Charges and limits go by name, so that
//! connecting again changes nothing.

use super::limits::{DOMAINS_MAX, GUEST_NAMES_MAX};
use crate::config::{GuestConfig, Limits, Uuid, check_domain};
use copage_coherence::msg::LABEL_BYTES_MAX;
use copage_grants::channel::DomainPeer;
use std::collections::HashMap;
use std::sync::Arc;

/// Why somebody is not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    /// Not a name.
    #[error(
        "a guest's name has 1 to {LABEL_BYTES_MAX} bytes of UTF-8 without '/', spaces and control characters"
    )]
    BadName,
    /// The uid may not take it.
    #[error(
        "uid {uid} may not connect as {name:?}: the configuration has no such [[guest]] with this uid"
    )]
    NotYours {
        /// Who.
        uid: u32,
        /// As whom.
        name: String,
    },
    /// The uid is nobody here.
    #[error("uid {0} is no [[guest]] of the configuration")]
    Unknown(u32),
    /// The domain may not take the name.
    #[error("domain {domain:?} is guest {is:?} here and may not connect as {name:?}")]
    NotThisDomain {
        /// Its name in the toolstack.
        domain: String,
        /// Who it is.
        is: String,
        /// As whom.
        name: String,
    },
    /// The domain is nobody here.
    #[error(
        "domain {0:?} is not attached: `copage attach {0} EXPORT` in the control domain lets it in"
    )]
    NotAttached(String),
    /// Too many names in use.
    #[error("{GUEST_NAMES_MAX} guest names are in use")]
    TooMany,
}

impl Refused {
    pub(super) fn errno(&self) -> i32 {
        match self {
            Self::BadName => libc::EINVAL,
            Self::NotYours { .. }
            | Self::Unknown(_)
            | Self::NotThisDomain { .. }
            | Self::NotAttached(_) => libc::EACCES,
            Self::TooMany => libc::EUSERS,
        }
    }
}

/// A guest by name, and what it holds over all its sessions.
#[derive(Clone, Debug)]
pub(super) struct GuestEntry {
    pub name: Arc<str>,
    pub limits: Limits,
    /// From the configuration: never forgotten.
    configured: bool,
    /// A domain is attached as this guest: not forgotten meanwhile.
    attached: bool,
    /// Sessions and domids not drained.
    pub sessions: usize,
    pub handles: usize,
    /// Open files, and opens under way.
    pub files: usize,
}

/// How a domain is known: by what the toolstack writes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DomainIs {
    /// Its name.
    Named(String),
    /// Its uuid.
    Uuid(Uuid),
}

impl DomainIs {
    /// What an administrator wrote: a uuid, or else a name.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(uuid) => Ok(Self::Uuid(uuid)),
            Err(_) => check_domain(text).map(|()| Self::Named(text.to_owned())),
        }
    }

    fn is(&self, domain: &DomainPeer) -> bool {
        match self {
            Self::Named(name) => *name == domain.name,
            Self::Uuid(uuid) => uuid.0 == domain.uuid,
        }
    }
}

/// All guests by name. Numbers are those that the cache charges.
#[derive(Debug)]
pub(super) struct Guests {
    own_uid: u32,
    by_uid: Vec<(u32, u32)>,
    /// Domains that are attached.
    by_domain: Vec<(DomainIs, u32)>,
    entries: Vec<GuestEntry>,
    by_name: HashMap<Arc<str>, u32>,
    defaults: Limits,
}

impl Guests {
    pub(super) fn new(own_uid: u32, defaults: Limits, configured: &[GuestConfig]) -> Self {
        let mut guests = Self {
            own_uid,
            by_uid: Vec::new(),
            by_domain: Vec::new(),
            entries: Vec::new(),
            by_name: HashMap::new(),
            defaults,
        };
        for guest in configured {
            let id = guests.push(&guest.name, guest.limits, true);
            guests.by_uid.extend(guest.uid.map(|uid| (uid, id)));
            let named = guest.domain.clone().map(DomainIs::Named);
            let known = named.or(guest.uuid.map(DomainIs::Uuid));
            guests.by_domain.extend(known.map(|is| (is, id)));
        }
        guests
    }

    fn push(&mut self, name: &str, limits: Limits, configured: bool) -> u32 {
        let name: Arc<str> = name.into();
        // Bounded by GUEST_NAMES_MAX and by the configuration's length.
        let id = self.entries.len() as u32;
        self.by_name.insert(name.clone(), id);
        let entry = GuestEntry {
            name,
            limits,
            configured,
            attached: false,
            sessions: 0,
            handles: 0,
            files: 0,
        };
        self.entries.push(entry);
        id
    }

    /// Every guest that there was from the start, with its limits.
    pub(super) fn all(&self) -> impl Iterator<Item = (u32, &GuestEntry)> {
        (0u32..).zip(&self.entries)
    }

    pub(super) fn get(&self, guest: u32) -> Option<&GuestEntry> {
        self.entries.get(guest as usize)
    }

    pub(super) fn get_mut(&mut self, guest: u32) -> Option<&mut GuestEntry> {
        self.entries.get_mut(guest as usize)
    }

    /// The number of a name, if it is in use or was configured.
    pub(super) fn by_name(&self, name: &str) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    /// Who `uid` is, that says it is `claimed` (empty: it says nothing). The second value: its
    /// limits have to be made known to the cache.
    pub(super) fn identify(&mut self, uid: u32, claimed: &[u8]) -> Result<(u32, bool), Refused> {
        let claimed = if claimed.is_empty() {
            None
        } else {
            Some(check_name(claimed)?)
        };
        let of_uid =
            |by_uid: &[(u32, u32)]| by_uid.iter().find(|(u, _)| *u == uid).map(|&(_, id)| id);
        if uid == 0 || uid == self.own_uid {
            return match claimed {
                Some(name) => self.named(name),
                None => match of_uid(&self.by_uid) {
                    Some(id) => Ok((id, false)),
                    None => self.named(&format!("uid-{uid}")),
                },
            };
        }
        if !self.entries.iter().any(|e| e.configured) {
            return self.named(&format!("uid-{uid}"));
        }
        match claimed {
            None => of_uid(&self.by_uid)
                .map(|id| (id, false))
                .ok_or(Refused::Unknown(uid)),
            Some(name) => self
                .by_name(name)
                .filter(|&id| self.by_uid.contains(&(uid, id)))
                .map(|id| (id, false))
                .ok_or_else(|| Refused::NotYours {
                    uid,
                    name: name.to_owned(),
                }),
        }
    }

    /// Which domains may have sessions at all.
    pub(super) fn domains(&self) -> impl Iterator<Item = &DomainIs> {
        self.by_domain.iter().map(|(is, _)| is)
    }

    /// Who a domain is, that says it is `claimed` (empty: it says nothing). A uuid says more than a
    /// name.
    pub(super) fn identify_domain(
        &self,
        domain: &DomainPeer,
        claimed: &[u8],
    ) -> Result<u32, Refused> {
        let by_uuid = |is: &DomainIs| matches!(is, DomainIs::Uuid(_));
        let mut found = self.by_domain.iter().filter(|(is, _)| is.is(domain));
        let first = found.next();
        let best = found.find(|(is, _)| by_uuid(is)).or(first);
        let &(_, id) = best.ok_or_else(|| Refused::NotAttached(domain.name.clone()))?;
        let is = self.get(id).map_or("", |entry| &entry.name);
        if claimed.is_empty() || claimed == is.as_bytes() {
            return Ok(id);
        }
        Err(Refused::NotThisDomain {
            domain: domain.name.clone(),
            is: is.to_owned(),
            name: check_name(claimed)?.to_owned(),
        })
    }

    /// Lets a domain have sessions. The guest's number and whether its limits have to be made known
    /// to the cache: who the configuration says that it is, else one named as the domain.
    pub(super) fn attach(&mut self, is: DomainIs) -> Result<(u32, bool), Refused> {
        if let Some((_, id)) = self.by_domain.iter().find(|(known, _)| *known == is) {
            return Ok((*id, false));
        }
        if self.by_domain.len() >= DOMAINS_MAX {
            return Err(Refused::TooMany);
        }
        let name = match &is {
            DomainIs::Named(name) => name.clone(),
            DomainIs::Uuid(uuid) => uuid.to_string(),
        };
        let (id, is_new) = self.named(check_name(name.as_bytes())?)?;
        if let Some(entry) = self.get_mut(id) {
            // Stays as long as the domain is attached.
            entry.attached = true;
        }
        self.by_domain.push((is, id));
        Ok((id, is_new))
    }

    /// Lets a domain have no sessions any more; who it was.
    pub(super) fn detach(&mut self, is: &DomainIs) -> Option<u32> {
        let place = self.by_domain.iter().position(|(known, _)| known == is)?;
        let (_, id) = self.by_domain.remove(place);
        if let Some(entry) = self.get_mut(id) {
            entry.attached = false;
        }
        Some(id)
    }

    /// Who an attached domain is.
    pub(super) fn attached(&self, is: &DomainIs) -> Option<u32> {
        let found = self.by_domain.iter().find(|(known, _)| known == is);
        found.map(|&(_, id)| id)
    }

    fn named(&mut self, name: &str) -> Result<(u32, bool), Refused> {
        if let Some(id) = self.by_name(name) {
            return Ok((id, false));
        }
        if self.entries.len() < GUEST_NAMES_MAX {
            return Ok((self.push(name, self.defaults, false), true));
        }
        // Takes the place of a name that nobody uses, and what may still be charged to it.
        let idle = self
            .entries
            .iter()
            .position(|e| !e.configured && !e.attached && e.sessions == 0);
        let place = idle.ok_or(Refused::TooMany)?;
        let name: Arc<str> = name.into();
        let entry = self.entries.get_mut(place).ok_or(Refused::TooMany)?;
        self.by_name.remove(&entry.name);
        entry.name = name.clone();
        let id = place as u32;
        self.by_name.insert(name, id);
        Ok((id, false))
    }
}

/// A label that can stand in access lists and on a terminal.
fn check_name(name: &[u8]) -> Result<&str, Refused> {
    let name = std::str::from_utf8(name).map_err(|_| Refused::BadName)?;
    let good = (1..=LABEL_BYTES_MAX).contains(&name.len())
        && name != "*"
        && !name
            .chars()
            .any(|c| c == '/' || c.is_whitespace() || c.is_control());
    if good {
        Ok(name)
    } else {
        Err(Refused::BadName)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u32 = 500;

    fn guest(name: &str, uid: Option<u32>) -> GuestConfig {
        GuestConfig {
            name: name.into(),
            uid,
            domain: None,
            uuid: None,
            limits: Limits::default(),
        }
    }

    fn domain(name: &str, uuid: u8) -> DomainPeer {
        DomainPeer {
            domid: 7,
            name: name.into(),
            uuid: [uuid; 16],
        }
    }

    #[test]
    fn domains_are_who_the_configuration_or_the_administrator_says() {
        let mut by_name = guest("web", None);
        by_name.domain = Some("web-vm".into());
        let mut by_uuid = guest("db", None);
        by_uuid.uuid = Some(Uuid([5; 16]));
        let mut guests = Guests::new(OWN, Limits::default(), &[by_name, by_uuid]);
        assert_eq!(guests.identify_domain(&domain("web-vm", 1), b""), Ok(0));
        assert_eq!(guests.identify_domain(&domain("web-vm", 1), b"web"), Ok(0));
        // Whatever its name, the uuid says who it is.
        assert_eq!(guests.identify_domain(&domain("web-vm", 5), b""), Ok(1));
        assert_eq!(guests.identify_domain(&domain("db", 5), b"db"), Ok(1));
        let lie = guests.identify_domain(&domain("web-vm", 1), b"db");
        assert!(matches!(lie, Err(Refused::NotThisDomain { .. })));
        let unknown = guests.identify_domain(&domain("new", 9), b"");
        assert_eq!(unknown, Err(Refused::NotAttached("new".into())));

        let is = DomainIs::parse("new").unwrap();
        let (id, is_new) = guests.attach(is.clone()).unwrap();
        assert!(is_new && guests.attach(is.clone()) == Ok((id, false)));
        assert_eq!(guests.identify_domain(&domain("new", 9), b""), Ok(id));
        assert_eq!(guests.detach(&is), Some(id));
        assert!(guests.identify_domain(&domain("new", 9), b"").is_err());
        // Attached as who it is already.
        let is = DomainIs::parse("web-vm").unwrap();
        assert_eq!(guests.attach(is), Ok((0, false)));
        assert!(DomainIs::parse("17").is_err() && DomainIs::parse("a b").is_err());
    }

    fn name_of(guests: &mut Guests, uid: u32, claimed: &str) -> Result<String, Refused> {
        let (id, _) = guests.identify(uid, claimed.as_bytes())?;
        Ok(guests.get(id).unwrap().name.to_string())
    }

    #[test]
    fn without_configured_guests_others_are_their_uid() {
        let mut guests = Guests::new(OWN, Limits::default(), &[]);
        assert_eq!(name_of(&mut guests, OWN, "web").unwrap(), "web");
        assert_eq!(name_of(&mut guests, 0, "db").unwrap(), "db");
        assert_eq!(name_of(&mut guests, OWN, "").unwrap(), "uid-500");
        // A stranger cannot take a name, nor another's uid.
        assert_eq!(name_of(&mut guests, 7, "web").unwrap(), "uid-7");
        assert_eq!(name_of(&mut guests, 7, "uid-500").unwrap(), "uid-7");
    }

    #[test]
    fn configured_names_belong_to_their_uid() {
        let list = [
            guest("web", Some(7)),
            guest("blog", Some(7)),
            guest("db", Some(8)),
        ];
        let mut guests = Guests::new(OWN, Limits::default(), &list);
        assert_eq!(name_of(&mut guests, 7, "").unwrap(), "web");
        assert_eq!(name_of(&mut guests, 7, "blog").unwrap(), "blog");
        assert!(matches!(
            name_of(&mut guests, 7, "db"),
            Err(Refused::NotYours { .. })
        ));
        assert!(matches!(
            name_of(&mut guests, 7, "free"),
            Err(Refused::NotYours { .. })
        ));
        assert_eq!(name_of(&mut guests, 9, ""), Err(Refused::Unknown(9)));
        assert_eq!(name_of(&mut guests, OWN, "db").unwrap(), "db");
        assert_eq!(name_of(&mut guests, 0, "free").unwrap(), "free");
    }

    #[test]
    fn names_are_checked() {
        let mut guests = Guests::new(OWN, Limits::default(), &[]);
        let long = "x".repeat(LABEL_BYTES_MAX + 1);
        for bad in ["a/b", "a b", "a\n", "*", "a\0", &long] {
            assert_eq!(
                name_of(&mut guests, OWN, bad),
                Err(Refused::BadName),
                "{bad:?}"
            );
        }
        assert_eq!(guests.identify(OWN, b"\xff"), Err(Refused::BadName));
    }

    #[test]
    fn names_are_bounded_and_idle_ones_make_room() {
        let mut guests = Guests::new(OWN, Limits::default(), &[]);
        for i in 0..GUEST_NAMES_MAX {
            let (id, _) = guests.identify(OWN, format!("g{i}").as_bytes()).unwrap();
            guests.get_mut(id).unwrap().sessions = 1;
        }
        assert_eq!(guests.identify(OWN, b"more"), Err(Refused::TooMany));
        guests.get_mut(5).unwrap().sessions = 0;
        assert_eq!(guests.identify(OWN, b"more"), Ok((5, false)));
        assert_eq!(guests.by_name("g5"), None);
    }
}
