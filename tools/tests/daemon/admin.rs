//! The administrator's socket.

use crate::support::*;
use copage::serve::admin_types::{AdminReply, AdminRequest, ExportEntry};
use copage_coherence::msg::*;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

fn errno(reply: &AdminReply) -> i32 {
    match reply {
        AdminReply::Error { errno, .. } => *errno,
        _ => 0,
    }
}

#[test]
fn local_admin_lists_guests_and_exports() {
    let host = Host::new();
    let mut a = host.guest("web");
    a.attach("data").unwrap();
    let AdminReply::Guests { guests } = host.admin(&AdminRequest::Guests) else {
        panic!()
    };
    assert_eq!(guests.len(), 1);
    let guest = &guests[0];
    assert_eq!(
        (guest.name.as_str(), guest.dom, guest.epoch),
        ("web", a.dom, a.epoch.0)
    );
    assert_eq!((guest.handles, guest.files, guest.requests), (1, 0, 1));
    assert_eq!(guest.pid, Some(std::process::id() as i32));
    assert!(guest.lease_left_ms > 3000 && guest.lease_left_ms <= 5050);
    let AdminReply::Exports { exports } = host.admin(&AdminRequest::ExportList) else {
        panic!()
    };
    assert_eq!((exports.len(), exports[0].name.as_str()), (1, "data"));
    let mode = std::fs::metadata(host.daemon.as_ref().unwrap().admin_socket()).unwrap();
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);
}

#[test]
fn local_exports_come_and_go() {
    let host = Host::new();
    let more = host.dir.path().join("more");
    std::fs::create_dir(&more).unwrap();
    std::fs::write(more.join("file"), b"x").unwrap();
    let entry = |name: &str, path: &std::path::Path| ExportEntry {
        name: name.into(),
        path: path.into(),
        mode: "ro".into(),
        allow: vec!["*".into()],
        group: None,
        writeback_ms: None,
    };
    let add = |e: ExportEntry| host.admin(&AdminRequest::ExportAdd(e));
    assert_eq!(add(entry("more", &more)), AdminReply::Done);
    let mut a = host.guest("a");
    let root = a.attach("more").unwrap();
    assert!(a.lookup(root, b"file").is_ok());
    // Bad ones, each with its reason.
    assert_ne!(
        errno(&add(entry("more", &host.dir.path().join("run")))),
        0,
        "name taken"
    );
    assert_ne!(
        errno(&add(entry("inner", &host.data().join("dir")))),
        0,
        "overlap"
    );
    assert_ne!(
        errno(&add(entry("none", &host.dir.path().join("none")))),
        0,
        "missing"
    );
    assert_ne!(errno(&add(entry("file", &more.join("file")))), 0, "a file");
    let other = ExportEntry {
        mode: "rw".into(),
        ..entry("rw", &host.dir.path().join("run"))
    };
    assert_ne!(errno(&add(other)), 0, "mode");
    let remove = AdminRequest::ExportRemove {
        name: "more".into(),
    };
    assert_eq!(host.admin(&remove), AdminReply::Done);
    assert_eq!(errno(&host.admin(&remove)), libc::ENOENT);
    assert_eq!(a.lookup(root, b"file").unwrap_err(), libc::ESTALE);
    assert_eq!(a.attach("more"), Err(libc::ENOENT));
}

