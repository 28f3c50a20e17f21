//! A daemon with nothing to do: how often it wakes, how much memory it keeps.

use crate::daemon::{Daemon, DaemonOptions};
use crate::files::TestFile;
use crate::guest::{self, Guest, Order};
use crate::limits::PAGES_PER_MIB;
use crate::process::{self, Memory};
use crate::reader;
use crate::setting::Setting;
use crate::table::{Row, Unit, show};
use anyhow::Result;
use std::time::{Duration, Instant};

const NAME: &str = "idle";
/// Guests that are connected and do nothing.
const GUESTS: usize = 4;
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
    Ok(())
}
