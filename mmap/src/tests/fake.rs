//! A daemon that is no more than the protocol: one thread, one guest at a time, files whose pages
//! say where they are from. What it is told to do wrong it does wrong. It can die and begin anew, with
//! numbers that begin anew too; a number of another session is written down as wrong.

use super::fake_coherent::Coherent;
use super::fake_files::Home;
pub(super) use super::fake_files::{Seen, State, word};
use crate::granted::standin::StandIn;
use copage_coherence::msg::{
    DecodeError, Generation, MESSAGE_BYTES_MAX, Notice, PageRange, Request, decode_header,
};
use copage_grants::channel::{Channel, ChannelError, Listener};
use copage_grants::{Epoch, LocalBackend, LocalConfig, PageIndex, pages_for};
use parking_lot::{Condvar, Mutex};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(super) struct Fake {
    dir: tempfile::TempDir,
    backend: Arc<LocalBackend>,
    pub(super) state: Mutex<State>,
    changed: Condvar,
    /// Held from what is decided until it is sent, where the protocol says what comes first.
    in_order: Mutex<()>,
    ttl_ms: u32,
}

/// What becomes of a message.
enum After {
    GoOn,
    /// It is answered when what is asked back was given back.
    HoldUp,
    Dead,
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

    /// A daemon whose file is of a `coherent` export.
    pub(super) fn start_coherent(bytes: u64) -> Arc<Self> {
        let fake = Self::start(bytes);
        fake.state.lock().coherent = Some(Coherent::new(bytes));
        fake
    }

    /// The same, sharing by grants.
    pub(super) fn start_coherent_granted(bytes: u64, movable: bool) -> (Arc<Self>, Arc<StandIn>) {
        let (fake, standin) = Self::start_granted(bytes, movable);
        standin.keep();
        fake.state.lock().coherent = Some(Coherent::new(bytes));
        (fake, standin)
    }

    /// Asks for pages of the newest content back.
    pub(super) fn take_back(&self, recall: u64, first: u64, count: u32) {
        let _in_order = self.in_order.lock();
        self.ask_back(recall, first, count);
    }

    fn ask_back(&self, recall: u64, first: u64, count: u32) {
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
            in_order: Mutex::new(()),
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
        let mut epoch = Epoch(0);
        // Faults for pages that are asked back.
        let mut held_up: Vec<Vec<u8>> = Vec::new();
        loop {
            let len = match channel.recv(&mut buf) {
                Ok(message) => message.len,
                Err(ChannelError::Closed) => return,
                Err(e) => panic!("{e}"),
            };
            let mut messages = vec![buf[..len].to_vec()];
            messages.append(&mut held_up);
            for message in messages {
                match self.answer(channel, &message, &mut epoch) {
                    After::GoOn => {}
                    After::HoldUp => held_up.push(message),
                    After::Dead => return,
                }
            }
        }
    }

    fn answer(&self, channel: &Channel, message: &[u8], epoch: &mut Epoch) -> After {
        let frame = decode_header(message).unwrap();
        let request: Result<Request<'_>, DecodeError> = Request::decode(&frame);
        let request = request.unwrap();
        let coherent = self.state.lock().coherent.is_some();
        let _in_order = coherent.then(|| self.in_order.lock());
        if let Request::Fault { range, .. } = request {
            let recall = self.state.lock().asks_first.take();
            if let Some(recall) = recall {
                self.ask_back(recall, range.first.0, range.count);
            }
        }
        let (slow, reply) = {
            let mut state = self.state.lock();
            if state.dies_after == Some(0) {
                (state.dies_after, state.down) = (None, true);
                self.changed.notify_all();
            }
            if state.down {
                // Dead, and read no more.
                channel.shutdown();
                return After::Dead;
            }
            if state.is_leaving(&request) {
                state.held_up += 1;
                return After::HoldUp;
            }
            state.dies_after = state.dies_after.map(|left| left - 1);
            if let Request::Hello { .. } = request {
                state.epoch += 1;
                state.sessions += 1;
                state.opens = 0;
                *epoch = Epoch(state.epoch);
            } else if frame.epoch != *epoch {
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
                _ => *epoch,
            };
            let mut out = Vec::new();
            reply.encode(frame.request, of, &mut out).unwrap();
            // The guest may be gone; what it said before is still read.
            let _ = channel.send(&out, fd.as_ref().map(AsFd::as_fd));
        }
        After::GoOn
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
        if let Some(coherent) = &mut state.coherent {
            coherent.restart();
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

    /// Another home for a `coherent` file, as after a fence, if the guest writes none of its pages.
    pub(super) fn rehome(&self) -> bool {
        let mut state = self.state.lock();
        let idle = state.coherent.as_ref().is_some_and(|c| c.held.is_empty());
        if idle {
            let (older, newest) = (state.newest, state.newest + 1);
            let bytes = state.homes[&older].bytes;
            state.homes[&older].punch(0, pages_for(bytes));
            state.homes.insert(newest, Home::new(&self.backend, bytes));
            state.newest = newest;
        }
        idle
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
