//! Coherent exports, spoken by hand: sessions that end, are fenced or were another daemon's, pages that bounce, and what
//! the administrator is shown.

use crate::strict_guest::*;
use crate::support::*;
use copage::serve::admin_types::{AdminReply, AdminRequest};
use copage_coherence::msg::*;
use copage_grants::{Access, PageIndex};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

#[test]
fn local_coherent_anothers_ack_and_an_old_epoch_count_for_nothing() {
    let host = Host::with(coherent);
    let mut a = Co::open(&host, "a", "big", true);
    let mut b = Co::open(&host, "b", "big", true);
    let arena = a.arena();
    let fault = a.fault(1, 1, Access::ReadWrite);
    granted(&a.call(&fault));
    arena.write_all_at(&[1; 4096], PAGE).unwrap();
    let number = b.post_fault(1, Access::ReadWrite);
    // The writer is asked and does not answer; others answer for it, in every way.
    let recall = loop {
        let came = receive(&a.guest.channel).unwrap();
        if let Some(Notice::Invalidate { recall, .. }) = came.notice() {
            break recall;
        }
    };
    b.guest.post(&Request::Ack { recall });
    b.guest.post(&Request::Ack { recall: 1 << 63 });
    b.guest.post(&Request::Ack { recall: u64::MAX });
    let range = PageRange {
        first: PageIndex(1),
        count: u32::MAX,
    };
    let unmapped = Request::Unmapped {
        file: b.file,
        generation: b.generation,
        range,
    };
    b.guest.post(&unmapped);
    let epoch = std::mem::replace(&mut a.guest.epoch, copage_grants::Epoch(1));
    a.guest.post(&Request::Ack { recall });
    a.guest.epoch = epoch;
    for _ in 0..50 {
        assert!(b.take(number).is_none(), "granted while another has it");
        std::thread::sleep(Duration::from_millis(2));
    }
    // It stores on, and then lets go: all of it is there.
    arena.write_all_at(&[2; 4096], PAGE).unwrap();
    a.guest.post(&Request::Ack { recall });
    let came = wait_for(&mut [&mut b], number);
    assert_eq!(granted(&came).2, Access::ReadWrite);
    let arena_b = b.arena();
    assert_eq!(page_of(&arena_b, 1), vec![2; 4096]);
    host.stop();
}

#[test]
fn local_coherent_who_does_not_let_go_is_fenced_and_reads_nothing_more() {
    let host = Host::with(|config| {
        coherent(config);
        config.invalidate_deadline_ms = 300;
    });
    let mut a = Co::open(&host, "a", "big", true);
    let mut b = Co::open(&host, "b", "big", true);
    let arena = a.arena();
    let fault = a.fault(2, 1, Access::ReadWrite);
    granted(&a.call(&fault));
    arena.write_all_at(&[1; 4096], 2 * PAGE).unwrap();
    let number = b.post_fault(2, Access::ReadWrite);
    let reason = a.guest.end(Duration::from_secs(10));
    assert_eq!(reason, Some(FenceReason::DeadlineMissed));
    // The file has a new home, where what it had stored is; its old descriptors show nothing.
    let came = wait_for(&mut [&mut b], number);
    match came.reply() {
        Reply::Granted { .. } | Reply::Stale { .. } => {}
        other => panic!("{other:?}"),
    }
    arena.write_all_at(&[3; 4096], 2 * PAGE).unwrap();
    eventually("a new home", || {
        let came = b.call(&Request::Sync { file: b.file });
        assert!(matches!(came.reply(), Reply::Done), "{:?}", came.reply());
        b.read(2 * PAGE, 4096) == [1; 4096] && b.rebased
    });
    assert_eq!(page_of(&a.home, 2), vec![0; 4096]);
    host.stop();
}

