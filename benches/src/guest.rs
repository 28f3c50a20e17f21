//! Guests in processes of their own: they take orders on stdin, one JSON value a line, and answer
//! each by one on stdout.

use crate::daemon;
use crate::pattern::Random;
use crate::process::Faults;
use crate::reader;
use crate::role::{self, Role};
use anyhow::{Context, Result, bail, ensure};
use copage_grants::PAGE_SIZE;
use copage_mmap::native::NativeMapping;
use copage_mmap::{Client, ConnectOptions, File, Mapping};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Instant;

/// What a guest does next.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Begins a session.
    Connect {
        /// The daemon's socket.
        socket: PathBuf,
    },
    /// Opens and maps a file of the export, touching nothing.
    Map {
        /// Its name.
        name: String,
    },
    /// Maps a file of the host instead.
    MapNative {
        /// Where it is.
        path: PathBuf,
    },
    /// Opens and maps a file of the export to be written, touching nothing.
    MapWritable {
        /// Its name.
        name: String,
    },
    /// Maps a file of the host to be written instead.
    MapNativeWritable {
        /// Where it is.
        path: PathBuf,
    },
    /// Stores to the first word of each page from the last to the first, and times each: see [`stored_sum`].
    StoreEach {
        /// What, together with the page's number.
        value: u64,
    },
    /// Reads the first word of each page from the last to the first, and times each.
    TouchEach,
    /// Stores to the first word of each of the first pages, then syncs the file, which is timed.
    StoreAndSync {
        /// What, together with the page's number.
        value: u64,
        /// How many pages.
        pages: u64,
    },
    /// Stores to one word again and again.
    StoreLoop {
        /// Where, in bytes.
        offset: usize,
        /// How often.
        stores: u64,
    },
    /// Has every page granted and mapped.
    Populate,
    /// Adds up all words.
    Sum,
    /// Touches each page once, in order.
    Touch,
    /// Touches pages at random and times each: those whose number is `part` modulo `parts`.
    Latency {
        /// Of the file's content.
        seed: u64,
        /// How many.
        count: u64,
        /// Which share of the pages is this guest's.
        part: u64,
        /// Among how many guests the pages are shared out.
        parts: u64,
    },
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// How long the work took.
    pub seconds: f64,
    /// The sum of what was read.
    pub sum: u64,
    /// Faults of the working thread.
    pub faults: (u64, u64),
    /// How long the sync alone took.
    pub seconds_of_sync: f64,
    /// For each timed touch, in ns.
    pub latencies_ns: Vec<u64>,
    /// Why it failed.
    pub error: Option<String>,
}

/// A guest's process; ended when dropped.
pub struct Guest {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Guest {
    /// Starts a process that is not yet connected.
    pub fn spawn() -> Result<Self> {
        let mut child = role::command(Role::Guest)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("a guest's process")?;
        let orders = child.stdin.take();
        let answers = child.stdout.take().context("a guest's stdout")?;
        Ok(Self {
            child,
            orders,
            answers: BufReader::new(answers),
        })
    }

    /// Starts `count` guests with a session each.
    pub fn spawn_connected(count: usize, socket: &Path) -> Result<Vec<Self>> {
        let mut guests = Vec::new();
        for _ in 0..count {
            let mut guest = Self::spawn()?;
            guest.order(&Order::Connect {
                socket: socket.to_owned(),
            })?;
            guests.push(guest);
        }
        Ok(guests)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives an order without waiting for the answer.
    pub fn send(&mut self, order: &Order) -> Result<()> {
        let orders = self.orders.as_mut().context("a guest that is ending")?;
        let mut line = serde_json::to_string(order)?;
        line.push('\n');
        Ok(orders.write_all(line.as_bytes())?)
    }

    /// Waits for the answer to the oldest order that has none.
    pub fn receive(&mut self) -> Result<Answer> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        if line.is_empty() {
            bail!("a guest ended: {:?}", self.child.wait()?);
        }
        let answer: Answer = serde_json::from_str(&line)?;
        match answer.error {
            Some(error) => bail!("a guest: {error}"),
            None => Ok(answer),
        }
    }

    /// Gives an order and waits for the answer.
    pub fn order(&mut self, order: &Order) -> Result<Answer> {
        self.send(order)?;
        self.receive()
    }
}

/// Gives all of them the same order at the same time.
pub fn order_all(guests: &mut [Guest], order: &Order) -> Result<Vec<Answer>> {
    for guest in guests.iter_mut() {
        guest.send(order)?;
    }
    guests.iter_mut().map(Guest::receive).collect()
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The end of its orders ends it.
        self.orders = None;
        let _ = self.child.wait();
    }
}

/// What `StoreEach` stores to a page.
fn stored(value: u64, page: u64) -> u64 {
    (value << 32) | page
}

/// What [`Order::Touch`] finds in so many pages after [`Order::StoreEach`].
pub fn stored_sum(value: u64, pages: u64) -> u64 {
    (0..pages).fold(0, |sum, page| sum.wrapping_add(stored(value, page)))
}

/// Have the first pages of a file what `StoreEach` stores?
pub fn is_stored(bytes: &[u8], value: u64, pages: u64) -> bool {
    let mut all = (0..pages).zip(bytes.chunks(PAGE_SIZE));
    let words = bytes.len() as u64 >= pages * PAGE_SIZE as u64;
    words && all.all(|(page, bytes)| bytes.starts_with(&stored(value, page).to_le_bytes()))
}

enum Mapped {
    Shared(Mapping),
    Native(NativeMapping),
}

