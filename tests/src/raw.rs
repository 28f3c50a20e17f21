//! A guest without the library: says exactly what a test wants it to say.

use copage_coherence::msg::{
    DATA_BYTES_MAX, FAULT_PAGES_MAX, FileToken, Generation, Handle, HelloFlags, MESSAGE_BYTES_MAX,
    Notice, OpenHow, PROTOCOL_VERSION, Reply, Request, decode_header,
};
use copage_coherence::msg::{FaultHint, FrameKind, PageRange};
use copage_grants::PAGE_SIZE;
use copage_grants::channel::{Channel, ChannelError};
use copage_grants::{Access, Epoch, PageIndex, Version};
use copage_mmap::native::NativeMapping;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// What came.
#[derive(Debug)]
pub struct Came {
    bytes: Vec<u8>,
    /// The descriptor beside it.
    pub fd: Option<OwnedFd>,
}

impl Came {
    /// Is it a reply, and to which request?
    pub fn request(&self) -> Option<u64> {
        let frame = decode_header(&self.bytes).expect("the daemon's header");
        (frame.kind == FrameKind::Reply).then_some(frame.request)
    }

    /// As a reply.
    pub fn reply(&self) -> Reply<'_> {
        let frame = decode_header(&self.bytes).expect("the daemon's header");
        Reply::decode(&frame).expect("a reply")
    }

    /// As a notice, if it is one.
    pub fn notice(&self) -> Option<Notice> {
        let frame = decode_header(&self.bytes).expect("the daemon's header");
        (frame.kind == FrameKind::Notice).then(|| Notice::decode(&frame).expect("a notice"))
    }

    /// As the reply to a fault; the errno of another. Stale is ESTALE.
    pub fn granted(&self) -> Result<Granted, i32> {
        match self.reply() {
            Reply::Granted {
                range,
                granter,
                refs,
                ..
            } => {
                let refs = refs.as_chunks().0.iter();
                Ok(Granted {
                    range,
                    granter: granter.0,
                    refs: refs.map(|r| u32::from_le_bytes(*r)).collect(),
                })
            }
            Reply::Stale { .. } => Err(libc::ESTALE),
            Reply::Error { errno, .. } => Err(errno),
            other => panic!("to Fault: {other:?}"),
        }
    }

    /// The errno of an Error reply.
    pub fn errno(&self) -> Option<i32> {
        match self.reply() {
            Reply::Error { errno, .. } => Some(errno),
            _ => None,
        }
    }
}

/// An open file of a raw session.
#[derive(Debug)]
pub struct RawFile {
    /// Its token.
    pub token: FileToken,
    /// Its generation at open.
    pub generation: Generation,
    /// Its version at open.
    pub version: Version,
    /// Its bytes at open.
    pub bytes: u64,
    /// The home.
    pub fd: Option<OwnedFd>,
}

/// What a fault brought.
#[derive(Debug)]
pub struct Granted {
    /// Which pages.
    pub range: PageRange,
    /// The domain whose grants they are.
    pub granter: u16,
    /// Its references, a page each; none where a descriptor is the way to them.
    pub refs: Vec<u32>,
}

fn fault_request(file: &RawFile, first: u64, count: u32) -> Request<'static> {
    fault_for(file, first, count, Access::ReadOnly)
}

/// A request for pages.
pub fn fault_for(file: &RawFile, first: u64, count: u32, access: Access) -> Request<'static> {
    Request::Fault {
        file: file.token,
        generation: file.generation,
        range: PageRange {
            first: PageIndex(first),
            count,
        },
        hint: FaultHint::Populate,
        access,
    }
}

/// One session, or an attempt at one.
#[derive(Debug)]
pub struct Raw {
    /// The channel.
    pub channel: Channel,
    /// The epoch that messages carry.
    pub epoch: Epoch,
    /// The lease that Welcome named.
    pub lease_ttl: Duration,
    next: u64,
    /// Notices that came while a reply was waited for.
    pub notices: Vec<Notice>,
    /// Replies to other requests that came meanwhile.
    pub earlier: Vec<Came>,
}

