//! The pager: the one thread that reads the userfaultfd and the channel.
//!
//! It never touches a mapped page, never waits to send, never takes a lock that is held by somebody
//! who may fault, and never moves pages: whatever waits for faults to be served would wait forever.

pub(crate) mod faults;
pub(crate) mod space;
pub(crate) mod worker;

use crate::error::{LostWhy, MmapError};
use crate::file::Content;
use crate::limits::{EVENTS_MAX, IN_FLIGHT_MAX, MESSAGES_BURST_MAX};
use crate::mapped::{Change, Mapped};
use crate::mapping::MapKind;
use crate::quiet::Quiet;
use crate::session::{Answer, Shared};
use crate::uffd::{FaultEvent, UffdMsg};
use copage_coherence::msg::{
    FaultHint, FrameKind, Generation, MESSAGE_BYTES_MAX, Notice, PageRange, Reply, Request,
    decode_header,
};
use copage_grants::channel::ChannelError;
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64, PageIndex, Version};
use faults::{Faults, InFlight, Waiter};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use worker::Job;

/// Milliseconds of CLOCK_BOOTTIME, which goes on while the machine sleeps.
pub(crate) fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    // Both are positive.
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// The session lease as this side sees it.
struct Lease {
    ttl_ms: u64,
    /// When the lease ends: counted from when the last renewal that was granted was sent.
    ends_ms: u64,
    /// When to send the next renewal.
    renew_ms: u64,
    /// The renewal that is under way: its number and when it was sent.
    asked: Option<(u64, u64)>,
}

/// The state of the pager's thread.
pub(crate) struct Pager {
    shared: Arc<Shared>,
    faults: Faults,
    lease: Lease,
    /// What came; as long as a message can be.
    inbound: Vec<u8>,
    /// What goes; used again.
    outgoing: Vec<u8>,
    /// The loss has been handed to the worker.
    ending: bool,
    finished: Arc<AtomicBool>,
}

impl Pager {
    /// `welcomed_ms`: when Hello was sent.
    pub(crate) fn new(shared: Arc<Shared>, welcomed_ms: u64, finished: Arc<AtomicBool>) -> Self {
        let ttl_ms = u64::from(shared.welcome.lease_ttl_ms).max(3);
        Self {
            shared,
            faults: Faults::default(),
            lease: Lease {
                ttl_ms,
                ends_ms: welcomed_ms + ttl_ms,
                renew_ms: welcomed_ms + ttl_ms / 3,
                asked: None,
            },
            inbound: vec![0; MESSAGE_BYTES_MAX],
            outgoing: Vec::new(),
            ending: false,
            finished,
        }
    }

    /// The pager's thread.
    pub(crate) fn run(mut self) {
        Quiet::forever();
        while !self.finished.load(Ordering::Acquire) {
            // A bug here must not leave threads waiting in their faults: it ends the session.
            if catch_unwind(AssertUnwindSafe(|| self.turn())).is_err() {
                self.lose(LostWhy::Internal);
            }
        }
        self.shared.session.channel.shutdown();
    }

