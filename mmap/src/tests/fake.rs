//! A daemon that is no more than the protocol: one thread, one guest at a time, files whose pages
//! say where they are from. What it is told to do wrong it does wrong. It can die and begin anew, with
//! numbers that begin anew too; a number of another session is written down as wrong.

use crate::granted::standin::{StandIn, content};
use copage_coherence::msg::{
    Attr, DecodeError, FaultHint, FileKind, FileToken, Generation, Handle, MESSAGE_BYTES_MAX,
    Notice, OpenHow, OpenedFlags, PageRange, Reply, Request, WelcomeFlags, decode_header,
};
use copage_grants::channel::{Channel, ChannelError, Listener};
use copage_grants::{
    Backend, DomId, Epoch, FrameNo, HomeId, HomeSpec, LocalBackend, LocalConfig, PAGE_SIZE,
    PageIndex, TrustClass, Version, pages_for,
};
use parking_lot::{Condvar, Mutex};
use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The word that fills page `page` of the content with this number; never 0. With the first daemon that
/// is the content's generation.
pub(super) fn word(generation: u32, page: u64) -> u64 {
    content(generation, page)
}

/// One content of the one file, in a home of the real backend.
pub(super) struct Home {
    backend: Arc<LocalBackend>,
    id: HomeId,
    read: OwnedFd,
    pub(super) bytes: u64,
}

/// Frames are numbered like pages: the fake keeps no ledger.
fn frames(first: u64, pages: u64) -> Vec<FrameNo> {
    (first..first + pages)
        .map(|page| FrameNo(page as u32))
        .collect()
}

impl Home {
    fn new(backend: &Arc<LocalBackend>, bytes: u64) -> Self {
        let id = backend
            .open_home(&HomeSpec {
                label: "f".into(),
                bytes,
                class: TrustClass::OWN,
            })
            .unwrap();
        let read = backend.home_descriptor(id).unwrap();
        Self {
            backend: Arc::clone(backend),
            id,
            read,
            bytes,
        }
    }

    fn fill(&self, content: u32, first: u64, pages: u64) {
        if pages == 0 {
            return;
        }
        let mut data = Vec::with_capacity(pages as usize * PAGE_SIZE);
        for page in first..first + pages {
            data.extend_from_slice(&word(content, page).to_le_bytes().repeat(PAGE_SIZE / 8));
        }
        let until = (self.bytes - first * PAGE_SIZE as u64).min(data.len() as u64) as usize;
        data[until..].fill(0);
        let frames = frames(first, pages);
        self.backend
            .store(self.id, PageIndex(first), &frames, &data)
            .unwrap();
    }

    pub(super) fn punch(&self, first: u64, pages: u64) {
        let pages = pages.min(pages_for(self.bytes) - first);
        let frames = frames(first, pages);
        self.backend
            .discard(self.id, PageIndex(first), &frames)
            .unwrap();
    }
}

/// A request that came, as far as tests ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    Fault {
        generation: u32,
        first: u64,
        count: u32,
        hint: FaultHint,
    },
    /// One that was not answered.
    Read,
    Forget,
    Close,
    Ack(u64),
    Unmapped {
        generation: u32,
        first: u64,
        count: u32,
    },
    Bye,
}

/// The files: their slots as nodes.
const F: u32 = 2;
const G: u32 = 3;

#[derive(Default)]
pub(super) struct State {
    /// Of the last session; each has the next.
    pub(super) epoch: u64,
    /// Sessions there were, and opens in the last.
    sessions: u32,
    opens: u32,
    /// Generation 1 of this daemon is content 1 + this.
    base: u32,
    /// Nobody gets in.
    pub(super) down: bool,
    /// Die after so many messages.
    pub(super) dies_after: Option<u32>,
    /// `f` is the host's file of this number; `None`: there is no `f`.
    pub(super) ino: Option<u64>,
    /// Numbers that came and are not of the session they came in.
    pub(super) wrong: Vec<String>,
    /// Of daemons before; guests may have them mapped.
    old_homes: Vec<Home>,
    pub(super) homes: HashMap<u32, Home>,
    pub(super) newest: u32,
    pub(super) seen: Vec<Seen>,
    /// Pages that cannot be read.
    pub(super) bad: HashSet<u64>,
    /// Take everything back at each fault before it is granted.
    pub(super) thrash: bool,
    /// Wait so long with each Granted.
    pub(super) slow: Duration,
    /// Grant at most so many pages at once.
    pub(super) grant_max: u32,
    /// Do not answer renewals.
    pub(super) deaf: bool,
    /// Answer no fault.
    pub(super) stuck: bool,
    /// Share by grants: no descriptors.
    pub(super) standin: Option<Arc<StandIn>>,
    /// What was asked back, by recall: generation, first page, pages, the newest batch of then.
    recalls: HashMap<u64, (u32, u64, u64, u64)>,
    channel: Option<Arc<Channel>>,
}

