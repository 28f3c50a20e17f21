//! First touch of a file below a mount.

use crate::daemon::{Daemon, DaemonOptions};
use crate::files::{self, TestFile};
use crate::limits::PAGES_PER_MIB;
use crate::mounted::Mounted;
use crate::pattern::Random;
use crate::process::Faults;
use crate::reader;
use crate::setting::Setting;
use crate::stats::interleaved;
use crate::table::{Row, Unit};
use anyhow::Result;
use copage_mmap::native::NativeMapping;
use std::fs::File;
use std::path::Path;
use std::time::Instant;

const NAME: &str = "mount";

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("mount-files")?;
    let file = TestFile::make(&dir, "file", setting.sizes.touch_pages, 71)?;
    let daemon = Daemon::start(setting, &dir, options(&file, true))?;
    if let Err(error) = Mounted::start(setting, &daemon) {
        rows.push(
            Row::new(NAME, "first touch, mount, resident file", Unit::Seconds)
                .note(format!("not here: {error:#}")),
        );
        return Ok(());
    }
    drop(daemon);
    for huge in [false, true] {
        resident(setting, &file, huge, rows)?;
    }
    cold(setting, &file, rows)
}

fn options(file: &TestFile, huge: bool) -> DaemonOptions {
    DaemonOptions::ro(2 * (file.pages / PAGES_PER_MIB).max(4), huge)
}

/// Maps an open file afresh and touches pages: seconds for each, unmapping not counted.
fn touch(
    opened: &File,
    seed: u64,
    order: &[u64],
    expected: u64,
    faults: &mut (u64, u64),
) -> Result<f64> {
    let (before, begin) = (Faults::of_thread()?, Instant::now());
    let mapping = NativeMapping::new(opened, false)?;
    let got = reader::touch(mapping.as_volatile(), order.iter().copied());
    let seconds = begin.elapsed().as_secs_f64();
    *faults = Faults::of_thread()?.since(before);
    reader::check(&format!("first touch (seed {seed})"), got, expected)?;
    Ok(seconds / order.len() as f64)
}

fn resident(setting: &Setting, file: &TestFile, huge: bool, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("mount-files")?;
    let daemon = Daemon::start(setting, &dir, options(file, huge))?;
    let mounted = Mounted::start(setting, &daemon)?;
    files::chill(&file.path)?;
    files::warm(&file.path)?;
    let ours = File::open(mounted.dir().join(file.name()))?;
    let theirs = File::open(&file.path)?;
    let stats = daemon.stats()?;
    let how = match stats.frames_pinned {
        0 => "through the page cache: no frame is pinned".to_owned(),
        pinned => format!(
            "passthrough: {pinned} frames pinned, {} of them huge",
            stats.frames_huge
        ),
    };
    let frames = if huge {
        "2 MiB frames (aim 0.6)"
    } else {
        "4 KiB frames"
    };
    let in_order: Vec<u64> = (0..file.pages).collect();
    let random = Random::new(8).permutation(file.pages);
    for (name, order) in [("in order", in_order), ("random", random)] {
        let expected = reader::expected_touch(file.seed, order.iter().copied());
        let mut faults = [(0, 0); 2];
        let [copage, native] = interleaved::<2>(setting.sizes.reps, |side, _| {
            let opened = if side == 0 { &ours } else { &theirs };
            touch(opened, file.seed, &order, expected, &mut faults[side])
        })?;
        rows.push(
            Row::new(
                NAME,
                format!("first touch, mount, resident file, {name}, {frames}"),
                Unit::Seconds,
            )
            .copage(&copage)
            .against(format!("{} warm", setting.native()), &native)
            .ratio_at_most(1.1)
            .faults(faults[0], faults[1])
            .note(how.clone()),
        );
    }
    Ok(())
}

fn cold(setting: &Setting, file: &TestFile, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("mount-files")?;
    for (what, pages) in [("the first byte", 1), ("every page in order", file.pages)] {
        let order: Vec<u64> = (0..pages).collect();
        let expected = reader::expected_touch(file.seed, order.iter().copied());
        let mut faults = [(0, 0); 2];
        let mut open_and_touch = |side: usize, path: &Path| {
            let begin = Instant::now();
            let opened = File::open(path)?;
            touch(&opened, file.seed, &order, expected, &mut faults[side])?;
            anyhow::Ok(begin.elapsed().as_secs_f64())
        };
        let [copage, native] = interleaved::<2>(setting.sizes.reps_long, |side, _| {
            files::chill(&file.path)?;
            if side == 1 {
                return open_and_touch(side, &file.path);
            }
            let daemon = Daemon::start(setting, &dir, options(file, true))?;
            let mounted = Mounted::start(setting, &daemon)?;
            open_and_touch(side, &mounted.dir().join(file.name()))
        })?;
        let mib = file.pages / PAGES_PER_MIB;
        rows.push(
            Row::new(
                NAME,
                format!("open a cold file of {mib} MiB and touch {what}"),
                Unit::Seconds,
            )
            .copage(&copage)
            .against(format!("{} cold", setting.native()), &native)
            .faults(faults[0], faults[1]),
        );
    }
    Ok(())
}