    /// Waits for something and deals with it.
    fn turn(&mut self) {
        let shared = Arc::clone(&self.shared);
        let session = &shared.session;
        let out = if session.has_outbound() {
            PollFlags::OUT
        } else {
            PollFlags::empty()
        };
        let mut fds = Vec::with_capacity(3);
        fds.push(PollFd::new(&session.wake, PollFlags::IN));
        if !self.ending {
            fds.push(PollFd::new(&session.channel, PollFlags::IN | out));
        }
        // With too many requests under way the faults wait in the kernel.
        let uffd = shared
            .uffd
            .as_ref()
            .ok()
            .filter(|_| self.faults.len() < IN_FLIGHT_MAX);
        if let Some(uffd) = uffd {
            fds.push(PollFd::new(uffd, PollFlags::IN));
        }
        let timeout = self.timeout();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => self.lose(LostWhy::Sys {
                call: "poll",
                errno: e.raw_os_error(),
            }),
        }
        let ready = |i: usize| fds.get(i).is_some_and(|fd| !fd.revents().is_empty());
        let (woken, spoken) = (ready(0), !self.ending && ready(1));
        let faulted = uffd.is_some() && ready(fds.len() - 1);
        drop(fds);
        if woken {
            session.wake.drain();
        }
        if spoken {
            self.messages();
        }
        if faulted {
            self.events();
        }
        if !self.ending {
            session.flush();
            if session.is_closing() {
                session.post(&Request::Bye);
                self.lose(LostWhy::Closed);
            } else if session.overflowed() {
                let why = "the daemon reads nothing; the queue to it is full";
                self.lose(LostWhy::Protocol(why.into()));
            } else {
                self.renew();
            }
        }
    }

    /// How long to wait: until the next renewal is due or the lease ends.
    fn timeout(&self) -> Option<Timespec> {
        if self.ending {
            return None;
        }
        let due = match self.lease.asked {
            Some(_) => self.lease.ends_ms,
            None => self.lease.renew_ms.min(self.lease.ends_ms),
        };
        // One more, so that it is past when the wait ends.
        let ms = due.saturating_sub(now_ms()) + 1;
        Some(Timespec {
            tv_sec: (ms / 1000) as i64,
            tv_nsec: (ms % 1000 * 1_000_000) as i64,
        })
    }

    /// Renews the lease when it is time; ends the session when the lease is over. What the daemon
    /// had to say was read before.
    fn renew(&mut self) {
        let now = now_ms();
        if now >= self.lease.ends_ms {
            self.lose(LostWhy::LeaseExpired);
        } else if now >= self.lease.renew_ms && self.lease.asked.is_none() {
            let number = self.shared.session.number();
            self.lease.asked = Some((number, now));
            self.send(number, &Request::Renew);
        }
    }

    fn send(&mut self, number: u64, request: &Request<'_>) {
        let session = &self.shared.session;
        match request.encode(number, session.epoch(), &mut self.outgoing) {
            Ok(()) => session.send(&self.outgoing),
            // The pager sends numbers only, and they are in range.
            Err(e) => tracing::error!(error = %e, "a request could not be encoded"),
        }
    }

    /// Ends the session: calls fail now, mappings as soon as the worker gets to them.
    fn lose(&mut self, why: LostWhy) {
        if self.ending {
            return;
        }
        self.ending = true;
        if why != LostWhy::Closed {
            tracing::info!(%why, "session lost");
        }
        self.shared.session.lose(why);
        self.faults.clear();
        // The worker lives as long as this thread.
        let _ = self.shared.jobs.send(Job::Lost);
    }

    // ---- faults ----

    fn events(&mut self) {
        let shared = Arc::clone(&self.shared);
        let Ok(uffd) = &shared.uffd else { return };
        let mut events = [UffdMsg::default(); EVENTS_MAX];
        match uffd.read(&mut events) {
            Ok(count) => {
                for fault in events.iter().take(count).filter_map(UffdMsg::fault) {
                    self.fault(fault);
                }
            }
            Err(e) => self.lose(LostWhy::Sys {
                call: "read of the userfaultfd",
                errno: e.raw_os_error().unwrap_or(libc::EIO),
            }),
        }
    }

    fn fault(&mut self, fault: FaultEvent) {
        if self.ending {
            // The worker wakes it when the page is SIGBUS.
            return;
        }
        let shared = Arc::clone(&self.shared);
        let Ok(uffd) = &shared.uffd else { return };
        let found = shared.space.lock().find(fault.address).cloned();
        let Some(mapped) = found else {
            // Just being unmapped. It is for the kernel to say what the access gets.
            uffd.wake(fault.address, PAGE_SIZE);
            return;
        };
        if mapped.file().rebases.load(Ordering::SeqCst) > 0 {
            // The worker wakes it when the rebase is done.
            return;
        }
        let within = (fault.address - mapped.addr()) / PAGE_SIZE;
        let page = mapped.first_page() + within as u64;
        if fault.protected {
            if mapped.store(uffd, page) == Change::Done {
                mapped.wake(uffd, page, 1);
            }
            return;
        }
        match mapped.try_is_behind(page) {
            Some(false) => {}
            Some(true) => {
                self.restore(mapped, page);
                return;
            }
            // Whoever changes the mapping just now wakes it.
            None => return,
        }
        let write = fault.write && mapped.kind() == MapKind::Private;
        self.want(Waiter {
            mapped,
            page,
            write,
        });
    }

    /// Asks for the bytes of a private page that is missing; the worker puts them there.
    fn restore(&mut self, mapped: Arc<Mapped>, page: u64) {
        if self.faults.is_restoring(&mapped, page) {
            return;
        }
        let number = self.shared.session.number();
        let request = Request::Read {
            file: mapped.file().token,
            offset: page * PAGE_SIZE_U64,
            len: PAGE_SIZE as u32,
        };
        self.send(number, &request);
        self.faults.insert_restore(number, mapped, page);
    }

    fn restored(&mut self, mapped: Arc<Mapped>, file_page: u64, answer: &Answer) {
        let bytes = match answer.reply() {
            Ok(Reply::Bytes { data: [] }) => Err(MmapError::Invalid(
                "the page is past the end of the file".into(),
            )),
            Ok(Reply::Bytes { data }) if data.len() <= PAGE_SIZE => {
                let mut page = Box::new([0; PAGE_SIZE]);
                page[..data.len()].copy_from_slice(data);
                Ok(page)
            }
            Ok(other) => Err(crate::client::unexpected("one page of Bytes", &other)),
            Err(e) => Err(e),
        };
        let _ = self.shared.jobs.send(Job::Restore {
            mapped,
            file_page,
            bytes,
        });
    }

    /// Asks for a page, unless it is on its way.
    fn want(&mut self, waiter: Waiter) {
        if self.faults.join(&waiter) {
            return;
        }
        let bytes = waiter.mapped.file().content.lock().bytes;
        let window = waiter.mapped.window(waiter.page, bytes);
        let count = self.faults.clip(&waiter, window.count);
        self.ask(waiter, count, window.hint);
    }

    fn ask(&mut self, waiter: Waiter, count: u32, hint: FaultHint) {
        let file = Arc::clone(waiter.mapped.file());
        let generation = waiter.mapped.generation();
        let first = waiter.page;
        let number = self.shared.session.number();
        let range = PageRange {
            first: PageIndex(first),
            count,
        };
        self.send(
            number,
            &Request::Fault {
                file: file.token,
                generation,
                range,
                hint,
            },
        );
        let waiters = vec![waiter];
        self.faults.insert(
            number,
            InFlight {
                file,
                generation,
                first,
                count,
                waiters,
            },
        );
    }

    fn answered(&mut self, flight: InFlight, bytes: Vec<u8>, fd: Option<OwnedFd>) {
        let answer = Answer::new(bytes, fd);
        match answer.reply() {
            Ok(Reply::Granted { range, .. }) => self.granted(flight, range),
            Ok(Reply::Stale {
                generation,
                version,
                bytes,
            }) => {
                if generation <= flight.generation {
                    let text = "stale, but there is no newer content".into();
                    self.refused(flight, &MmapError::Protocol(text));
                    return;
                }
                drop(flight.waiters);
                let content = (generation, version, bytes);
                self.newer(flight.file, content, answer.fd, None);
            }
            Ok(other) => {
                let error = crate::client::unexpected("Granted", &other);
                self.refused(flight, &error);
            }
            Err(error) => self.refused(flight, &error),
        }
    }

    fn granted(&mut self, flight: InFlight, range: PageRange) {
        let shared = Arc::clone(&self.shared);
        let Ok(uffd) = &shared.uffd else { return };
        let first = range.first.0;
        let granted = first..first.saturating_add(range.count.into());
        if !granted.contains(&flight.first) {
            let text = "granted, but not the page that was asked for".into();
            self.refused(flight, &MmapError::Protocol(text));
            return;
        }
        let (here, rest): (Vec<_>, Vec<_>) = flight
            .waiters
            .into_iter()
            .partition(|w| granted.contains(&w.page));
        for waiter in here.iter().filter(|w| w.write) {
            // Missed or not: it is woken below, and faults again if need be.
            let _ = waiter.mapped.store(uffd, waiter.page);
        }
        for (i, waiter) in here.iter().enumerate() {
            // One wake for each mapping.
            if !here[..i]
                .iter()
                .any(|w| Arc::ptr_eq(&w.mapped, &waiter.mapped))
            {
                waiter.mapped.wake(uffd, first, range.count);
            }
        }
        for waiter in rest {
            self.want(waiter);
        }
    }

    /// The daemon refused a request: if it was for more than one page, each page that is waited for
    /// is asked for by itself, so that one bad page does not take its neighbours along.
    fn refused(&mut self, flight: InFlight, error: &MmapError) {
        let shared = Arc::clone(&self.shared);
        let Ok(uffd) = &shared.uffd else { return };
        for waiter in flight.waiters {
            if flight.count > 1 {
                if !self.faults.join(&waiter) {
                    self.ask(waiter, 1, FaultHint::Random);
                }
                continue;
            }
            let empty = shared.empty.as_fd();
            let change = waiter
                .mapped
                .refuse_page(uffd, empty, waiter.page, error.clone());
            if change == Change::Done {
                waiter.mapped.wake(uffd, waiter.page, 1);
            }
        }
    }

    /// Hands a newer content to the worker. Faults of the file lie until it is done.
    fn newer(
        &mut self,
        file: Arc<crate::file::FileInner>,
        (generation, version, bytes): (Generation, Version, u64),
        fd: Option<OwnedFd>,
        recall: Option<u64>,
    ) {
        let Some(fd) = fd else {
            self.lose(LostWhy::Protocol(
                "a newer content came without its descriptor".into(),
            ));
            return;
        };
        let content = Content {
            generation,
            version,
            bytes,
            home: Some(Arc::new(fd)),
        };
        file.rebases.fetch_add(1, Ordering::SeqCst);
        let _ = self.shared.jobs.send(Job::Rebase {
            file,
            content,
            recall,
        });
    }

    // ---- messages ----

    fn messages(&mut self) {
        for _ in 0..MESSAGES_BURST_MAX {
            let mut inbound = std::mem::take(&mut self.inbound);
            let received = self.shared.session.channel.try_recv(&mut inbound);
            let more = match received {
                Ok(message) => {
                    self.message(&inbound[..message.len], message.fd);
                    !self.ending
                }
                Err(ChannelError::WouldBlock) => false,
                Err(ChannelError::Closed) => {
                    self.lose(LostWhy::HungUp);
                    false
                }
                Err(e) => {
                    self.lose(LostWhy::Protocol(e.to_string()));
                    false
                }
            };
            self.inbound = inbound;
            if !more {
                return;
            }
        }
    }

    fn message(&mut self, bytes: &[u8], fd: Option<OwnedFd>) {
        let frame = match decode_header(bytes) {
            Ok(frame) => frame,
            Err(e) => return self.lose(LostWhy::Protocol(e.to_string())),
        };
        if frame.epoch != self.shared.session.epoch() {
            // Of an earlier session; it counts for nothing.
            return;
        }
        match frame.kind {
            FrameKind::Reply => {
                if self
                    .lease
                    .asked
                    .is_some_and(|(number, _)| number == frame.request)
                {
                    self.renewed(&Answer::new(bytes.to_vec(), None));
                } else if let Some(flight) = self.faults.remove(frame.request) {
                    self.answered(flight, bytes.to_vec(), fd);
                } else if let Some((mapped, page)) = self.faults.remove_restore(frame.request) {
                    self.restored(mapped, page, &Answer::new(bytes.to_vec(), None));
                } else {
                    self.shared
                        .session
                        .answer(frame.request, Answer::new(bytes.to_vec(), fd));
                }
            }
            FrameKind::Notice => match Notice::decode(&frame) {
                Ok(notice) => self.notice(notice, fd),
                Err(e) => self.lose(LostWhy::Protocol(e.to_string())),
            },
            FrameKind::Request => {
                self.lose(LostWhy::Protocol("the daemon sent a request".into()));
            }
        }
    }

    fn renewed(&mut self, answer: &Answer) {
        let Some((_, sent_ms)) = self.lease.asked.take() else {
            return;
        };
        match answer.reply() {
            Ok(Reply::Renewed { lease_ttl_ms }) => {
                // From when it was sent: the daemon counts from when it came, which is later.
                self.lease.ttl_ms = u64::from(lease_ttl_ms).max(3);
                self.lease.ends_ms = sent_ms + self.lease.ttl_ms;
                self.lease.renew_ms = sent_ms + self.lease.ttl_ms / 3;
            }
            Ok(other) => {
                let error = crate::client::unexpected("Renewed", &other);
                self.lose(LostWhy::Protocol(error.to_string()));
            }
            Err(e) => self.lose(LostWhy::Protocol(format!("the lease was not renewed: {e}"))),
        }
    }

    fn notice(&mut self, notice: Notice, fd: Option<OwnedFd>) {
        match notice {
            Notice::Invalidate {
                recall,
                file,
                generation,
                range,
                ..
            } => {
                match self.shared.file(file) {
                    Some(file) => {
                        let job = Job::Invalidate {
                            file,
                            generation,
                            range,
                            recall,
                        };
                        let _ = self.shared.jobs.send(job);
                    }
                    // Closed meanwhile: nothing is mapped.
                    None => self.shared.session.post(&Request::Ack { recall }),
                }
            }
            Notice::Rebase {
                recall,
                file,
                generation,
                version,
                bytes,
                ..
            } => match self.shared.file(file) {
                Some(file) => {
                    self.newer(file, (generation, version, bytes), fd, Some(recall));
                }
                None => self.shared.session.post(&Request::Ack { recall }),
            },
            Notice::Fenced { reason } => self.lose(LostWhy::Fenced(reason)),
            Notice::Goodbye => self.lose(LostWhy::Stopped),
        }
    }
}
