//! A guest of the demo: a process of its own that carries out orders read from standard input.

use super::pattern::{self, PageContent};
use super::proto::{Answer, Order, Watched};
use anyhow::{Context, Result, bail};
use copage_coherence::msg::OpenHow;
use copage_grants::sys::PageMap;
use copage_grants::volatile::VolatileBytes;
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64};
use copage_mmap::native::NativeMapping;
use copage_mmap::{Client, ConnectOptions, DaemonAt, Export, File, MapOptions, Mapping, MmapError};
use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

/// Bytes copied at a time for a checksum.
const COPY_BYTES: usize = 256 * 1024;

/// A mapping of any kind, read through the same type.
enum View {
    Shared(Mapping),
    Written(File, Mapping),
    Native(NativeMapping),
}

impl View {
    fn bytes(&self) -> VolatileBytes<'_> {
        match self {
            Self::Shared(mapping) | Self::Written(_, mapping) => mapping.as_volatile(),
            Self::Native(mapping) => mapping.as_volatile(),
        }
    }
}

/// A thread that reads or writes until it is told to stop.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Answer>,
}

struct Agent {
    connect: String,
    name: String,
    client: Option<Client>,
    exports: HashMap<String, Export>,
    views: Vec<Arc<View>>,
    watch: Option<Watch>,
}

/// Serves orders until `Exit` or the end of the input.
pub fn run(connect: &str, name: &str) -> Result<()> {
    let mut agent = Agent {
        connect: connect.to_owned(),
        name: name.to_owned(),
        client: None,
        exports: HashMap::new(),
        views: Vec::new(),
        watch: None,
    };
    for line in std::io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?).context("an order")?;
        if matches!(order, Order::Exit) {
            break;
        }
        let answer = agent
            .carry_out(order)
            .unwrap_or_else(|error| Answer::Failed {
                why: format!("{error:#}"),
            });
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(&answer)?)?;
        out.flush()?;
    }
    Ok(())
}

impl Agent {
    fn carry_out(&mut self, order: Order) -> Result<Answer> {
        match order {
            Order::Connect => self.connect(),
            Order::Map { export, paths } => self.map(&export, &paths),
            Order::MapNative { paths } => self.map_native(&paths),
            Order::Checksum => self.checksum(),
            Order::Frame { mapping, page } => self.frame(mapping, page),
            Order::Watch { mapping, random } => self.watch(mapping, random),
            Order::MapWritten {
                export,
                path,
                writable,
            } => self.map_written(&export, &path, writable),
            Order::Store {
                mapping,
                page,
                version,
            } => self.store(mapping, page, version),
            Order::Sync { mapping } => self.sync(mapping),
            Order::WriteOn { mapping } => self.write_on(mapping),
            Order::Stop => self.stop(),
            Order::Read { mapping, page } => self.read(mapping, page),
            Order::PageCache => page_cache(),
            Order::Unmap => {
                self.views.clear();
                Ok(Answer::Done)
            }
            Order::Exit => Ok(Answer::Done),
        }
    }

    fn connect(&mut self) -> Result<Answer> {
        let options = ConnectOptions::named(&self.name);
        let client = match self.connect.as_str() {
            "xen" => Client::connect_at(&DaemonAt::Xen, &options)?,
            socket => Client::connect(Path::new(socket), &options)?,
        };
        let domid = client.welcome().dom.0;
        self.client = Some(client);
        Ok(Answer::Connected { domid })
    }

    fn map(&mut self, export: &str, paths: &[String]) -> Result<Answer> {
        self.export(export)?;
        let mut bytes = 0;
        for path in paths {
            let node = self.exports[export].resolve(path.as_bytes())?;
            let file = node.open(OpenHow::Map).with_context(|| path.clone())?;
            bytes += file.len();
            let mapping = file
                .map(&MapOptions::default())
                .with_context(|| path.clone())?;
            self.views.push(Arc::new(View::Shared(mapping)));
        }
        Ok(Answer::Mapped { bytes })
    }

