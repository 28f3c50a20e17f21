//! What the fake daemon knows of its files, and its answers.

use super::fake_coherent::Coherent;
use crate::granted::standin::{StandIn, content};
use copage_coherence::msg::{
    Attr, FaultHint, FileKind, FileToken, Generation, Handle, OpenHow, OpenedFlags, PageRange,
    Reply, Request, WelcomeFlags,
};
use copage_grants::channel::Channel;
use copage_grants::{
    Backend, DomId, Epoch, FrameNo, HomeId, HomeSpec, LocalBackend, PAGE_SIZE, PageIndex,
    TrustClass, Version, pages_for,
};
use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// The word that fills page `page` of the content with this number; never 0. With the first daemon that
/// is the content's generation.
pub(super) fn word(generation: u32, page: u64) -> u64 {
    content(generation, page)
}

/// One content of the one file, in a home of the real backend.
pub(super) struct Home {
    backend: Arc<LocalBackend>,
    id: HomeId,
    pub(super) read: OwnedFd,
    pub(super) bytes: u64,
}

/// Frames are numbered like pages: the fake keeps no ledger.
fn frames(first: u64, pages: u64) -> Vec<FrameNo> {
    (first..first + pages)
        .map(|page| FrameNo(page as u32))
        .collect()
}

impl Home {
    pub(super) fn new(backend: &Arc<LocalBackend>, bytes: u64) -> Self {
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

    /// Puts one page there.
    pub(super) fn put(&self, page: u64, bytes: &[u8; PAGE_SIZE]) {
        let frames = frames(page, 1);
        self.backend
            .store(self.id, PageIndex(page), &frames, bytes)
            .unwrap();
    }

    /// Gives it another length; nobody has pages behind the shorter end.
    pub(super) fn resize(&mut self, bytes: u64) {
        let (new, old) = (pages_for(bytes), pages_for(self.bytes));
        if new < old {
            self.punch(new, old - new);
        }
        self.backend.resize_home(self.id, bytes).unwrap();
        self.bytes = bytes;
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
    pub(super) sessions: u32,
    pub(super) opens: u32,
    /// Generation 1 of this daemon is content 1 + this.
    pub(super) base: u32,
    /// Nobody gets in.
    pub(super) down: bool,
    /// Die after so many messages.
    pub(super) dies_after: Option<u32>,
    /// `f` is the host's file of this number; `None`: there is no `f`.
    pub(super) ino: Option<u64>,
    /// Numbers that came and are not of the session they came in.
    pub(super) wrong: Vec<String>,
    /// Of daemons before; guests may have them mapped.
    pub(super) old_homes: Vec<Home>,
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
    pub(super) recalls: HashMap<u64, (u32, u64, u64, u64)>,
    /// Ask for the pages of the next fault back, by this recall, before it is looked at.
    pub(super) asks_first: Option<u64>,
    /// How often a fault waited for pages that were asked back.
    pub(super) held_up: u32,
    pub(super) channel: Option<Arc<Channel>>,
    /// The file is of a `coherent` export.
    pub(super) coherent: Option<Coherent>,
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

pub(super) type Said = Option<(Reply<'static>, Option<OwnedFd>)>;

impl State {
    /// The content that there is.
    pub(super) fn content(&self) -> u32 {
        self.base + self.newest
    }

    pub(super) fn version(&self) -> Version {
        Version::new(self.sessions, self.newest)
    }

    /// The token of the first open in the present session; the others follow.
    pub(super) fn token(&self) -> FileToken {
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
            | Request::Write { file, .. }
            | Request::Truncate { file, .. }
            | Request::Sync { file }
            | Request::Arena { file, .. }
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

    pub(super) fn handle(&mut self, request: &Request<'_>, ttl_ms: u32) -> Said {
        self.check(request);
        self.opens += u32::from(matches!(request, Request::Open { .. }));
        if let Some(said) = self.handle_coherent(request) {
            return said;
        }
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
                mode: u8::from(self.coherent.is_some()),
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
                        coherent: self.coherent.is_some(),
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
                let asked = self.recalls.remove(&recall);
                if let (Some(standin), Some((generation, first, count, batch))) =
                    (&self.standin, asked)
                {
                    standin.acked(generation, first, count, batch);
                }
                if let Some((generation, first, count, _)) = asked {
                    self.given_back(generation, first, count);
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
                access: copage_grants::Access::ReadOnly,
                place: copage_coherence::msg::GrantedPlace::Home,
                version: copage_grants::Version(0),
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
            access: copage_grants::Access::ReadOnly,
            place: copage_coherence::msg::GrantedPlace::Home,
            version: copage_grants::Version(0),
        };
        Some((granted, None))
    }
}
