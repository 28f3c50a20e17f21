//! A guest of the tests: a process that carries out orders read from standard input, one JSON
//! document a line. Other roles by arguments: `attack` (the descriptor that is its standard input),
//! `attack-process PID`, `mute SOCKET NAME FILE map|pin` (holds and never lets go).
#![forbid(unsafe_code)]

mod written;

use anyhow::{Context, Result, bail};
use copage::demo::pattern::{self, PageContent};
use copage_coherence::msg::OpenHow;
use copage_grants::volatile::{VolatileBytes, VolatileBytesMut};
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64};
use copage_mmap::native::NativeMapping;
use copage_mmap::{
    Client, ConnectOptions, Export, File, MapOptions, Mapping, MmapError, UserfaultPolicy,
};
use copage_tests::attack;
use copage_tests::history::{OneMachine, Plan, SharedFile, log_file, record};
use copage_tests::orders::{Answer, Order, Watched};
use copage_tests::watch::watch;
use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use written::Counting;

/// A mapping of either kind, with the file that keeps it.
enum View {
    Faulted(Mapping, File),
    Pinned(NativeMapping, File),
}

impl View {
    fn bytes(&self) -> VolatileBytes<'_> {
        match self {
            Self::Faulted(mapping, _) => mapping.as_volatile(),
            Self::Pinned(mapping, _) => mapping.as_volatile(),
        }
    }

    fn bytes_mut(&self) -> Result<VolatileBytesMut<'_>> {
        let Self::Faulted(mapping, _) = self else {
            bail!("a pinned file is not stored to");
        };
        mapping
            .as_volatile_mut()
            .context("the mapping is read-only")
    }

    fn file(&self) -> &File {
        match self {
            Self::Faulted(_, file) | Self::Pinned(_, file) => file,
        }
    }
}

/// A thread that reads until it is told to stop.
struct Watch {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Watched>>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Agent {
    client: Option<Client>,
    exports: HashMap<String, Export>,
    views: Vec<Arc<View>>,
    files: Vec<Option<File>>,
    watch: Option<Watch>,
    counting: Vec<Counting>,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        [] => {
            // What the library has to say, for who looks why a guest ended.
            tracing_subscriber::fmt()
                .with_ansi(false)
                .with_writer(std::io::stderr)
                .init();
            orders()
        }
        ["attack"] => {
            println!(
                "{}",
                serde_json::to_string(&attack::descriptor(&std::io::stdin()))?
            );
            Ok(())
        }
        ["attack-process", pid] => {
            println!("{}", serde_json::to_string(&attack::process(pid.parse()?))?);
            Ok(())
        }
        ["mute", socket, name, path, how] => {
            Ok(copage_tests::mute::run(Path::new(socket), name, path, how)?)
        }
        _ => bail!("unknown arguments: {args:?}"),
    }
}

/// Carries out orders until there are no more.
fn orders() -> Result<()> {
    let mut agent = Agent::default();
    for line in std::io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?).context("an order")?;
        let answer = agent
            .carry_out(order)
            .unwrap_or_else(|error| Answer::Failed {
                errno: errno(&error),
                why: format!("{error:#}"),
            });
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(&answer)?)?;
        out.flush()?;
    }
    Ok(())
}

/// The number of the innermost error that has one.
fn errno(error: &anyhow::Error) -> i32 {
    let number = |cause: &(dyn std::error::Error + 'static)| {
        let own = cause.downcast_ref::<MmapError>().map(MmapError::errno);
        own.or_else(|| cause.downcast_ref::<std::io::Error>()?.raw_os_error())
    };
    error.chain().find_map(number).unwrap_or(0)
}

fn answer_page(bytes: &[u8], page: u64) -> Answer {
    let version = match pattern::check(bytes, page) {
        PageContent::Whole(version) => Some(version),
        PageContent::Crossed { .. } | PageContent::Wrong => None,
    };
    Answer::Page {
        version,
        zero: bytes.iter().all(|&b| b == 0),
    }
}

