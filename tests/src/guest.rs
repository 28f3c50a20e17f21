//! Guests as processes of their own.

use crate::orders::{Answer, Order, Watched};
use crate::wait;
use copage_mmap::ConnectOptions;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

/// The uid that guests of another user run as; it need not have a name.
pub const OTHER_UID: u32 = 61_234;

/// Where a program of this crate was built: beside the directory of the test programs.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("the test's own path");
    let dir = own.ancestors().nth(2).expect("target/PROFILE/deps/TEST");
    let path = dir.join(name);
    assert!(
        path.exists(),
        "{} was not built: run cargo test for the whole package",
        path.display()
    );
    path
}

/// `program`, where every user can run it whatever the modes of the directories above the target
/// directory are.
pub fn program_for_everybody(name: &str, dir: &Path) -> PathBuf {
    let copy = dir.join(name);
    if !copy.exists() {
        // Under another name first: two tests may come here at once. By another process: a child that
        // a test beside this one forks has every descriptor of this process for a moment, and a
        // program that is open for writing cannot run.
        let part = dir.join(format!("{name}.{:?}", std::thread::current().id()));
        let copied = Command::new("cp").arg(program(name)).arg(&part).status();
        assert!(copied.expect("cp").success(), "a copy of the program");
        std::fs::rename(&part, &copy).expect("the copy's name");
    }
    copy
}

/// A guest process. Killed when dropped.
pub struct Guest {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Who it is in messages.
    pub label: String,
    named: bool,
    /// How long it looks for a daemon that is gone, in ms.
    pub reconnect_ms: u32,
}

/// How a guest is started.
#[derive(Clone, Debug, Default)]
pub struct As {
    /// Another uid than the test's (needs root).
    pub uid: Option<u32>,
    /// Say the label as name; only root and the daemon's own uid may take any.
    pub named: bool,
}

impl Guest {
    /// Starts a guest process that is not connected yet.
    pub fn spawn(dir: &Path, label: &str, how: &As) -> Self {
        let path = match how.uid {
            Some(_) => program_for_everybody("copage-test-guest", dir),
            None => program("copage-test-guest"),
        };
        let mut command = Command::new(path);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(uid) = how.uid {
            command.uid(uid).gid(uid);
        }
        let mut child = command.spawn().expect("a guest process");
        let orders = child.stdin.take().expect("piped");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        Self {
            child,
            orders,
            answers,
            label: label.to_owned(),
            named: how.named,
            reconnect_ms: ConnectOptions::default().reconnect_ms,
        }
    }

    /// Starts a guest and connects it under the name `label`.
    pub fn connected(dir: &Path, socket: &Path, label: &str) -> Self {
        let mut guest = Self::named(dir, label);
        guest.connect(socket);
        guest
    }

    /// Starts a guest that says its label as its name.
    pub fn named(dir: &Path, label: &str) -> Self {
        let how = As {
            named: true,
            ..As::default()
        };
        Self::spawn(dir, label, &how)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives an order and does not wait.
    pub fn tell(&mut self, order: &Order) {
        let line = serde_json::to_string(order).expect("an order is JSON");
        writeln!(self.orders, "{line}")
            .and_then(|()| self.orders.flush())
            .unwrap_or_else(|e| panic!("{}: {e} at {order:?}", self.label));
    }

    /// The next answer; `None` when the process has ended.
    pub fn hear(&mut self) -> Option<Answer> {
        let mut line = String::new();
        match self.answers.read_line(&mut line) {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap_or_else(|e| {
                panic!("{}: {e}: {line}", self.label);
            })),
        }
    }

    /// Gives an order and waits for the answer, which may be `Failed`; `None` when the process ended.
    pub fn try_ask(&mut self, order: &Order) -> Option<Answer> {
        self.tell(order);
        self.hear()
    }

    /// Gives an order that has to succeed.
    pub fn ask(&mut self, order: &Order) -> Answer {
        match self.try_ask(order) {
            Some(Answer::Failed { errno, why }) => {
                panic!("{}: {order:?} failed with {errno}: {why}", self.label)
            }
            Some(answer) => answer,
            None => panic!(
                "{}: ended at {order:?}: {:?}",
                self.label,
                self.child.wait()
            ),
        }
    }

    /// Gives an order that has to fail; its errno and words.
    pub fn refused(&mut self, order: &Order) -> (i32, String) {
        match self.try_ask(order) {
            Some(Answer::Failed { errno, why }) => (errno, why),
            other => panic!("{}: {order:?} was to fail: {other:?}", self.label),
        }
    }

    /// Connects under its label. Answers the domid and epoch.
    pub fn connect(&mut self, socket: &Path) -> (u16, u64) {
        match self.ask(&self.connect_order(socket, "best")) {
            Answer::Connected { dom, epoch, .. } => (dom, epoch),
            other => panic!("{}: {other:?}", self.label),
        }
    }

