//! Beginning, renewing, ending, and beginning again.

use crate::support::*;
use copage::config::{GuestConfig, Limits};
use copage::serve::admin_types::{AdminReply, AdminRequest};
use copage::serve::{Daemon, ServeError};
use copage_coherence::msg::*;
use copage_grants::Epoch;
use std::time::{Duration, Instant};

/// To be waited for; long enough for a guest of a loaded machine to say all it has to.
const SHORT_TERM_MS: u32 = 2000;

fn sessions(host: &Host) -> usize {
    match host.admin(&AdminRequest::Guests) {
        AdminReply::Guests { guests } => guests.len(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn local_a_session_begins_with_hello() {
    let host = Host::new();
    let mut a = host.guest("web");
    let mut b = host.guest("");
    assert_eq!(a.name, "web");
    assert_eq!(
        b.name,
        format!("uid-{}", rustix::process::geteuid().as_raw())
    );
    assert_ne!(a.dom, b.dom);
    assert!(b.epoch > a.epoch);
    assert_eq!(a.lease_ttl_ms, 5000);
    let came = a.call(&Request::Exports);
    assert_eq!(came.reply(), Reply::Exports { names: b"data\0" });
    assert_eq!(
        b.call(&Request::Renew).reply(),
        Reply::Renewed { lease_ttl_ms: 5000 }
    );
    // A second Hello is refused and changes nothing.
    let again = Request::Hello {
        version: PROTOCOL_VERSION,
        flags: HelloFlags::default(),
        name: b"db",
        uuid: [0; 16],
    };
    assert_eq!(a.call(&again).errno(), libc::EPROTO);
    assert_eq!(a.call(&Request::Renew).errno(), 0);
    host.stop();
}

#[test]
fn local_hello_is_the_first_thing_said() {
    let host = Host::new();
    let channel = host.dial();
    let mut wire = Vec::new();
    Request::Exports.encode(3, Epoch(0), &mut wire).unwrap();
    channel.send(&wire, None).unwrap();
    assert_eq!(receive(&channel).unwrap().errno(), libc::EPROTO);
    assert!(receive(&channel).is_err(), "the channel is closed");
}

#[test]
fn local_other_versions_are_told() {
    let host = Host::new();
    let channel = host.dial();
    let hello = Request::Hello {
        version: 9,
        flags: HelloFlags::default(),
        name: b"",
        uuid: [0; 16],
    };
    let mut wire = Vec::new();
    hello.encode(1, Epoch(0), &mut wire).unwrap();
    channel.send(&wire, None).unwrap();
    assert_eq!(receive(&channel).unwrap().errno(), libc::EPROTONOSUPPORT);
}

#[test]
fn local_userfaultfd_comes_when_asked_for() {
    let host = Host::new();
    let (_guest, came) = Guest::hello_wanting(host.dial(), "a", true).unwrap();
    let Reply::Welcome { flags, .. } = came.reply() else {
        panic!()
    };
    assert_eq!(flags.userfaultfd, came.fd.is_some());
    let there = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
        .is_ok();
    assert_eq!(came.fd.is_some(), there);
    let (_guest, came) = Guest::hello_wanting(host.dial(), "a", false).unwrap();
    assert!(came.fd.is_none());
}

#[test]
fn local_a_lease_that_is_not_renewed_ends() {
    let host = Host::with(|c| c.lease_ttl_ms = SHORT_TERM_MS);
    let mut kept = host.guest("kept");
    let silent = host.guest("silent");
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(u64::from(SHORT_TERM_MS) + 500) {
        assert_eq!(kept.call(&Request::Renew).errno(), 0);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(
        silent.end(Duration::from_secs(10)),
        Some(FenceReason::LeaseExpired)
    );
    assert_eq!(kept.call(&Request::Exports).errno(), 0);
    assert_eq!(sessions(&host), 1);
}

#[test]
fn local_old_epochs_count_for_nothing() {
    let host = Host::with(|c| c.lease_ttl_ms = SHORT_TERM_MS);
    let old = host.guest("a");
    let old_epoch = old.epoch;
    old.end(Duration::from_secs(10));
    let mut new = host.guest("a");
    assert!(new.epoch > old_epoch);
    let epoch = std::mem::replace(&mut new.epoch, old_epoch);
    assert_eq!(new.call(&Request::Renew).errno(), libc::ESTALE);
    assert_eq!(
        new.call(&Request::Attach { export: b"data" }).errno(),
        libc::ESTALE
    );
    // Without an answer, and without a word.
    new.post(&Request::Bye);
    new.epoch = epoch;
    assert_eq!(new.call(&Request::Exports).errno(), 0);
}

#[test]
fn local_bye_and_hang_up_end_sessions() {
    let host = Host::with(|c| c.lease_ttl_ms = SHORT_TERM_MS);
    let mut a = host.guest("a");
    a.post(&Request::Bye);
    assert!(receive(&a.channel).is_err());
    eventually("no session after Bye", || sessions(&host) == 0);
    // This process lives on after its channel closed: it is not taken for dead, its lease ends.
    let b = host.guest("b");
    drop(b);
    assert_eq!(sessions(&host), 1);
    eventually("no session after the lease", || sessions(&host) == 0);
    let AdminReply::Stats(stats) = host.admin(&AdminRequest::Stats) else {
        panic!()
    };
    assert_eq!(stats.counters["fenced_lease_expired"], 1);
    assert_eq!(stats.counters["sessions_ended"], 1);
}

/// A guest that asks, says Bye and closes its channel at once: the answers find nobody, and the Bye
/// behind the questions must be heard all the same.
#[test]
fn local_bye_behind_unanswered_questions_is_heard() {
    let host = Host::with(|c| c.lease_ttl_ms = 60_000);
    for round in 0..50 {
        let mut guest = host.guest("hasty");
        for _ in 0..round {
            guest.post(&Request::Exports);
        }
        guest.post(&Request::Bye);
    }
    eventually("no session after Bye", || sessions(&host) == 0);
}

#[test]
fn local_a_killed_guest_is_gone_at_once() {
    // A shell cannot speak the protocol, so this very test is started again as the guest.
    if let Some(socket) = std::env::var_os("COPAGE_TEST_GUEST") {
        let channel = copage_grants::channel::Channel::connect(socket.as_ref()).unwrap();
        let _guest = Guest::hello(channel, "child").unwrap();
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    // No lease ends before the test gives up.
    let host = Host::with(|c| c.lease_ttl_ms = 60_000);
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sessions::local_a_killed_guest_is_gone_at_once"])
        .env("COPAGE_TEST_GUEST", host.socket())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    eventually("the child's session", || sessions(&host) == 1);
    let AdminReply::Guests { guests } = host.admin(&AdminRequest::Guests) else {
        panic!()
    };
    assert_eq!(
        (guests[0].name.as_str(), guests[0].pid.unwrap()),
        ("child", child.id() as i32)
    );
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("no session after the kill", || sessions(&host) == 0);
}

#[test]
fn local_the_fenced_can_come_again() {
    let host = Host::new();
    let mut a = host.guest("a");
    let root = a.attach("data").unwrap();
    let fence = AdminRequest::Fence { guest: "a".into() };
    assert_eq!(host.admin(&fence), AdminReply::Fenced { sessions: 1 });
    assert_eq!(a.end(Duration::from_secs(2)), Some(FenceReason::Removed));
    let mut again = host.guest("a");
    assert_ne!(again.dom, a.dom);
    // What it was given before is nothing now.
    assert_eq!(
        again.call(&Request::Getattr { node: root }).errno(),
        libc::EBADF
    );
    assert!(again.attach("data").is_ok());
    assert!(matches!(
        host.admin(&AdminRequest::Fence {
            guest: "nobody".into()
        }),
        AdminReply::Error {
            errno: libc::ENOENT,
            ..
        }
    ));
}

#[test]
fn local_goodbye_to_all() {
    let host = Host::new();
    let a = host.guest("a");
    let run_dir = host.daemon.as_ref().unwrap().run_dir().to_owned();
    let Host { daemon, dir } = host;
    daemon.unwrap().stop().unwrap();
    assert_eq!(receive(&a.channel).unwrap().notice(), Some(Notice::Goodbye));
    assert!(receive(&a.channel).is_err());
    assert!(!run_dir.join("guest.sock").exists());
    assert!(!run_dir.join("admin.sock").exists());
    drop(dir);
}

#[test]
fn local_one_daemon_in_a_directory() {
    let host = Host::new();
    let config = copage::config::Config {
        run_dir: host.daemon.as_ref().unwrap().run_dir().to_owned(),
        ..Default::default()
    };
    let error = Daemon::start(&config).unwrap_err();
    assert!(matches!(error, ServeError::RunDir(_)), "{error}");
    assert!(error.to_string().contains("is running"), "{error}");
    // The first is none the worse for it.
    host.guest("a");
    let dir = host.dir.path().join("run");
    host.daemon.as_ref().map(|d| d.run_dir()).unwrap();
    let config = copage::config::Config {
        run_dir: dir.join("other"),
        ..Default::default()
    };
    Daemon::start(&config).unwrap().stop().unwrap();
}

#[test]
fn local_sockets_of_the_dead_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().join("run");
    std::fs::create_dir(&run_dir).unwrap();
    for name in ["guest.sock", "admin.sock"] {
        drop(std::os::unix::net::UnixListener::bind(run_dir.join(name)).unwrap());
        assert!(run_dir.join(name).exists());
    }
    let config = copage::config::Config {
        run_dir,
        ..Default::default()
    };
    let daemon = Daemon::start(&config).unwrap();
    assert!(
        Guest::hello(
            copage_grants::channel::Channel::connect(&daemon.guest_socket()).unwrap(),
            "a"
        )
        .is_ok()
    );
}

#[test]
fn local_an_idle_daemon_sleeps() {
    let host = Host::new();
    let _guest = host.guest("a");
    let rounds = |host: &Host| {
        let AdminReply::Stats(stats) = host.admin(&AdminRequest::Stats) else {
            panic!()
        };
        stats.counters["loop_rounds"]
    };
    rounds(&host);
    let before = rounds(&host);
    std::thread::sleep(Duration::from_millis(700));
    // Asking is what wakes it: the connection, its request, its answer and its end.
    assert!(
        rounds(&host) - before <= 6,
        "{} rounds",
        rounds(&host) - before
    );
}

#[test]
fn local_access_lists_and_limits_go_by_name() {
    let small = Limits {
        handles_max: 3,
        files_max: 1,
        ..Limits::default()
    };
    let host = Host::with(|c| {
        c.guests = vec![GuestConfig {
            name: "small".into(),
            uid: None,
            domain: None,
            uuid: None,
            limits: small,
        }];
        c.exports[0].allow = vec!["small".into(), "other".into()];
    });
    let mut stranger = host.guest("stranger");
    assert_eq!(
        stranger.call(&Request::Exports).reply(),
        Reply::Exports { names: b"" }
    );
    assert_eq!(stranger.attach("data"), Err(libc::EACCES));
    assert_eq!(stranger.attach("nothing"), Err(libc::ENOENT));
    let mut first = host.guest("small");
    let root = first.attach("data").unwrap();
    let (hello, _) = first.lookup(root, b"hello").unwrap();
    // Handles are counted over all sessions of the name.
    let mut second = host.guest("small");
    let root2 = second.attach("data").unwrap();
    assert_eq!(second.lookup(root2, b"big").unwrap_err(), libc::ENFILE);
    // One more reference to what it has is no new handle.
    assert!(second.lookup(root2, b"nothing").is_err());
    assert_eq!(second.attach("data"), Ok(root2));
    first.post(&Request::Forget {
        node: hello,
        count: 1,
    });
    assert_eq!(first.call(&Request::Renew).errno(), 0);
    assert!(second.lookup(root2, b"big").is_ok());
    // And are given back when a session ends.
    first.post(&Request::Bye);
    assert!(receive(&first.channel).is_err());
    eventually("the handles of the ended session are free", || {
        second.lookup(root2, b"hello").is_ok()
    });
}