impl Raw {
    /// Connects and says nothing.
    pub fn silent(socket: &Path) -> Self {
        Self::over(Channel::connect(socket).expect("the daemon listens"))
    }

    /// Says nothing, over a channel that is there.
    pub fn over(channel: Channel) -> Self {
        Self {
            channel,
            epoch: Epoch(0),
            lease_ttl: Duration::ZERO,
            next: 1,
            notices: Vec::new(),
            earlier: Vec::new(),
        }
    }

    /// Connects and says Hello as `name`; the errno when that is refused.
    pub fn try_hello(socket: &Path, name: &str) -> Result<Self, i32> {
        Self::silent(socket).introduced(name)
    }

    /// A session as `name` over the ring of this Xen guest; the errno when that is refused.
    pub fn try_hello_xen(name: &str) -> Result<Self, i32> {
        let channel = Channel::connect_xen().expect("the daemon listens");
        Self::over(channel).introduced(name)
    }

    fn introduced(self, name: &str) -> Result<Self, i32> {
        let mut raw = self;
        let hello = Request::Hello {
            version: PROTOCOL_VERSION,
            flags: HelloFlags::default(),
            name: name.as_bytes(),
            uuid: [0; 16],
        };
        let came = raw.ask(&hello).ok_or(libc::EPIPE)?;
        match came.reply() {
            Reply::Welcome {
                epoch,
                lease_ttl_ms,
                ..
            } => {
                raw.epoch = epoch;
                raw.lease_ttl = Duration::from_millis(lease_ttl_ms.into());
                Ok(raw)
            }
            Reply::Error { errno, .. } => Err(errno),
            other => panic!("to Hello: {other:?}"),
        }
    }

    /// Connects under the name that its credentials give.
    pub fn hello(socket: &Path) -> Self {
        Self::try_hello(socket, "").expect("a session")
    }

    /// Sends bytes as they are; `false` when the daemon has hung up.
    pub fn send(&self, bytes: &[u8]) -> bool {
        match self.channel.send(bytes, None) {
            Ok(()) => true,
            Err(ChannelError::Closed) => false,
            Err(e) => panic!("send: {e}"),
        }
    }

    /// A request as it stands on the wire, with a number of its own.
    pub fn encode(&mut self, request: &Request<'_>) -> (u64, Vec<u8>) {
        let number = self.next;
        self.next += 1;
        let mut bytes = Vec::new();
        request
            .encode(number, self.epoch, &mut bytes)
            .expect("a request that can be said");
        (number, bytes)
    }

    /// Sends a request; its number, or `None` when the daemon has hung up.
    pub fn tell(&mut self, request: &Request<'_>) -> Option<u64> {
        let (number, bytes) = self.encode(request);
        self.send(&bytes).then_some(number)
    }