impl Agent {
    fn carry_out(&mut self, order: Order) -> Result<Answer> {
        match order {
            Order::Connect {
                socket,
                name,
                userfault,
                reconnect_ms,
            } => self.connect(&socket, name, &userfault, reconnect_ms),
            Order::Map {
                export,
                path,
                private,
            } => {
                let file = self.open(&export, &path, OpenHow::Map)?;
                let how = if private {
                    MapOptions::private()
                } else {
                    MapOptions::shared()
                };
                let mapping = file.map(&how)?;
                Ok(self.keep(View::Faulted(mapping, file)))
            }
            Order::Pin { export, path } => {
                let file = self.open(&export, &path, OpenHow::Pin)?;
                let plain = std::fs::File::from(file.descriptor()?);
                let mapping = NativeMapping::new(&plain, false)?;
                Ok(self.keep(View::Pinned(mapping, file)))
            }
            Order::Load { mapping, page } => {
                let mut bytes = [0; PAGE_SIZE];
                let got = self
                    .view(mapping)?
                    .bytes()
                    .read_into(page as usize * PAGE_SIZE, &mut bytes);
                if got != PAGE_SIZE {
                    bail!("the mapping ends within page {page}");
                }
                Ok(answer_page(&bytes, page))
            }
            Order::Probe { mapping, page } => {
                let mut bytes = [0; PAGE_SIZE];
                let at = self.address(mapping, page)?;
                if copage_grants::sys::read_own_memory(at as usize, &mut bytes)? != PAGE_SIZE {
                    bail!("page {page} is there in part");
                }
                Ok(answer_page(&bytes, page))
            }
            Order::Poke { mapping, page } => {
                let at = self.address(mapping, page)?;
                let memory = std::fs::File::options()
                    .write(true)
                    .open("/proc/self/mem")?;
                memory.write_all_at(&[0xEE; PAGE_SIZE], at)?;
                Ok(Answer::Done)
            }
            Order::Populate {
                mapping,
                first,
                count,
            } => match &*self.view(mapping)? {
                View::Faulted(mapping, _) => {
                    let range = first as usize * PAGE_SIZE
                        ..((first + count) as usize * PAGE_SIZE).min(mapping.len());
                    mapping.populate(range)?;
                    Ok(Answer::Done)
                }
                View::Pinned(..) => bail!("a pinned file is populated"),
            },
            Order::Watch { run_pages } => self.watch(run_pages),
            Order::Look => {
                let watch = self.watch.as_ref().context("not watching")?;
                let seen = *watch
                    .seen
                    .lock()
                    .map_err(|_| anyhow::anyhow!("the watcher panicked"))?;
                Ok(Answer::Watched(seen))
            }
            Order::Stop => self.stop(),
            Order::Read {
                export,
                path,
                offset,
                len,
            } => {
                let file = self.open(&export, &path, OpenHow::Read)?;
                let mut bytes = vec![0; len];
                let got = file.read_at(&mut bytes, offset)?;
                bytes.truncate(got);
                Ok(Answer::Bytes { bytes })
            }
            Order::Open { .. }
            | Order::MapFile { .. }
            | Order::ReadAt { .. }
            | Order::WriteAt { .. }
            | Order::SetLen { .. }
            | Order::Sync { .. }
            | Order::Close { .. } => self.use_file(order),
            Order::LoadWord {
                mapping,
                offset,
                probe,
            } => self.load_word(mapping, offset, probe),
            Order::StoreWord {
                mapping,
                offset,
                value,
            } => self.store_word(mapping, offset, value),
            order @ (Order::Count { .. } | Order::Follow { .. } | Order::Stamp { .. }) => {
                self.go_on(order)
            }
            Order::StopCounting => self.stop_counting(),
            Order::Compare { mapping, with } => self.compare(mapping, &with),
            Order::Generation { mapping } => {
                let view = self.view(mapping)?;
                let file = view.file();
                Ok(Answer::Generation {
                    generation: file.generation().0,
                    bytes: file.len(),
                    host_bounded: file.host_bounded(),
                })
            }
            Order::LastError { mapping } => match &*self.view(mapping)? {
                View::Faulted(mapping, _) => {
                    let why = mapping
                        .last_error()
                        .map(|e| format!("{:?}: {}", e.offset, e.error));
                    Ok(Answer::Lost { why })
                }
                View::Pinned(..) => Ok(Answer::Lost { why: None }),
            },
            Order::Record {
                export,
                path,
                plan,
                log,
            } => self.record(&export, &path, &plan, &log),
            Order::Unmap => {
                self.views.clear();
                Ok(Answer::Done)
            }
            Order::Lost => {
                let client = self.client.as_ref().context("not connected")?;
                Ok(Answer::Lost {
                    why: client.lost().map(|why| why.to_string()),
                })
            }
            Order::Reconnects => {
                let client = self.client.as_ref().context("not connected")?;
                Ok(Answer::Reconnects {
                    count: client.reconnects(),
                })
            }
            Order::Disconnect => {
                self.views.clear();
                self.files.clear();
                self.exports.clear();
                self.client = None;
                Ok(Answer::Done)
            }
        }
    }

