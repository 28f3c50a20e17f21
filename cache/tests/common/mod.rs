//! A cache over a backend and a directory, with the part of the daemon that tests need: it drains
//! events, ticks, and answers recalls as a guest that obeys.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use copage_cache::*;
use copage_grants::*;
use crossbeam_channel::{Receiver, unbounded};
use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The signal that reports broken leases in tests: ignored by default, so it ends no test process.
const LEASE_SIGNAL: i32 = libc::SIGURG;

pub const PAGE: usize = PAGE_SIZE;

pub struct Rig {
    pub cache: Arc<Cache>,
    pub backend: Arc<dyn Backend>,
    pub dir: tempfile::TempDir,
    pub export: ExportId,
    pub acks: bool,
    /// What was asked back and not acked: first page, pages, when.
    pub asked: Vec<(PageIndex, u32, Instant)>,
    pub recalls: u64,
    pub retired: u64,
    pub withdrawn: u64,
    /// What was told of coherent files, in order.
    pub strict: Vec<CacheEvent>,
    receiver: Receiver<CacheEvent>,
    answers: HashMap<u64, CacheEvent>,
    ticket: u64,
}

pub fn config(frames_max: u32) -> CacheConfig {
    CacheConfig {
        frames_max,
        host_settle_ms: 40,
        recall_deadline_ms: 300,
        lease_signal: Some(LEASE_SIGNAL),
        ..CacheConfig::default()
    }
}

pub fn local(force: bool) -> Arc<dyn Backend> {
    let config = LocalConfig {
        force,
        entries: 65_536,
        ..LocalConfig::default()
    };
    Arc::new(LocalBackend::new(config).unwrap())
}

pub fn who(n: u16) -> Holder {
    Holder {
        dom: DomId(n),
        guest: u32::from(n) + 100,
        class: TrustClass::OWN,
    }
}

/// Content that tells file, page and round apart.
pub fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

impl Rig {
    pub fn new(frames_max: u32) -> Self {
        Self::with(local(true), config(frames_max))
    }

    pub fn with(backend: Arc<dyn Backend>, config: CacheConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().into();
        Self::of(backend, config, dir, spec("e", path))
    }

    /// The same with an export of one's own in `dir`.
    pub fn of(
        backend: Arc<dyn Backend>,
        config: CacheConfig,
        dir: tempfile::TempDir,
        spec: ExportSpec,
    ) -> Self {
        let (sender, receiver) = unbounded();
        let sink = EventSink::new(sender, Arc::new(|| {}));
        let cache = Cache::new(backend.clone(), config, sink).unwrap();
        let export = cache.add_export(spec).unwrap();
        Self {
            cache,
            backend,
            dir,
            export,
            acks: true,
            asked: Vec::new(),
            recalls: 0,
            retired: 0,
            withdrawn: 0,
            strict: Vec::new(),
            receiver,
            answers: HashMap::new(),
            ticket: 0,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, data: &[u8]) {
        std::fs::write(self.path(name), data).unwrap();
    }

    pub fn node(&self, name: &str) -> NodeRef {
        let root = self.cache.root(self.export).unwrap();
        self.cache.lookup(&root, name.as_bytes()).unwrap().0
    }

    pub fn ticket(&mut self) -> u64 {
        self.ticket += 1;
        self.ticket
    }

    /// Takes in what happened within `wait`.
    pub fn pump(&mut self, wait: Duration) {
        self.cache.tick(Cache::now_ms());
        self.cache.host_events();
        let Ok(event) = self.receiver.recv_timeout(wait) else {
            return;
        };
        for event in std::iter::once(event).chain(self.receiver.try_iter().collect::<Vec<_>>()) {
            match event {
                CacheEvent::Faulted { ticket, .. }
                | CacheEvent::Opened { ticket, .. }
                | CacheEvent::Read { ticket, .. }
                | CacheEvent::Meta { ticket, .. } => {
                    assert!(
                        self.answers.insert(ticket, event).is_none(),
                        "answered twice"
                    );
                }
                CacheEvent::Placed { .. }
                | CacheEvent::Saved { .. }
                | CacheEvent::Synced { .. }
                | CacheEvent::Reserved { .. }
                | CacheEvent::Resized { .. }
                | CacheEvent::WantBack { .. }
                | CacheEvent::HostWants { .. }
                | CacheEvent::HostChanged { .. } => self.strict.push(event),
                CacheEvent::Retired { .. } => self.retired += 1,
                CacheEvent::Withdrawn { .. } => self.withdrawn += 1,
                CacheEvent::Recall {
                    file,
                    generation,
                    first,
                    count,
                    holders,
                    ..
                } => {
                    self.recalls += 1;
                    if !self.acks {
                        self.asked.push((first, count, Instant::now()));
                    }
                    for dom in holders.into_iter().filter(|_| self.acks) {
                        let holder = who(dom.0);
                        self.cache.unmapped(&file, holder, generation, first, count);
                        self.cache.recall_done(
                            &file,
                            generation,
                            first,
                            count,
                            dom,
                            RecallEnd::Acked,
                        );
                    }
                }
            }
        }
    }

    /// The same, for threads that do not wait for their answers.
    pub fn pump_discarding(&mut self, wait: Duration) {
        self.pump(wait);
        self.answers.clear();
    }

    pub fn wait(&mut self, ticket: u64) -> CacheEvent {
        let start = Instant::now();
        loop {
            if let Some(event) = self.answers.remove(&ticket) {
                return event;
            }
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "no answer: {:?}",
                self.cache.stats()
            );
            self.pump(Duration::from_millis(5));
        }
    }

