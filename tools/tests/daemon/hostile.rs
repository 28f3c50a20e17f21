//! Guests that lie, flood, stall, and talk nonsense.

use crate::support::*;
use copage::serve::admin_types::{AdminReply, AdminRequest};
use copage_coherence::msg::*;
use copage_grants::channel::ChannelError;
use copage_grants::{Epoch, PageIndex};
use std::time::{Duration, Instant};

/// The daemon still serves others, promptly.
fn still_serves(host: &Host) {
    let start = Instant::now();
    let mut guest = host.guest("witness");
    let root = guest.attach("data").unwrap();
    guest.lookup(root, b"hello").unwrap();
    guest.post(&Request::Bye);
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "others waited {:?}",
        start.elapsed()
    );
}

#[test]
fn local_forged_handles_name_nothing() {
    let host = Host::new();
    let mut a = host.guest("a");
    let mut b = host.guest("b");
    let root = a.attach("data").unwrap();
    let (hello, _) = a.lookup(root, b"hello").unwrap();
    b.attach("data").unwrap();
    let forged = [
        Handle {
            slot: hello.slot,
            tag: hello.tag,
            epoch: b.epoch.0,
        },
        Handle {
            slot: hello.slot,
            tag: hello.tag ^ 1,
            epoch: hello.epoch,
        },
        Handle {
            slot: hello.slot + 1,
            ..hello
        },
        Handle {
            slot: u32::MAX,
            ..hello
        },
        Handle {
            epoch: hello.epoch + 1,
            ..hello
        },
        Handle {
            slot: 0,
            tag: 0,
            epoch: 0,
        },
    ];
    for handle in forged {
        assert_eq!(
            a.call(&Request::Getattr { node: handle }).errno(),
            libc::EBADF,
            "{handle:?}"
        );
    }
    // Another session's handle, as it is.
    for request in [
        Request::Getattr { node: hello },
        Request::Readlink { node: hello },
        Request::Listxattr { node: hello },
        Request::Getxattr {
            node: hello,
            name: b"user.x",
        },
        Request::Statfs { node: hello },
        Request::Lookup {
            parent: hello,
            name: b"x",
        },
        Request::Readdir {
            node: hello,
            cookie: 0,
            bytes_max: 4096,
            handles: true,
        },
        Request::Open {
            node: hello,
            how: OpenHow::Read,
            write: false,
        },
    ] {
        assert_eq!(b.call(&request).errno(), libc::EBADF, "{request:?}");
    }
    // One that was given back, once its slot holds something else.
    a.post(&Request::Forget {
        node: hello,
        count: u64::MAX,
    });
    let (big, _) = a.lookup(root, b"big").unwrap();
    assert_eq!((big.slot, big.tag == hello.tag), (hello.slot, false));
    assert_eq!(
        a.call(&Request::Getattr { node: hello }).errno(),
        libc::EBADF
    );
}

#[test]
fn local_forged_files_name_nothing() {
    let host = Host::new();
    let mut a = host.guest("a");
    for token in [0, 1, 7, u64::MAX] {
        let file = FileToken(token);
        let range = PageRange {
            first: PageIndex(0),
            count: 1,
        };
        let generation = Generation(1);
        let fault = Request::Fault {
            file,
            generation,
            range,
            hint: FaultHint::Random,
            access: copage_grants::Access::ReadOnly,
        };
        assert_eq!(a.call(&fault).errno(), libc::EBADF);
        assert_eq!(
            a.call(&Request::Read {
                file,
                offset: 0,
                len: 1
            })
            .errno(),
            libc::EBADF
        );
        assert_eq!(a.call(&Request::Close { file }).errno(), libc::EBADF);
        a.post(&Request::Unmapped {
            file,
            generation,
            range,
        });
        a.post(&Request::Ack { recall: token });
    }
    assert_eq!(a.call(&Request::Renew).errno(), 0);
}

