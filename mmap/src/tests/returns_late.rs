//! While the daemon is away: what is shown and for how long, what waits, and what ends the waiting.

use super::fake::{Seen, word};
use super::granted::reachable;
use super::returns::{ALL, By, away, clean, guest};
use super::*;
use crate::limits::RECONNECT_MS;
use crate::{LostWhy, MmapError};
use copage_coherence::msg::{FenceReason, Notice};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Long enough for a loaded machine to renew it.
const TERM_MS: u32 = 1000;

/// Touches a page in a thread; whether that is done within 200 ms, and then `then`, after which it must be.
fn touch_waits(mapping: &Mapping, page: usize, then: impl FnOnce()) -> (bool, u64) {
    std::thread::scope(|scope| {
        let touch = scope.spawn(|| page_word(mapping.as_volatile(), page));
        std::thread::sleep(Duration::from_millis(200));
        let waited = !touch.is_finished();
        then();
        (waited, touch.join().unwrap())
    })
}

#[test]
fn local_what_is_mapped_is_read_until_the_lease_is_over_and_then_waited_for() {
    for by in ALL {
        let (fake, client) = guest(by, TERM_MS, RECONNECT_MS);
        let file = open(&client, OpenHow::Map);
        let mapping = file.map(&MapOptions::shared()).unwrap();
        let mine = file.map(&MapOptions::private()).unwrap();
        mapping.populate(0..20 * PAGE_SIZE).unwrap();
        mine.populate(0..20 * PAGE_SIZE).unwrap();
        store(&mine, 0, 1);
        let begin = Instant::now();
        fake.go_down();
        away(&client);
        // With the page, or too late by this machine's fault.
        let word_now = page_word(mapping.as_volatile(), 3);
        let quick = begin.elapsed() < Duration::from_millis(u64::from(TERM_MS) / 2);
        assert!(word_now == word(1, 3) && quick, "not seen on this machine");
        std::thread::sleep(Duration::from_millis(u64::from(TERM_MS) + 200));
        // What was stored is one's own.
        assert_eq!(mine.as_volatile().read_u8(0), Some(1));
        assert_eq!(
            touch_waits(&mine, 3, || {
                let seen = touch_waits(&mapping, 3, || {
                    fake.come_back(true);
                });
                assert_eq!(seen, (true, word(2, 3)), "{by:?}");
            }),
            (true, word(2, 3)),
            "{by:?}"
        );
        assert_eq!(mine.as_volatile().read_u8(0), Some(1));
        assert_eq!(client.reconnects(), 1);
        clean(&fake);
    }
}

#[test]
fn local_while_the_lease_runs_what_is_mapped_is_there_and_the_rest_waits() {
    for by in ALL {
        let (fake, client) = guest(by, 60_000, RECONNECT_MS);
        let mapping = map(&client, &MapOptions::shared());
        mapping.populate(0..20 * PAGE_SIZE).unwrap();
        fake.go_down();
        away(&client);
        let seen = touch_waits(&mapping, 400, || {
            assert_eq!(page_word(mapping.as_volatile(), 3), word(1, 3));
            fake.come_back(false);
        });
        assert_eq!(seen, (true, word(1, 400)));
        clean(&fake);
    }
}

#[test]
fn local_a_daemon_that_stops_takes_everything_back_at_once() {
    for by in ALL {
        let (fake, client) = guest(by, 60_000, RECONNECT_MS);
        let mapping = map(&client, &MapOptions::shared());
        assert_eq!(page_word(mapping.as_volatile(), 3), word(1, 3));
        fake.state.lock().down = true;
        fake.notify(&Notice::Goodbye, None);
        fake.die();
        away(&client);
        if let Some(standin) = fake.state.lock().standin.clone() {
            eventually("all to be unmapped", || standin.mapped() == 0);
        }
        std::thread::sleep(Duration::from_millis(50));
        let seen = touch_waits(&mapping, 3, || {
            fake.come_back(true);
        });
        assert_eq!(seen, (true, word(2, 3)), "{by:?}");
        clean(&fake);
    }
}