    fn map_native(&mut self, paths: &[String]) -> Result<Answer> {
        let mut bytes = 0;
        for path in paths {
            let file = std::fs::File::open(path).with_context(|| path.clone())?;
            let mapping = NativeMapping::new(&file, false).with_context(|| path.clone())?;
            bytes += mapping.as_volatile().len() as u64;
            self.views.push(Arc::new(View::Native(mapping)));
        }
        Ok(Answer::Mapped { bytes })
    }

    fn checksum(&self) -> Result<Answer> {
        let mut buffer = vec![0; COPY_BYTES];
        let xxh3 = self
            .views
            .iter()
            .map(|view| {
                let bytes = view.bytes();
                let mut hash = xxhash_rust::xxh3::Xxh3::new();
                let mut at = 0;
                while at < bytes.len() {
                    let part = buffer.len().min(bytes.len() - at);
                    bytes.read_into(at, &mut buffer[..part]);
                    hash.update(&buffer[..part]);
                    at += part;
                }
                hash.digest()
            })
            .collect();
        Ok(Answer::Checksums { xxh3 })
    }

    fn view(&self, mapping: usize) -> Result<&Arc<View>> {
        self.views
            .get(mapping)
            .with_context(|| format!("there is no mapping {mapping}"))
    }

    fn frame(&self, mapping: usize, page: u64) -> Result<Answer> {
        let bytes = self.view(mapping)?.bytes();
        let at = page as usize * PAGE_SIZE;
        // Touched, so that there is a frame to name.
        bytes.read_into(at, &mut [0]);
        let entry = PageMap::own()?.entry(bytes.as_ptr().addr() + at)?;
        Ok(Answer::Frame {
            pfn: entry.frame_number().unwrap_or(0),
        })
    }

    fn read(&self, mapping: usize, page: u64) -> Result<Answer> {
        let mut buffer = [0; PAGE_SIZE];
        self.view(mapping)?
            .bytes()
            .read_into(page as usize * PAGE_SIZE, &mut buffer);
        let version = match pattern::check(&buffer, page) {
            PageContent::Whole(version) => version,
            PageContent::Crossed { .. } | PageContent::Wrong => 0,
        };
        Ok(Answer::Page { version })
    }

    fn watch(&mut self, mapping: usize, random: bool) -> Result<Answer> {
        if self.watch.is_some() {
            bail!("already watching");
        }
        let view = Arc::clone(self.view(mapping)?);
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || Answer::Watched(watch(&view.bytes(), random, &seen)))?;
        self.watch = Some(Watch { stop, thread });
        Ok(Answer::Done)
    }

    fn stop(&mut self) -> Result<Answer> {
        let watch = self.watch.take().context("not watching")?;
        watch.stop.store(true, Ordering::Relaxed);
        match watch.thread.join() {
            Ok(answer) => Ok(answer),
            Err(_) => bail!("the thread panicked"),
        }
    }
}

impl Agent {
    fn export(&mut self, name: &str) -> Result<&Export> {
        let client = self.client.as_ref().context("not connected")?;
        if !self.exports.contains_key(name) {
            let export = client.attach(name)?;
            self.exports.insert(name.to_owned(), export);
        }
        self.exports.get(name).context("an export")
    }

    fn map_written(&mut self, export: &str, path: &str, writable: bool) -> Result<Answer> {
        let node = self.export(export)?.resolve(path.as_bytes())?;
        let file = if writable {
            node.open_for_writing(OpenHow::Map)?
        } else {
            node.open(OpenHow::Map)?
        };
        let mapping = file.map(&MapOptions {
            writable,
            ..MapOptions::shared()
        })?;
        let bytes = file.len();
        self.views.push(Arc::new(View::Written(file, mapping)));
        Ok(Answer::Mapped { bytes })
    }

    fn store(&self, mapping: usize, page: u64, version: u32) -> Result<Answer> {
        let View::Written(_, mapping) = &**self.view(mapping)? else {
            bail!("mapping {mapping} is not written");
        };
        let bytes = mapping
            .as_volatile_mut()
            .context("it is mapped to be read")?;
        let mut content = [0; PAGE_SIZE];
        pattern::fill(&mut content, page, version);
        let at = page as usize * PAGE_SIZE;
        let begin = Instant::now();
        bytes.write_from(at, &content[..8]);
        let ns = begin.elapsed().as_nanos() as u64;
        bytes.write_from(at, &content);
        Ok(Answer::Stored { ns })
    }

