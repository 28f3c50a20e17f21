//! A daemon with nothing to do: how often it wakes, how much memory it keeps.

use crate::broadcast::Broadcast;
use crate::daemon::{Daemon, DaemonOptions};
use crate::files::TestFile;
use crate::guest::{self, Guest, Order};
use crate::limits::PAGES_PER_MIB;
use crate::process::{self, Memory};
use crate::reader;
use crate::setting::Setting;
use crate::table::{Row, Unit, show};
use anyhow::{Result, bail};
use copage::serve::admin_types::{AdminReply, AdminRequest};
use std::time::{Duration, Instant};

const NAME: &str = "idle";
/// Guests that are connected and do nothing.
const GUESTS: usize = 4;
/// How many idle guests have their renewals counted.
const RENEWING: [(usize, &str); 2] = [(1, "1 idle guest"), (16, "16 idle guests")];
/// The budget; none of it is used but for one small file.
const FRAMES_MIB: u64 = 64;

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("idle")?;
    let file = TestFile::make(&dir, "file", 4 * PAGES_PER_MIB, 51)?;
    let daemon = Daemon::start(setting, &dir, DaemonOptions::ro(FRAMES_MIB, true))?;
    let lease_ttl_ms = daemon.connect()?.welcome().lease_ttl_ms;
    let mut guests = Guest::spawn_connected(GUESTS, &daemon.socket())?;
    guest::order_all(
        &mut guests,
        &Order::Map {
            name: file.name().to_owned(),
        },
    )?;
    for answer in guest::order_all(&mut guests, &Order::Sum)? {
        reader::check("guests that are idle later", answer.sum, file.sum())?;
    }
    // What follows work (a collapse, a lapse of the session that asked for the term) has its time.
    std::thread::sleep(Duration::from_millis(500));

    let (sleeps, ticks, begin) = (
        process::sleeps(daemon.pid())?,
        process::cpu_ticks(daemon.pid())?,
        Instant::now(),
    );
    std::thread::sleep(Duration::from_millis(setting.sizes.idle_ms));
    let sleeps = process::sleeps(daemon.pid())? - sleeps;
    let ticks = process::cpu_ticks(daemon.pid())? - ticks;
    let seconds = begin.elapsed().as_secs_f64();
    let memory = Memory::of(daemon.pid())?;

    // Each guest renews once in a third of a term; the window may hold one more of each.
    let renewals = (GUESTS as f64) * (seconds / (f64::from(lease_ttl_ms) / 3000.0)).ceil();
    rows.push(
        Row::new(
            NAME,
            format!("wake-ups beyond renewals, {GUESTS} idle guests"),
            Unit::Count,
        )
        .value((sleeps as f64 - renewals).max(0.0))
        .value_at_most(0.0)
        .note(format!(
            "{sleeps} voluntary switches of all threads in {seconds:.1} s, {renewals} renewals \
                 expected at most (term {lease_ttl_ms} ms); CPU time {ticks} ticks"
        )),
    );
    rows.push(
        Row::new(NAME, "memory besides frames", Unit::Bytes)
            .value((memory.anonymous + memory.file) as f64)
            .value_at_most(f64::from(10 << 20))
            .note(format!(
                "anonymous {} (tables for {FRAMES_MIB} MiB of frames included), program text {} \
                 (this bench's own program plays the daemon), page tables {}",
                show(memory.anonymous as f64, Unit::Bytes),
                show(memory.file as f64, Unit::Bytes),
                show(memory.page_tables as f64, Unit::Bytes),
            )),
    );
    renewing(setting, rows)
}

/// What idle guests cost: the daemon's CPU time, beside that of a process which is sent as many messages and sends
/// each back. And what it costs that one of them has pages for writing, which are looked at for write-back.
fn renewing(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("renewals")?;
    let file = TestFile::make(&dir, "file", PAGES_PER_MIB, 52)?;
    let name = || file.name().to_owned();
    let echo = Broadcast::start(1, 1)?.cpu_of_message(200, Duration::from_millis(10))?;
    let daemon = Daemon::start(setting, &dir, DaemonOptions::coherent())?;
    let mut guests = Vec::new();
    for (count, what) in RENEWING {
        let more = Guest::spawn_connected(count - guests.len(), &daemon.socket())?;
        guests.extend(more);
        guest::order_all(&mut guests, &Order::Map { name: name() })?;
        guest::order_all(&mut guests, &Order::Touch)?;
        row(setting, rows, &daemon, echo, what)?;
    }
    if let Some(writer) = guests.first_mut() {
        writer.order(&Order::MapWritable { name: name() })?;
        writer.order(&Order::StoreEach { value: 1 })?;
    }
    let what = format!("16 idle guests, one has {} pages for writing", file.pages);
    row(setting, rows, &daemon, echo, &what)
}

fn requests(daemon: &Daemon) -> Result<u64> {
    match daemon.admin(&AdminRequest::Guests)? {
        AdminReply::Guests { guests } => Ok(guests.iter().map(|g| g.requests).sum()),
        other => bail!("guests: {other:?}"),
    }
}

fn row(
    setting: &Setting,
    rows: &mut Vec<Row>,
    daemon: &Daemon,
    echo: f64,
    what: &str,
) -> Result<()> {
    // What follows work has its time: the last stores are written back.
    std::thread::sleep(Duration::from_millis(1500));
    let before = requests(daemon)?;
    let (cpu, begin) = (process::cpu_seconds(daemon.pid())?, Instant::now());
    std::thread::sleep(Duration::from_millis(setting.sizes.idle_ms));
    let seconds = begin.elapsed().as_secs_f64();
    let cpu = (process::cpu_seconds(daemon.pid())? - cpu) / seconds;
    let a_second = (requests(daemon)? - before) as f64 / seconds;
    rows.push(
        Row::new(
            NAME,
            format!("CPU time of the daemon in a second, {what}"),
            Unit::Seconds,
        )
        .value(cpu)
        .against_value("a process that echoes as many messages", echo * a_second)
        .note(format!(
            "{a_second:.1} renewals a second, and as many answers, in a window of {seconds:.1} s"
        )),
    );
    Ok(())
}
