//! What guests on Xen see of one file that all of them write, against what one file would have shown: each
//! operation at one moment between its begin and its end.
//!
//! The guests and the checker are those of `tests/tests/local_histories.rs`; how operations of several domains are
//! put in order is in `records.rs`. Cannot show more than what happened, which is little and at random; nor what
//! several processors do, since the emulated machine has one.

use super::stage::{LIMIT, Stage};
use crate::guest::{Guest, Kind, Setup};
use crate::lab::Lab;
use crate::records::Records;
use anyhow::{Context, Result, bail, ensure};
use copage_grants::PAGE_SIZE;
use copage_tests::history::{Clock as _, History, Plan};
use std::time::Duration;

/// Session lease and deadline of an invalidate, in ms: emulated guests get no processor for seconds at times.
const TERM_MS: u64 = 15_000;
/// The guest that comes instead of one that is destroyed.
const LATER: &str = "tells-again";
const SOON: Duration = Duration::from_secs(90);
/// What most runs do: 16 seconds of three guests on four pages.
const PLAN: Plan = Plan {
    guest: 0,
    start_ns: 0,
    slot_ns: 400_000_000,
    slots: 40,
    ops: 10,
    pages: 4,
    tail_pages: 0,
    store_permille: 400,
    message_permille: 150,
    sync_permille: 20,
    resize_permille: 0,
};

/// Guests, a daemon, and runs one after the other.
struct Bench<'a> {
    lab: &'a Lab,
    stage: Stage<'a>,
    records: Records,
    /// Recorders there have been.
    count: u32,
}

/// A run: a file of its own, and recorders in guests.
struct Run<'b, 'a> {
    bench: &'b mut Bench<'a>,
    plan: Plan,
    file: String,
    recorders: Vec<Recorder>,
    history: History,
}

/// A program in a guest; its number is that of its log.
struct Recorder {
    number: u32,
    /// `None`: it is destroyed.
    domid: Option<u16>,
}

impl<'a> Bench<'a> {
    fn new(lab: &'a Lab, later: &[&str]) -> Result<Self> {
        let newest = lab.series()?.last().context("no guest kernels")?.clone();
        let setups = [
            Setup::new(Kind::Pvh, "tells-pvh", 160),
            Setup::new(Kind::Pv, "tells-pv", 160),
            Setup {
                series: Some(newest),
                ..Setup::new(Kind::Pvh, "tells-new", 160)
            },
        ];
        let more = format!("lease_ttl_ms = {TERM_MS}\ninvalidate_deadline_ms = {TERM_MS}\n");
        Ok(Self {
            lab,
            stage: Stage::new(lab, &setups, 1, &more, later)?,
            records: Records::new(lab)?,
            count: 0,
        })
    }

    /// A run of every guest there is; `change` makes the plan of the first its own.
    fn run<'b>(&'b mut self, plan: Plan, change: impl FnOnce(&mut Plan)) -> Result<Run<'b, 'a>> {
        let file = format!("file{}", self.count);
        let bytes = (plan.pages + plan.tail_pages) as usize * PAGE_SIZE;
        std::fs::write(self.stage.share.join(&file), vec![0; bytes])?;
        let plan = Plan {
            // Time for all to open it.
            start_ns: self.records.clock()?.now_ns() + 3_000_000_000,
            ..plan
        };
        let guests = self.stage.guests.len();
        let mut first = plan.clone();
        change(&mut first);
        let mut run = Run {
            bench: self,
            plan,
            file,
            recorders: Vec::new(),
            history: History::default(),
        };
        run.record(0, first)?;
        for which in 1..guests {
            run.record(which, run.plan.clone())?;
        }
        Ok(run)
    }
}

