//! What the library costs in a guest, beside the calls below it: in turns, in one process.

use super::library::word;
use crate::numbers::Numbers;
use anyhow::{Result, bail, ensure};
use copage_coherence::msg::OpenHow;
use copage_grants::PAGE_SIZE;
use copage_grants::xen::lib::Gnttab;
use copage_mmap::{Client, ConnectOptions, DaemonAt, Export, MapOptions, Mapping};
use copage_tests::raw::Raw;
use std::time::{Duration, Instant};

/// Pages of the file: [`BLOCKS`] blocks.
pub const PAGES: u64 = 4096;
/// A block, in pages. One fault in each: nearer ones would be taken for a stream that reads on.
const BLOCK_PAGES: u64 = 64;
const BLOCKS: u64 = PAGES / BLOCK_PAGES;
/// A fault's least window lies in the first so many pages of a block.
const LEAST_PAGES: usize = 16;
/// Rounds of mapping, behind one that does not count.
const MAP_ROUNDS: usize = 9;
/// Passes over all blocks; the first does not count.
const FAULT_PASSES: usize = 6;
/// There is one processor: until daemon and kernel are done with what
/// was left them.
const SETTLE: Duration = Duration::from_millis(400);

/// The middle one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// So many of a hundred are not above it.
fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() * percent).div_ceil(100).saturating_sub(1);
    values.get(at).copied().unwrap_or(f64::NAN)
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// The windows that lie over a mapping, in pages: the kernel's own list.
fn windows(mapping: &Mapping) -> Result<Vec<usize>> {
    let begin = mapping.as_ptr().addr();
    let mut all = Vec::new();
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        let range = line.split(' ').next().and_then(|r| r.split_once('-'));
        let (true, Some((from, to))) = (line.ends_with("/dev/xen/gntdev"), range) else {
            continue;
        };
        let (from, to) = (
            usize::from_str_radix(from, 16)?,
            usize::from_str_radix(to, 16)?,
        );
        if (begin..begin + mapping.len()).contains(&from) {
            all.push((to - from) / PAGE_SIZE);
        }
    }
    Ok(all)
}

fn check_page(mapping: &Mapping, page: usize) -> Result<()> {
    let read = mapping.as_volatile().read_u64(page * PAGE_SIZE);
    ensure!(
        read == Some(word(1, page as u64)),
        "page {page} shows {read:x?}"
    );
    Ok(())
}

/// Mapping and unmapping, in us a page, of each round.
#[derive(Default)]
struct Costs {
    map: Vec<f64>,
    unmap: Vec<f64>,
}

impl Costs {
    fn add(&mut self, pages: usize, map: Duration, unmap: Duration) {
        self.map.push(us(map) / pages as f64);
        self.unmap.push(us(unmap) / pages as f64);
    }
}

/// Maps by populate in ranges of `step` pages, and unmaps. Returns the windows.
fn by_library(
    export: &Export,
    path: &str,
    (pages, step): (usize, usize),
    costs: &mut Costs,
) -> Result<Vec<usize>> {
    // Opened anew, so that the daemon writes entries anew.
    let file = export.open(path, OpenHow::Map)?;
    let bytes = (pages * PAGE_SIZE) as u64;
    let mapping = file.map(&MapOptions::shared().range(0, bytes))?;
    std::thread::sleep(SETTLE);
    let begin = Instant::now();
    for first in (0..pages).step_by(step) {
        mapping.populate(first * PAGE_SIZE..(first + step).min(pages) * PAGE_SIZE)?;
    }
    let mapped = begin.elapsed();
    let windows_mapped = windows(&mapping)?;
    let sum = windows_mapped.iter().sum::<usize>();
    ensure!(sum == pages, "{windows_mapped:?}");
    check_page(&mapping, pages - 1)?;
    let begin = Instant::now();
    mapping.unmap_pages(0..mapping.len())?;
    costs.add(pages, mapped, begin.elapsed());
    ensure!(windows(&mapping)?.is_empty(), "windows stayed");
    drop(mapping);
    file.close()?;
    Ok(windows_mapped)
}

/// Maps the same frames in the same batches, and unmaps.
fn by_calls(
    gnttab: &Gnttab,
    (granter, refs): &(u16, Vec<u32>),
    batches: &[usize],
    costs: &mut Costs,
) -> Result<()> {
    std::thread::sleep(SETTLE);
    let begin = Instant::now();
    let mut maps = Vec::with_capacity(batches.len());
    let mut rest = &refs[..];
    for &batch in batches {
        let (these, behind) = rest.split_at(batch);
        maps.push(gnttab.map(*granter, these, false)?);
        rest = behind;
    }
    let mapped = begin.elapsed();
    let read = maps[0].bytes().read_u64(0);
    ensure!(read == Some(word(1, 0)), "{read:x?}");
    let begin = Instant::now();
    drop(maps);
    costs.add(refs.len(), mapped, begin.elapsed());
    Ok(())
}

