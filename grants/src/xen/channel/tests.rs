//! The registry of domains over a xenstore of its own. What it cannot show: xenstored, grants and
//! event channels (the Xen laboratory does).

use super::accept::Published;
use super::limits::{EVENTS_BURST, FLOOD_PAUSE, NODES_LOOKED_AT, REFUSED_STAYS};
use super::pages::Slot;
use super::registry::{Counts, ListenerEvent, Nodes, Registry, Wanted, With};
use crate::channel::{Channel, ChannelError};
use crate::xen::lib::XenError;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

#[derive(Default)]
struct Fake {
    nodes: RefCell<BTreeMap<String, Vec<u8>>>,
    watches: RefCell<Vec<(String, String)>>,
    introduced: RefCell<BTreeSet<u16>>,
    reads: Cell<usize>,
}

impl Nodes for Fake {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>, XenError> {
        self.reads.set(self.reads.get() + 1);
        Ok(self.nodes.borrow().get(path).cloned())
    }
    fn write(&self, path: &str, value: &[u8]) -> Result<(), XenError> {
        self.nodes
            .borrow_mut()
            .insert(path.to_owned(), value.to_vec());
        Ok(())
    }
    fn remove(&self, path: &str) -> Result<(), XenError> {
        let below = format!("{path}/");
        let mut nodes = self.nodes.borrow_mut();
        nodes.retain(|node, _| node != path && !node.starts_with(&below));
        Ok(())
    }
    fn list(&self, path: &str) -> Result<Vec<String>, XenError> {
        let below = format!("{path}/");
        let nodes = self.nodes.borrow();
        let names = nodes.keys().filter_map(|node| node.strip_prefix(&below));
        let names: BTreeSet<&str> = names.filter_map(|rest| rest.split('/').next()).collect();
        Ok(names.into_iter().map(str::to_owned).collect())
    }
    fn watch(&self, path: &str, token: &str) -> Result<(), XenError> {
        self.watches.borrow_mut().push((path.into(), token.into()));
        Ok(())
    }
    fn unwatch(&self, path: &str, token: &str) -> Result<(), XenError> {
        let mut watches = self.watches.borrow_mut();
        let before = watches.len();
        watches.retain(|(p, t)| (p.as_str(), t.as_str()) != (path, token));
        assert_eq!(watches.len() + 1, before, "{path} {token} is no watch");
        Ok(())
    }
    fn is_introduced(&self, domid: u16) -> Result<bool, XenError> {
        Ok(self.introduced.borrow().contains(&domid))
    }
}

struct Host {
    store: Fake,
    registry: Registry,
    counts: Arc<Counts>,
    now: Instant,
    out: Vec<ListenerEvent>,
    /// What was mapped, and the sessions that go on.
    mapped: Vec<(u16, Published)>,
    slots: Vec<Slot>,
}

impl Host {
    fn new(wanted: &[Wanted]) -> Self {
        let counts = Arc::new(Counts::default());
        let mut host = Self {
            store: Fake::default(),
            registry: Registry::new(wanted.to_vec(), 3, counts.clone()),
            counts,
            now: Instant::now(),
            out: Vec::new(),
            mapped: Vec::new(),
            slots: Vec::new(),
        };
        host.with(|registry, with| registry.start(with));
        host
    }