impl<'a> Run<'_, 'a> {
    /// A recorder in a guest.
    fn record(&mut self, which: usize, plan: Plan) -> Result<()> {
        let number = self.bench.count;
        self.bench.count += 1;
        let guest = self.bench.stage.guest(which)?;
        let plan = serde_json::to_string(&Plan {
            guest: number,
            ..plan
        })?;
        let told = self.bench.records.grant(number, guest.domid())?;
        let Self { file, .. } = self;
        // It is asked later how that ended, when the guest is there still.
        guest.spawn(&format!(
            "copage-xen-lab do record share {file} {told} '{plan}' > /tmp/said.{number} 2>&1; \
             echo $? > /tmp/ended.{number}"
        ))?;
        self.recorders.push(Recorder {
            number,
            domid: Some(guest.domid()),
        });
        Ok(())
    }

    fn sleep(&self, seconds: u64) {
        std::thread::sleep(Duration::from_secs(seconds));
    }

    /// Until every recorder has begun.
    fn begun(&self) -> Result<()> {
        for recorder in &self.recorders {
            let log = || self.bench.records.log(recorder.number);
            let begun = || Ok((!log()?.is_empty()).then_some(()));
            self.bench.lab.wait("a recorder to begin", SOON, begun)?;
        }
        Ok(())
    }

    fn pause(&self, which: usize, pauses: bool) -> Result<()> {
        let domid = self.bench.stage.guest(which)?.domid();
        let word = if pauses { "pause" } else { "unpause" };
        self.bench.lab.sh(&format!("xl {word} {domid}"))?.text()?;
        Ok(())
    }

    /// What the guest does from now on is not asked about.
    fn will_be_fenced(&mut self, which: usize) -> Result<()> {
        let guest = self.recorders[which].number;
        let from_ns = self.bench.records.stamp_ns()?;
        self.history.will_be_fenced(guest, from_ns);
        Ok(())
    }

    /// `xl destroy`, and another guest instead, which records too.
    fn destroy(&mut self, which: usize, setup: &Setup) -> Result<()> {
        let dead = self.bench.stage.guests.remove(which);
        let domid = dead.domid();
        dead.destroy()?;
        for recorder in &mut self.recorders {
            if recorder.domid == Some(domid) {
                recorder.domid = None;
            }
        }
        let guest = Guest::create(self.bench.lab, setup)?;
        guest.ready()?;
        self.bench.stage.guests.insert(which, guest);
        self.record(which, self.plan.clone())
    }

    /// SIGKILL of the daemon, and another begins.
    fn kill_daemon(&mut self) -> Result<()> {
        // Not later than when it dies: what was done by then is what can be lost.
        self.history.daemon_killed(self.bench.records.stamp_ns()?);
        self.bench.stage.daemon.kill()?;
        self.bench.stage.daemon.again()
    }

    /// Until all recorders have ended; what those said that ended by SIGBUS.
    fn ended(&self, what: &str) -> Result<Vec<String>> {
        let mut fenced = Vec::new();
        for Recorder { number, domid } in &self.recorders {
            let log = self.bench.lab.log(&format!("history-{number}"));
            // What it has written down can be looked at whatever comes of it.
            let keep =
                || Ok::<_, anyhow::Error>(std::fs::write(&log, self.bench.records.log(*number)?)?);
            let Some(domid) = *domid else {
                keep()?;
                continue;
            };
            let guests = &self.bench.stage.guests;
            let guest = guests.iter().find(|guest| guest.domid() == domid);
            let guest = guest.context("its guest")?;
            let ended = self.bench.lab.wait("the recorders' end", LIMIT, || {
                let ended = guest.run(&format!("cat /tmp/ended.{number} 2>/dev/null"))?;
                Ok(Some(ended.stdout.trim().to_owned()).filter(|ended| !ended.is_empty()))
            })?;
            keep()?;
            let said = guest.run(&format!("cat /tmp/said.{number}"))?.stdout;
            match &*ended {
                "0" => {}
                // SIGBUS, as a shell says it.
                "135" => fenced.push(format!("{}: {}", guest.name(), said.trim())),
                other => bail!("{what}: a recorder ended with {other}: {said}"),
            }
        }
        Ok(fenced)
    }

    /// Waits for all recorders, and has the checker say what it thinks of what they wrote down.
    fn finish(mut self, what: &str, seen_is_kept: bool) -> Result<String> {
        let fenced = self.ended(what)?;
        ensure!(
            fenced.len() <= self.history.fenced(),
            "{what}: {} guests ended by SIGBUS (when their lease of {TERM_MS} ms ran out, the machine is too busy, or the \
             daemon hangs): {}",
            fenced.len(),
            fenced.join(" | ")
        );
        self.bench
            .stage
            .run(0, &format!("sync share {}", self.file))?;
        for Recorder { number, .. } in &self.recorders {
            let log = self.bench.records.log(*number)?;
            self.history.add(*number, &log);
        }
        let begin_ns = self.bench.records.stamp_ns()?;
        let bytes = std::fs::read(self.bench.stage.share.join(&self.file))?;
        let end_ns = self.bench.records.stamp_ns()?;
        self.history.at_last(&bytes, &self.plan, (begin_ns, end_ns));
        let judged = self.history.judge(seen_is_kept);
        let (summary, told) = judged.map_err(|why| anyhow::anyhow!("{what}: {why}"))?;
        self.bench.lab.show(&format!("history {what}: {told}"))?;
        self.bench.stage.audited()?;
        Ok(format!(
            "{what}: {} operations on {} words, {} saw what another guest stored",
            summary.ops, summary.words, summary.of_others
        ))
    }
}

