//! What the daemon asks back: without force, as on Xen, the guest has to let go itself.

use crate::support::*;
use copage::serve::admin_types::{AdminReply, AdminRequest};
use copage_coherence::msg::*;
use copage_grants::PageIndex;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// A guest that has the first pages of `big` granted. The home's descriptor stands for a mapping:
/// while it is open the frames may be mapped.
fn holder(host: &Host) -> (Guest, FileToken, Generation, OwnedFd) {
    let mut guest = host.guest("holder");
    let root = guest.attach("data").unwrap();
    let (node, _) = guest.lookup(root, b"big").unwrap();
    let came = guest.call(&Request::Open {
        node,
        how: OpenHow::Map,
        write: false,
    });
    let Reply::Opened {
        file, generation, ..
    } = came.reply()
    else {
        panic!("{:?}", came.reply())
    };
    let range = PageRange {
        first: PageIndex(0),
        count: 64,
    };
    let fault = Request::Fault {
        file,
        generation,
        range,
        hint: FaultHint::Populate,
        access: copage_grants::Access::ReadOnly,
    };
    assert!(matches!(guest.call(&fault).reply(), Reply::Granted { .. }));
    (guest, file, generation, came.fd.unwrap())
}

/// Waits for a notice; replies before it are dropped.
fn notice(guest: &mut Guest) -> (Notice, Came) {
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < Duration::from_secs(10), "no notice came");
        let came = receive(&guest.channel).unwrap();
        if let Some(notice) = came.notice() {
            return (notice, came);
        }
    }
}

fn grants(host: &Host) -> u64 {
    let all = AdminRequest::Grants {
        guest: None,
        entries_max: None,
    };
    match host.admin(&all) {
        AdminReply::Grants(grants) => grants.total,
        other => panic!("{other:?}"),
    }
}

#[test]
fn local_without_force_pages_are_asked_back() {
    let host = Host::with(|c| c.force = false);
    let (mut guest, file, generation, _home) = holder(&host);
    let before = grants(&host);
    assert!(before >= 64);
    host.admin(&AdminRequest::Reclaim { pages: 256 });
    let mut asked = 0;
    while asked < before {
        let (
            Notice::Invalidate {
                recall,
                file: of,
                generation: g,
                range,
                reason,
                ..
            },
            _,
        ) = notice(&mut guest)
        else {
            panic!("another notice")
        };
        assert_eq!(
            (of, g, reason),
            (file, generation, InvalidateReason::Reclaim)
        );
        asked += u64::from(range.count);
        guest.post(&Request::Unmapped {
            file,
            generation,
            range,
        });
        guest.post(&Request::Ack { recall });
    }
    eventually("no grants after the acks", || grants(&host) == 0);
    assert_eq!(guest.call(&Request::Renew).errno(), 0);
    let AdminReply::Guests { guests } = host.admin(&AdminRequest::Guests) else {
        panic!()
    };
    assert_eq!(guests[0].recalls, 0);
    assert!(matches!(host.admin(&AdminRequest::Audit), AdminReply::Audit(a) if a.ok));
}