    fn with(&mut self, call: impl FnOnce(&mut Registry, &mut With<'_>) -> Result<(), XenError>) {
        let (mapped, slots) = (&mut self.mapped, &mut self.slots);
        let mut accept = |domid, published: Published, slot| {
            mapped.push((domid, published));
            // Entries of the test's guests are below 100.
            if published.ring_ref >= 100 {
                return Err(ChannelError::Refused("no such entry".into()));
            }
            slots.push(slot);
            Ok(Channel::ring_pair(0)?.1)
        };
        let mut with = With {
            store: &self.store,
            accept: &mut accept,
            now: self.now,
            out: &mut self.out,
        };
        call(&mut self.registry, &mut with).unwrap();
    }

    /// An event for each watch of the path or one above it.
    fn changed(&mut self, path: &str) {
        let watches = self.store.watches.borrow().clone();
        for (watched, token) in watches {
            if path == watched || path.starts_with(&format!("{watched}/")) {
                self.with(|registry, with| registry.event(path, &token, with));
            }
        }
    }

    fn domain(&mut self, domid: u16, name: &str, uuid: u8) {
        let dir = format!("/local/domain/{domid}");
        let uuid = format!("{uuid:02x}").repeat(16);
        let (a, b) = uuid.split_at(8);
        let vm = format!(
            "/vm/{a}-{}-{}-{}-{}",
            &b[..4],
            &b[4..8],
            &b[8..12],
            &b[12..]
        );
        self.store
            .write(&format!("{dir}/name"), name.as_bytes())
            .unwrap();
        self.store
            .write(&format!("{dir}/vm"), vm.as_bytes())
            .unwrap();
        self.store.introduced.borrow_mut().insert(domid);
        self.changed("@introduceDomain");
    }

    fn gone(&mut self, domid: u16) {
        self.store.introduced.borrow_mut().remove(&domid);
        self.store
            .remove(&format!("/local/domain/{domid}"))
            .unwrap();
        self.changed("@releaseDomain");
    }

    fn publish(&mut self, domid: u16, session: &str, ring_ref: &str) {
        let dir = format!("/local/domain/{domid}/data/copage/{session}");
        let nodes = [
            ("version", "1"),
            ("ring-ref", ring_ref),
            ("port-to-daemon", "5"),
            ("port-to-guest", "6"),
            ("state", "ready"),
        ];
        for (node, value) in nodes {
            let path = format!("{dir}/{node}");
            self.store.write(&path, value.as_bytes()).unwrap();
            self.changed(&path);
        }
    }

    fn node(&self, path: &str) -> Option<String> {
        let nodes = self.store.nodes.borrow();
        let value = nodes.get(path)?;
        Some(String::from_utf8_lossy(value).into_owned())
    }

    /// Domids of new sessions, and of ended domains.
    fn told(&mut self) -> (Vec<u16>, Vec<u16>) {
        let (mut connected, mut ended) = (Vec::new(), Vec::new());
        for event in self.out.drain(..) {
            match event {
                ListenerEvent::Connected { domain, .. } => connected.push(domain.domid),
                ListenerEvent::DomainEnded { domid } => ended.push(domid),
            }
        }
        (connected, ended)
    }
}

#[test]
fn local_attached_domains_have_sessions_and_others_are_not_watched() {
    let mut host = Host::new(&[Wanted::Named("web".into()), Wanted::Uuid([0x22; 16])]);
    host.domain(1, "web", 0x11);
    host.domain(2, "other-name", 0x22);
    host.domain(3, "stranger", 0x33);
    for domid in 1..=3 {
        host.publish(domid, "a-1", "7");
    }
    assert_eq!(host.told(), (vec![1, 2], vec![]));
    let published = Published {
        ring_ref: 7,
        port_to_daemon: 5,
        port_to_guest: 6,
    };
    assert_eq!(host.mapped, [(1, published), (2, published)]);
    // What was accepted is removed, what nobody watches is left.
    assert_eq!(host.node("/local/domain/1/data/copage/a-1/state"), None);
    assert!(host.node("/local/domain/3/data/copage/a-1/state").is_some());
    // Attached later: what waits is found. Renamed: no more.
    let all = [Wanted::Named("stranger".into())];
    host.with(|registry, with| registry.set_wanted(all.to_vec(), with));
    host.changed("/local/domain/3/data/copage");
    assert_eq!(host.told().0, [3]);
    host.publish(1, "b", "7");
    assert_eq!(host.told().0, []);
    host.store
        .write("/local/domain/1/name", b"stranger")
        .unwrap();
    host.changed("/local/domain/1/name");
    host.changed("/local/domain/1/data/copage");
    assert_eq!(host.told().0, [1]);
    assert_eq!(host.counts.attached_now.load(Ordering::Relaxed), 2);
}

#[test]
fn local_a_number_that_is_used_again_is_another_domain() {
    let mut host = Host::new(&[Wanted::Named("web".into())]);
    host.domain(5, "web", 1);
    host.publish(5, "a", "7");
    assert_eq!(host.told(), (vec![5], vec![]));
    host.gone(5);
    assert_eq!(host.told(), (vec![], vec![5]));
    assert_eq!(
        host.store.watches.borrow().len(),
        2,
        "only those for domains"
    );
    host.domain(5, "web", 2);
    // It ends and another takes its number between two events.
    host.publish(5, "b", "7");
    host.domain(5, "other", 3);
    assert_eq!(host.told(), (vec![5], vec![5]));
    host.publish(5, "c", "7");
    assert_eq!(host.told(), (vec![], vec![]));
}

#[test]
fn local_garbage_is_refused_with_words_and_removed_later() {
    let mut host = Host::new(&[Wanted::Named("web".into())]);
    host.domain(5, "web", 1);
    for (number, bad) in ["", "-1", "4294967296", "100", "99999999999999999999"]
        .iter()
        .enumerate()
    {
        host.publish(5, &format!("bad-{number}"), bad);
    }
    host.publish(5, "bad_name", "7");
    host.publish(5, "..", "7");
    assert_eq!(host.told(), (vec![], vec![]));
    assert_eq!(host.counts.refused.load(Ordering::Relaxed), 5);
    let dir = "/local/domain/5/data/copage";
    assert_eq!(
        host.node(&format!("{dir}/bad-0/refused")).unwrap(),
        "ring-ref is no number"
    );
    assert_eq!(
        host.node(&format!("{dir}/bad-3/refused")).unwrap(),
        "no such entry"
    );
    assert_eq!(host.node(&format!("{dir}/bad-3/state")).unwrap(), "refused");
    assert!(host.registry.due().is_some());
    host.now += REFUSED_STAYS;
    host.with(|registry, with| registry.tick(with));
    assert_eq!(host.node(&format!("{dir}/bad-3/refused")), None);
    // As many sessions as there may be, and one when another has ended.
    for number in 0..4 {
        host.publish(5, &format!("good-{number}"), "7");
    }
    assert_eq!(host.told().0.len(), 3);
    let text = host.node(&format!("{dir}/good-3/refused")).unwrap();
    assert!(text.contains("3 sessions"), "{text}");
    host.slots.pop();
    host.publish(5, "good-4", "7");
    assert_eq!(host.told().0, [5]);
}

#[test]
fn local_a_domain_that_floods_is_not_listened_to_for_a_while() {
    let mut host = Host::new(&[Wanted::Named("web".into()), Wanted::Named("good".into())]);
    host.domain(5, "web", 1);
    host.domain(6, "good", 2);
    let before = host.store.reads.get();
    for _ in 0..100_000 {
        host.changed("/local/domain/5/data/copage/x/state");
    }
    assert!(host.store.reads.get() - before <= EVENTS_BURST as usize);
    assert_eq!(host.counts.floods.load(Ordering::Relaxed), 1);
    host.publish(6, "a", "7");
    assert_eq!(host.told().0, [6], "others are listened to");
    host.publish(5, "a", "7");
    assert_eq!(host.told().0, []);
    assert!(host.registry.due().is_some());
    host.now += FLOOD_PAUSE + Duration::from_secs(1);
    host.with(|registry, with| registry.tick(with));
    host.changed("/local/domain/5/data/copage");
    assert_eq!(host.told().0, [5], "what was published meanwhile is found");
    // Nodes without number: only so many are looked at.
    for number in 0..1000 {
        let path = format!("/local/domain/5/data/copage/z{number}/state");
        host.store.write(&path, b"no").unwrap();
    }
    host.now += Duration::from_secs(60);
    let before = host.store.reads.get();
    host.changed("/local/domain/5/data/copage");
    assert!(host.store.reads.get() - before <= NODES_LOOKED_AT);
}