    /// The next message, within `at_most`; `None` when there is none or the daemon has hung up.
    pub fn hear_within(&self, at_most: Duration) -> Option<Came> {
        let end = Instant::now() + at_most;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = rustix::event::Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [rustix::event::PollFd::new(
                &self.channel,
                rustix::event::PollFlags::IN,
            )];
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Ok(0) => return None,
                Ok(_) => {}
                Err(_) => continue, // EINTR
            }
            let mut bytes = vec![0; MESSAGE_BYTES_MAX];
            return match self.channel.try_recv(&mut bytes) {
                Ok(received) => {
                    bytes.truncate(received.len);
                    Some(Came {
                        bytes,
                        fd: received.fd,
                    })
                }
                Err(ChannelError::WouldBlock) => continue,
                Err(_) => None,
            };
        }
    }

    /// The reply to request `number`, ten seconds at most; notices before it are kept.
    pub fn reply_to(&mut self, number: u64) -> Option<Came> {
        loop {
            let came = self.hear_within(Duration::from_secs(10))?;
            match came.notice() {
                Some(notice) => self.notices.push(notice),
                None if came.request() == Some(number) => return Some(came),
                None => self.earlier.push(came),
            }
        }
    }

    /// Sends a request and waits for its reply; `None` when the daemon has hung up.
    pub fn ask(&mut self, request: &Request<'_>) -> Option<Came> {
        let number = self.tell(request)?;
        self.reply_to(number)
    }

    /// The errno to a request that has to be refused.
    pub fn refused(&mut self, request: &Request<'_>) -> i32 {
        let came = self
            .ask(request)
            .unwrap_or_else(|| panic!("hung up at {request:?}"));
        came.errno()
            .unwrap_or_else(|| panic!("{request:?} was not refused: {:?}", came.reply()))
    }

    /// The root of an export.
    pub fn attach(&mut self, export: &str) -> Handle {
        let came = self
            .ask(&Request::Attach {
                export: export.as_bytes(),
            })
            .expect("a reply");
        match came.reply() {
            Reply::Attached { root, .. } => root,
            other => panic!("to Attach: {other:?}"),
        }
    }

    /// One name in a directory.
    pub fn lookup(&mut self, parent: Handle, name: &[u8]) -> Result<Handle, i32> {
        let came = self
            .ask(&Request::Lookup { parent, name })
            .expect("a reply");
        match came.reply() {
            Reply::Entry { node, .. } => Ok(node),
            Reply::Error { errno, .. } => Err(errno),
            other => panic!("to Lookup: {other:?}"),
        }
    }

    /// Opens a node.
    pub fn try_open(&mut self, node: Handle, how: OpenHow) -> Result<RawFile, i32> {
        self.try_open_to(node, how, false)
    }

    /// As [`Self::try_open`], for writing too.
    pub fn try_open_to(&mut self, node: Handle, how: OpenHow, write: bool) -> Result<RawFile, i32> {
        let request = Request::Open { node, how, write };
        let mut came = self.ask(&request).ok_or(libc::EPIPE)?;
        let fd = came.fd.take();
        match came.reply() {
            Reply::Opened {
                file,
                generation,
                version,
                bytes,
                ..
            } => Ok(RawFile {
                token: file,
                generation,
                version,
                bytes,
                fd,
            }),
            Reply::Error { errno, .. } => Err(errno),
            other => panic!("to Open: {other:?}"),
        }
    }

    /// Attaches, looks `path`'s one name up, opens.
    pub fn open(&mut self, export: &str, name: &str, how: OpenHow) -> RawFile {
        let node = self.node(export, name);
        self.try_open(node, how).expect("it can be opened")
    }

    /// As [`Self::open`], to map a file of a coherent export that it may write.
    pub fn open_for_writing(&mut self, export: &str, name: &str) -> RawFile {
        let node = self.node(export, name);
        let opened = self.try_open_to(node, OpenHow::Map, true);
        opened.expect("it can be opened for writing")
    }

    fn node(&mut self, export: &str, name: &str) -> Handle {
        let root = self.attach(export);
        let node = self.lookup(root, name.as_bytes());
        node.expect("the file is there")
    }

    /// Gets the file's first `pages` pages for writing, renewing the lease for as long as it takes; how many it got,
    /// and the errno of the first refusal.
    pub fn take_to_write(&mut self, file: &RawFile, pages: u64) -> (u64, Option<i32>) {
        let mut got = 0;
        while got < pages {
            let count = FAULT_PAGES_MAX.min((pages - got) as u32);
            match self.pages_at_last(&fault_for(file, got, count, Access::ReadWrite)) {
                Ok(granted) => got = granted.range.first.0 + u64::from(granted.range.count),
                Err(errno) => return (got, Some(errno)),
            }
        }
        (got, None)
    }

    /// The file that pages granted for writing are mapped from: its first `pages` pages.
    pub fn map_arena(&mut self, file: &RawFile, pages: u64) -> NativeMapping {
        let request = Request::Arena {
            file: file.token,
            common: false,
        };
        let arena = self.ask(&request).and_then(|came| came.fd);
        let arena = std::fs::File::from(arena.expect("an arena"));
        NativeMapping::writable_part(&arena, pages as usize * PAGE_SIZE).expect("it can be mapped")
    }

    /// Faults pages in; the pages granted (first, count), or the errno. Stale is ESTALE.
    pub fn fault(&mut self, file: &RawFile, first: u64, count: u32) -> Result<(u64, u32), i32> {
        let granted = self.granted(file, first, count)?;
        Ok((granted.range.first.0, granted.range.count))
    }

    /// As [`Self::fault`], with the references that come from a daemon which gives no descriptors.
    pub fn granted(&mut self, file: &RawFile, first: u64, count: u32) -> Result<Granted, i32> {
        let came = self.ask(&fault_request(file, first, count));
        came.ok_or(libc::EPIPE)?.granted()
    }

    /// As [`Self::granted`], renewing the lease for as long as it takes.
    pub fn granted_at_last(
        &mut self,
        file: &RawFile,
        first: u64,
        count: u32,
    ) -> Result<Granted, i32> {
        self.pages_at_last(&fault_request(file, first, count))
    }

    fn pages_at_last(&mut self, fault: &Request<'_>) -> Result<Granted, i32> {
        let number = self.tell(fault);
        while self.renew() {
            let came = self.earlier.iter().position(|c| c.request() == number);
            if let Some(at) = came {
                return self.earlier.remove(at).granted();
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err(libc::EPIPE)
    }

    /// References for the file's first `pages` pages, all of one domain: that domain, and they.
    pub fn refs(&mut self, file: &RawFile, pages: u64) -> Result<(u16, Vec<u32>), i32> {
        let (mut of, mut all) = (None, Vec::new());
        while (all.len() as u64) < pages {
            let first = all.len() as u64;
            let count = FAULT_PAGES_MAX.min((pages - first) as u32);
            let granted = self.granted_at_last(file, first, count)?;
            let before = (first - granted.range.first.0) as usize;
            assert!(granted.refs.len() > before, "granted nothing: {granted:?}");
            assert!(*of.get_or_insert(granted.granter) == granted.granter);
            all.extend_from_slice(&granted.refs[before..]);
        }
        all.truncate(pages as usize);
        Ok((of.unwrap_or_default(), all))
    }

    /// Reads by message.
    pub fn read(&mut self, file: FileToken, offset: u64, len: u32) -> Result<Vec<u8>, i32> {
        let request = Request::Read {
            file,
            offset,
            len: len.min(DATA_BYTES_MAX),
        };
        let came = self.ask(&request).ok_or(libc::EPIPE)?;
        match came.reply() {
            Reply::Bytes { data } => Ok(data.to_vec()),
            Reply::Error { errno, .. } => Err(errno),
            other => panic!("to Read: {other:?}"),
        }
    }

    /// Renews the lease; `false` when the session counts no more.
    pub fn renew(&mut self) -> bool {
        match self.ask(&Request::Renew) {
            Some(came) => matches!(came.reply(), Reply::Renewed { .. }),
            None => false,
        }
    }

    /// Waits until the daemon has hung up, throwing away what it says; how long that took.
    pub fn wait_hung_up(&mut self, at_most: Duration) -> Duration {
        let begin = Instant::now();
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        while begin.elapsed() < at_most {
            match self.channel.try_recv(&mut bytes) {
                Ok(_) => {}
                Err(ChannelError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
                Err(_) => return begin.elapsed(),
            }
        }
        panic!("not hung up after {at_most:?}");
    }
}