#[test]
fn local_mapping_and_opening_wait_for_the_daemon() {
    let (fake, client) = guest(By::Descriptors, 60_000, RECONNECT_MS);
    let file = open(&client, OpenHow::Map);
    // With a word, so that what a new mapping would show is taken back at once.
    fake.state.lock().down = true;
    fake.notify(&Notice::Goodbye, None);
    fake.die();
    away(&client);
    std::thread::sleep(Duration::from_millis(100));
    std::thread::scope(|scope| {
        let maps = scope.spawn(|| {
            let mapping = file.map(&MapOptions::shared()).unwrap();
            page_word(mapping.as_volatile(), 3)
        });
        let opens = scope.spawn(|| {
            let mapping = map(&client, &MapOptions::private());
            page_word(mapping.as_volatile(), 3)
        });
        std::thread::sleep(Duration::from_millis(100));
        assert!(!maps.is_finished() && !opens.is_finished());
        fake.come_back(true);
        assert_eq!(
            (maps.join().unwrap(), opens.join().unwrap()),
            (word(2, 3), word(2, 3))
        );
    });
    clean(&fake);
}

#[test]
fn local_no_daemon_in_time_is_the_end() {
    for by in ALL {
        let (fake, client) = guest(by, 60_000, 500);
        let file = open(&client, OpenHow::Map);
        let mapping = file.map(&MapOptions::shared()).unwrap();
        let mine = file.map(&MapOptions::private()).unwrap();
        mapping.populate(0..20 * PAGE_SIZE).unwrap();
        store(&mine, 0, 1);
        let (sender, told) = crossbeam_channel::unbounded();
        client.on_lost(move |why| sender.send(why.clone()).unwrap());
        let begin = Instant::now();
        fake.go_down();
        away(&client);
        std::thread::scope(|scope| {
            let fault = scope.spawn(|| reachable(&mapping, 400));
            let call = scope.spawn(|| client.exports());
            assert!(!fault.join().unwrap(), "a fault was answered by nobody");
            let lost = MmapError::Lost(LostWhy::HungUp);
            assert_eq!(call.join().unwrap(), Err(lost));
        });
        assert!(begin.elapsed() >= Duration::from_millis(500), "too early");
        let why = told.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(
            (why, client.lost()),
            (LostWhy::HungUp, Some(LostWhy::HungUp))
        );
        assert!(!reachable(&mapping, 3) && !reachable(&mine, 0) && !reachable(&mine, 100));
        assert!(matches!(
            mapping.last_error().unwrap().error,
            MmapError::Lost(_)
        ));
        assert!(matches!(mapping.populate(0..1), Err(MmapError::Lost(_))));
        assert_eq!(client.reconnects(), 0);
        // Too late.
        fake.come_back(false);
        std::thread::sleep(Duration::from_millis(100));
        assert!(client.lost().is_some() && !client.is_away());
        clean(&fake);
    }
}

#[test]
fn local_closing_while_the_daemon_is_away_ends_at_once() {
    for by in ALL {
        let (fake, client) = guest(by, 60_000, RECONNECT_MS);
        let file = open(&client, OpenHow::Map);
        let mapping = file.map(&MapOptions::shared()).unwrap();
        mapping.populate(0..20 * PAGE_SIZE).unwrap();
        client.on_lost(|why| panic!("called: {why}"));
        fake.go_down();
        away(&client);
        std::thread::scope(|scope| {
            let fault = scope.spawn(|| reachable(&mapping, 400));
            let call = scope.spawn(|| file.read_at(&mut [0; 4], 0));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!fault.is_finished() && !call.is_finished());
            let begin = Instant::now();
            client.close();
            assert!(!fault.join().unwrap());
            let closed = MmapError::Lost(LostWhy::Closed);
            assert_eq!(call.join().unwrap(), Err(closed));
            let given_up = Duration::from_millis(RECONNECT_MS.into());
            assert!(begin.elapsed() < given_up, "it hung");
        });
        eventually("refused", || !reachable(&mapping, 3));
        drop(mapping);
        // The library's threads may have it in hand a moment longer.
        eventually("nobody else to have it", || file.is_last());
        assert_eq!(file.close().unwrap_err(), MmapError::Lost(LostWhy::Closed));
        drop(client);
        // Nobody comes any more.
        fake.state.lock().seen.clear();
        fake.come_back(false);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(fake.state.lock().seen, []);
    }
}

#[test]
fn local_dropping_everything_while_the_daemon_is_away_ends_it() {
    let (fake, client) = guest(By::Descriptors, 60_000, RECONNECT_MS);
    let mapping = map(&client, &MapOptions::shared());
    let shared = std::sync::Arc::downgrade(client.shared());
    fake.go_down();
    away(&client);
    drop((mapping, client));
    eventually("its threads to end", || shared.strong_count() == 0);
}