pub(super) struct Fake {
    dir: tempfile::TempDir,
    backend: Arc<LocalBackend>,
    pub(super) state: Mutex<State>,
    changed: Condvar,
    ttl_ms: u32,
}

impl Fake {
    /// A daemon with one file, `f`, of `bytes` bytes.
    pub(super) fn start(bytes: u64) -> Arc<Self> {
        Self::start_with(bytes, 60_000)
    }

    /// A daemon that shares its file by grants.
    pub(super) fn start_granted(bytes: u64, movable: bool) -> (Arc<Self>, Arc<StandIn>) {
        let (fake, standin) = (Self::start(bytes), StandIn::new(movable));
        fake.state.lock().standin = Some(Arc::clone(&standin));
        (fake, standin)
    }

    /// Asks for granted pages of the newest content back.
    pub(super) fn take_back(&self, recall: u64, first: u64, count: u32) {
        let (generation, token) = {
            let mut state = self.state.lock();
            let newest = state.newest;
            let batch = state.standin.as_ref().map_or(0, |s| s.newest_batch());
            state
                .recalls
                .insert(recall, (newest, first, u64::from(count), batch));
            (newest, state.token())
        };
        let notice = Notice::Invalidate {
            recall,
            file: token,
            generation: Generation(generation),
            range: PageRange {
                first: PageIndex(first),
                count,
            },
            reason: copage_coherence::msg::InvalidateReason::Reclaim,
            deadline_ms: 1000,
        };
        self.notify(&notice, None);
    }

    pub(super) fn start_with(bytes: u64, ttl_ms: u32) -> Arc<Self> {
        let dir = tempfile::tempdir().unwrap();
        let backend = Arc::new(LocalBackend::new(LocalConfig::default()).unwrap());
        let mut state = State {
            epoch: 77,
            ino: Some(1),
            newest: 1,
            grant_max: u32::MAX,
            ..State::default()
        };
        state.homes.insert(1, Home::new(&backend, bytes));
        let fake = Arc::new(Self {
            dir,
            backend,
            state: Mutex::new(state),
            changed: Condvar::new(),
            ttl_ms,
        });
        let listener = Listener::bind(&fake.socket(), 0o600).unwrap();
        let daemon = Arc::clone(&fake);
        std::thread::spawn(move || {
            // Until the process ends, or the test has dropped it and nobody comes.
            while let Ok((channel, _peer)) = listener.accept() {
                let channel = Arc::new(channel);
                {
                    let mut state = daemon.state.lock();
                    if state.down {
                        continue;
                    }
                    state.channel = Some(Arc::clone(&channel));
                }
                let daemon = Arc::clone(&daemon);
                std::thread::spawn(move || daemon.serve(&channel));
            }
        });
        fake
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.dir.path().join("guest.sock")
    }