#[test]
fn local_names_lead_nowhere_else() {
    let host = Host::new();
    let mut a = host.guest("a");
    let root = a.attach("data").unwrap();
    let long = [b'x'; 300];
    let names: [(&[u8], i32); 7] = [
        (b"..", libc::EINVAL),
        (b".", libc::EINVAL),
        (b"", libc::EINVAL),
        (b"dir/inner", libc::EINVAL),
        (b"a\0b", libc::EINVAL),
        (&long, libc::ENAMETOOLONG),
        (b"\xff\xfe", libc::ENOENT),
    ];
    for (name, errno) in names {
        assert_eq!(a.lookup(root, name), Err(errno), "{name:?}");
    }
    let (link, attr) = a.lookup(root, b"link").unwrap();
    assert_eq!(attr.kind, FileKind::Symlink);
    assert_eq!(
        a.call(&Request::Readlink { node: link }).reply(),
        Reply::Bytes {
            data: b"/etc/passwd"
        }
    );
    assert_eq!(a.lookup(link, b"x"), Err(libc::ENOTDIR));
    assert_ne!(
        a.call(&Request::Open {
            node: link,
            how: OpenHow::Read,
            write: false,
        })
        .errno(),
        0
    );
    assert_eq!(a.attach("../data"), Err(libc::ENOENT));
}

#[test]
fn local_garbage_is_fenced() {
    let host = Host::new();
    for garbage in [&b"x"[..], b"cpg1", &[0; 32], &[0xff; 4096]] {
        let a = host.guest("a");
        a.channel.send(garbage, None).unwrap();
        assert_eq!(
            a.end(Duration::from_secs(2)),
            Some(FenceReason::Protocol),
            "{garbage:?}"
        );
        // Before Hello nobody is told anything.
        let silent = host.dial();
        silent.send(garbage, None).unwrap();
        assert!(receive(&silent).is_err());
    }
    // Longer than any message.
    let a = host.guest("a");
    a.channel
        .send(&vec![1; MESSAGE_BYTES_MAX + 100], None)
        .unwrap();
    assert_eq!(a.end(Duration::from_secs(2)), Some(FenceReason::Protocol));
    still_serves(&host);
}

#[test]
fn local_misunderstandings_are_answered_some_times() {
    let host = Host::new();
    let mut a = host.guest("a");
    let mut wire = Vec::new();
    let mut answered = 0;
    loop {
        a.number += 1;
        Request::Getattr {
            node: Handle {
                slot: 0,
                tag: 0,
                epoch: 0,
            },
        }
        .encode(a.number, a.epoch, &mut wire)
        .unwrap();
        // A kind that there is not.
        wire[6] = 0x77;
        if a.channel.send(&wire, None).is_err() {
            break;
        }
        match receive(&a.channel) {
            Ok(came) if came.notice().is_none() => {
                assert_eq!(came.errno(), libc::EPROTO);
                answered += 1;
            }
            _ => break,
        }
        assert!(answered < 100, "never fenced");
    }
    assert!(answered > 3);
    still_serves(&host);
}

#[test]
fn local_random_bytes_do_no_harm() {
    let host = Host::new();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..200 {
        let mut a = host.guest("fuzz");
        let root = a.attach("data").unwrap();
        let mut wire = Vec::new();
        for _ in 0..20 {
            // A good message with some bytes of it changed, past the magic.
            let request = Request::Lookup {
                parent: root,
                name: b"hello",
            };
            request.encode(random() | 1, a.epoch, &mut wire).unwrap();
            for _ in 0..random() % 3 {
                let at = 4 + random() as usize % (wire.len() - 4);
                wire[at] = random() as u8;
            }
            if a.channel.send(&wire, None).is_err() {
                break;
            }
        }
        a.post_if_open(&Request::Bye);
    }
    still_serves(&host);
}

impl Guest {
    fn post_if_open(&mut self, request: &Request<'_>) {
        let mut wire = Vec::new();
        request.encode(0, self.epoch, &mut wire).unwrap();
        let _ = self.channel.send(&wire, None);
    }
}

