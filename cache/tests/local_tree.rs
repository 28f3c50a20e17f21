//! Names, attributes, listings and exports: what is refused, and that nothing leads out.
//!
//! Cannot show: file systems mounted below an export (that needs rights), races of renames.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::*;
use copage_cache::*;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

#[test]
fn local_names_that_could_lead_elsewhere_are_refused() {
    let rig = Rig::new(64);
    rig.write("f", b"x");
    std::os::unix::fs::symlink("/etc", rig.path("out")).unwrap();
    let root = rig.cache.root(rig.export).unwrap();
    for name in [&b""[..], b".", b"..", b"a/b", b"/etc", b"a\0b"] {
        assert!(
            matches!(rig.cache.lookup(&root, name), Err(CacheError::BadName(_))),
            "{name:?}"
        );
    }
    let long = vec![b'a'; 300];
    assert_eq!(
        rig.cache.lookup(&root, &long).unwrap_err().errno(),
        libc::ENAMETOOLONG
    );
    assert_eq!(
        rig.cache.lookup(&root, b"none").unwrap_err().errno(),
        libc::ENOENT
    );
    let (link, attr) = rig.cache.lookup(&root, b"out").unwrap();
    assert_eq!(attr.kind, Kind::Symlink);
    assert_eq!(rig.cache.readlink(&link).unwrap(), b"/etc");
    assert!(matches!(
        rig.cache.lookup(&link, b"passwd"),
        Err(CacheError::NotDirectory)
    ));
    assert!(matches!(
        rig.cache.readdir(&link, 0, 4096, false),
        Err(CacheError::NotDirectory)
    ));
    let (file, _) = rig.cache.lookup(&root, b"f").unwrap();
    assert!(matches!(
        rig.cache.lookup(&file, b"x"),
        Err(CacheError::NotDirectory)
    ));
    let strange = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    std::fs::write(rig.dir.path().join(strange), b"y").unwrap();
    assert_eq!(rig.cache.lookup(&root, b"\xff\xfe").unwrap().1.bytes, 1);
}

#[test]
fn local_special_files_are_shown_and_not_opened() {
    let mut rig = Rig::new(64);
    std::fs::create_dir(rig.path("d")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(rig.path("s")).unwrap();
    assert!(matches!(
        rig.open("d", OpenHow::Map, who(1)),
        Err(CacheError::IsDirectory)
    ));
    assert!(matches!(
        rig.open("s", OpenHow::Map, who(1)),
        Err(CacheError::NotRegular)
    ));
    let node = rig.node("s");
    assert_eq!(rig.cache.attr(&node).unwrap().kind, Kind::Other);
}

#[test]
fn local_listings_go_on_where_they_ended() {
    let rig = Rig::new(64);
    for n in 0..500 {
        rig.write(&format!("file-{n}"), b"");
    }
    let root = rig.cache.root(rig.export).unwrap();
    let (mut cookie, mut names, mut batches) = (0, Vec::new(), 0);
    loop {
        let dir = rig
            .cache
            .readdir(&root, cookie, 4096, batches % 2 == 1)
            .unwrap();
        for item in dir.items {
            cookie = item.cookie;
            if batches % 2 == 1 && !item.name.starts_with(b".") {
                assert_eq!(item.node.unwrap().1.ino, item.ino);
            }
            names.push(item.name);
        }
        batches += 1;
        if dir.end {
            break;
        }
    }
    assert!(batches > 3);
    assert_eq!(names.len(), 502);
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 502, "every entry once");
}

#[test]
fn local_exports_must_be_real_and_apart() {
    let rig = Rig::new(64);
    std::fs::create_dir(rig.path("sub")).unwrap();
    rig.write("f", b"");
    let why = |name: &str, path: PathBuf| {
        rig.cache
            .add_export(spec(name, path))
            .unwrap_err()
            .to_string()
    };
    assert!(why("a", rig.path("sub")).contains("overlaps export e"));
    assert!(why("a", rig.dir.path().parent().unwrap().into()).contains("overlaps"));
    assert!(why("a", rig.path("none")).contains("No such file"));
    assert!(why("a", "relative".into()).contains("absolute"));
    let other = tempfile::tempdir().unwrap();
    std::fs::write(other.path().join("f"), b"").unwrap();
    assert!(why("a", other.path().join("f")).contains("not a directory"));
    assert!(why("e", other.path().into()).contains("already"));
    assert!(why("a/b", other.path().into()).contains("no '/'"));
    let id = rig
        .cache
        .add_export(spec("b", other.path().into()))
        .unwrap();
    assert_eq!(rig.cache.exports().len(), 2);
    rig.cache.remove_export(id).unwrap();
    assert!(matches!(rig.cache.root(id), Err(CacheError::NoSuchExport)));
}

#[test]
fn local_attributes_are_shown_to_read() {
    let rig = Rig::new(64);
    rig.write("f", b"x");
    let node = rig.node("f");
    let set = rustix::fs::setxattr(
        rig.path("f"),
        c"user.k",
        b"value",
        rustix::fs::XattrFlags::empty(),
    );
    if set.is_err() {
        println!("skipped: no extended attributes here");
        return;
    }
    assert_eq!(rig.cache.getxattr(&node, b"user.k").unwrap(), b"value");
    assert!(rig.cache.listxattr(&node).unwrap().starts_with(b"user.k\0"));
    assert_eq!(
        rig.cache.getxattr(&node, b"user.none").unwrap_err().errno(),
        libc::ENODATA
    );
    assert_eq!(
        rig.cache.getxattr(&node, b"trusted.k").unwrap_err().errno(),
        libc::ENODATA
    );
}