    fn serve(&self, channel: &Channel) {
        let mut buf = vec![0; MESSAGE_BYTES_MAX];
        let mut out = Vec::new();
        let mut epoch = Epoch(0);
        loop {
            let len = match channel.recv(&mut buf) {
                Ok(message) => message.len,
                Err(ChannelError::Closed) => return,
                Err(e) => panic!("{e}"),
            };
            let frame = decode_header(&buf[..len]).unwrap();
            let request: Result<Request<'_>, DecodeError> = Request::decode(&frame);
            let request = request.unwrap();
            let (slow, reply) = {
                let mut state = self.state.lock();
                if state.dies_after == Some(0) {
                    (state.dies_after, state.down) = (None, true);
                    self.changed.notify_all();
                }
                if state.down {
                    // Dead, and read no more.
                    return channel.shutdown();
                }
                state.dies_after = state.dies_after.map(|left| left - 1);
                if let Request::Hello { .. } = request {
                    state.epoch += 1;
                    state.sessions += 1;
                    state.opens = 0;
                    epoch = Epoch(state.epoch);
                } else if frame.epoch != epoch {
                    let text = format!("{request:?} in epoch {epoch:?}: {:?}", frame.epoch);
                    state.wrong.push(text);
                }
                let reply = state.handle(&request, self.ttl_ms);
                (state.slow, reply)
            };
            self.changed.notify_all();
            if let Some((reply, fd)) = reply {
                if matches!(request, Request::Fault { .. }) {
                    std::thread::sleep(slow);
                }
                let of = match request {
                    Request::Hello { .. } => Epoch(0),
                    _ => epoch,
                };
                reply.encode(frame.request, of, &mut out).unwrap();
                // The guest may be gone; what it said before is still read.
                let _ = channel.send(&out, fd.as_ref().map(AsFd::as_fd));
            }
        }
    }

    /// Waits until `test` holds of the state; fails after 10 s.
    pub(super) fn wait(&self, what: &str, mut test: impl FnMut(&State) -> bool) {
        let until = Instant::now() + Duration::from_secs(10);
        let mut state = self.state.lock();
        while !test(&state) {
            assert!(
                !self.changed.wait_until(&mut state, until).timed_out(),
                "{what}"
            );
        }
    }

    pub(super) fn notify(&self, notice: &Notice, fd: Option<&OwnedFd>) {
        let mut out = Vec::new();
        let (epoch, channel) = {
            let state = self.state.lock();
            (Epoch(state.epoch), state.channel.clone().unwrap())
        };
        notice.encode(epoch, &mut out).unwrap();
        channel.send(&out, fd.map(AsFd::as_fd)).unwrap();
    }

    /// Sends bytes that are no message.
    pub(super) fn garbage(&self, bytes: &[u8]) {
        self.state
            .lock()
            .channel
            .clone()
            .unwrap()
            .send(bytes, None)
            .unwrap();
    }

    /// As if the daemon died.
    pub(super) fn die(&self) {
        self.state.lock().channel.take().unwrap().shutdown();
    }

    /// As if the daemon died and none came in its place.
    pub(super) fn go_down(&self) {
        self.state.lock().down = true;
        self.die();
    }

    /// Another daemon in its place, which counts from 1 again. `changed`: the host changed the file
    /// meanwhile. The content that it has.
    pub(super) fn come_back(&self, changed: bool) -> u32 {
        let mut state = self.state.lock();
        let bytes = state.homes[&state.newest].bytes;
        state.base += state.newest - u32::from(!changed);
        state.newest = 1;
        let old: Vec<Home> = state.homes.drain().map(|(_, home)| home).collect();
        state.old_homes.extend(old);
        state.homes.insert(1, Home::new(&self.backend, bytes));
        if let Some(standin) = &state.standin {
            standin.restart();
        }
        state.down = false;
        state.stuck = false;
        state.content()
    }

    /// A newer content. `force`: everything of the old is taken back.
    pub(super) fn change(&self, bytes: u64, force: bool) -> u32 {
        let mut state = self.state.lock();
        let newest = state.newest + 1;
        state.homes.insert(newest, Home::new(&self.backend, bytes));
        state.newest = newest;
        if force {
            let old = &state.homes[&(newest - 1)];
            old.punch(0, pages_for(old.bytes));
        }
        newest
    }

    /// Tells of the newest content.
    pub(super) fn tell(&self, recall: u64) {
        let (fd, notice) = {
            let mut state = self.state.lock();
            let older = state.newest - 1;
            let batch = state.standin.as_ref().map_or(0, |s| s.newest_batch());
            state.recalls.insert(recall, (older, 0, u64::MAX, batch));
            let home = &state.homes[&state.newest];
            let notice = Notice::Rebase {
                recall,
                file: state.token(),
                generation: Generation(state.newest),
                version: state.version(),
                bytes: home.bytes,
                deadline_ms: 1000,
            };
            let fd = home.read.try_clone().unwrap();
            (state.standin.is_none().then_some(fd), notice)
        };
        self.notify(&notice, fd.as_ref());
    }