    fn connect(
        &mut self,
        socket: &str,
        name: String,
        userfault: &str,
        reconnect_ms: u32,
    ) -> Result<Answer> {
        let userfault = match userfault {
            "best" => UserfaultPolicy::Best,
            "user-mode-only" => UserfaultPolicy::UserModeOnly,
            "none" => UserfaultPolicy::None,
            other => bail!("no such policy: {other}"),
        };
        self.exports.clear();
        let options = ConnectOptions {
            name,
            userfault,
            reconnect_ms,
        };
        let client = Client::connect(Path::new(socket), &options)?;
        let welcome = client.welcome();
        let full = client.userfault_mode() == copage_mmap::UserfaultMode::Full;
        self.client = Some(client);
        Ok(Answer::Connected {
            dom: welcome.dom.0,
            epoch: welcome.epoch.0,
            name: welcome.name,
            read_only_enforced: welcome.read_only_enforced,
            full,
        })
    }

    fn open(&mut self, export: &str, path: &str, how: OpenHow) -> Result<File> {
        if !self.exports.contains_key(export) {
            let client = self.client.as_ref().context("not connected")?;
            self.exports
                .insert(export.to_owned(), client.attach(export)?);
        }
        Ok(self.exports[export].open(path, how)?)
    }

    fn record(&mut self, export: &str, path: &str, plan: &Plan, log: &str) -> Result<Answer> {
        let client = self.client.as_ref().context("not connected")?;
        let node = client.attach(export)?.resolve(path)?;
        let file = node.open_for_writing(OpenHow::Map)?;
        let mapping = file.map(&MapOptions::written())?;
        let log = log_file(log.as_ref())?;
        let ops = record(plan, &SharedFile::new(file, mapping), &OneMachine, log)?;
        Ok(Answer::Recorded { ops })
    }

    fn keep(&mut self, view: View) -> Answer {
        let bytes = view.bytes().len() as u64;
        self.views.push(Arc::new(view));
        Answer::Mapped {
            mapping: self.views.len() - 1,
            bytes,
        }
    }

    fn view(&self, mapping: usize) -> Result<Arc<View>> {
        self.views
            .get(mapping)
            .cloned()
            .with_context(|| format!("there is no mapping {mapping}"))
    }

    fn address(&self, mapping: usize, page: u64) -> Result<u64> {
        Ok(self.view(mapping)?.bytes().as_ptr().addr() as u64 + page * PAGE_SIZE_U64)
    }

    fn compare(&self, mapping: usize, with: &str) -> Result<Answer> {
        let view = self.view(mapping)?;
        let ours = view.bytes();
        let theirs = std::fs::File::open(with)?;
        let mut at = 0;
        let (mut a, mut b) = (vec![0; 1 << 18], vec![0; 1 << 18]);
        while at < ours.len() {
            let len = a.len().min(ours.len() - at);
            ours.read_into(at, &mut a[..len]);
            theirs.read_exact_at(&mut b[..len], at as u64)?;
            if let Some(differs) = (0..len).find(|&i| a[i] != b[i]) {
                let differs_at = Some((at + differs) as u64);
                return Ok(Answer::Compared {
                    bytes: at as u64,
                    differs_at,
                });
            }
            at += len;
        }
        Ok(Answer::Compared {
            bytes: at as u64,
            differs_at: None,
        })
    }

    fn watch(&mut self, run_pages: u64) -> Result<Answer> {
        if self.watch.is_some() {
            bail!("already watching");
        }
        let views = self.views.clone();
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Watched::default()));
        let (of_thread, into) = (Arc::clone(&stop), Arc::clone(&seen));
        let seed = u64::from(std::process::id());
        let thread = std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || {
                let bytes: Vec<_> = views.iter().map(|view| view.bytes()).collect();
                watch(&bytes, run_pages, seed, &of_thread, &into);
            })?;
        self.watch = Some(Watch { stop, seen, thread });
        Ok(Answer::Done)
    }

    fn stop(&mut self) -> Result<Answer> {
        let watch = self.watch.take().context("not watching")?;
        watch.stop.store(true, Ordering::Relaxed);
        if watch.thread.join().is_err() {
            bail!("the watching thread panicked");
        }
        let seen = *watch
            .seen
            .lock()
            .map_err(|_| anyhow::anyhow!("the watcher panicked"))?;
        Ok(Answer::Watched(seen))
    }
}