/// Steps one after the other, in three guests.
fn steps(lab: &Lab, steps: &[fn(&mut Bench<'_>) -> Result<String>]) -> Result<String> {
    let mut bench = Bench::new(lab, &[LATER])?;
    let mut seen = Vec::new();
    for step in steps {
        seen.push(step(&mut bench)?);
    }
    bench.stage.daemon.stop()?;
    Ok(seen.join("; "))
}

/// Nothing happens to the guests.
pub fn histories(lab: &Lab) -> Result<String> {
    steps(lab, &[plain])
}

/// The file's length and the room for its pages change.
pub fn room(lab: &Lab) -> Result<String> {
    steps(lab, &[sizes, scarce])
}

/// Guests are paused and destroyed.
pub fn ends(lab: &Lab) -> Result<String> {
    steps(lab, &[stopped, destroyed])
}

/// The daemon is killed.
pub fn kills(lab: &Lab) -> Result<String> {
    steps(lab, &[daemon_killed])
}

fn plain(bench: &mut Bench<'_>) -> Result<String> {
    bench.run(PLAN, |_| {})?.finish("of three guests", true)
}

fn sizes(bench: &mut Bench<'_>) -> Result<String> {
    let plan = Plan {
        tail_pages: 4,
        ..PLAN
    };
    let run = bench.run(plan, |plan| plan.resize_permille = 100)?;
    run.finish("of a file that gets shorter and longer", true)
}

fn scarce(bench: &mut Bench<'_>) -> Result<String> {
    // More than the smaller budget: every turn takes pages back.
    let big = bench.stage.share.join("big");
    std::fs::write(&big, vec![1; 7 << 20])?;
    let run = bench.run(Plan { slots: 60, ..PLAN }, |_| {})?;
    run.begun()?;
    for _ in 0..3 {
        let read = run
            .bench
            .stage
            .guest(0)?
            .run("copage cat share big | wc -c")?;
        ensure!(read.text()?.trim() == "7340032", "{read:?}");
        for words in ["budget 4", "reclaim 4", "budget 8"] {
            run.bench.stage.daemon.copage(words)?.text()?;
        }
    }
    let seen = run.finish("of a budget that is cut", true)?;
    std::fs::remove_file(&big)?;
    Ok(seen)
}

fn stopped(bench: &mut Bench<'_>) -> Result<String> {
    let mut run = bench.run(Plan { slots: 120, ..PLAN }, |_| {})?;
    run.begun()?;
    run.pause(0, true)?;
    run.sleep(TERM_MS / 5000);
    run.pause(0, false)?;
    run.sleep(2);
    run.will_be_fenced(1)?;
    run.pause(1, true)?;
    run.sleep(TERM_MS / 1000 + 8);
    run.pause(1, false)?;
    run.finish(
        "of guests that are paused, for a moment and for longer than their lease",
        true,
    )
}

fn destroyed(bench: &mut Bench<'_>) -> Result<String> {
    let mut run = bench.run(Plan { slots: 200, ..PLAN }, |_| {})?;
    run.begun()?;
    run.sleep(4);
    run.destroy(2, &Setup::new(Kind::Pvh, LATER, 160))?;
    run.finish("of a guest that is destroyed", true)
}

fn daemon_killed(bench: &mut Bench<'_>) -> Result<String> {
    let plan = Plan {
        slots: 150,
        sync_permille: 60,
        ..PLAN
    };
    let mut run = bench.run(plan, |_| {})?;
    run.begun()?;
    for _ in 0..2 {
        run.sleep(6);
        run.kill_daemon()?;
        run.sleep(10);
    }
    // What several write at once is saved when the last lets go.
    run.finish("of a daemon that is killed", false)
}
