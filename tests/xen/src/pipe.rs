//! `copage-xen-lab pipe GUEST -- PROGRAM ARGUMENT…`: a program in a guest with the standard input and
//! output of a process of dom0.
//!
//! Bytes go through nodes of the guest, a chunk at a time each way, under `data/lab/pipes/NAME/`:
//!
//! | node | written by | holds |
//! |---|---|---|
//! | `start` | dom0 | the program and its arguments, a zero byte between them |
//! | `in` | dom0 | `SEQ more\n` and bytes, or `SEQ end\n` |
//! | `taken` | the guest | the last SEQ that the program's input has |
//! | `out` | the guest | `SEQ\n` and bytes |
//! | `had` | dom0 | the last SEQ that is written out |
//! | `ended` | the guest | `exit N` or `signal N` after the last `out` was had; `failed WHY` |
//! | `kill` | dom0 | the program is to be killed |
//!
//! A second process in dom0, the warden, outlives the first: it has the program killed when that ends
//! before the program does, and removes the nodes.

use crate::agent::split;
use crate::job::Ended;
use crate::store::{PAYLOAD_MAX, Store};
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Bytes of a chunk for a guest; the rest of a message is the node's name and the number.
const IN_MAX: usize = PAYLOAD_MAX - 400;
/// Bytes of a chunk from a guest: xenstored refuses its nodes over 2,048 bytes.
const OUT_MAX: usize = 1800;
/// A wait for a node ends now and then to see whether the guest is still there.
const LOOK: Duration = Duration::from_secs(2);
/// What a program gets to end by itself after the end of its input.
const END_GRACE: Duration = Duration::from_secs(10);
/// How long the warden waits for the program's end.
const KILL_LIMIT: Duration = Duration::from_secs(60);

/// Where a pipe's nodes are.
fn below(base: &str, name: &str, node: &str) -> String {
    format!("{base}data/lab/pipes/{name}/{node}")
}

/// Waits until `look` finds something in nodes that `store` watches; `Ok(None)`: the nodes are gone.
fn wait_for<T>(
    store: &mut Store,
    alive: &str,
    mut look: impl FnMut(&mut Store) -> Result<Option<T>>,
) -> Result<Option<T>> {
    loop {
        if let Some(found) = look(store)? {
            return Ok(Some(found));
        }
        if store.read(alive)?.is_none() {
            return Ok(None);
        }
        store.wait(LOOK)?;
    }
}

/// The guest's end: starts what dom0 asks for, as long as the guest runs.
pub fn serve() -> Result<()> {
    let mut store = Store::of_guest()?;
    store.watch("data/lab/pipes")?;
    let mut known = Vec::new();
    loop {
        let names = store.list("data/lab/pipes")?;
        known.retain(|name| names.contains(name));
        for name in names {
            if known.contains(&name) {
                continue;
            }
            let Some(words) = store.read(&below("", &name, "start"))? else {
                continue;
            };
            if let Err(error) = start(&name, &String::from_utf8_lossy(&words)) {
                let text = format!("failed {error:#}");
                store.write(&below("", &name, "ended"), text.as_bytes())?;
            }
            known.push(name);
        }
        store.wait(Duration::from_secs(3600))?;
    }
}

fn start(name: &str, words: &str) -> Result<()> {
    let mut words = words.split('\0');
    let program = words.next().context("no program")?;
    let mut child = Command::new(program)
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| program.to_owned())?;
    let input = child.stdin.take().context("its input")?;
    let output = child.stdout.take().context("its output")?;
    let name = name.to_owned();
    std::thread::spawn(move || {
        if let Err(error) = attend(&name, child, input, output) {
            eprintln!("lab: pipe {name}: {error:#}");
        }
    });
    Ok(())
}

