//! An honest guest beside an attack: served all along, and everything clean afterwards.

use crate::daemon::{Daemon, Setup};
use crate::guest::Guest;
use crate::orders::{Order, Watched};
use crate::tree::Tree;
use crate::wait;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Pages of the honest guest's file.
const HONEST_PAGES: u64 = 256;
/// The longest that the honest guest may wait for a page, in ms. Two cores shared with the attack,
/// the compiler's other tests and a debug build; a daemon that hangs on somebody is far above it.
const SLOWEST_MS: u64 = 3_000;
/// How much the daemon's own memory may grow, in bytes: limits of every kind used to the full.
const GROWTH_BYTES: u64 = 96 << 20;

/// A daemon, an honest guest that reads all the time, and somebody who takes its pages back all the
/// time, so that it needs the daemon.
pub struct Beside {
    /// The daemon under attack.
    pub daemon: Daemon,
    /// What it exports.
    pub tree: Tree,
    honest: Guest,
    anonymous_bytes: u64,
    stop: Arc<AtomicBool>,
    reclaimer: Option<JoinHandle<()>>,
}

impl Beside {
    /// Starts all three on a tree that `fill` has put more files into. The honest guest is named
    /// `honest`, as root.
    pub fn start(setup: &Setup, fill: impl FnOnce(&Tree)) -> Self {
        Self::start_with(setup, |tree, _| fill(tree))
    }

    /// As [`Self::start`]; what the setup says may depend on where the tree is.
    pub fn start_with(setup: &Setup, fill: impl FnOnce(&Tree, &mut Setup)) -> Self {
        let tree = Tree::new();
        tree.pattern("honest", HONEST_PAGES);
        let mut setup = setup.clone();
        fill(&tree, &mut setup);
        let daemon = Daemon::start(&tree, &setup);
        let mut honest = Guest::connected(tree.root(), &daemon.socket(), "honest");
        honest.map("export", "honest");
        honest.ask(&Order::Watch { run_pages: 8 });
        let stop = Arc::new(AtomicBool::new(false));
        let (mut admin, until) = (daemon.admin(), Arc::clone(&stop));
        let reclaimer = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                admin.reclaim(HONEST_PAGES);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let anonymous_bytes = daemon.anonymous_bytes();
        Self {
            daemon,
            tree,
            honest,
            anonymous_bytes,
            stop,
            reclaimer: Some(reclaimer),
        }
    }

    /// The guests' socket.
    pub fn socket(&self) -> std::path::PathBuf {
        self.daemon.socket()
    }

    /// Ends the attack: the honest guest has seen no wrong byte and still sees new ones, was never
    /// kept waiting for long; the daemon lives, its memory is bounded, its audit is clean.
    pub fn finish(mut self, attack: &str) -> Watched {
        let taken = |daemon: &Daemon| daemon.admin().stats().counters["reclaimed_granted_pages"];
        let (before, taken_before) = (self.honest.look(), taken(&self.daemon));
        // It reads on, and pages that it had go on being taken from it: it needs the daemon.
        wait::until(
            Duration::from_secs(10),
            "the honest guest to be served",
            || self.honest.look().pages > before.pages && taken(&self.daemon) > taken_before,
        );
        let seen = self.honest.stop_watching();
        let taken = taken(&self.daemon);
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reclaimer) = self.reclaimer.take() {
            reclaimer.join().expect("the reclaimer");
        }
        assert_eq!((seen.wrong, seen.backwards), (0, 0), "{attack}: {seen:?}");
        assert!(
            seen.slowest_ms < SLOWEST_MS,
            "{attack}: the honest guest was kept waiting: {seen:?}"
        );
        let grown = self
            .daemon
            .anonymous_bytes()
            .saturating_sub(self.anonymous_bytes);
        assert!(
            grown < GROWTH_BYTES,
            "{attack}: the daemon grew by {grown} bytes"
        );
        self.daemon.audit_clean();
        println!(
            "{attack}: beside it {} pages read, {taken} taken back, slowest run {} ms, daemon +{} KiB",
            seen.pages,
            seen.slowest_ms,
            grown / 1024
        );
        seen
    }
}