#[test]
fn local_admin_bad_lines_are_answered() {
    let host = Host::new();
    let stream = UnixStream::connect(host.daemon.as_ref().unwrap().admin_socket()).unwrap();
    let mut to = stream.try_clone().unwrap();
    let mut from = BufReader::new(stream);
    let mut ask = |line: &str| {
        to.write_all(line.as_bytes()).unwrap();
        to.write_all(b"\n").unwrap();
        let mut answer = String::new();
        from.read_line(&mut answer).unwrap();
        serde_json::from_str::<AdminReply>(&answer).unwrap()
    };
    for line in [
        "",
        "x",
        "{}",
        r#"{"cmd":"nothing"}"#,
        r#"{"cmd":"reclaim"}"#,
        r#"{"cmd":"fence","guest":1}"#,
    ] {
        assert_eq!(errno(&ask(line)), libc::EINVAL, "{line:?}");
    }
    assert!(matches!(
        ask(r#"{"cmd":"guests"}"#),
        AdminReply::Guests { .. }
    ));
    // Several at once are answered in order.
    to.write_all(b"{\"cmd\":\"audit\"}\n{\"cmd\":\"guests\"}\n{\"cmd\":\"stats\"}\n")
        .unwrap();
    let mut next = || {
        let mut answer = String::new();
        from.read_line(&mut answer).unwrap();
        serde_json::from_str::<AdminReply>(&answer).unwrap()
    };
    assert!(matches!(next(), AdminReply::Audit(audit) if audit.ok));
    assert!(matches!(next(), AdminReply::Guests { .. }));
    assert!(matches!(next(), AdminReply::Stats(_)));
}

#[test]
fn local_admin_long_lines_end() {
    let host = Host::new();
    let mut stream = UnixStream::connect(host.daemon.as_ref().unwrap().admin_socket()).unwrap();
    let chunk = vec![b'x'; 4096];
    let start = Instant::now();
    while stream.write_all(&chunk).is_ok() {
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "an endless line is read for ever"
        );
    }
    assert!(matches!(
        host.admin(&AdminRequest::Guests),
        AdminReply::Guests { .. }
    ));
}

#[test]
fn local_admin_stops_the_daemon() {
    let host = Host::new();
    let guest = host.guest("a");
    assert_eq!(host.admin(&AdminRequest::Stop), AdminReply::Done);
    assert_eq!(
        receive(&guest.channel).unwrap().notice(),
        Some(Notice::Goodbye)
    );
    host.stop();
}

#[test]
fn local_admin_shows_pages_and_grants() {
    let host = Host::new();
    let mut a = host.guest("web");
    let root = a.attach("data").unwrap();
    let (big, _) = a.lookup(root, b"big").unwrap();
    let came = a.call(&Request::Open {
        node: big,
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
        first: copage_grants::PageIndex(3),
        count: 2,
    };
    a.call(&Request::Fault {
        file,
        generation,
        range,
        hint: FaultHint::Populate,
        access: copage_grants::Access::ReadOnly,
    });
    let AdminReply::Pages(pages) = host.admin(&AdminRequest::Pages {
        path: "data/big".into(),
    }) else {
        panic!()
    };
    assert!(pages.cached && pages.resident_pages >= 2 && pages.grants >= 2);
    assert!(
        pages
            .runs
            .iter()
            .any(|r| r.holders == ["web"] && r.first <= 3)
    );
    let by_path = AdminRequest::Pages {
        path: host.data().join("big"),
    };
    assert!(matches!(host.admin(&by_path), AdminReply::Pages(p) if p.cached));
    let all = AdminRequest::Grants {
        guest: None,
        entries_max: Some(1),
    };
    let AdminReply::Grants(grants) = host.admin(&all) else {
        panic!()
    };
    assert_eq!((grants.total, grants.entries.len()), (pages.grants, 1));
    assert_eq!(grants.guests[0].guest, "web");
    let none = AdminRequest::Grants {
        guest: Some("nobody".into()),
        entries_max: None,
    };
    assert_eq!(errno(&host.admin(&none)), libc::ENOENT);
    assert!(matches!(host.admin(&AdminRequest::Audit), AdminReply::Audit(a) if a.ok));
    for path in ["data/none", "other/x", "data/../run", "/etc/passwd"] {
        let reply = host.admin(&AdminRequest::Pages { path: path.into() });
        assert_ne!(errno(&reply), 0, "{path}");
    }
    a.call(&Request::Close { file });
    let AdminReply::Grants(grants) = host.admin(&all) else {
        panic!()
    };
    assert_eq!(grants.total, 0);
}
