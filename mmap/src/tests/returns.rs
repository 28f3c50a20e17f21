//! The daemon dies and another comes in its place: readers, callers and what was open go on.

use super::fake::{Fake, Seen, word};
use super::*;
use crate::MmapError;
use crate::granted::standin::StandIn;
use crate::limits::RECONNECT_MS;
use copage_coherence::msg::Generation;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

pub(super) const PAGES: usize = 600;
pub(super) const BYTES: u64 = (PAGES * PAGE_SIZE) as u64;

/// How a fake shares.
#[derive(Clone, Copy, Debug)]
pub(super) enum By {
    Descriptors,
    /// As in a PVH guest.
    Grants,
    /// As in a PV guest.
    UnmovableGrants,
}

pub(super) const ALL: [By; 3] = [By::Descriptors, By::Grants, By::UnmovableGrants];

/// A fake with a term, and a client that looks so long for it.
pub(super) fn guest(by: By, ttl_ms: u32, reconnect_ms: u32) -> (Arc<Fake>, Client) {
    let fake = Fake::start_with(BYTES, ttl_ms);
    let client = match by {
        By::Descriptors => connect_for(&fake, reconnect_ms),
        By::Grants | By::UnmovableGrants => {
            let standin = StandIn::new(matches!(by, By::Grants));
            fake.state.lock().standin = Some(standin);
            connect_granted_for(&fake, reconnect_ms)
        }
    };
    (fake, client)
}

pub(super) fn away(client: &Client) {
    eventually("the loss to be noticed", || client.is_away());
}

/// Nothing came that was of another session, and nothing is left of the daemons before.
pub(super) fn clean(fake: &Fake) {
    assert_eq!(fake.state.lock().wrong, [""; 0]);
    if let Some(standin) = fake.state.lock().standin.clone() {
        assert_eq!(standin.lies.load(Ordering::SeqCst), 0);
        eventually("what the daemons before had granted", || {
            standin.left_over() == 0
        });
    }
}

/// The content that a page shows now; it must be whole, and the page's own.
fn shown(mapping: &Mapping, page: usize) -> u32 {
    let got = peek(mapping.as_volatile(), page);
    let content = (got >> 40) as u32;
    assert_eq!(got, word(content, page as u64), "page {page}");
    content
}