    /// The order to connect.
    pub fn connect_order(&self, socket: &Path, userfault: &str) -> Order {
        Order::Connect {
            socket: socket.to_str().expect("a plain path").to_owned(),
            name: if self.named {
                self.label.clone()
            } else {
                String::new()
            },
            userfault: userfault.to_owned(),
            reconnect_ms: self.reconnect_ms,
        }
    }

    /// How often it has found a daemon again.
    pub fn reconnects(&mut self) -> u64 {
        match self.ask(&Order::Reconnects) {
            Answer::Reconnects { count } => count,
            other => panic!("{}: {other:?}", self.label),
        }
    }

    /// Maps a whole file shared; its number and bytes.
    pub fn map(&mut self, export: &str, path: &str) -> (usize, u64) {
        let order = Order::Map {
            export: export.into(),
            path: path.into(),
            private: false,
        };
        match self.ask(&order) {
            Answer::Mapped { mapping, bytes } => (mapping, bytes),
            other => panic!("{}: {other:?}", self.label),
        }
    }

    /// Opens a file to map it and to write; its number.
    pub fn open_written(&mut self, export: &str, path: &str) -> usize {
        let order = Order::Open {
            export: export.into(),
            path: path.into(),
            map: true,
            write: true,
        };
        match self.ask(&order) {
            Answer::Opened { file, .. } => file,
            other => panic!("{}: {other:?}", self.label),
        }
    }

    /// Maps all of an open file; the mapping's number.
    pub fn map_file(&mut self, file: usize, writable: bool) -> usize {
        let order = Order::MapFile {
            file,
            writable,
            len: 0,
        };
        match self.ask(&order) {
            Answer::Mapped { mapping, .. } => mapping,
            other => panic!("{}: {other:?}", self.label),
        }
    }

    /// Loads a word by a plain load.
    pub fn load_word(&mut self, mapping: usize, offset: u64) -> u64 {
        let order = Order::LoadWord {
            mapping,
            offset,
            probe: false,
        };
        match self.ask(&order) {
            Answer::Word { value } => value,
            other => panic!("{}: {other:?}", self.label),
        }
    }

    /// Stores a word by a plain store.
    pub fn store_word(&mut self, mapping: usize, offset: u64, value: u64) {
        self.ask(&Order::StoreWord {
            mapping,
            offset,
            value,
        });
    }

    /// Puts an open file on the disk.
    pub fn sync(&mut self, file: usize) {
        self.ask(&Order::Sync { file });
    }

    /// The version of one page, read by plain loads; panics unless the page is whole.
    pub fn load(&mut self, mapping: usize, page: u64) -> u32 {
        match self.ask(&Order::Load { mapping, page }) {
            Answer::Page {
                version: Some(version),
                ..
            } => version,
            other => panic!("{}: page {page}: {other:?}", self.label),
        }
    }

    /// The version of one page, or the errno, read by process_vm_readv.
    pub fn probe(&mut self, mapping: usize, page: u64) -> Result<u32, i32> {
        match self.try_ask(&Order::Probe { mapping, page }) {
            Some(Answer::Page {
                version: Some(version),
                ..
            }) => Ok(version),
            Some(Answer::Failed { errno, .. }) => Err(errno),
            other => panic!("{}: page {page}: {other:?}", self.label),
        }
    }

    /// Ends `Watch`.
    pub fn stop_watching(&mut self) -> Watched {
        match self.ask(&Order::Stop) {
            Answer::Watched(watched) => watched,
            other => panic!("{}: {other:?}", self.label),
        }
    }

    /// What `Watch` has seen so far.
    pub fn look(&mut self) -> Watched {
        match self.ask(&Order::Look) {
            Answer::Watched(watched) => watched,
            other => panic!("{}: {other:?}", self.label),
        }
    }

    /// The words for why its session is lost, if it is.
    pub fn lost(&mut self) -> Option<String> {
        match self.ask(&Order::Lost) {
            Answer::Lost { why } => why,
            other => panic!("{}: {other:?}", self.label),
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap_or_else(|e| panic!("{}: {signal:?}: {e}", self.label));
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) -> ExitStatus {
        self.signal(Signal::KILL);
        self.wait()
    }

    /// SIGSTOP.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Waits for its end, ten seconds at most.
    pub fn wait(&mut self) -> ExitStatus {
        let child = &mut self.child;
        wait::some(Duration::from_secs(10), "the end of a guest", || {
            child.try_wait().expect("a child can be waited for")
        })
    }

    /// Waits for its end, which must be by SIGBUS.
    pub fn died_of_sigbus(&mut self) {
        let status = self.wait();
        assert_eq!(
            status.signal(),
            Some(libc::SIGBUS),
            "{}: {status:?}",
            self.label
        );
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended, or be stopped; neither stops a SIGKILL.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
