//! Who a guest is: its name, by what the kernel says of the process that connected.
//!
//! Root and the daemon's own uid may take any name. Everybody else is who the configuration says
//! its uid is; without any `[[guest]]` there, `uid-N`. Charges and limits go by name, so that
//! connecting again changes nothing.

use super::limits::GUEST_NAMES_MAX;
use crate::config::{GuestConfig, Limits};
use copage_coherence::msg::LABEL_BYTES_MAX;
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
    /// Too many names in use.
    #[error("{GUEST_NAMES_MAX} guest names are in use")]
    TooMany,
}

impl Refused {
    pub(super) fn errno(&self) -> i32 {
        match self {
            Self::BadName => libc::EINVAL,
            Self::NotYours { .. } | Self::Unknown(_) => libc::EACCES,
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
    /// Sessions and domids not drained.
    pub sessions: usize,
    pub handles: usize,
    /// Open files, and opens under way.
    pub files: usize,
}

/// All guests by name. Numbers are those that the cache charges.
#[derive(Debug)]
pub(super) struct Guests {
    own_uid: u32,
    by_uid: Vec<(u32, u32)>,
    entries: Vec<GuestEntry>,
    by_name: HashMap<Arc<str>, u32>,
    defaults: Limits,
}

impl Guests {
    pub(super) fn new(own_uid: u32, defaults: Limits, configured: &[GuestConfig]) -> Self {
        let mut guests = Self {
            own_uid,
            by_uid: Vec::new(),
            entries: Vec::new(),
            by_name: HashMap::new(),
            defaults,
        };
        for guest in configured {
            let id = guests.push(&guest.name, guest.limits, true);
            guests.by_uid.extend(guest.uid.map(|uid| (uid, id)));
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
            .position(|e| !e.configured && e.sessions == 0);
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
            limits: Limits::default(),
        }
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