/// Lets the others go when this thread fails.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Readers of shared and private mappings, callers, and a daemon that dies again and again. Nobody sees
/// anything but a delay; a SIGBUS would end the whole test.
fn through_deaths(by: By, changed: bool) {
    const DEATHS: u64 = 8;
    let (fake, client) = guest(by, 60_000, RECONNECT_MS);
    let file = open(&client, OpenHow::Map);
    let mapping = file.map(&MapOptions::shared()).unwrap();
    let mine = file.map(&MapOptions::private()).unwrap();
    for page in 0..10 {
        store(&mine, page * PAGE_SIZE, 7);
    }
    let (stop, newest) = (AtomicBool::new(false), AtomicU32::new(1));
    let read = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let stops = Stops(&stop);
        for thread in 0..3usize {
            let (mapping, mine, stop, newest, read) = (&mapping, &mine, &stop, &newest, &read);
            scope.spawn(move || {
                let mapping = if thread == 0 { mine } else { mapping };
                let mut seen = [0; PAGES];
                let mut x = thread * 97;
                while !stop.load(Ordering::SeqCst) {
                    x = (x * 5 + 7) % 7919;
                    let page = 10 + x % (PAGES - 10);
                    let now = shown(mapping, page);
                    assert!(now >= seen[page], "page {page} went back");
                    assert!(now <= newest.load(Ordering::SeqCst), "page {page}: {now}");
                    seen[page] = now;
                    read.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let calls = scope.spawn(|| {
            let export = client.attach("all").unwrap();
            let node = export.root().lookup(b"f").unwrap();
            let mut at = 0;
            while !stop.load(Ordering::SeqCst) {
                at = (at + 37) % (PAGES - 20);
                let pages = at * PAGE_SIZE..(at + 20) * PAGE_SIZE;
                mapping.populate(pages.clone()).unwrap();
                mine.populate(pages).unwrap();
                let mut data = [0; PAGE_SIZE];
                let place = (at * PAGE_SIZE) as u64;
                assert_eq!(file.read_at(&mut data, place).unwrap(), PAGE_SIZE);
                assert_eq!(node.attr().unwrap().ino, 1);
                assert_eq!(export.root().lookup(b"f").unwrap().kind(), node.kind());
                let other = node.open(OpenHow::Map).unwrap();
                let also = other.map(&MapOptions::shared()).unwrap();
                shown(&also, at);
                drop(also);
                other.close().unwrap();
                assert!(client.exports().is_ok());
            }
        });
        for death in 1..=DEATHS {
            std::thread::sleep(Duration::from_millis(20 + death * 7 % 30));
            fake.go_down();
            away(&client);
            std::thread::sleep(Duration::from_millis(death * 11 % 40));
            // Before anybody can see it.
            let next = newest.load(Ordering::SeqCst) + u32::from(changed);
            newest.store(next, Ordering::SeqCst);
            assert_eq!(fake.come_back(changed), next);
            eventually("the return", || client.reconnects() == death);
            let before = read.load(Ordering::Relaxed);
            eventually("reading to go on", || {
                read.load(Ordering::Relaxed) > before + 100
            });
        }
        drop(stops);
        calls.join().unwrap();
    });
    let last = newest.load(Ordering::SeqCst);
    for page in 0..PAGES {
        assert_eq!(shown(&mapping, page), last);
        if page >= 10 {
            assert_eq!(shown(&mine, page), last);
        }
    }
    assert_eq!(mapping.generation(), Generation(1), "as this daemon counts");
    for page in 0..10 {
        let at = page * PAGE_SIZE;
        assert_eq!(mine.as_volatile().read_u8(at), Some(7), "what was stored");
    }
    assert_eq!(client.lost(), None);
    clean(&fake);
}

#[test]
fn local_readers_and_callers_go_on_through_deaths_of_the_daemon() {
    through_deaths(By::Descriptors, false);
}

#[test]
fn local_readers_and_callers_go_on_and_see_what_changed_meanwhile() {
    through_deaths(By::Descriptors, true);
}

#[test]
fn local_readers_of_granted_pages_go_on_through_deaths_of_the_daemon() {
    through_deaths(By::Grants, false);
    through_deaths(By::UnmovableGrants, false);
}

#[test]
fn local_readers_of_granted_pages_go_on_and_see_what_changed_meanwhile() {
    through_deaths(By::Grants, true);
    through_deaths(By::UnmovableGrants, true);
}

/// The numbers of two daemons are the same; their contents are not.
#[test]
fn local_the_same_generation_number_of_another_daemon_is_another_content() {
    for by in ALL {
        let (fake, client) = guest(by, 60_000, RECONNECT_MS);
        let file = open(&client, OpenHow::Map);
        let mapping = file.map(&MapOptions::shared()).unwrap();
        assert_eq!(shown(&mapping, 3), 1);
        let version = file.version();
        fake.go_down();
        away(&client);
        assert_eq!(fake.come_back(true), 2);
        eventually("the new content", || shown(&mapping, 3) == 2);
        assert_eq!(mapping.generation(), Generation(1));
        assert!(file.version() > version, "versions rise over daemons");
        let fresh = file.map(&MapOptions::shared()).unwrap();
        assert_eq!(shown(&fresh, 3), 2);
        // What the new daemon says of its own numbers is done.
        assert_eq!(fake.change(BYTES, false), 2);
        fake.tell(9);
        fake.wait("an ack", |s| s.seen.contains(&Seen::Ack(9)));
        assert_eq!(shown(&mapping, 3), 3);
        clean(&fake);
    }
}

#[test]
fn local_what_was_asked_when_the_daemon_died_is_asked_again() {
    for by in ALL {
        let (fake, client) = guest(by, 60_000, RECONNECT_MS);
        let file = open(&client, OpenHow::Map);
        let mapping = file.map(&MapOptions::shared()).unwrap();
        let read = open(&client, OpenHow::Read);
        fake.state.lock().stuck = true;
        std::thread::scope(|scope| {
            let fault = scope.spawn(|| shown(&mapping, 400));
            let call = scope.spawn(|| mapping.populate(500 * PAGE_SIZE..501 * PAGE_SIZE));
            let bytes = scope.spawn(|| read.read_at(&mut [0; 100], 5).unwrap());
            fake.wait("all three", |s| {
                let faults = |s: &&Seen| matches!(s, Seen::Fault { .. });
                s.seen.iter().filter(faults).count() >= 2 && s.seen.contains(&Seen::Read)
            });
            fake.go_down();
            away(&client);
            fake.come_back(true);
            assert_eq!(fault.join().unwrap(), 2);
            assert_eq!(call.join().unwrap(), Ok(()));
            assert_eq!(bytes.join().unwrap(), 100);
        });
        clean(&fake);
    }
}

#[test]
fn local_a_file_that_was_replaced_is_stale_and_the_others_go_on() {
    for by in ALL {
        for ino in [Some(2), None] {
            let (fake, client) = guest(by, 60_000, RECONNECT_MS);
            let root = client.attach("all").unwrap().root();
            let node = root.lookup(b"f").unwrap();
            let file = node.open(OpenHow::Map).unwrap();
            let mapping = file.map(&MapOptions::shared()).unwrap();
            let mine = file.map(&MapOptions::private()).unwrap();
            store(&mine, 0, 1);
            let other = root.lookup(b"g").unwrap().open(OpenHow::Map).unwrap();
            let kept = other.map(&MapOptions::shared()).unwrap();
            assert_eq!((shown(&mapping, 3), shown(&kept, 3)), (1, 1));
            fake.go_down();
            away(&client);
            fake.state.lock().ino = ino;
            fake.come_back(true);
            eventually("the other file", || shown(&kept, 3) == 2);
            eventually("the end of this one", || mapping.last_error().is_some());
            assert!(!granted::reachable(&mapping, 3) && !granted::reachable(&mine, 0));
            let stale = |error: MmapError| {
                assert_eq!(error.errno(), libc::ESTALE);
                assert_eq!(
                    error.to_string(),
                    "all/f is not the file any more that it was before the daemon was started again"
                );
            };
            stale(mapping.last_error().unwrap().error);
            stale(mapping.populate(0..1).unwrap_err());
            stale(file.read_at(&mut [0; 4], 0).unwrap_err());
            stale(file.map(&MapOptions::shared()).unwrap_err());
            stale(node.attr().unwrap_err());
            stale(node.open(OpenHow::Map).unwrap_err());
            if ino.is_some() {
                let anew = open(&client, OpenHow::Map);
                let fresh = anew.map(&MapOptions::shared()).unwrap();
                assert_eq!(shown(&fresh, 3), 2);
            }
            assert_eq!(client.lost(), None);
            clean(&fake);
        }
    }
}

#[test]
fn local_a_pinned_file_keeps_what_was_pinned() {
    let (fake, client) = guest(By::Descriptors, 60_000, RECONNECT_MS);
    let file = open(&client, OpenHow::Pin);
    let plain = std::fs::File::from(file.descriptor().unwrap());
    let native = crate::native::NativeMapping::new(&plain, false).unwrap();
    let (version, opened) = (file.version(), file.opened_version());
    assert!(!file.is_of_earlier_session());
    fake.go_down();
    away(&client);
    fake.come_back(true);
    eventually("the return", || client.reconnects() == 1);
    assert_eq!(page_word(native.as_volatile(), 3), word(1, 3));
    assert!(file.is_of_earlier_session() && file.pinned());
    assert_eq!((file.version(), file.opened_version()), (version, opened));
    assert!(file.descriptor().is_ok());
    // Messages read what there is now.
    let mut data = [0; 8];
    file.read_at(&mut data, 0).unwrap();
    assert_eq!(u64::from_le_bytes(data), word(2, 0));
    let again = open(&client, OpenHow::Pin);
    assert!(!again.is_of_earlier_session());
    clean(&fake);
}
