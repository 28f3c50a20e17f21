//! Real guests and a real daemon that make a history.

use copage_grants::PAGE_SIZE_U64;
use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::Guest;
use copage_tests::history::check::Summary;
use copage_tests::history::{History, Plan, now_ns};
use copage_tests::orders::{Answer, Order};
use copage_tests::tree::Tree;
use std::path::PathBuf;
use std::time::Duration;

/// A run: a daemon, a coherent file of zeros, and guests that do things to it.
pub struct Run {
    pub tree: Tree,
    pub daemon: Daemon,
    setup: Setup,
    /// What every guest is told, but for its number and its log.
    plan: Plan,
    guests: Vec<Recorder>,
    /// How many there have been.
    count: u32,
    history: History,
}

struct Recorder {
    number: u32,
    guest: Guest,
}

impl Run {
    /// Everything begins half a second from now.
    pub fn start(setup: Setup, plan: Plan) -> Self {
        let tree = Tree::new();
        let setup = Setup {
            tables: format!(
                "[[export]]\nname = \"shared\"\npath = {:?}\nmode = \"coherent\"\nallow = [\"*\"]\n",
                tree.at("other")
            ),
            ..setup
        };
        let file = std::fs::File::create(tree.at("other").join("file")).expect("a file");
        file.set_len((plan.pages + plan.tail_pages) * PAGE_SIZE_U64)
            .expect("its length");
        let daemon = Daemon::start(&tree, &setup);
        let plan = Plan {
            start_ns: now_ns() + 500_000_000,
            ..plan
        };
        Self {
            tree,
            daemon,
            setup,
            plan,
            guests: Vec::new(),
            count: 0,
            history: History::default(),
        }
    }

    /// One guest more; `change` makes its plan its own.
    pub fn guest(&mut self, change: impl FnOnce(&mut Plan)) {
        let number = self.count;
        self.count += 1;
        let mut plan = Plan {
            guest: number,
            ..self.plan.clone()
        };
        change(&mut plan);
        let name = format!("g{number}");
        let mut guest = Guest::connected(self.tree.root(), &self.daemon.socket(), &name);
        guest.tell(&Order::Record {
            export: "shared".into(),
            path: "file".into(),
            plan,
            log: self.log(number).to_str().expect("a plain path").into(),
        });
        self.guests.push(Recorder { number, guest });
    }

    pub fn guests(&mut self, count: u32) {
        for _ in 0..count {
            self.guest(|_| {});
        }
    }

    fn log(&self, number: u32) -> PathBuf {
        self.tree.at(&format!("log.{number}"))
    }

    /// Is the time over in which things are done?
    pub fn is_over(&self) -> bool {
        now_ns() >= self.plan.start_ns + self.plan.slots * self.plan.slot_ns
    }

    /// Until then.
    pub fn wait(&self) {
        let end_ns = self.plan.start_ns + self.plan.slots * self.plan.slot_ns;
        std::thread::sleep(Duration::from_nanos(end_ns.saturating_sub(now_ns())));
    }

    /// The guest with this place among those that live.
    pub fn stop(&self, which: usize) {
        self.guests[which].guest.stop();
    }

    pub fn resume(&self, which: usize) {
        self.guests[which].guest.resume();
    }

    /// What the guest does from now on is not asked about.
    pub fn will_be_fenced(&mut self, which: usize) {
        let guest = self.guests[which].number;
        self.history.will_be_fenced(guest, now_ns());
    }

    /// SIGKILL, and another guest begins.
    pub fn kill(&mut self, which: usize) {
        let mut dead = self.guests.remove(which);
        dead.guest.kill();
        self.guest(|_| {});
    }

    /// SIGKILL of the daemon, and another begins.
    pub fn kill_daemon(&mut self) {
        // Not later than when it dies: what was done by then is what can be lost.
        self.history.daemon_killed(now_ns());
        self.daemon.kill();
        self.daemon = Daemon::start(&self.tree, &self.setup);
    }

    /// Waits for all guests, and checks what they did.
    pub fn finish(mut self, what: &str, seen_is_kept: bool) -> Summary {
        let mut ended = 0;
        for recorder in &mut self.guests {
            match recorder.guest.hear() {
                Some(Answer::Recorded { .. }) => {}
                Some(other) => panic!("guest {}: {other:?}", recorder.number),
                // By SIGBUS: it was fenced.
                None => ended += 1,
            }
        }
        let mut last = Guest::connected(self.tree.root(), &self.daemon.socket(), "last");
        let file = last.open_written("shared", "file");
        last.sync(file);
        drop(last);
        for guest in 0..self.count {
            let log = std::fs::read_to_string(self.log(guest)).expect("a guest's log");
            self.history.add(guest, &log);
        }
        let begin_ns = now_ns();
        let bytes = std::fs::read(self.tree.at("other").join("file")).expect("the file");
        self.history
            .at_last(&bytes, &self.plan, (begin_ns, now_ns()));
        let judged = self.history.judge(seen_is_kept);
        let (summary, told) = judged.unwrap_or_else(|why| panic!("{what}: {why}"));
        println!("history {what}: {told}");
        let counters = self.daemon.admin().stats().counters;
        let fences = counters
            .iter()
            .filter(|(name, _)| name.starts_with("fenced"));
        assert!(
            ended <= self.history.fenced(),
            "{ended} guests died of themselves; {:?}; what they said is above",
            fences.collect::<Vec<_>>()
        );
        self.daemon.audit_clean();
        summary
    }
}

/// What most runs do: two seconds of three guests on eight pages.
pub const PLAN: Plan = Plan {
    guest: 0,
    start_ns: 0,
    slot_ns: 40_000_000,
    slots: 60,
    ops: 8,
    pages: 8,
    tail_pages: 0,
    store_permille: 400,
    message_permille: 150,
    sync_permille: 20,
    resize_permille: 0,
};

pub const HALF_A_TERM: Duration = Duration::from_millis(500);

/// Terms of a second: long enough for a loaded machine, short enough to wait for.
pub fn short_terms() -> Setup {
    Setup {
        lease_ttl_ms: 1000,
        invalidate_deadline_ms: 1000,
        ..Setup::default()
    }
}
