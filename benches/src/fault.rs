//! The way of a fault: how long until the first byte, and how many pages a second come end to end.

use crate::daemon::{Daemon, DaemonOptions};
use crate::files::TestFile;
use crate::guest::{self, Guest, Order};
use crate::limits::PAGES_PER_MIB;
use crate::reader;
use crate::setting::Setting;
use crate::stats::Samples;
use crate::table::{Row, Unit};
use anyhow::Result;
use std::time::Instant;

const NAME: &str = "fault";

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("fault")?;
    let file = TestFile::make(&dir, "file", setting.sizes.touch_pages, 31)?;
    let options = DaemonOptions::ro(2 * (file.pages / PAGES_PER_MIB).max(4), true);
    for guests in [1, 4] {
        let daemon = Daemon::start(setting, &dir, options)?;
        latency(setting, &daemon, &file, guests, rows)?;
    }
    for guests in [1, 4] {
        let daemon = Daemon::start(setting, &dir, options)?;
        throughput(&daemon, &file, guests, rows)?;
    }
    Ok(())
}

fn connected(daemon: &Daemon, file: &TestFile, count: usize) -> Result<Vec<Guest>> {
    let mut guests = Guest::spawn_connected(count, &daemon.socket())?;
    guest::order_all(
        &mut guests,
        &Order::Map {
            name: file.name().to_owned(),
        },
    )?;
    Ok(guests)
}

fn latency(
    setting: &Setting,
    daemon: &Daemon,
    file: &TestFile,
    count: usize,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let mut guests = connected(daemon, file, count)?;
    let parts = count as u64;
    for (part, guest) in guests.iter_mut().enumerate() {
        let count = setting.sizes.fault_count / parts;
        guest.send(&Order::Latency {
            seed: file.seed,
            count,
            part: part as u64,
            parts,
        })?;
    }
    let mut all = Samples::default();
    for guest in &mut guests {
        all.extend(
            guest
                .receive()?
                .latencies_ns
                .into_iter()
                .map(|ns| ns as f64 * 1e-9),
        );
    }
    for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
        let row = Row::new(
            NAME,
            format!("fault to first byte, {name}, {count} guest(s), cold file"),
            Unit::Seconds,
        );
        rows.push(match all.percentile(share) {
            Some(value) => row.value(value),
            None => row.note("not here: nothing was timed"),
        });
    }
    Ok(())
}

fn throughput(daemon: &Daemon, file: &TestFile, count: usize, rows: &mut Vec<Row>) -> Result<()> {
    let expected = reader::expected_touch(file.seed, 0..file.pages);
    for state in ["cold", "resident"] {
        // Fresh processes each time: nothing of theirs is mapped.
        let mut guests = connected(daemon, file, count)?;
        let begin = Instant::now();
        let answers = guest::order_all(&mut guests, &Order::Touch)?;
        let seconds = begin.elapsed().as_secs_f64();
        for answer in &answers {
            reader::check("pages mapped end to end", answer.sum, expected)?;
        }
        let pages = (file.pages * count as u64) as f64;
        rows.push(
            Row::new(
                NAME,
                format!("mapped pages a second, {count} guest(s), {state} file, in order"),
                Unit::PerSecond,
            )
            .value(pages / seconds),
        );
    }
    Ok(())
}