#[test]
fn local_a_guest_that_never_reads_is_fenced() {
    let host = Host::with(|c| c.lease_ttl_ms = 600);
    let mut a = host.guest("deaf");
    let root = a.attach("data").unwrap();
    a.channel.set_nonblocking(true).unwrap();
    let mut wire = Vec::new();
    let start = Instant::now();
    let mut sent = 0u64;
    // It asks, and renews, and never reads an answer.
    let ended = loop {
        let request = if sent.is_multiple_of(10) {
            Request::Renew
        } else {
            Request::Readdir {
                node: root,
                cookie: 0,
                bytes_max: 65536,
                handles: true,
            }
        };
        request.encode(sent + 2, a.epoch, &mut wire).unwrap();
        match a.channel.send(&wire, None) {
            Ok(()) => sent += 1,
            Err(ChannelError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
            Err(_) => break true,
        }
        if start.elapsed() > Duration::from_secs(30) {
            break false;
        }
    };
    assert!(
        ended,
        "{sent} messages went in and nothing was done about it"
    );
    still_serves(&host);
    let AdminReply::Stats(stats) = host.admin(&AdminRequest::Stats) else {
        panic!()
    };
    let counters = &stats.counters;
    assert_eq!(
        counters["fenced_lease_expired"] + counters["fenced_protocol"],
        1
    );
}

#[test]
fn local_floods_hold_nobody_up() {
    let host = Host::new();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for n in 0..4 {
            let mut flooder = host.guest(&format!("flood-{n}"));
            let stop = &stop;
            scope.spawn(move || {
                let root = flooder.attach("data").unwrap();
                flooder.channel.set_nonblocking(true).unwrap();
                let mut wire = Vec::new();
                let mut number = 10;
                let mut buf = vec![0; MESSAGE_BYTES_MAX];
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    number += 1;
                    let request = Request::Lookup {
                        parent: root,
                        name: b"nothing",
                    };
                    request.encode(number, flooder.epoch, &mut wire).unwrap();
                    let _ = flooder.channel.send(&wire, None);
                    let _ = flooder.channel.recv(&mut buf);
                }
            });
        }
        let mut guest = host.guest("quiet");
        let root = guest.attach("data").unwrap();
        let mut times = Vec::new();
        for _ in 0..100 {
            let start = Instant::now();
            guest.lookup(root, b"hello").unwrap();
            assert_eq!(guest.call(&Request::Renew).errno(), 0);
            times.push(start.elapsed());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        times.sort();
        println!(
            "beside four floods: median {:?}, slowest {:?}",
            times[50], times[99]
        );
        assert!(times[50] < Duration::from_millis(500), "{times:?}");
    });
}

#[test]
fn local_silent_connections_make_room() {
    let host = Host::new();
    let silent: Vec<_> = (0..300).map(|_| host.dial()).collect();
    still_serves(&host);
    // The oldest were closed for the newest.
    assert!(receive(&silent[0]).is_err());
    let mut wire = Vec::new();
    Request::Bye.encode(0, Epoch(0), &mut wire).unwrap();
    let alive = silent
        .iter()
        .filter(|c| c.send(&wire, None).is_ok())
        .count();
    assert!(alive <= 129, "{alive} connections without a session");
}

#[test]
fn local_sessions_of_one_name_have_a_bound() {
    let host = Host::new();
    let mut held = Vec::new();
    let refused = loop {
        match Guest::hello(host.dial(), "many") {
            Ok(guest) => held.push(guest),
            Err(errno) => break errno,
        }
        assert!(held.len() < 1000);
    };
    assert_eq!((refused, held.len()), (libc::EUSERS, 256));
    still_serves(&host);
    held.pop().unwrap().post_if_open(&Request::Bye);
    eventually("room for one more", || {
        Guest::hello(host.dial(), "many").is_ok()
    });
}

#[test]
fn local_too_much_at_once_is_refused_by_number() {
    let host = Host::new();
    let mut a = host.guest("a");
    let root = a.attach("data").unwrap();
    let (hello, _) = a.lookup(root, b"hello").unwrap();
    // More than may be in flight: all are answered, each once, none out of the session.
    let mut waiting: std::collections::BTreeSet<u64> = std::collections::BTreeSet::new();
    for _ in 0..200 {
        waiting.insert(a.post(&Request::Getattr { node: hello }));
    }
    while !waiting.is_empty() {
        let came = receive(&a.channel).unwrap();
        assert_eq!(came.errno(), 0);
        assert!(waiting.remove(&came.request()));
    }
}