    pub(super) fn punch(&self, first: u64, pages: u64) {
        let state = self.state.lock();
        state.homes[&state.newest].punch(first, pages);
    }

    pub(super) fn faults(&self) -> Vec<(u64, u32)> {
        let seen = self.state.lock().seen.clone();
        seen.iter()
            .filter_map(|s| match s {
                Seen::Fault { first, count, .. } => Some((*first, *count)),
                _ => None,
            })
            .collect()
    }
}

fn attr(kind: FileKind, ino: u64, bytes: u64) -> Attr {
    Attr {
        kind,
        perm: 0o755,
        nlink: 1,
        uid: 0,
        gid: 0,
        ino,
        dev: 1,
        rdev: 0,
        bytes,
        blocks: 0,
        atime: (0, 0),
        mtime: (0, 0),
        ctime: (0, 0),
    }
}

type Said = Option<(Reply<'static>, Option<OwnedFd>)>;

impl State {
    /// The content that there is.
    pub(super) fn content(&self) -> u32 {
        self.base + self.newest
    }

    fn version(&self) -> Version {
        Version::new(self.sessions, self.newest)
    }

    /// The token of the first open in the present session; the others follow.
    fn token(&self) -> FileToken {
        FileToken(u64::from(5 + 100_000 * (self.sessions - 1)))
    }

    /// Writes down what is of another session.
    fn check(&mut self, request: &Request<'_>) {
        let right = match *request {
            Request::Lookup { parent: node, .. }
            | Request::Getattr { node }
            | Request::Readdir { node, .. }
            | Request::Forget { node, .. }
            | Request::Open { node, .. } => node.epoch == self.epoch,
            Request::Close { file }
            | Request::Fault { file, .. }
            | Request::Read { file, .. }
            | Request::Unmapped { file, .. } => {
                let first = self.token().0;
                (first..first + u64::from(self.opens)).contains(&file.0)
            }
            _ => true,
        };
        if !right {
            self.wrong
                .push(format!("{request:?} in epoch {}", self.epoch));
        }
    }

    fn handle(&mut self, request: &Request<'_>, ttl_ms: u32) -> Said {
        self.check(request);
        self.opens += u32::from(matches!(request, Request::Open { .. }));
        let epoch = self.epoch;
        let handle = |slot| Handle {
            slot,
            tag: 9,
            epoch,
        };
        let content = self.content();
        let newest = &self.homes[&self.newest];
        let plain = |reply| Some((reply, None));
        match *request {
            Request::Hello { .. } => {
                let welcome = Reply::Welcome {
                    dom: DomId(3),
                    epoch: Epoch(self.epoch),
                    lease_ttl_ms: ttl_ms,
                    invalidate_deadline_ms: 5000,
                    handles_max: 100,
                    files_max: 100,
                    flags: WelcomeFlags {
                        forced_revoke: true,
                        read_only_enforced: false,
                        userfaultfd: false,
                    },
                    name: b"guest",
                };
                plain(welcome)
            }
            Request::Exports => plain(Reply::Exports {
                names: b"all\0more\0",
            }),
            Request::Attach { export: b"all" } => plain(Reply::Attached {
                root: handle(1),
                attr: attr(FileKind::Directory, 100, 0),
                mode: 0,
            }),
            Request::Lookup { name: b"f", .. } if self.ino.is_some() => plain(Reply::Entry {
                node: handle(F),
                attr: attr(FileKind::Regular, self.ino.unwrap_or(0), newest.bytes),
            }),
            Request::Lookup { name: b"g", .. } => plain(Reply::Entry {
                node: handle(G),
                attr: attr(FileKind::Regular, 200, newest.bytes),
            }),
            Request::Getattr { .. } => plain(Reply::Attr {
                attr: attr(FileKind::Regular, 1, newest.bytes),
            }),
            Request::Attach { .. } | Request::Lookup { .. } => plain(Reply::Error {
                errno: libc::ENOENT,
                text: b"no such name",
            }),
            Request::Open { how, .. } => {
                if how == OpenHow::Pin {
                    newest.fill(content, 0, pages_for(newest.bytes));
                }
                let opened = Reply::Opened {
                    file: FileToken(self.token().0 + u64::from(self.opens) - 1),
                    generation: Generation(self.newest),
                    version: self.version(),
                    bytes: newest.bytes,
                    flags: OpenedFlags {
                        descriptor: self.standin.is_none(),
                        pinned: how == OpenHow::Pin,
                        host_bounded: false,
                    },
                };
                if self.standin.is_some() {
                    if how == OpenHow::Pin {
                        return plain(Reply::Error {
                            errno: libc::EOPNOTSUPP,
                            text: b"files cannot be pinned here",
                        });
                    }
                    return plain(opened);
                }
                Some((opened, Some(newest.read.try_clone().unwrap())))
            }
            Request::Fault {
                generation,
                range,
                hint,
                ..
            } => {
                self.seen.push(Seen::Fault {
                    generation: generation.0,
                    first: range.first.0,
                    count: range.count,
                    hint,
                });
                self.fault(generation, range)
            }
            Request::Read { .. } if self.stuck => self.note(Seen::Read),
            Request::Read { offset, len, .. } => {
                let page = offset / PAGE_SIZE as u64;
                let end = newest.bytes.min(offset.saturating_add(len.into()));
                let bytes = word(content, page).to_le_bytes().repeat(PAGE_SIZE / 8);
                let data = bytes[..end.saturating_sub(offset) as usize].to_vec();
                plain(Reply::Bytes { data: data.leak() })
            }
            Request::Renew if !self.deaf => plain(Reply::Renewed {
                lease_ttl_ms: ttl_ms,
            }),
            Request::Close { .. } => {
                self.seen.push(Seen::Close);
                plain(Reply::Done)
            }
            Request::Forget { .. } => self.note(Seen::Forget),
            Request::Ack { recall } => {
                if let (Some(standin), Some((generation, first, count, batch))) =
                    (&self.standin, self.recalls.remove(&recall))
                {
                    standin.acked(generation, first, count, batch);
                }
                self.note(Seen::Ack(recall))
            }
            Request::Bye => self.note(Seen::Bye),
            Request::Unmapped {
                generation, range, ..
            } => {
                if let Some(standin) = &self.standin {
                    // What is in use stays: another mapping's, or the guest's mistake.
                    standin.revoke(generation.0, range.first.0, range.count.into());
                }
                self.note(Seen::Unmapped {
                    generation: generation.0,
                    first: range.first.0,
                    count: range.count,
                })
            }
            _ => None,
        }
    }

    fn note(&mut self, seen: Seen) -> Said {
        self.seen.push(seen);
        None
    }

    fn fault(&self, generation: Generation, range: PageRange) -> Said {
        if self.stuck {
            return None;
        }
        let newest = &self.homes[&self.newest];
        if generation.0 != self.newest {
            let stale = Reply::Stale {
                generation: Generation(self.newest),
                version: self.version(),
                bytes: newest.bytes,
            };
            let fd = newest.read.try_clone().unwrap();
            return Some((stale, self.standin.is_none().then_some(fd)));
        }
        let first = range.first.0;
        let end = (first + u64::from(range.count.min(self.grant_max))).min(pages_for(newest.bytes));
        if (first..end).any(|page| self.bad.contains(&page)) {
            let text: &[u8] = b"the host could not read the page";
            return Some((
                Reply::Error {
                    errno: libc::EIO,
                    text,
                },
                None,
            ));
        }
        if first >= end {
            let (errno, text): (_, &[u8]) = (libc::EINVAL, b"past the end of the file");
            return Some((Reply::Error { errno, text }, None));
        }
        if let Some(standin) = &self.standin {
            let refs = standin.grant(self.newest, self.content(), first, (end - first) as usize);
            let bytes: Vec<u8> = refs.iter().flat_map(|r| r.to_le_bytes()).collect();
            let granted = Reply::Granted {
                generation,
                range: PageRange {
                    first: PageIndex(first),
                    count: refs.len() as u32,
                },
                granter: DomId(StandIn::GRANTER),
                refs: bytes.leak(),
            };
            return Some((granted, None));
        }
        if self.thrash {
            newest.punch(0, pages_for(newest.bytes));
        }
        newest.fill(self.content(), first, end - first);
        let granted = Reply::Granted {
            generation,
            range: PageRange {
                first: PageIndex(first),
                count: (end - first) as u32,
            },
            granter: DomId(0),
            refs: &[],
        };
        Some((granted, None))
    }
}
