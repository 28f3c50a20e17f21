//! What the checks of frames run: a guest that maps, a daemon that is killed.

use crate::checks::frames::config;
use anyhow::{Context, Result, bail, ensure};
use copage_grants::xen::lib::Gnttab;
use copage_grants::{
    Access, Backend, DomId, FrameNo, HomeSpec, PAGE_SIZE, PageIndex, TrustClass, XenBackend,
};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

/// The content of a page, different for each: every 8 bytes say where they are.
pub fn page_of(page: u64) -> Vec<u8> {
    let words = (0..PAGE_SIZE as u64 / 8).map(|word| (page << 32) | (word * 7 + 1));
    words.flat_map(u64::to_le_bytes).collect()
}

/// First and last eight bytes and a sum over all, as `map` says them.
pub fn words(page: &[u8]) -> String {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&page[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let sum = (0..page.len() / 8).fold(0u64, |sum, n| sum.rotate_left(1) ^ word(n * 8));
    format!("{:x}-{:x}-{sum:x}", word(0), word(page.len() - 8))
}

/// `map GRANTER REF,REF… [SECONDS [writable]]`: maps, says what is there, holds it so long.
pub fn map(arguments: &[&str]) -> Result<()> {
    let [granter, refs, rest @ ..] = arguments else {
        bail!("map GRANTER REF,REF… [SECONDS [writable]]");
    };
    let refs = refs
        .split(',')
        .map(str::parse)
        .collect::<Result<Vec<u32>, _>>()?;
    let seconds = rest.first().map_or(Ok(0), |s| s.parse())?;
    let writable = rest.get(1) == Some(&"writable");
    let gnttab = Gnttab::open()?;
    let mapped = gnttab
        .map(granter.parse()?, &refs, writable)
        .map_err(|error| anyhow::anyhow!("errno {}: {error}", error.errno()))?;
    let bytes = mapped.bytes().to_vec();
    let seen: Vec<_> = bytes.chunks(PAGE_SIZE).map(words).collect();
    println!("mapped {}", seen.join(" "));
    std::io::stdout().flush()?;
    std::thread::sleep(Duration::from_secs(seconds));
    if mapped.bytes().to_vec() != bytes {
        bail!("what was mapped has changed");
    }
    Ok(())
}

/// `store GRANTER REF,REF… WORD`: maps for writing, says so, and then adds one to that word of each page until it
/// is killed. The words of all who do this are apart.
pub fn store(arguments: &[&str]) -> Result<()> {
    let [granter, refs, word] = arguments else {
        bail!("store GRANTER REF,REF… WORD");
    };
    let refs = refs
        .split(',')
        .map(str::parse)
        .collect::<Result<Vec<u32>, _>>()?;
    let offset = word.parse::<usize>()? * 8;
    let gnttab = Gnttab::open()?;
    let mapped = gnttab
        .map(granter.parse()?, &refs, true)
        .map_err(|error| anyhow::anyhow!("errno {}: {error}", error.errno()))?;
    let pages = mapped.bytes_mut().context("not mapped for writing")?;
    println!("mapped");
    std::io::stdout().flush()?;
    loop {
        for page in 0..refs.len() {
            let at = page * PAGE_SIZE + offset;
            let value = pages.read_only().read_u64(at).context("past the end")?;
            ensure!(pages.write_u64(at, value.wrapping_add(1)), "past the end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// `hold-frames DIR DOMID [writable]`: in dom0, stores four pages, grants them, says how, and waits to be killed.
pub fn hold(arguments: &[&str]) -> Result<()> {
    let [dir, domid, rest @ ..] = arguments else {
        bail!("hold-frames DIR DOMID [writable]");
    };
    let access = match rest.first() {
        Some(&"writable") => Access::ReadWrite,
        _ => Access::ReadOnly,
    };
    let backend = XenBackend::new(config(Path::new(dir), 1000))?;
    let home = backend.open_home(&HomeSpec {
        label: "held".into(),
        bytes: 4 * PAGE_SIZE as u64,
        class: TrustClass::OWN,
    })?;
    let frames = [0, 1, 2, 3].map(FrameNo);
    for (page, frame) in (0..).zip(frames) {
        backend.store(home, PageIndex(page), &[frame], &page_of(page))?;
    }
    backend.bind(DomId(1), domid.parse()?)?;
    let mut grants = Vec::new();
    backend.grant(DomId(1), access, &frames, &mut grants)?;
    let granter = backend.granter(grants[0].table).context("no domain")?;
    let refs: Vec<_> = grants.iter().map(|g| g.gref.0.to_string()).collect();
    println!("{} {}", granter.0, refs.join(","));
    std::io::stdout().flush()?;
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}
