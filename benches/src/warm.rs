//! Reading through a warm mapping: random cache lines, and sums of whole pages in order.

use crate::daemon::{self, Daemon, DaemonOptions};
use crate::files::{self, TestFile};
use crate::limits::PAGES_PER_MIB;
use crate::pattern::{LINE_BYTES, Random};
use crate::process::{self, Faults};
use crate::reader;
use crate::setting::Setting;
use crate::stats::interleaved;
use crate::table::{Row, Unit};
use anyhow::Result;
use copage_grants::PAGE_SIZE;
use copage_grants::volatile::VolatileBytes;
use copage_mmap::Mapping;
use copage_mmap::native::NativeMapping;
use std::time::Instant;

const NAME: &str = "warm";
const LINES_PER_PAGE: u64 = (PAGE_SIZE / LINE_BYTES) as u64;

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let sizes = &setting.sizes;
    let dir = setting.subdir("warm")?;
    let file = TestFile::make(&dir, "file", sizes.warm_pages, 11)?;
    let mib = sizes.warm_pages / PAGES_PER_MIB;
    let sum = file.sum();
    let mut random = Random::new(5);
    let bound = sizes.warm_pages * LINES_PER_PAGE;
    let lines: Vec<u32> = (0..sizes.warm_lines)
        .map(|_| random.below(bound) as u32)
        .collect();
    let lines_sum = reader::expected_lines(file.seed, &lines);

    // Both kinds of frames at once, each with a daemon and a fresh mapping, beside the native one.
    let budget = 2 * mib.max(4);
    let mut daemons = Vec::new();
    for huge in [false, true] {
        daemons.push(Daemon::start(
            setting,
            &dir,
            DaemonOptions::ro(budget, huge),
        )?);
    }
    let mut shared = Vec::new();
    for daemon in &daemons {
        let client = daemon.connect()?;
        let (file, mapping) = daemon::map(&client, file.name())?;
        mapping.populate(0..mapping.len())?;
        shared.push((client, file, mapping));
    }
    let huge_pages = daemons[1].wait_for_huge(sizes.warm_pages)?;
    // Fresh maps of what the daemons have made of it by now: 2 MiB frames may come after the pages.
    let mut mappings: Vec<Mapping> = Vec::new();
    for (_, file, _) in &shared {
        let mapping = file.map(&copage_mmap::MapOptions::shared())?;
        mapping.populate(0..mapping.len())?;
        mappings.push(mapping);
    }
    files::chill(&file.path)?;
    files::warm(&file.path)?;
    let native = NativeMapping::new(&std::fs::File::open(&file.path)?, true)?;
    let sides: [VolatileBytes<'_>; 3] = [
        mappings[0].as_volatile(),
        mappings[1].as_volatile(),
        native.as_volatile(),
    ];

    let mut by_huge = [0; 3];
    for (sum, bytes) in by_huge.iter_mut().zip(sides) {
        let start = bytes.as_ptr().addr();
        *sum = process::mapped_huge(start, start + bytes.len())? / PAGE_SIZE as u64;
    }
    let note = |side: usize| {
        format!(
            "mapped by 2 MiB: {} of {} pages ({} of them in 2 MiB frames), native {}",
            by_huge[side],
            sizes.warm_pages,
            if side == 0 { 0 } else { huge_pages },
            by_huge[2],
        )
    };
    let mut measure =
        |what: &str, work: &dyn Fn(VolatileBytes<'_>) -> u64, expected, units: f64| {
            let mut faults = [(0, 0); 3];
            // Once without a clock: what is left to map is mapped.
            for (side, bytes) in sides.iter().enumerate() {
                let before = Faults::of_thread()?;
                reader::check(what, work(*bytes), expected)?;
                faults[side] = Faults::of_thread()?.since(before);
            }
            let [small, huge, native] = interleaved::<3>(sizes.reps, |side, _| {
                let begin = Instant::now();
                let got = work(sides[side]);
                let seconds = begin.elapsed().as_secs_f64();
                reader::check(what, got, expected)?;
                Ok(units / seconds)
            })?;
            rows.push(
                Row::new(
                    NAME,
                    format!("{what}, {mib} MiB, 4 KiB frames"),
                    Unit::PerSecond,
                )
                .copage(&small)
                .against(setting.native(), &native)
                .ratio_at_least(0.99)
                .faults(faults[0], faults[2])
                .note(note(0)),
            );
            rows.push(
                Row::new(
                    NAME,
                    format!("{what}, {mib} MiB, 2 MiB frames (aim 1.3)"),
                    Unit::PerSecond,
                )
                .copage(&huge)
                .against(setting.native(), &native)
                .ratio_at_least(0.99)
                .faults(faults[1], faults[2])
                .note(note(1)),
            );
            anyhow::Ok(())
        };
    measure(
        "random cache lines",
        &|bytes| reader::sum_lines(bytes, &lines),
        lines_sum,
        lines.len() as f64,
    )?;
    measure(
        "sums of pages in order",
        &reader::sum_all,
        sum,
        sizes.warm_pages as f64,
    )
}