    fn sync(&self, mapping: usize) -> Result<Answer> {
        let View::Written(file, _) = &**self.view(mapping)? else {
            bail!("mapping {mapping} is not written");
        };
        file.sync()?;
        Ok(Answer::Done)
    }

    fn write_on(&mut self, mapping: usize) -> Result<Answer> {
        if self.watch.is_some() {
            bail!("already at work");
        }
        let view = Arc::clone(self.view(mapping)?);
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("write".into())
            .spawn(move || {
                write_on(&view, &seen).unwrap_or_else(|error| Answer::Failed {
                    why: format!("{error:#}"),
                })
            })?;
        self.watch = Some(Watch { stop, thread });
        Ok(Answer::Done)
    }
}

/// See [`Order::WriteOn`].
fn write_on(view: &View, stop: &AtomicBool) -> Result<Answer> {
    let View::Written(file, mapping) = view else {
        bail!("the mapping is not written");
    };
    let bytes = mapping
        .as_volatile_mut()
        .context("it is mapped to be read")?;
    let pages = bytes.len() as u64 / PAGE_SIZE_U64;
    let (mut acked, mut at_kill, mut again) = (0, None, 0);
    while !stop.load(Ordering::Relaxed) {
        let n = acked + 1;
        let at = (n % pages) as usize * PAGE_SIZE;
        if !bytes.write_u64(at, n) {
            bail!("no word at {at}");
        }
        match file.sync() {
            Ok(()) => acked = n,
            Err(MmapError::WritesLost) => {
                at_kill.get_or_insert(acked);
                again += 1;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Answer::Wrote {
        acked,
        at_kill: at_kill.unwrap_or(acked),
        again,
    })
}

/// What this kernel keeps of files, in bytes.
fn page_cache() -> Result<Answer> {
    let text = std::fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let cached = text.lines().find_map(|line| line.strip_prefix("Cached:"));
    let kib = cached.and_then(|rest| rest.split_whitespace().next());
    let kib: u64 = kib.context("/proc/meminfo: no Cached")?.parse()?;
    Ok(Answer::PageCache { bytes: kib * 1024 })
}

/// Reads pages and checks every word of each until `stop`.
fn watch(bytes: &VolatileBytes<'_>, random: bool, stop: &AtomicBool) -> Watched {
    let begin = Instant::now();
    let pages = bytes.len() as u64 / PAGE_SIZE_U64;
    let mut seen = vec![0_u32; pages as usize];
    let mut watched = Watched::default();
    let mut buffer = [0; PAGE_SIZE];
    let mut newest = 0;
    let mut draw = 0x243f_6a88_85a3_08d3_u64 ^ u64::from(std::process::id());
    let mut page = 0;
    while !stop.load(Ordering::Relaxed) && pages > 0 {
        page = if random {
            draw = draw
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (draw >> 33) % pages
        } else {
            (page + 1) % pages
        };
        let at = page as usize * PAGE_SIZE;
        bytes.read_into(at, &mut buffer);
        let mut content = pattern::check(&buffer, page);
        if let PageContent::Crossed { .. } = content {
            watched.crossed += 1;
            bytes.read_into(at, &mut buffer);
            content = pattern::check(&buffer, page);
        }
        match content {
            PageContent::Whole(version) => {
                watched.backwards += u64::from(version < seen[page as usize]);
                seen[page as usize] = version;
                watched.version = version;
                if version > newest {
                    newest = version;
                    watched.newest_seen_ns = super::monotonic_ns();
                }
            }
            // Twice in a row no change can hit the copy of one page.
            PageContent::Crossed { .. } | PageContent::Wrong => watched.wrong += 1,
        }
        watched.pages += 1;
    }
    watched.seconds = begin.elapsed().as_secs_f64();
    watched
}
