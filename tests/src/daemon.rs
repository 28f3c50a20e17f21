//! Daemons as processes of their own.

use crate::admin::Admin;
use crate::guest::program;
use crate::tree::Tree;
use crate::wait;
use rustix::process::{Pid, Signal, kill_process};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

/// What a test's daemon is told.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The budget, in MiB.
    pub frames_mib: u64,
    /// Take pages back by force.
    pub force: bool,
    /// The session lease, in ms.
    pub lease_ttl_ms: u32,
    /// How long a guest may take over an invalidation, in ms.
    pub invalidate_deadline_ms: u32,
    /// More lines before the first table.
    pub more: String,
    /// Lines of `[limits]`.
    pub limits: String,
    /// Guests write `export`.
    pub coherent: bool,
    /// Names that may use `export`.
    pub allow: Vec<String>,
    /// Tables of guests and of more exports.
    pub tables: String,
    /// Which calls of the backend fail: see the program `copage-test-daemon`.
    pub fail: Option<String>,
}

impl Default for Setup {
    /// 16 MiB with force, one export named `export` for everybody.
    fn default() -> Self {
        Self {
            frames_mib: 16,
            force: true,
            lease_ttl_ms: 5000,
            invalidate_deadline_ms: 5000,
            more: String::new(),
            limits: String::new(),
            coherent: false,
            allow: vec!["*".into()],
            tables: String::new(),
            fail: None,
        }
    }
}

impl Setup {
    /// The configuration file for a daemon that exports `tree`.
    pub fn toml(&self, tree: &Tree) -> String {
        let Self {
            frames_mib,
            force,
            lease_ttl_ms,
            invalidate_deadline_ms,
            more,
            limits,
            ..
        } = self;
        let mut text = String::new();
        let allow = serde_json::to_string(&self.allow).expect("names are JSON, and so TOML");
        let path = tree.at("export");
        let mode = if self.coherent { "coherent" } else { "ro" };
        write!(
            text,
            "run_dir = {:?}\nframes_mib = {frames_mib}\nforce = {force}\n\
             lease_ttl_ms = {lease_ttl_ms}\ninvalidate_deadline_ms = {invalidate_deadline_ms}\n\
             {more}\n[limits]\n{limits}\n\
             [[export]]\nname = \"export\"\npath = {path:?}\nmode = {mode:?}\nallow = {allow}\n{}\n",
            tree.at("run"),
            self.tables,
        )
        .expect("a string takes everything");
        text
    }
}

/// A daemon process. Killed when dropped.
pub struct Daemon {
    child: Child,
    run_dir: PathBuf,
}

impl Daemon {
    /// Starts a daemon for `tree` and waits until it listens.
    pub fn start(tree: &Tree, setup: &Setup) -> Self {
        let config = tree.at("copage.toml");
        std::fs::write(&config, setup.toml(tree)).expect("the configuration");
        let mut command = Command::new(program("copage-test-daemon"));
        command.arg(&config);
        if let Some(fail) = &setup.fail {
            command.arg(fail);
        }
        let mut child = command.spawn().expect("a daemon process");
        let run_dir = tree.at("run");
        wait::until(Duration::from_secs(10), "a daemon that listens", || {
            let ended = child.try_wait().expect("a child can be waited for");
            assert!(ended.is_none(), "the daemon ended: {ended:?}");
            // A name left by an earlier daemon refuses.
            Admin::connect(&run_dir).is_ok()
        });
        Self { child, run_dir }
    }

    /// The guests' socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("guest.sock")
    }

    /// Its run directory.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// A new admin connection.
    pub fn admin(&self) -> Admin {
        Admin::connect(&self.run_dir).expect("the daemon answers")
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Panics unless the daemon lives and its audit finds nothing, after ledger and cache have come
    /// to rest (an audit of a busy daemon may see a thing half done).
    pub fn audit_clean(&mut self) {
        let ended = self.child.try_wait().expect("a child can be waited for");
        assert!(ended.is_none(), "the daemon ended: {ended:?}");
        let audit = self.admin().audit();
        let differences: Vec<_> = audit
            .checks
            .iter()
            .filter(|c| !c.differences.is_empty())
            .collect();
        assert!(
            audit.ok && differences.is_empty(),
            "the audit found: {differences:#?}"
        );
        assert!(
            audit.checks.iter().any(|c| c.checked > 0),
            "an audit of nothing: {audit:?}"
        );
    }

    /// Its private memory, in bytes (RssAnon, proc_pid_status(5)).
    pub fn anonymous_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("the daemon lives");
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix("RssAnon:"))
            .expect("RssAnon");
        let kib: u64 = line
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .expect("a number");
        kib * 1024
    }

    /// How many descriptors it has open; `None`: only root may count those of an undumpable process.
    pub fn descriptors(&self) -> Option<usize> {
        let dir = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).ok()?;
        Some(dir.count())
    }

    /// Waits until it has no more descriptors open than `before`, where they can be counted.
    pub fn descriptors_back_to(&self, before: Option<usize>) {
        wait::until(
            Duration::from_secs(10),
            "the daemon's descriptors to go",
            || self.descriptors() <= before,
        );
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(&mut self) {
        kill_process(Pid::from_child(&self.child), Signal::KILL).expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// SIGTERM, and waits for its end; it has to be clean.
    pub fn stop(&mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("a child can be told");
        let status = wait::some(Duration::from_secs(10), "the daemon's end", || {
            self.child.try_wait().expect("a child can be waited for")
        });
        assert!(status.success(), "a clean stop: {status:?}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
