//! Real guests and a real daemon that make a history.

use super::check::{Summary, Trouble, check};
use copage_grants::PAGE_SIZE_U64;
use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::Guest;
use copage_tests::history::{Call, Op, Outcome, Plan, now_ns, read_log};
use copage_tests::orders::{Answer, Order};
use copage_tests::tree::Tree;
use std::collections::BTreeMap;
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
    /// When the daemon was killed.
    kills_ns: Vec<u64>,
    fenced: Vec<Trouble>,
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
            kills_ns: Vec::new(),
            fenced: Vec::new(),
        }
    }

    /// One guest more; `change` makes its plan its own.
    pub fn guest(&mut self, change: impl FnOnce(&mut Plan)) {
        let number = self.count;
        self.count += 1;
        let mut plan = Plan {
            guest: number,
            log: self.log(number).to_str().expect("a plain path").into(),
            ..self.plan.clone()
        };
        change(&mut plan);
        let name = format!("g{number}");
        let mut guest = Guest::connected(self.tree.root(), &self.daemon.socket(), &name);
        guest.tell(&Order::Record {
            export: "shared".into(),
            path: "file".into(),
            plan,
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
        let from_ns = now_ns();
        self.fenced.push(Trouble::Fenced { guest, from_ns });
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
        self.kills_ns.push(now_ns());
        self.daemon.kill();
        self.daemon = Daemon::start(&self.tree, &self.setup);
    }

    /// What the file has when all is over and synced: every word, read on the host, where no guest and no
    /// daemon is asked.
    fn read_at_last(&self) -> Vec<Op> {
        let mut last = Guest::connected(self.tree.root(), &self.daemon.socket(), "last");
        let file = last.open_written("shared", "file");
        last.sync(file);
        drop(last);
        let begin_ns = now_ns();
        let bytes = std::fs::read(self.tree.at("other").join("file")).expect("the file");
        let end_ns = now_ns();
        let words = bytes.chunks_exact(8).zip(0..);
        let read = words.filter_map(|(bytes, n)| {
            let (page, word) = (n * 8 / PAGE_SIZE_U64, n % (PAGE_SIZE_U64 / 8));
            let value = u64::from_le_bytes(bytes.try_into().ok()?);
            // What is past the file's end now and then has too many changes of that for the checker.
            (page < self.plan.pages && word < self.plan.slots).then_some(Op {
                guest: self.count,
                call: Call::Read { page, word },
                begin_ns,
                end: Some((end_ns, Outcome::Value(Some(value)))),
            })
        });
        read.collect()
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
        assert!(
            ended <= self.fenced.len(),
            "{ended} guests died of themselves"
        );
        let read = self.read_at_last();
        let (mut ops, mut troubles) = (Vec::<Op>::new(), self.fenced.clone());
        for guest in 0..self.count {
            let (of_guest, anew) = read_log(&self.log(guest), guest);
            ops.extend(of_guest);
            for &at_ns in &self.kills_ns {
                let anew_ns = anew.iter().copied().find(|anew_ns| *anew_ns > at_ns);
                troubles.push(Trouble::Killed {
                    guest,
                    at_ns,
                    anew_ns: anew_ns.unwrap_or(u64::MAX),
                });
            }
        }
        ops.extend(read);
        let summary =
            check(&ops, &troubles, seen_is_kept).unwrap_or_else(|v| panic!("{what}: {v:?}"));
        println!("history {what}: {} operations: {summary:?}", ops.len());
        let mut failed = BTreeMap::<(&str, i32), usize>::new();
        for op in &ops {
            if let Some((_, Outcome::Failed(errno))) = op.end {
                *failed.entry((op.call.name(), errno)).or_default() += 1;
            }
        }
        if !failed.is_empty() {
            println!("  failed, by errno: {failed:?}");
        }
        assert!(
            failed.is_empty() || !troubles.is_empty(),
            "something failed though nothing was wrong"
        );
        self.daemon.audit_clean();
        assert!(
            summary.of_others > 20,
            "the guests hardly met: there was nothing to check"
        );
        assert!(
            summary.skipped * 10 < summary.words,
            "too much of it could not be checked"
        );
        summary
    }
}

/// What most runs do: two seconds of three guests on eight pages.
pub const PLAN: Plan = Plan {
    guest: 0,
    log: String::new(),
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