#[test]
fn local_a_fence_is_the_end_at_once_with_a_daemon_that_came_back_too() {
    let (fake, client) = guest(By::Descriptors, 60_000, RECONNECT_MS);
    let mapping = map(&client, &MapOptions::shared());
    fake.go_down();
    away(&client);
    fake.come_back(false);
    eventually("the return", || client.reconnects() == 1);
    let reason = FenceReason::Removed;
    fake.notify(&Notice::Fenced { reason }, None);
    eventually("the end", || client.lost() == Some(LostWhy::Fenced(reason)));
    eventually("refused", || !reachable(&mapping, 3));
    clean(&fake);
}

#[test]
fn local_a_daemon_whose_epoch_went_back_is_not_gone_on_with() {
    let (fake, client) = guest(By::Descriptors, 60_000, 800);
    fake.go_down();
    away(&client);
    fake.state.lock().epoch = 5;
    fake.come_back(false);
    eventually("the end", || client.lost() == Some(LostWhy::HungUp));
    assert_eq!(client.reconnects(), 0);
}

/// The channel breaks again while files are opened again, at each of the messages of that.
#[test]
fn local_a_daemon_that_dies_while_files_are_opened_again() {
    // With pauses in between, which grow: fewer of them where less is to be seen.
    for (by, deaths) in [(By::Descriptors, 1..8), (By::Grants, 5..7)] {
        let (fake, client) = guest(by, 60_000, RECONNECT_MS);
        let file = open(&client, OpenHow::Map);
        let mapping = file.map(&MapOptions::shared()).unwrap();
        let other = open(&client, OpenHow::Map);
        let second = other.map(&MapOptions::private()).unwrap();
        store(&second, 0, 1);
        assert_eq!(page_word(mapping.as_volatile(), 3), word(1, 3));
        fake.go_down();
        away(&client);
        for messages in deaths {
            fake.state.lock().dies_after = Some(messages);
            fake.come_back(true);
            fake.wait("its death", |s| s.down);
            away(&client);
            assert_eq!(second.as_volatile().read_u8(0), Some(1));
        }
        let last = fake.come_back(true);
        eventually("the last content", || {
            page_word(mapping.as_volatile(), 3) == word(last, 3)
        });
        assert_eq!(page_word(second.as_volatile(), 3), word(last, 3));
        assert_eq!(second.as_volatile().read_u8(0), Some(1));
        assert_eq!(client.reconnects(), 1);
        clean(&fake);
    }
}

/// References that the daemon before gave, and that the one that is there has used again. (A real daemon
/// lets them rest for as long as the lease can run; here it is only the library that keeps them apart.)
#[test]
fn local_what_the_daemon_before_granted_is_not_shown_any_more() {
    let (fake, client) = guest(By::UnmovableGrants, 60_000, RECONNECT_MS);
    let standin = fake.state.lock().standin.clone().unwrap();
    let mapping = map(&client, &MapOptions::shared());
    standin.hold(true);
    std::thread::scope(|scope| {
        let touch = scope.spawn(|| page_word(mapping.as_volatile(), 400));
        eventually("a batch on its way", || standin.batches() == 1);
        fake.go_down();
        away(&client);
        fake.come_back(true);
        let again = standin.grant(1, 2, 0, 16);
        eventually("the return", || client.reconnects() == 1);
        standin.hold(false);
        assert_eq!(touch.join().unwrap(), word(2, 400));
        assert!(!again.is_empty());
    });
    // The new batch; the old one nowhere where anybody sees it.
    assert_eq!(standin.overlays.load(Ordering::SeqCst), 1);
    standin.revoke(1, 0, 16);
    clean(&fake);
}

#[test]
fn local_handles_are_given_back_to_the_daemon_that_gave_them() {
    let (fake, client) = guest(By::Descriptors, 60_000, RECONNECT_MS);
    let root = client.attach("all").unwrap().root();
    let (used, unused) = (root.lookup(b"f").unwrap(), root.lookup(b"f").unwrap());
    let read = used.open(OpenHow::Read).unwrap();
    fake.go_down();
    away(&client);
    fake.come_back(false);
    eventually("the return", || client.reconnects() == 1);
    used.attr().unwrap();
    let count = |what: Seen| {
        fake.state
            .lock()
            .seen
            .iter()
            .filter(|s| **s == what)
            .count()
    };
    fake.state.lock().seen.clear();
    drop(unused);
    // Not open with this daemon.
    drop(read);
    drop(used);
    eventually("one to be given back", || count(Seen::Forget) == 1);
    client.exports().unwrap();
    assert_eq!((count(Seen::Forget), count(Seen::Close)), (1, 0));
    clean(&fake);
}
