//! First touch by the library: of pages that are there, of pages that must be brought, in order.

use crate::bare::{self, Remote, RemoteOptions};
use crate::daemon::{self, Daemon, DaemonOptions};
use crate::files::{self, ReadKind, TestFile};
use crate::limits::PAGES_PER_MIB;
use crate::pattern::Random;
use crate::process::Faults;
use crate::reader;
use crate::setting::Setting;
use crate::stats::{Samples, interleaved};
use crate::table::{Row, Unit};
use anyhow::Result;
use copage_grants::volatile::VolatileBytes;
use copage_mmap::MapOptions;
use copage_mmap::native::NativeMapping;
use std::time::Instant;

const NAME: &str = "touch";

/// Touches pages under a clock: seconds for each, and the faults of it all.
struct Timer<'a> {
    seed: u64,
    order: &'a [u64],
    expected: u64,
    faults: (u64, u64),
}

impl<'a> Timer<'a> {
    fn new(seed: u64, order: &'a [u64]) -> Self {
        let expected = reader::expected_touch(seed, order.iter().copied());
        Self {
            seed,
            order,
            expected,
            faults: (0, 0),
        }
    }

    fn time(&mut self, bytes: VolatileBytes<'_>) -> Result<f64> {
        let (before, begin) = (Faults::of_thread()?, Instant::now());
        let got = reader::touch(bytes, self.order.iter().copied());
        let seconds = begin.elapsed().as_secs_f64();
        self.faults = Faults::of_thread()?.since(before);
        reader::check(
            &format!("first touch (seed {})", self.seed),
            got,
            self.expected,
        )?;
        Ok(seconds / self.order.len() as f64)
    }
}

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("touch")?;
    let file = TestFile::make(&dir, "file", setting.sizes.touch_pages, 21)?;
    present(setting, &file, rows)?;
    absent(setting, &file, rows)?;
    in_order(setting, &file, rows)
}

fn options(file: &TestFile) -> DaemonOptions {
    DaemonOptions::ro(2 * (file.pages / PAGES_PER_MIB).max(4), true)
}

/// Pages already granted: a fresh mapping of a file that is all there.
fn present(setting: &Setting, file: &TestFile, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("touch")?;
    let daemon = Daemon::start(
        setting,
        &dir,
        DaemonOptions {
            huge: false,
            ..options(file)
        },
    )?;
    let client = daemon.connect()?;
    let (open, filler) = daemon::map(&client, file.name())?;
    filler.populate(0..filler.len())?;
    files::warm(&file.path)?;
    let mut order = Random::new(3).permutation(file.pages);
    order.truncate(setting.sizes.touch_random_pages as usize);
    let (mut ours, mut theirs) = (Timer::new(file.seed, &order), Timer::new(file.seed, &order));
    let mut natives = Timer::new(file.seed, &order);
    let [copage, bare, native] = interleaved::<3>(setting.sizes.reps, |side, _| match side {
        0 => ours.time(open.map(&MapOptions::shared())?.as_volatile()),
        1 => theirs.time(bare::from_memory(file)?.as_volatile()),
        _ => {
            let opened = std::fs::File::open(&file.path)?;
            natives.time(NativeMapping::new(&opened, false)?.as_volatile())
        }
    })?;
    let row = |name: String, samples: &Samples, faults| {
        Row::new(
            NAME,
            "first touch, library, page already granted, random",
            Unit::Seconds,
        )
        .copage(&copage)
        .against(name, samples)
        .faults(ours.faults, faults)
    };
    rows.push(row("bare userfaultfd service".into(), &bare, theirs.faults).ratio_at_most(1.2));
    rows.push(row(
        format!("{} warm", setting.native()),
        &native,
        natives.faults,
    ));
    Ok(())
}