/// Sends what the program says, and how it ended.
fn attend(
    name: &str,
    mut child: Child,
    input: impl Write + Send + 'static,
    mut output: impl Read,
) -> Result<()> {
    let node = |node: &str| below("", name, node);
    let group = Pid::from_child(&child);
    let (feeder, killer) = (name.to_owned(), name.to_owned());
    // Both end with the pipe's nodes, or with the guest.
    std::thread::spawn(move || feed(&feeder, input));
    std::thread::spawn(move || kill_when_told(&killer, group));
    let mut store = Store::of_guest()?;
    store.watch(&node("had"))?;
    let mut chunk = vec![0; OUT_MAX];
    let mut sequence = 0_u64;
    loop {
        let len = output.read(&mut chunk)?;
        if len == 0 {
            break;
        }
        sequence += 1;
        let number = sequence.to_string();
        let message = [number.as_bytes(), b"\n", &chunk[..len]].concat();
        store.write(&node("out"), &message)?;
        let had = wait_for(&mut store, &node("in"), |store| {
            let had = store.read(&node("had"))?;
            Ok(had.filter(|had| *had == number.as_bytes()))
        })?;
        if had.is_none() {
            break;
        }
    }
    let ended = match child.wait()?.into() {
        Ended::Exit(code) => format!("exit {code}"),
        Ended::Signal(signal) => format!("signal {signal}"),
    };
    store.write(&node("ended"), ended.as_bytes())
}

/// Gives the program what comes for it.
fn feed(name: &str, input: impl Write) -> Result<()> {
    let node = |node: &str| below("", name, node);
    let mut input = Some(input);
    let mut store = Store::of_guest()?;
    store.watch(&node("in"))?;
    let mut last = "0".to_owned();
    loop {
        let next = wait_for(&mut store, &node("in"), |store| {
            let message = store.read(&node("in"))?.unwrap_or_default();
            let (head, body) = split(&message);
            let (number, what) = head.split_once(' ').unwrap_or_default();
            let new = number != last && !number.is_empty();
            Ok(new.then(|| (number.to_owned(), what == "end", body.to_vec())))
        })?;
        let Some((number, end, body)) = next else {
            return Ok(());
        };
        // A program that ended takes nothing; its end is told elsewhere.
        let written = input.as_mut().map(|input| input.write_all(&body));
        if end || !matches!(written, Some(Ok(()))) {
            input = None;
        }
        store.write(&node("taken"), number.as_bytes())?;
        last = number;
    }
}

/// Kills the program, and what it started, when dom0 says so.
fn kill_when_told(name: &str, group: Pid) -> Result<()> {
    let node = |node: &str| below("", name, node);
    let mut store = Store::of_guest()?;
    store.watch(&node("kill"))?;
    let told = wait_for(&mut store, &node("in"), |store| {
        let over = store.read(&node("ended"))?.map(|_| false);
        Ok(over.or(store.read(&node("kill"))?.map(|_| true)))
    })?;
    if told == Some(true) {
        // It may have ended by itself.
        let _ = kill_process_group(group, Signal::KILL);
    }
    Ok(())
}

/// Dom0's end. The exit status is the program's, 128 and the signal's number when one ended it.
pub fn run(name: &str, words: &[&str]) -> Result<ExitCode> {
    let found = Command::new("xl").args(["domid", name]).output();
    let domid = String::from_utf8(found.context("xl")?.stdout)?;
    let domid = domid
        .trim()
        .parse()
        .with_context(|| format!("no guest {name}"))?;
    let pipe = format!("pipe{}", std::process::id());
    let nodes = Nodes {
        domid,
        pipe: pipe.clone(),
    };
    let mut store = Store::of_dom0()?;
    let agent = format!("/local/domain/{domid}/data/lab/agent");
    ensure!(
        store.read(&agent)?.is_some(),
        "{name} has no agent, or is not up"
    );
    store.watch(&nodes.at("out"))?;
    store.watch(&nodes.at("ended"))?;
    store.watch(&nodes.alive())?;
    store.write(&nodes.at("in"), b"")?;
    // It sees the end of this process, however that comes, by the end of its own input.
    let _warden = Command::new(std::env::current_exe()?)
        .args(["pipe-warden", &nodes.domid.to_string(), &pipe])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .context("the warden")?;
    store.write(&nodes.at("start"), words.join("\0").as_bytes())?;
    std::thread::spawn(move || {
        if let Err(error) = nodes.send_input() {
            eprintln!("copage-xen-lab: {}: {error:#}", nodes.pipe);
        }
    });
    let nodes = Nodes { domid, pipe };
    let ended = nodes.write_output(&mut store);
    Ok(match ended.with_context(|| name.to_owned())? {
        Ended::Exit(code) => ExitCode::from(u8::try_from(code).unwrap_or(255)),
        Ended::Signal(signal) => ExitCode::from(u8::try_from(128 + signal).unwrap_or(255)),
    })
}

