//! A daemon on a directory of its own, and a guest that says what it is told to.

use copage::config::{Config, ExportConfig};
use copage::serve::admin_types::{AdminReply, AdminRequest};
use copage::serve::{Daemon, DaemonHandle};
use copage_coherence::msg::*;
use copage_grants::Epoch;
use copage_grants::channel::{Channel, ChannelError};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A daemon over one export `data`, which holds `hello` (13 bytes), `big` (1 MiB of a pattern),
/// `dir/inner` and a symbolic link `link`.
pub struct Host {
    pub daemon: Option<DaemonHandle>,
    pub dir: tempfile::TempDir,
}

pub const HELLO: &[u8] = b"hello, guest\n";
pub const BIG_BYTES: usize = 1 << 20;

/// The byte of `big` at an offset.
pub fn pattern(offset: usize) -> u8 {
    (offset / 4096 * 31 + offset % 251) as u8
}

impl Host {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        std::fs::create_dir_all(data.join("dir")).unwrap();
        std::fs::write(data.join("hello"), HELLO).unwrap();
        let big: Vec<u8> = (0..BIG_BYTES).map(pattern).collect();
        std::fs::write(data.join("big"), big).unwrap();
        std::fs::write(data.join("dir/inner"), b"inner").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", data.join("link")).unwrap();
        let mut config = Config {
            run_dir: dir.path().join("run"),
            frames_mib: 16,
            exports: vec![ExportConfig::new("data", &data)],
            ..Config::default()
        };
        change(&mut config);
        let daemon = Daemon::start(&config).unwrap();
        Self {
            daemon: Some(daemon),
            dir,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.daemon.as_ref().unwrap().guest_socket()
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A connection that has said nothing.
    pub fn dial(&self) -> Channel {
        Channel::connect(&self.socket()).unwrap()
    }

    pub fn guest(&self, name: &str) -> Guest {
        Guest::hello(self.dial(), name).unwrap()
    }

    pub fn admin(&self, request: &AdminRequest) -> AdminReply {
        let mut stream = UnixStream::connect(self.daemon.as_ref().unwrap().admin_socket()).unwrap();
        let mut line = serde_json::to_vec(request).unwrap();
        line.push(b'\n');
        stream.write_all(&line).unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    pub fn stop(mut self) {
        self.daemon.take().unwrap().stop().unwrap();
    }
}

/// What came: owned, so that it can be kept.
#[derive(Debug)]
pub struct Came {
    pub bytes: Vec<u8>,
    pub fd: Option<OwnedFd>,
}

impl Came {
    pub fn reply(&self) -> Reply<'_> {
        Reply::decode(&decode_header(&self.bytes).unwrap()).unwrap()
    }

    pub fn notice(&self) -> Option<Notice> {
        Notice::decode(&decode_header(&self.bytes).unwrap()).ok()
    }

    pub fn request(&self) -> u64 {
        decode_header(&self.bytes).unwrap().request
    }

    /// The errno of an Error reply, 0 for any other.
    pub fn errno(&self) -> i32 {
        match self.reply() {
            Reply::Error { errno, .. } => errno,
            _ => 0,
        }
    }
}

/// One session, spoken by hand.
pub struct Guest {
    pub channel: Channel,
    pub epoch: Epoch,
    pub dom: u16,
    pub name: String,
    pub lease_ttl_ms: u32,
    pub number: u64,
}

pub fn receive(channel: &Channel) -> Result<Came, ChannelError> {
    let mut buf = vec![0; MESSAGE_BYTES_MAX];
    let got = channel.recv(&mut buf)?;
    buf.truncate(got.len);
    Ok(Came {
        bytes: buf,
        fd: got.fd,
    })
}

impl Guest {
    /// Says Hello; the errno when refused.
    pub fn hello(channel: Channel, name: &str) -> Result<Self, i32> {
        Self::hello_wanting(channel, name, false).map(|(guest, _)| guest)
    }

    pub fn hello_wanting(
        channel: Channel,
        name: &str,
        wants_userfaultfd: bool,
    ) -> Result<(Self, Came), i32> {
        let mut wire = Vec::new();
        let hello = Request::Hello {
            version: PROTOCOL_VERSION,
            flags: HelloFlags { wants_userfaultfd },
            name: name.as_bytes(),
            uuid: [0; 16],
        };
        hello.encode(1, Epoch(0), &mut wire).unwrap();
        channel.send(&wire, None).unwrap();
        let came = receive(&channel).unwrap();
        let (epoch, dom, name, lease_ttl_ms) = match came.reply() {
            Reply::Welcome {
                epoch,
                dom,
                name,
                lease_ttl_ms,
                ..
            } => (
                epoch,
                dom.0,
                String::from_utf8(name.to_vec()).unwrap(),
                lease_ttl_ms,
            ),
            Reply::Error { errno, .. } => return Err(errno),
            other => panic!("{other:?}"),
        };
        Ok((
            Self {
                channel,
                epoch,
                dom,
                name,
                lease_ttl_ms,
                number: 1,
            },
            came,
        ))
    }

    /// Sends a request and returns its number.
    pub fn post(&mut self, request: &Request<'_>) -> u64 {
        self.number += 1;
        let mut wire = Vec::new();
        request.encode(self.number, self.epoch, &mut wire).unwrap();
        self.channel.send(&wire, None).unwrap();
        self.number
    }

    /// Sends a request and waits for its reply; notices before it are dropped.
    pub fn call(&mut self, request: &Request<'_>) -> Came {
        let number = self.post(request);
        loop {
            let came = receive(&self.channel).unwrap();
            if came.request() == number {
                return came;
            }
        }
    }

    pub fn attach(&mut self, export: &str) -> Result<Handle, i32> {
        let came = self.call(&Request::Attach {
            export: export.as_bytes(),
        });
        match came.reply() {
            Reply::Attached { root, attr, .. } if attr.kind == FileKind::Directory => Ok(root),
            Reply::Error { errno, .. } => Err(errno),
            other => panic!("{other:?}"),
        }
    }

    pub fn lookup(&mut self, parent: Handle, name: &[u8]) -> Result<(Handle, Attr), i32> {
        let came = self.call(&Request::Lookup { parent, name });
        match came.reply() {
            Reply::Entry { node, attr } => Ok((node, attr)),
            Reply::Error { errno, .. } => Err(errno),
            other => panic!("{other:?}"),
        }
    }

    /// Waits until the daemon ends the session, and says how: a reason, or `None` for a channel that
    /// was closed without a word.
    pub fn end(&self, within: Duration) -> Option<FenceReason> {
        self.channel.set_nonblocking(true).unwrap();
        let start = Instant::now();
        let mut reason = None;
        while start.elapsed() < within {
            match receive(&self.channel) {
                Ok(came) => {
                    if let Some(Notice::Fenced { reason: why }) = came.notice() {
                        reason = Some(why);
                    }
                }
                Err(ChannelError::WouldBlock) => std::thread::sleep(Duration::from_millis(5)),
                Err(_) => return reason,
            }
        }
        panic!("the session did not end within {within:?}");
    }
}

/// Waits until something is so.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "never came true: {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
