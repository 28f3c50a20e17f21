//! A random working set in fewer frames than it has pages.

use crate::bare::{Remote, RemoteOptions};
use crate::daemon::{self, Daemon, DaemonOptions};
use crate::files::{self, ReadKind, TestFile};
use crate::limits::PAGES_PER_MIB;
use crate::pattern::Random;
use crate::process::Faults;
use crate::reader;
use crate::setting::Setting;
use crate::stats::interleaved;
use crate::table::{Row, Unit};
use anyhow::Result;
use copage_grants::volatile::VolatileBytes;
use std::time::Instant;

const NAME: &str = "budget";

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let sizes = &setting.sizes;
    let dir = setting.subdir("budget")?;
    let file = TestFile::make(&dir, "file", sizes.working_set_mib * PAGES_PER_MIB, 41)?;
    for share in [2, 4, 8, 16] {
        one(setting, &file, share, rows)?;
    }
    Ok(())
}

/// The budget is a `share`-th of the working set.
fn one(setting: &Setting, file: &TestFile, share: u64, rows: &mut Vec<Row>) -> Result<()> {
    let sizes = &setting.sizes;
    let dir = setting.subdir("budget")?;
    let frames_mib = sizes.working_set_mib / share;
    let frames_max = frames_mib * PAGES_PER_MIB;
    let mut faults = [(0, 0); 3];
    // A side fills its budget before the clock starts, and every repetition has its own accesses.
    let mut measure = |side: usize, rep: usize, bytes: VolatileBytes<'_>| {
        let mut random = Random::new(1000 * share + rep as u64);
        let mut accesses =
            |count: u64| -> Vec<u64> { (0..count).map(|_| random.below(file.pages)).collect() };
        let (filling, timed) = (
            accesses(2 * frames_max),
            accesses(sizes.working_set_accesses),
        );
        let got = reader::touch(bytes, filling.iter().copied());
        reader::check(
            "filling the budget",
            got,
            reader::expected_touch(file.seed, filling),
        )?;
        let (before, begin) = (Faults::of_thread()?, Instant::now());
        let got = reader::touch(bytes, timed.iter().copied());
        let seconds = begin.elapsed().as_secs_f64();
        faults[side] = Faults::of_thread()?.since(before);
        reader::check(
            "a working set over the budget",
            got,
            reader::expected_touch(file.seed, timed),
        )?;
        anyhow::Ok(sizes.working_set_accesses as f64 / seconds)
    };
    let mut used_most = 0;
    let [copage, direct, buffered] = interleaved::<3>(sizes.reps_long.min(3), |side, rep| {
        if side == 0 {
            let daemon = Daemon::start(setting, &dir, DaemonOptions::ro(frames_mib, true))?;
            let client = daemon.connect()?;
            let (_open, mapping) = daemon::map(&client, file.name())?;
            let rate = measure(side, rep, mapping.as_volatile());
            used_most = used_most.max(daemon.stats()?.frames_used);
            return rate;
        }
        let read = if side == 1 {
            ReadKind::Direct
        } else {
            ReadKind::Buffered
        };
        if read == ReadKind::Buffered {
            files::warm(&file.path)?;
        }
        let remote = Remote::start(file, RemoteOptions { read, frames_max })?;
        measure(side, rep, remote.mapping()?.as_volatile())
    })?;
    let row = |name, samples| {
        Row::new(
            NAME,
            format!(
                "random accesses a second, {frames_mib} of {} MiB (1/{share})",
                sizes.working_set_mib
            ),
            Unit::PerSecond,
        )
        .copage(&copage)
        .against(name, samples)
    };
    let over = if used_most > frames_max {
        " OVER THE BUDGET"
    } else {
        ""
    };
    rows.push(
        row("bare loop, O_DIRECT", &direct)
            .ratio_at_least(0.8)
            .faults(faults[0], faults[1])
            .note(format!(
                "copage used {used_most} of {frames_max} frames{over}"
            )),
    );
    rows.push(
        row("bare loop, pread from page cache", &buffered)
            .faults(faults[0], faults[2])
            .note("this rival keeps the whole file in the page cache beside its frames"),
    );
    Ok(())
}