    pub fn open(&mut self, name: &str, how: OpenHow, who: Holder) -> Result<OpenDone, CacheError> {
        self.open_to(name, how, who, false)
    }

    pub fn open_to(
        &mut self,
        name: &str,
        how: OpenHow,
        who: Holder,
        write: bool,
    ) -> Result<OpenDone, CacheError> {
        let node = self.node(name);
        let ticket = self.ticket();
        self.cache.open(ticket, node, how, who, write);
        match self.wait(ticket) {
            CacheEvent::Opened { result, .. } => result,
            other => panic!("{other:?}"),
        }
    }

    pub fn map(&mut self, name: &str, who: Holder) -> Arc<CachedFile> {
        self.open(name, OpenHow::Map, who).unwrap().file
    }

    pub fn fault_of(
        &mut self,
        file: &Arc<CachedFile>,
        who: Holder,
        generation: u32,
        range: (u64, u32),
        hint: FaultHint,
    ) -> Result<FaultDone, CacheError> {
        let ticket = self.ticket();
        let first = PageIndex(range.0);
        match self
            .cache
            .fault(ticket, file, who, generation, first, range.1, hint)
        {
            FaultOutcome::Ready(result) => result,
            FaultOutcome::Pending => match self.wait(ticket) {
                CacheEvent::Faulted { result, .. } => result,
                other => panic!("{other:?}"),
            },
        }
    }

    /// Faults until it is granted, following new generations; returns the generation and the count.
    pub fn fault(
        &mut self,
        file: &Arc<CachedFile>,
        who: Holder,
        first: u64,
        count: u32,
    ) -> Result<(u32, u32), CacheError> {
        let mut generation = self.cache.current(file).generation;
        for _ in 0..50 {
            match self.fault_of(file, who, generation, (first, count), FaultHint::Random)? {
                FaultDone::Granted {
                    generation: g,
                    first: f,
                    count,
                    ..
                } => {
                    assert_eq!((g, f.0), (generation, first));
                    return Ok((g, count));
                }
                FaultDone::Stale(state) => generation = state.generation,
            }
        }
        panic!("stale again and again");
    }

    /// What the guest sees of a page that was granted: the bytes of the home. `None` when the home
    /// was replaced meanwhile.
    pub fn page(&self, file: &Arc<CachedFile>, generation: u32, page: u64) -> Option<Vec<u8>> {
        let fd = self.cache.descriptor(file, generation).ok()?;
        let mut buf = vec![0; PAGE];
        let n = std::fs::File::from(fd)
            .read_at(&mut buf, page * PAGE as u64)
            .unwrap();
        buf.truncate(n);
        Some(buf)
    }

    /// Faults a page and compares it with `data`, the file's content, of which no page is all zero.
    /// A page that is taken back between the grant and the look faults again, as in a mapping.
    pub fn check(&mut self, file: &Arc<CachedFile>, who: Holder, page: u64, data: &[u8]) {
        let start = page as usize * PAGE;
        for _ in 0..50 {
            let (generation, _) = self.fault(file, who, page, 1).unwrap();
            let Some(seen) = self.page(file, generation, page) else {
                continue;
            };
            if seen.iter().any(|b| *b != 0) {
                assert!(
                    seen == data[start..data.len().min(start + PAGE)],
                    "page {page} is wrong"
                );
                return;
            }
        }
        panic!("page {page} never came: {:?}", self.cache.stats());
    }

    pub fn read(
        &mut self,
        file: &Arc<CachedFile>,
        who: Holder,
        offset: u64,
        len: u32,
    ) -> Result<Vec<u8>, CacheError> {
        let ticket = self.ticket();
        self.cache.read(ticket, file, who, offset, len);
        match self.wait(ticket) {
            CacheEvent::Read { result, .. } => result,
            other => panic!("{other:?}"),
        }
    }

    /// Stands for the daemon's signal loop: which descriptor it was does not matter.
    pub fn break_leases(&self) {
        for fd in 0..4096 {
            self.cache.lease_broken(fd);
        }
    }

    /// Changes a file as a host process would, with the daemon alive beside it.
    pub fn host(&mut self, change: impl FnOnce() + Send) {
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let done = &done;
            scope.spawn(move || {
                change();
                done.store(true, std::sync::atomic::Ordering::Release);
            });
            while !done.load(std::sync::atomic::Ordering::Acquire) {
                self.break_leases();
                self.pump(Duration::from_millis(1));
            }
        });
        self.pump(Duration::from_millis(1));
    }

    pub fn audit(&mut self) {
        let start = Instant::now();
        // Fills of readahead, reclaim ahead of need: the audit of counts is exact when they are done.
        while self.cache.stats().frames_filling > 0 && start.elapsed() < Duration::from_secs(5) {
            self.pump(Duration::from_millis(1));
        }
        let report = self.cache.audit();
        assert!(report.is_clean(), "{report:#?}");
    }

    pub fn until(&mut self, what: &str, mut is: impl FnMut(&CacheStats) -> bool) {
        let start = Instant::now();
        while !is(&self.cache.stats()) {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "{what}: {:?}",
                self.cache.stats()
            );
            self.pump(Duration::from_millis(2));
        }
    }
}

pub fn spec(name: &str, path: PathBuf) -> ExportSpec {
    ExportSpec {
        name: name.into(),
        path,
        group: "g".into(),
        mode: ExportMode::ReadOnly,
    }
}
