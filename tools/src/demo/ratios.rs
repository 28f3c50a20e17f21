//! A few ratios against native mappings of the same file, side by side; the benches have them all.

use super::pattern;
use super::report::Report;
use anyhow::Result;
use copage_coherence::msg::OpenHow;
use copage_grants::volatile::VolatileBytes;
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64};
use copage_mmap::native::NativeMapping;
use copage_mmap::{Client, ConnectOptions, MapOptions};
use std::path::Path;
use std::time::Instant;

/// Pages of the measured file (64 MiB).
const PAGES: u64 = 16_384;
/// Reads of a warm mapping in one repetition.
const READS: u64 = 1_000_000;
/// Interleaved repetitions; medians are printed.
const REPETITIONS: usize = 5;

/// Measures and shows.
pub fn show(report: &mut Report, socket: &Path, scratch: &Path) -> Result<()> {
    let path = scratch.join("ratios");
    super::write_durably(&path, &pattern::file(PAGES, 1))?;
    let client = Client::connect(socket, &ConnectOptions::named("ratios"))?;
    let export = client.attach("scratch")?;
    let file = export.resolve(b"ratios")?.open(OpenHow::Map)?;
    let host = std::fs::File::open(&path)?;
    // The first pass fills, page cache and frames alike; what is compared is resident on both sides.
    let filled = Instant::now();
    let first = file.map(&MapOptions::default())?;
    touch(&first.as_volatile());
    let fill_s = filled.elapsed().as_secs_f64();
    touch(&NativeMapping::new(&host, false)?.as_volatile());
    let mut touches = (Vec::new(), Vec::new());
    let mut reads = (Vec::new(), Vec::new());
    for _ in 0..REPETITIONS {
        let native = NativeMapping::new(&host, false)?;
        touches.1.push(touch(&native.as_volatile()));
        reads.1.push(random_reads(&native.as_volatile()));
        let mapping = file.map(&MapOptions::default())?;
        touches.0.push(touch(&mapping.as_volatile()));
        reads.0.push(random_reads(&mapping.as_volatile()));
    }
    let (touch_ours, touch_native) = (median(touches.0), median(touches.1));
    let (read_ours, read_native) = (median(reads.0), median(reads.1));
    report.line(
        "ratios",
        true,
        format!(
            "against native mappings of the same file: warm random reads {:.2} ({:.1} and {:.1} ns), \
             first touch of resident pages {:.2} ({:.0} and {:.0} ns a page)",
            read_native / read_ours,
            read_ours,
            read_native,
            touch_native / touch_ours,
            touch_ours,
            touch_native,
        ),
    );
    report.line(
        "",
        true,
        format!(
            "(speed: above 1 copage is faster); cold, from the disk through the daemon: {:.0} MiB/s; \
             all ratios: cargo run --release -p copage-benches",
            (PAGES * PAGE_SIZE_U64) as f64 / f64::from(1 << 20) / fill_s
        ),
    );
    Ok(())
}

/// Reads one word of every page; ns a page.
fn touch(bytes: &VolatileBytes<'_>) -> f64 {
    let begin = Instant::now();
    let mut sum = 0_u64;
    for page in 0..bytes.len() / PAGE_SIZE {
        sum = sum.wrapping_add(bytes.read_u64(page * PAGE_SIZE).unwrap_or(0));
    }
    std::hint::black_box(sum);
    begin.elapsed().as_nanos() as f64 / PAGES as f64
}

/// Reads one word of random cache lines; ns a read.
fn random_reads(bytes: &VolatileBytes<'_>) -> f64 {
    let lines = bytes.len() as u64 / 64;
    let mut draw = 1_u64;
    let mut sum = 0_u64;
    let begin = Instant::now();
    for _ in 0..READS {
        draw = draw
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        sum = sum.wrapping_add(
            bytes
                .read_u64(((draw >> 33) % lines * 64) as usize)
                .unwrap_or(0),
        );
    }
    std::hint::black_box(sum);
    begin.elapsed().as_nanos() as f64 / READS as f64
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}
