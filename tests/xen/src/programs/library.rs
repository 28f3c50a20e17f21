//! The guest's library, mapping a file whose every byte is known.

use crate::numbers::Numbers;
use anyhow::{Context, Result, bail, ensure};
use copage_grants::PAGE_SIZE;
use copage_grants::volatile::VolatileBytes;
use copage_mmap::{
    Client, ConnectOptions, DaemonAt, File, MapOptions, Mapping, OpenHow, UserfaultMode,
};
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The word that fills page `page` of version `version` of the checks' file.
pub fn word(version: u64, page: u64) -> u64 {
    (version << 40) | (page + 1)
}

/// Pages of that file in a row.
pub fn content(version: u64, pages: u64) -> Vec<u8> {
    let of_page = |page| word(version, page).to_le_bytes().repeat(PAGE_SIZE / 8);
    (0..pages).flat_map(of_page).collect()
}

/// The version that every word of a page shows; they may rise within it as it is replaced.
pub(super) fn version_of(bytes: VolatileBytes<'_>, page: usize, least: u64) -> Result<u64> {
    let mut data = [0; PAGE_SIZE];
    let got = bytes.read_into(page * PAGE_SIZE, &mut data);
    ensure!(got == PAGE_SIZE, "page {page}: {got} bytes");
    let mut version = least;
    for chunk in data.chunks_exact(8) {
        let got = u64::from_le_bytes(chunk.try_into()?);
        if got != word(got >> 40, page as u64) || got >> 40 < version {
            bail!("page {page} shows {got:#x}, version {version} was seen");
        }
        version = got >> 40;
    }
    ensure!(version > 0, "page {page} is empty");
    Ok(version)
}

pub(super) fn say(words: &str) -> Result<()> {
    println!("{words}");
    Ok(std::io::stdout().flush()?)
}

/// What the kernel says of the memory that the device is mapped to: never writable, never made so,
/// never executable.
fn look_at_flags() -> Result<usize> {
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    let (mut of_device, mut maps) = (false, 0);
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if first.contains('-') && !first.ends_with(':') {
            of_device = line.ends_with("/dev/xen/gntdev");
            maps += usize::from(of_device);
            let mode = line.split(' ').nth(1).unwrap_or_default();
            ensure!(!of_device || !mode.contains(['w', 'x']), "{line}");
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && of_device
        {
            let bad = |flag: &&str| ["wr", "mw", "ex"].contains(flag);
            ensure!(!flags.split(' ').any(|f| bad(&f)), "{flags}");
        }
    }
    ensure!(maps > 0, "the device is not mapped");
    Ok(maps)
}

fn read_at_random(mapping: &Mapping, time: Duration, seed: u64) -> Result<u64> {
    let pages = mapping.len() / PAGE_SIZE;
    let (until, mut read) = (Instant::now() + time, 0);
    let mut numbers = Numbers::new(seed);
    let mut seen = vec![0; pages];
    while Instant::now() < until {
        let page = numbers.below(pages);
        seen[page] = version_of(mapping.as_volatile(), page, seen[page])?;
        read += 1;
    }
    Ok(read)
}

fn private(file: &File) -> Result<String> {
    let mapping = file.map(&MapOptions::private())?;
    let pages = mapping.len() / PAGE_SIZE;
    let bytes = mapping.as_volatile_mut().context("not writable")?;
    let mut numbers = Numbers::new(5);
    for n in 0..200 {
        let page = numbers.below(pages / 2) * 2;
        if n % 2 == 0 {
            // Its neighbour, which is never stored to, brings it too.
            version_of(mapping.as_volatile(), page + 1, 0)?;
        }
        let at = page * PAGE_SIZE + 8;
        ensure!(bytes.write_u64(at, 0xabcd + page as u64), "page {page}");
    }
    let mut numbers = Numbers::new(5);
    for _ in 0..200 {
        let page = numbers.below(pages / 2) * 2;
        let stored = mapping.as_volatile().read_u64(page * PAGE_SIZE + 8);
        ensure!(
            stored == Some(0xabcd + page as u64),
            "page {page} lost its store"
        );
        version_of(mapping.as_volatile(), page + 1, 0)?;
    }
    Ok(format!("{} private pages", mapping.private_pages()))
}

/// `library NAME EXPORT FILE SECONDS VERSION`: maps, reads at random, stores privately, waits until
/// every page is of VERSION. Every byte is checked.
pub fn library(arguments: &[&str]) -> Result<()> {
    let [name, export, path, seconds, version] = arguments else {
        bail!("library NAME EXPORT FILE SECONDS VERSION");
    };
    let (seconds, version) = (
        Duration::from_secs(seconds.parse()?),
        version.parse::<u64>()?,
    );
    let client = Client::connect_at(&DaemonAt::Xen, &ConnectOptions::named(*name))?;
    ensure!(
        client.userfault_mode() == UserfaultMode::Full,
        "{:?}",
        client.userfault_mode()
    );
    let file = client.attach(export)?.open(path, OpenHow::Map)?;
    let mapping = file.map(&MapOptions::shared())?;
    let begin = Instant::now();
    version_of(mapping.as_volatile(), 0, 0)?;
    say(&format!(
        "first page after {} us",
        begin.elapsed().as_micros()
    ))?;

    let wrong = AtomicU64::new(0);
    let read = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for seed in 1..=2 {
            let (mapping, wrong, read) = (&mapping, &wrong, &read);
            scope.spawn(move || match read_at_random(mapping, seconds, seed) {
                Ok(pages) => {
                    read.fetch_add(pages, Ordering::Relaxed);
                }
                Err(error) => {
                    eprintln!("{error:#}");
                    wrong.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    ensure!(wrong.into_inner() == 0, "wrong bytes");
    say(&format!("read {} pages at random", read.into_inner()))?;
    say(&format!(
        "{} windows, none writable or executable",
        look_at_flags()?
    ))?;
    say(&private(&file)?)?;
    ensure!(client.lost().is_none(), "{:?}", client.lost());

    say("waiting for a change")?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(|| -> Result<()> {
            let mut numbers = Numbers::new(9);
            let mut seen = vec![0; mapping.len() / PAGE_SIZE];
            while !done.load(Ordering::Relaxed) {
                let page = numbers.below(seen.len());
                seen[page] = version_of(mapping.as_volatile(), page, seen[page])?;
            }
            Ok(())
        });
        let until = Instant::now() + Duration::from_secs(60);
        let mut shown = 0;
        while Instant::now() < until && shown != version {
            shown = version_of(mapping.as_volatile(), 3, 0)?;
            std::thread::sleep(Duration::from_millis(5));
        }
        done.store(true, Ordering::Relaxed);
        match reader.join() {
            Ok(result) => result?,
            Err(_) => bail!("the reader panicked"),
        }
        ensure!(shown == version, "version {shown} is shown for ever");
        Ok(())
    })?;
    for page in 0..mapping.len() / PAGE_SIZE {
        ensure!(
            version_of(mapping.as_volatile(), page, 0)? == version,
            "page {page}"
        );
    }
    ensure!(client.lost().is_none(), "{:?}", client.lost());
    say(&format!("version {version} in every page"))?;
    drop(mapping);
    file.close()?;
    say("done")
}