#[test]
fn local_without_force_a_missed_deadline_fences() {
    let host = Host::with(|c| {
        c.force = false;
        c.invalidate_deadline_ms = 300;
    });
    let (guest, _, _, home) = holder(&host);
    host.admin(&AdminRequest::Reclaim { pages: 256 });
    let start = Instant::now();
    // It renews all the while.
    let reason = loop {
        // After the fence the channel takes nothing; what came before it is still to be read.
        let mut wire = Vec::new();
        Request::Renew.encode(1000, guest.epoch, &mut wire).unwrap();
        let _ = guest.channel.send(&wire, None);
        let came = receive(&guest.channel).unwrap();
        if let Some(Notice::Fenced { reason }) = came.notice() {
            break reason;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "never fenced");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(reason, FenceReason::DeadlineMissed);
    assert!(start.elapsed() >= Duration::from_millis(290));
    // What it may still have mapped is in quarantine, and the domid is not given again.
    eventually("its frames count as quarantined", || {
        let reply = host.admin(&AdminRequest::Stats);
        matches!(reply, AdminReply::Stats(stats) if stats.frames_quarantined == stats.frames_used)
    });
    assert!(grants(&host) > 0);
    let again = host.guest("holder");
    assert_ne!(again.dom, guest.dom);
    assert!(matches!(host.admin(&AdminRequest::Audit), AdminReply::Audit(a) if a.ok));
    drop(home);
    eventually("the quarantine is over when nobody has the home", || {
        grants(&host) == 0
    });
}

#[test]
fn local_changed_files_are_rebased() {
    for force in [true, false] {
        let host = Host::with(|c| c.force = force);
        let (mut guest, file, generation, _home) = holder(&host);
        std::fs::write(host.data().join("big"), b"short now").unwrap();
        let (rebase, came) = loop {
            match notice(&mut guest) {
                (
                    Notice::Rebase {
                        recall,
                        file: of,
                        generation: new,
                        bytes,
                        ..
                    },
                    came,
                ) => {
                    assert_eq!(of, file);
                    assert!(new > generation);
                    // The truncation and the write may be two changes.
                    guest.post(&Request::Ack { recall });
                    if bytes == 9 {
                        break (new, came);
                    }
                }
                (
                    Notice::Invalidate {
                        recall,
                        range,
                        generation,
                        ..
                    },
                    _,
                ) => {
                    guest.post(&Request::Unmapped {
                        file,
                        generation,
                        range,
                    });
                    guest.post(&Request::Ack { recall });
                }
                (other, _) => panic!("{other:?}"),
            }
        };
        assert!(came.fd.is_some(), "the new home is beside the notice");
        let range = PageRange {
            first: PageIndex(0),
            count: 1,
        };
        let hint = FaultHint::Random;
        let stale = guest.call(&Request::Fault {
            file,
            generation,
            range,
            hint,
            access: copage_grants::Access::ReadOnly,
        });
        assert!(
            matches!(stale.reply(), Reply::Stale { bytes: 9, .. }),
            "{:?}",
            stale.reply()
        );
        assert!(stale.fd.is_some());
        let now = guest.call(&Request::Fault {
            file,
            generation: rebase,
            range,
            hint,
            access: copage_grants::Access::ReadOnly,
        });
        assert!(matches!(
            now.reply(),
            Reply::Granted { .. } | Reply::Stale { .. }
        ));
        assert!(matches!(host.admin(&AdminRequest::Audit), AdminReply::Audit(a) if a.ok));
    }
}

/// All that a fenced guest had open gets a new home. Who has the same files open, more than there is
/// room for notices, hears of all of them as it reads, and is not taken for one who does not read.
#[test]
fn local_many_new_homes_at_once_fence_nobody_else() {
    const FILES: usize = 1400;
    let host = Host::new();
    for n in 0..FILES {
        std::fs::write(host.data().join(format!("f{n}")), b"x").unwrap();
    }
    let open_all = |name: &str| {
        let mut guest = host.guest(name);
        let root = guest.attach("data").unwrap();
        for n in 0..FILES {
            let (node, _) = guest.lookup(root, format!("f{n}").as_bytes()).unwrap();
            let how = OpenHow::Map;
            let came = guest.call(&Request::Open {
                node,
                how,
                write: false,
            });
            assert!(matches!(came.reply(), Reply::Opened { .. }));
            guest.call(&Request::Renew);
        }
        guest
    };
    let mut honest = open_all("honest");
    let evil = open_all("evil");
    honest.call(&Request::Renew);
    evil.channel.send(b"garbage", None).unwrap();
    assert!(evil.end(Duration::from_secs(5)).is_some());
    std::thread::sleep(Duration::from_millis(300));
    let mut asked = std::collections::HashMap::new();
    while asked.len() < FILES {
        match notice(&mut honest) {
            (Notice::Rebase { recall, file, .. }, came) => {
                assert!(came.fd.is_some());
                asked.insert(file, recall);
            }
            (other, _) => panic!("{other:?} after {} files", asked.len()),
        }
    }
    for recall in asked.into_values() {
        honest.post(&Request::Ack { recall });
    }
    assert!(matches!(
        honest.call(&Request::Renew).reply(),
        Reply::Renewed { .. }
    ));
}