#[test]
fn local_coherent_a_bounced_page_is_shared_by_its_writers() {
    let host = Host::with(|config| {
        coherent(config);
        config.share_bounced = Some(true);
    });
    let mut a = Co::open(&host, "a", "big", true);
    let mut b = Co::open(&host, "b", "big", true);
    let mut shared = None;
    for _ in 0..200 {
        let number = a.post_fault(4, Access::ReadWrite);
        let came = wait_for(&mut [&mut a, &mut b], number);
        let number = b.post_fault(4, Access::ReadWrite);
        let other = wait_for(&mut [&mut b, &mut a], number);
        if let (GrantedPlace::Common { serial }, GrantedPlace::Common { .. }) =
            (granted(&came).3, granted(&other).3)
        {
            shared = Some(serial);
            break;
        }
    }
    let serial = shared.expect("writers that bounce a page share it");
    let common = |co: &mut Co| {
        let came = co.call(&Request::Arena {
            file: co.file,
            common: true,
        });
        assert!(matches!(came.reply(), Reply::Arena { serial: s } if s == serial));
        File::from(came.fd.unwrap())
    };
    let (common_a, common_b) = (common(&mut a), common(&mut b));
    common_a.write_all_at(&[5; 4096], 4 * PAGE).unwrap();
    assert_eq!(page_of(&common_b, 4), vec![5; 4096]);
    let came = a.call(&Request::Sync { file: a.file });
    assert!(matches!(came.reply(), Reply::Done), "{:?}", came.reply());
    let disk = File::open(host.data().join("big")).unwrap();
    assert_eq!(page_of(&disk, 4), vec![5; 4096]);
    // A reader takes it from both.
    let mut c = Co::open(&host, "c", "big", false);
    let number = c.post_fault(4, Access::ReadOnly);
    let came = wait_for(&mut [&mut c, &mut a, &mut b], number);
    assert_eq!(granted(&came).3, GrantedPlace::Home);
    assert_eq!(page_of(&c.home, 4), vec![5; 4096]);
    host.stop();
}

/// Long enough for a read by a machine that has much else to do.
const TERM_MS: u32 = 2000;

#[test]
fn local_coherent_nobody_writes_before_the_earlier_sessions_are_over() {
    let mut config = None;
    let host = Host::with(|c| {
        coherent(c);
        c.lease_ttl_ms = TERM_MS;
        config = Some(c.clone());
    });
    let a = Co::open(&host, "a", "big", true);
    // It stops with a session: as far as the next daemon knows, that one goes on.
    let Host { daemon, dir } = host;
    daemon.unwrap().stop().unwrap();
    drop(a);
    let start = Instant::now();
    let daemon = copage::serve::Daemon::start(&config.unwrap()).unwrap();
    let host = Host {
        daemon: Some(daemon),
        dir,
    };
    let mut b = Co::open(&host, "b", "big", true);
    let fault = b.fault(0, 1, Access::ReadOnly);
    granted(&b.call(&fault));
    assert!(
        start.elapsed() < Duration::from_millis(TERM_MS.into()),
        "reading waits for nobody"
    );
    // So that its own lease goes on for longer than the others'.
    std::thread::sleep(Duration::from_millis(u64::from(TERM_MS) / 2));
    b.call(&Request::Renew);
    let fault = b.fault(0, 1, Access::ReadWrite);
    granted(&b.call(&fault));
    assert!(start.elapsed() >= Duration::from_millis(TERM_MS.into()));
    host.stop();
}

#[test]
fn local_coherent_leases_are_shown() {
    let host = Host::with(coherent);
    let mut a = Co::open(&host, "a", "big", true);
    let mut b = Co::open(&host, "b", "big", false);
    for (page, access) in [(0, Access::ReadOnly), (1, Access::ReadWrite)] {
        let fault = a.fault(page, 1, access);
        granted(&a.call(&fault));
    }
    b.post_fault(1, Access::ReadOnly);
    let leases = |path: &str| {
        let path = (!path.is_empty()).then(|| path.into());
        match host.admin(&AdminRequest::Leases {
            path,
            pages_max: None,
        }) {
            AdminReply::Leases(leases) => leases,
            other => panic!("{other:?}"),
        }
    };
    eventually("somebody waits", || {
        let found = leases("data/big");
        let page = found.pages.iter().find(|p| p.page == 1).unwrap();
        assert_eq!(page.state, "exclusive");
        assert!(page.dirty && page.holders[0].writable && page.holders[0].guest == "a");
        page.waiting == ["b:ro"] && page.holders[0].leaving
    });
    let AdminReply::Pages(pages) = host.admin(&AdminRequest::Pages {
        path: "data/big".into(),
    }) else {
        panic!()
    };
    let states = pages.runs.iter().map(|run| {
        let strict = run.strict.as_ref().unwrap();
        (run.first, run.count, &*strict.state, strict.writers.len())
    });
    assert_eq!(
        states.collect::<Vec<_>>(),
        [(0, 1, "shared", 0), (1, 1, "exclusive", 1)]
    );
    let all = leases("");
    assert_eq!((all.pages[0].page, &*all.pages[0].state), (0, "shared"));
    assert!(leases("data/hello").pages.is_empty());
    let AdminReply::Stats(stats) = host.admin(&AdminRequest::Stats) else {
        panic!()
    };
    assert_eq!(stats.strict.granted_write, 1);
    assert_eq!(stats.strict.recalls, 1);
    host.stop();
}
