//! The control channel between two ends of this process and with another one. What it cannot show:
//! floods (the daemon's tests do).
#![allow(clippy::unwrap_used, clippy::panic)] // Tests.

use copage_grants::channel::{Channel, ChannelError, Listener};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Descriptors of this process that are of the file: other tests open and close theirs beside this one.
fn open_of(file: &Path) -> usize {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap();
    let links = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    links.filter(|link| link == file).count()
}

/// Sends several descriptors beside one message, as no honest end does.
fn send_raw(channel: &Channel, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let mut space = vec![std::mem::MaybeUninit::uninit(); 4096];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    rustix::net::sendmsg(
        channel,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
}

#[test]
fn local_messages_and_descriptors_arrive_and_nothing_else_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = Listener::bind(&path, 0o600).unwrap();
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    listener.set_nonblocking(true).unwrap();
    assert!(matches!(listener.accept(), Err(ChannelError::WouldBlock)));
    let guest = Channel::connect(&path).unwrap();
    let (daemon, peer) = listener.accept().unwrap();
    assert_eq!(
        (peer.pid, peer.uid),
        (std::process::id(), rustix::process::getuid().as_raw())
    );

    let mut buf = vec![0; 200_000];
    let long = vec![5; 128 * 1024 + 512];
    let beside = dir.path().join("file");
    std::fs::write(&beside, b"beside").unwrap();
    let file = File::open(&beside).unwrap();
    daemon.try_send(&long, Some(file.as_fd())).unwrap();
    let received = guest.recv(&mut buf).unwrap();
    assert_eq!(buf[..received.len], long);
    let mut text = String::new();
    let fd = received.fd.unwrap();
    let flags = rustix::io::fcntl_getfd(&fd).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    File::from(fd).read_to_string(&mut text).unwrap();
    assert_eq!(text, "beside");

    let before = open_of(&beside);
    assert_eq!(before, 1);
    let many = [file.as_fd(); 200];
    send_raw(&guest, b"unwanted", &many);
    assert_eq!(daemon.recv(&mut buf).unwrap().len, 8);
    assert_eq!(open_of(&beside), before, "a daemon takes no descriptors");
    send_raw(&daemon, b"too many", &many);
    let received = guest.recv(&mut buf).unwrap();
    assert!(received.fd.is_some());
    assert_eq!(open_of(&beside), before + 1, "one at most is kept");
    drop(received);

    guest.send(&long, None).unwrap();
    guest.send(b"next", None).unwrap();
    let short = daemon.recv(&mut buf[..100]);
    assert!(matches!(
        short,
        Err(ChannelError::Truncated { buffer_bytes: 100 })
    ));
    send_raw(&daemon, &long, &many[..1]);
    assert!(guest.recv(&mut buf[..100]).is_err());
    assert_eq!(
        open_of(&beside),
        before,
        "the descriptor beside a message that is lost is closed"
    );
    assert_eq!(daemon.recv(&mut buf).unwrap().len, 4);
    assert!(matches!(
        daemon.try_recv(&mut buf),
        Err(ChannelError::WouldBlock)
    ));
    assert!(matches!(
        guest.send(b"", None),
        Err(ChannelError::BadLength { bytes: 0 })
    ));
    let huge = vec![0; 16 << 20];
    assert!(matches!(
        guest.send(&huge, None),
        Err(ChannelError::BadLength { .. })
    ));

    // Somebody who does not read holds nobody up.
    let full = loop {
        if let Err(e) = daemon.try_send(&long, None) {
            break e;
        }
    };
    assert!(matches!(full, ChannelError::WouldBlock));
    daemon.shutdown();
    assert!(matches!(guest.send(b"x", None), Err(ChannelError::Closed)));
    drop(daemon);
    while let Ok(received) = guest.recv(&mut buf) {
        assert_eq!(received.len, long.len());
    }
    assert!(matches!(guest.recv(&mut buf), Err(ChannelError::Closed)));
}

#[test]
fn local_a_name_left_behind_is_taken_over_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let first = Listener::bind(&path, 0o666).unwrap();
    let second = Listener::bind(&path, 0o666);
    match second {
        Err(ChannelError::Sys { source, .. }) => {
            assert_eq!(source.raw_os_error(), Some(libc::EADDRINUSE));
        }
        other => panic!("{other:?}"),
    }
    drop(first);
    assert!(!path.exists(), "the name goes with the listener");
    // As a daemon that was killed leaves it.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let third = Listener::bind(&path, 0o666).unwrap();
    Channel::connect(&path).unwrap().send(b"x", None).unwrap();
    third.accept().unwrap();
    drop(third);
    // What is not a socket is not ours to remove.
    rustix::fs::open(&path, OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
    assert!(Listener::bind(&path, 0o666).is_err());
    assert!(path.exists());
    assert!(Listener::bind(&dir.path().join("x".repeat(200)), 0o666).is_err());
}