/// Waits for the end of its input, which is that of the pipe.
pub fn warden(domid: u16, pipe: &str) -> Result<()> {
    std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink())?;
    let pipe = pipe.to_owned();
    let nodes = Nodes { domid, pipe };
    let mut store = Store::of_dom0()?;
    let begin = Instant::now();
    store.watch(&nodes.at("ended"))?;
    while store.read(&nodes.alive())?.is_some() && store.read(&nodes.at("ended"))?.is_none() {
        if store.read(&nodes.at("kill"))?.is_none() {
            store.write(&nodes.at("kill"), b"")?;
        }
        if begin.elapsed() > KILL_LIMIT {
            // It is paused perhaps: the order stays.
            return Ok(());
        }
        store.wait(LOOK)?;
    }
    // A write that came after the guest's end made its node again.
    match store.read(&nodes.alive())? {
        Some(_) => store.remove(&nodes.at("")),
        None => store.remove(&format!("/local/domain/{domid}")),
    }
}

/// The nodes of a pipe, as dom0 names them.
struct Nodes {
    domid: u16,
    pipe: String,
}

impl Nodes {
    fn at(&self, node: &str) -> String {
        let Self { domid, pipe } = self;
        let node = below(&format!("/local/domain/{domid}/"), pipe, node);
        node.trim_end_matches('/').to_owned()
    }

    /// The toolstack's node: it goes with the guest, and nobody here makes it again.
    fn alive(&self) -> String {
        format!("/local/domain/{}/domid", self.domid)
    }

    /// Sends this process's input to the program, and its end; what does not end then is killed.
    fn send_input(&self) -> Result<()> {
        let mut store = Store::of_dom0()?;
        store.watch(&self.at("taken"))?;
        store.watch(&self.alive())?;
        let mut input = std::io::stdin().lock();
        let mut chunk = vec![0; IN_MAX];
        for sequence in 1_u64.. {
            let len = input.read(&mut chunk)?;
            let what = if len == 0 { "end" } else { "more" };
            let head = format!("{sequence} {what}\n");
            store.write(&self.at("in"), &[head.as_bytes(), &chunk[..len]].concat())?;
            let number = sequence.to_string();
            let taken = wait_for(&mut store, &self.alive(), |store| {
                let taken = store.read(&self.at("taken"))?;
                Ok(taken.filter(|taken| *taken == number.as_bytes()))
            })?;
            if len == 0 || taken.is_none() {
                break;
            }
        }
        std::thread::sleep(END_GRACE);
        store.write(&self.at("kill"), b"")
    }

    /// Writes what the program says; how it ended.
    fn write_output(&self, store: &mut Store) -> Result<Ended> {
        let mut out = std::io::stdout().lock();
        let mut last = String::new();
        loop {
            let next = wait_for(store, &self.alive(), |store| {
                let message = store.read(&self.at("out"))?.unwrap_or_default();
                let (number, body) = split(&message);
                if number != last {
                    return Ok(Some(Ok((number, body.to_vec()))));
                }
                Ok(store.read(&self.at("ended"))?.map(Err))
            })?;
            match next.context("the guest is gone")? {
                Ok((number, body)) => {
                    out.write_all(&body)?;
                    out.flush()?;
                    store.write(&self.at("had"), number.as_bytes())?;
                    last = number;
                }
                Err(words) => return ended_by(&words),
            }
        }
    }
}

fn ended_by(words: &[u8]) -> Result<Ended> {
    let words = String::from_utf8_lossy(words);
    match words.split_once(' ') {
        Some(("exit", code)) => Ok(Ended::Exit(code.parse()?)),
        Some(("signal", signal)) => Ok(Ended::Signal(signal.parse()?)),
        Some(("failed", why)) => bail!("{why}"),
        _ => bail!("the guest says that the program ended with {words:?}"),
    }
}