/// `pages` pages of the file by populate in ranges of `step` pages, beside libxengnttab's calls in batches
/// as the library chose.
///
/// No ratio of unmapping: the kernel lets go of the entries some ms after the calls, and it is chance
/// how much of that falls into them.
fn map(export: &Export, path: &str, bare: &mut Raw, pages: usize, step: usize) -> Result<String> {
    // References of the file's frames that nobody else maps by.
    let file = bare.open(export.name(), path, OpenHow::Map);
    let refs = bare.refs(&file, pages as u64);
    let refs = refs.map_err(std::io::Error::from_raw_os_error)?;
    let gnttab = Gnttab::open()?;
    let batches = by_library(export, path, (pages, step), &mut Costs::default())?;
    by_calls(&gnttab, &refs, &batches, &mut Costs::default())?;
    let (mut library, mut calls) = (Costs::default(), Costs::default());
    for round in 0..MAP_ROUNDS {
        ensure!(bare.renew(), "the lease is lost");
        for turn in 0..2 {
            if (round + turn) % 2 == 0 {
                let windows = by_library(export, path, (pages, step), &mut library)?;
                ensure!(windows == batches, "other windows: {windows:?}");
            } else {
                by_calls(&gnttab, &refs, &batches, &mut calls)?;
            }
        }
    }
    let mut ratios: Vec<f64> = library
        .map
        .iter()
        .zip(&calls.map)
        .map(|(library, calls)| library / calls)
        .collect();
    let (least, most) = (percentile(&mut ratios, 0), percentile(&mut ratios, 100));
    let (by_library, by_calls) = (median(library.map), median(calls.map));
    Ok(format!(
        "{pages} resident pages in {} windows: populate {by_library:.1} us a page, libxengnttab's map \
         {by_calls:.1}: {:.2} times (rounds: {least:.2} to {most:.2}); the calls that unmap {:.1}, {:.1}",
        batches.len(),
        by_library / by_calls,
        median(library.unmap),
        median(calls.unmap)
    ))
}

/// Blocks in an order without a pattern.
fn shuffled(numbers: &mut Numbers) -> Vec<u64> {
    let mut blocks: Vec<u64> = (0..BLOCKS).collect();
    for at in (1..blocks.len()).rev() {
        blocks.swap(at, numbers.below(at + 1));
    }
    blocks
}

/// One page touched at a time, at random, beside a request that does nothing.
fn fault(client: &Client, export: &Export, path: &str) -> Result<String> {
    let (mut faults, mut trips) = (Vec::new(), Vec::new());
    let mut numbers = Numbers::new(3);
    let mut brought = 0;
    for pass in 0..FAULT_PASSES {
        let file = export.open(path, OpenHow::Map)?;
        let mapping = file.map(&MapOptions::shared())?;
        std::thread::sleep(SETTLE);
        for block in shuffled(&mut numbers) {
            let page = (block * BLOCK_PAGES) as usize + numbers.below(LEAST_PAGES);
            std::thread::sleep(Duration::from_millis(5));
            let begin = Instant::now();
            let first = mapping.as_volatile().read_u64(page * PAGE_SIZE);
            let fault = begin.elapsed();
            ensure!(first == Some(word(1, page as u64)), "page {page}");
            std::thread::sleep(Duration::from_millis(5));
            let begin = Instant::now();
            let names = client.exports()?;
            let trip = begin.elapsed();
            ensure!(names.len() == 1, "{names:?}");
            if pass > 0 {
                faults.push(us(fault));
                trips.push(us(trip));
            }
        }
        let windows = windows(&mapping)?;
        ensure!(
            windows.len() as u64 == BLOCKS,
            "{} windows after {BLOCKS} faults",
            windows.len()
        );
        brought = windows.iter().sum::<usize>() / windows.len();
        drop(mapping);
        file.close()?;
        std::thread::sleep(SETTLE);
    }
    let of = |percent, values: &mut Vec<f64>| percentile(values, percent);
    let (fault50, fault99) = (of(50, &mut faults), of(99, &mut faults));
    let (trip50, trip99) = (of(50, &mut trips), of(99, &mut trips));
    Ok(format!(
        "{} faults on resident pages, each brings {brought}: p50 {fault50:.0} us, a bare round trip \
         {trip50:.0} us: {:.2} times; p99 {fault99:.0} and {trip99:.0} us (the host's other work is in them)",
        faults.len(),
        fault50 / trip50
    ))
}

/// `measure NAME EXPORT FILE`: of a file of [`PAGES`] pages, which one populate makes resident.
pub fn measure(arguments: &[&str]) -> Result<()> {
    let [name, export, path] = arguments else {
        bail!("measure NAME EXPORT FILE");
    };
    let client = Client::connect_at(&DaemonAt::Xen, &ConnectOptions::named(*name))?;
    let export = client.attach(export)?;
    let bare = Raw::try_hello_xen(name);
    let mut bare = bare.map_err(std::io::Error::from_raw_os_error)?;
    // Open for as long as anything is measured.
    let file = export.open(path, OpenHow::Map)?;
    let mapping = file.map(&MapOptions::shared())?;
    mapping.populate(0..mapping.len())?;
    drop(mapping);
    println!("map    {}", map(&export, path, &mut bare, 2048, 2048)?);
    println!("map    {}", map(&export, path, &mut bare, 512, 16)?);
    drop(bare);
    println!("fault  {}", fault(&client, &export, path)?);
    ensure!(client.lost().is_none(), "{:?}", client.lost());
    file.close()?;
    Ok(())
}