/// Pages that the daemon must read from the disk, touched at random: windows of one page.
fn absent(setting: &Setting, file: &TestFile, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("touch")?;
    let mut order = Random::new(4).permutation(file.pages);
    order.truncate(setting.sizes.touch_random_pages as usize);
    let mut timers: [Timer<'_>; 4] = std::array::from_fn(|_| Timer::new(file.seed, &order));
    let samples = interleaved::<4>(setting.sizes.reps_long, |side, _| {
        let remote = |read| {
            Remote::start(
                file,
                RemoteOptions {
                    read,
                    frames_max: u64::MAX,
                },
            )
        };
        match side {
            0 => {
                let daemon = Daemon::start(setting, &dir, options(file))?;
                let client = daemon.connect()?;
                let (_open, mapping) = daemon::map(&client, file.name())?;
                timers[0].time(mapping.as_volatile())
            }
            1 => timers[1].time(remote(ReadKind::Direct)?.mapping()?.as_volatile()),
            2 => {
                files::warm(&file.path)?;
                timers[2].time(remote(ReadKind::Buffered)?.mapping()?.as_volatile())
            }
            _ => {
                files::chill(&file.path)?;
                let opened = std::fs::File::open(&file.path)?;
                timers[3].time(NativeMapping::new(&opened, false)?.as_volatile())
            }
        }
    })?;
    let row = |side: usize, name: String| {
        Row::new(
            NAME,
            "first touch, library, not yet granted, random, cold",
            Unit::Seconds,
        )
        .copage(&samples[0])
        .against(name, &samples[side])
        .faults(timers[0].faults, timers[side].faults)
    };
    rows.push(row(1, "bare + round trip + O_DIRECT".into()).ratio_at_most(1.2));
    rows.push(row(2, "bare + round trip + pread from page cache".into()));
    rows.push(row(
        3,
        format!("{} cold (its own readahead)", setting.native()),
    ));
    Ok(())
}

/// All pages in order: windows make the faults few.
fn in_order(setting: &Setting, file: &TestFile, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("touch")?;
    let order: Vec<u64> = (0..file.pages).collect();
    let mut timers: [Timer<'_>; 2] = std::array::from_fn(|_| Timer::new(file.seed, &order));
    let [copage, native] = interleaved::<2>(setting.sizes.reps_long, |side, _| {
        if side == 0 {
            let daemon = Daemon::start(setting, &dir, options(file))?;
            let client = daemon.connect()?;
            let (_open, mapping) = daemon::map(&client, file.name())?;
            timers[0].time(mapping.as_volatile())
        } else {
            files::chill(&file.path)?;
            let opened = std::fs::File::open(&file.path)?;
            timers[1].time(NativeMapping::new(&opened, false)?.as_volatile())
        }
    })?;
    rows.push(
        Row::new(
            NAME,
            "first touch, library, not yet granted, in order (aim 1.0)",
            Unit::Seconds,
        )
        .copage(&copage)
        .against(format!("{} cold", setting.native()), &native)
        .faults(timers[0].faults, timers[1].faults),
    );
    let mut timers: [Timer<'_>; 3] = std::array::from_fn(|_| Timer::new(file.seed, &order));
    let mut opens = Vec::new();
    let mut daemons = Vec::new();
    for huge in [false, true] {
        let daemon = Daemon::start(
            setting,
            &dir,
            DaemonOptions {
                huge,
                ..options(file)
            },
        )?;
        let client = daemon.connect()?;
        let (open, filler) = daemon::map(&client, file.name())?;
        filler.populate(0..filler.len())?;
        if huge {
            daemon.wait_for_huge(file.pages)?;
        }
        opens.push((open, filler));
        daemons.push((daemon, client));
    }
    files::warm(&file.path)?;
    let samples = interleaved::<3>(setting.sizes.reps, |side, _| {
        if let Some((open, _)) = opens.get(side) {
            timers[side].time(open.map(&MapOptions::shared())?.as_volatile())
        } else {
            let opened = std::fs::File::open(&file.path)?;
            timers[side].time(NativeMapping::new(&opened, false)?.as_volatile())
        }
    })?;
    for (side, frames) in ["4 KiB frames", "2 MiB frames"].into_iter().enumerate() {
        rows.push(
            Row::new(
                NAME,
                format!("first touch, library, resident, in order, {frames}"),
                Unit::Seconds,
            )
            .copage(&samples[side])
            .against(format!("{} warm", setting.native()), &samples[2])
            .faults(timers[side].faults, timers[2].faults),
        );
    }
    Ok(())
}
