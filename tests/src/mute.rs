//! A guest process that holds what it was given and does not let go: it renews (until told not to),
//! answers no notice, and keeps its plain mapping whatever happens to its session.

use crate::guest::{program, program_for_everybody};
use copage_mmap::native::NativeMapping;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// What [`Mute::store`] stores.
pub const EVIL: u64 = 0xbad0_bad0_bad0_bad0;

/// One such process. Killed when dropped.
pub struct Mute {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Mute {
    /// Starts it as guest `name`: it opens `path` of `export` and maps it plainly. `how` is `map`
    /// (faults all of it in first), `pin`, `holes` (faults nothing in and touches everything), or `write` (of the
    /// export `written`: gets what it can for writing, maps it and stores to it).
    pub fn start(dir: &Path, socket: &Path, name: &str, path: &str, how: &str) -> Self {
        Self::try_start(dir, socket, name, path, how).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// As [`Self::start`]; in words when the daemon refuses.
    pub fn try_start(
        dir: &Path,
        socket: &Path,
        name: &str,
        path: &str,
        how: &str,
    ) -> Result<Self, String> {
        let mut command = Command::new(program("copage-test-guest"));
        command
            .current_dir(dir)
            .arg("mute")
            .arg(socket)
            .args([name, path, how]);
        Self::run(command)
    }

    /// As [`Self::start`], as another user, whose name the daemon knows.
    pub fn start_as(uid: u32, dir: &Path, socket: &Path, path: &str, how: &str) -> Self {
        let mut command = Command::new(program_for_everybody("copage-test-guest", dir));
        command
            .uid(uid)
            .gid(uid)
            .arg("mute")
            .arg(socket)
            .args(["", path, how]);
        Self::run(command).unwrap_or_else(|e| panic!("{e}"))
    }

    fn run(mut command: Command) -> Result<Self, String> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("a guest process");
        let orders = child.stdin.take().expect("piped");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        let mut mute = Self {
            child,
            orders,
            answers,
        };
        match mute.line().as_str() {
            "ready" => Ok(mute),
            other => Err(other.to_owned()),
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.answers
            .read_line(&mut line)
            .expect("a pipe can be read");
        line.trim_end().to_owned()
    }

    fn ask(&mut self, order: &str) -> String {
        writeln!(self.orders, "{order}").expect("the process lives");
        self.line()
    }

    /// It renews no more.
    pub fn stop_renewing(&mut self) {
        assert_eq!(self.ask("stop-renewing"), "done");
    }

    /// It stores [`EVIL`] to each page that it got for writing, whether or not it has it still; `false`: it died of
    /// that.
    pub fn store(&mut self) -> bool {
        match self.ask("store").as_str() {
            "done" => true,
            other => {
                assert_eq!(other, "");
                let status = self.child.wait().expect("a child can be waited for");
                assert_eq!(status.signal(), Some(libc::SIGBUS), "{status:?}");
                false
            }
        }
    }

    /// Waits until the daemon has hung up on it; how long that took.
    pub fn wait_fenced(&mut self, at_most: Duration) -> Duration {
        let begin = Instant::now();
        while self.ask("fenced") != "yes" {
            assert!(begin.elapsed() < at_most, "not fenced after {at_most:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        begin.elapsed()
    }

    /// The versions of the pages that its mapping shows, each once; pages of zeros are left out, any
    /// other wrong page is version 0.
    pub fn versions(&mut self) -> Vec<u32> {
        let answer = self.ask("versions");
        answer
            .split_whitespace()
            .map(|v| v.parse().expect("a version"))
            .collect()
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }
}

impl Drop for Mute {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Stores to the first word of each page.
fn store_all(bytes: &copage_grants::volatile::VolatileBytesMut<'_>, value: u64) {
    let mut all = (0..bytes.len()).step_by(copage_grants::PAGE_SIZE);
    assert!(
        all.all(|at| bytes.write_u64(at, value)),
        "a page that is too short"
    );
}

/// What the process does: see [`Mute`]. Returns when its standard input ends.
pub fn run(socket: &Path, name: &str, path: &str, how: &str) -> std::io::Result<()> {
    use copage::demo::pattern::{self, PageContent};
    use copage_coherence::msg::{FAULT_PAGES_MAX, OpenHow, Request};
    let mut out = std::io::stdout();
    let mut say = |text: String| writeln!(out, "{text}").and_then(|()| out.flush());
    let mut raw = match crate::raw::Raw::try_hello(socket, name) {
        Ok(raw) => raw,
        Err(errno) => return say(format!("hello: errno {errno}")),
    };
    let root = raw.attach(if how == "write" { "written" } else { "export" });
    let node = match raw.lookup(root, path.as_bytes()) {
        Ok(node) => node,
        Err(errno) => return say(format!("lookup: errno {errno}")),
    };
    let kind = if how == "pin" {
        OpenHow::Pin
    } else {
        OpenHow::Map
    };
    let mut file = match raw.try_open_to(node, kind, how == "write") {
        Ok(file) => file,
        Err(errno) => return say(format!("open: errno {errno}")),
    };
    if how == "map" {
        let pages = u32::try_from(copage_grants::pages_for(file.bytes)).unwrap_or(u32::MAX);
        let step = FAULT_PAGES_MAX as usize;
        for first in (0..pages).step_by(step) {
            let count = FAULT_PAGES_MAX.min(pages - first);
            match raw.fault(&file, first.into(), count) {
                Ok(_) => {}
                Err(errno) if first == 0 => return say(format!("fault: errno {errno}")),
                // It has what it may have.
                Err(_) => break,
            }
        }
    }
    let mut arena = None;
    if how == "write" {
        let pages = copage_grants::pages_for(file.bytes);
        let (got, errno) = raw.take_to_write(&file, pages);
        if let Some(errno) = errno {
            return say(format!("fault: errno {errno} after {got} pages"));
        }
        let mapped = raw.map_arena(&file, got);
        let bytes = mapped.as_volatile_mut().ok_or(std::io::ErrorKind::Other)?;
        store_all(&bytes, 1);
        arena = Some(mapped);
    }
    let home = file
        .fd
        .take()
        .map(std::fs::File::from)
        .ok_or(std::io::ErrorKind::NotFound)?;
    let mapping = NativeMapping::new(&home, true)?;
    let mut renewing = true;
    let orders = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if orders.0.send(line).is_err() {
                return;
            }
        }
    });
    say("ready".into())?;
    let mut fenced = false;
    loop {
        match orders.1.recv_timeout(raw.lease_ttl / 4) {
            Ok(order) => match order.as_str() {
                "stop-renewing" => {
                    renewing = false;
                    say("done".into())?;
                }
                "fenced" => say(if fenced { "yes".into() } else { "no".into() })?,
                "store" => {
                    let bytes = arena.as_ref().and_then(NativeMapping::as_volatile_mut);
                    let bytes = bytes.ok_or(std::io::ErrorKind::Other)?;
                    store_all(&bytes, EVIL);
                    say("done".into())?;
                }
                _ => {
                    let bytes = mapping.as_volatile().to_vec();
                    let mut versions: Vec<u32> = Vec::new();
                    for (index, page) in (0..).zip(bytes.chunks(copage_grants::PAGE_SIZE)) {
                        let version = match pattern::check(page, index) {
                            PageContent::Whole(version) => version,
                            PageContent::Wrong if page.iter().all(|&b| b == 0) => continue,
                            PageContent::Crossed { .. } | PageContent::Wrong => 0,
                        };
                        if !versions.contains(&version) {
                            versions.push(version);
                        }
                    }
                    let words: Vec<String> = versions.iter().map(u32::to_string).collect();
                    say(words.join(" "))?;
                }
            },
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
        }
        if renewing && !fenced {
            fenced = raw.tell(&Request::Renew).is_none();
        }
        // Hears everything, answers nothing.
        let mut bytes = vec![0; copage_coherence::msg::MESSAGE_BYTES_MAX];
        loop {
            match raw.channel.try_recv(&mut bytes) {
                Ok(_) => {}
                Err(copage_grants::channel::ChannelError::WouldBlock) => break,
                Err(_) => {
                    fenced = true;
                    break;
                }
            }
        }
    }
}