impl Mapped {
    fn bytes(&self) -> copage_grants::volatile::VolatileBytes<'_> {
        match self {
            Self::Shared(mapping) => mapping.as_volatile(),
            Self::Native(mapping) => mapping.as_volatile(),
        }
    }
}

#[derive(Default)]
struct State {
    // Dropped in this order: what is mapped, then the session.
    mapped: Option<Mapped>,
    file: Option<File>,
    client: Option<Client>,
}

impl State {
    fn bytes(&self) -> Result<copage_grants::volatile::VolatileBytes<'_>> {
        Ok(self.mapped.as_ref().context("nothing is mapped")?.bytes())
    }

    fn bytes_mut(&self) -> Result<copage_grants::volatile::VolatileBytesMut<'_>> {
        let mapped = self.mapped.as_ref().context("nothing is mapped")?;
        let bytes = match mapped {
            Mapped::Shared(mapping) => mapping.as_volatile_mut(),
            Mapped::Native(mapping) => mapping.as_volatile_mut(),
        };
        bytes.context("it is mapped to be read")
    }

    fn work(&mut self, order: Order) -> Result<Answer> {
        let mut answer = Answer::default();
        match order {
            Order::Connect { socket } => {
                self.client = Some(Client::connect(&socket, &ConnectOptions::default())?);
            }
            Order::Map { name } => {
                let client = self.client.as_ref().context("no session")?;
                // The mapping keeps the file open.
                let (_, mapping) = daemon::map(client, &name)?;
                self.mapped = Some(Mapped::Shared(mapping));
            }
            Order::MapNative { path } => {
                let file = std::fs::File::open(path)?;
                self.mapped = Some(Mapped::Native(NativeMapping::new(&file, false)?));
            }
            Order::Populate => match self.mapped.as_ref().context("nothing is mapped")? {
                Mapped::Shared(mapping) => mapping.populate(0..mapping.len())?,
                Mapped::Native(_) => bail!("a native mapping"),
            },
            Order::MapWritable { name } => {
                let client = self.client.as_ref().context("no session")?;
                let (file, mapping) = daemon::map_writable(client, &name)?;
                self.mapped = Some(Mapped::Shared(mapping));
                self.file = Some(file);
            }
            Order::MapNativeWritable { path } => {
                let file = std::fs::File::options().read(true).write(true).open(path)?;
                self.mapped = Some(Mapped::Native(NativeMapping::writable(&file)?));
            }
            Order::StoreEach { value } => {
                let bytes = self.bytes_mut()?;
                for page in (0..bytes.len().div_ceil(PAGE_SIZE)).rev() {
                    let begin = Instant::now();
                    let at = page * PAGE_SIZE;
                    let fits = bytes.write_u64(at, stored(value, page as u64));
                    answer.latencies_ns.push(begin.elapsed().as_nanos() as u64);
                    ensure!(fits, "no word at {at}");
                }
            }
            Order::TouchEach => {
                let bytes = self.bytes()?;
                for page in (0..bytes.len().div_ceil(PAGE_SIZE)).rev() {
                    let begin = Instant::now();
                    let word = reader::touch(bytes, [page as u64]);
                    answer.latencies_ns.push(begin.elapsed().as_nanos() as u64);
                    answer.sum = answer.sum.wrapping_add(word);
                }
            }
            Order::StoreAndSync { value, pages } => {
                let bytes = self.bytes_mut()?;
                for page in 0..pages {
                    let at = page as usize * PAGE_SIZE;
                    ensure!(bytes.write_u64(at, stored(value, page)), "no word at {at}");
                }
                let file = self.file.as_ref().context("nothing is open")?;
                let begin = Instant::now();
                file.sync()?;
                answer.seconds_of_sync = begin.elapsed().as_secs_f64();
            }
            Order::StoreLoop { offset, stores } => {
                let bytes = self.bytes_mut()?;
                let fit = (0..stores).all(|value| bytes.write_u64(offset, value));
                ensure!(fit, "no word at {offset}");
            }
            Order::Sum => answer.sum = reader::sum_all(self.bytes()?),
            Order::Touch => {
                let bytes = self.bytes()?;
                let pages = (bytes.len() / PAGE_SIZE) as u64;
                answer.sum = reader::touch(bytes, 0..pages);
            }
            Order::Latency {
                seed,
                count,
                part,
                parts,
            } => {
                let bytes = self.bytes()?;
                let pages = (bytes.len() / PAGE_SIZE) as u64;
                let own = Random::new(seed ^ part).permutation(pages / parts);
                for page in own
                    .into_iter()
                    .take(count as usize)
                    .map(|i| i * parts + part)
                {
                    let begin = Instant::now();
                    let word = reader::touch(bytes, [page]);
                    answer.latencies_ns.push(begin.elapsed().as_nanos() as u64);
                    reader::check("a timed touch", word, reader::expected_touch(seed, [page]))?;
                }
            }
        }
        Ok(answer)
    }
}

/// A guest's process.
pub fn main(args: &[OsString]) -> Result<()> {
    if !args.is_empty() {
        bail!("a guest takes no arguments");
    }
    let mut state = State::default();
    let mut out = std::io::stdout();
    for line in std::io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?)?;
        let (before, begin) = (Faults::of_thread()?, Instant::now());
        let worked = state.work(order);
        let seconds = begin.elapsed().as_secs_f64();
        let mut answer = worked.unwrap_or_else(|error| Answer {
            error: Some(format!("{error:#}")),
            ..Answer::default()
        });
        answer.seconds = seconds;
        answer.faults = Faults::of_thread()?.since(before);
        writeln!(out, "{}", serde_json::to_string(&answer)?)?;
        out.flush()?;
    }
    Ok(())
}
