//! Ratios: what copage costs beside the bare operations below it, in one boot, in turns.

use super::frames::config;
use crate::daemon::Daemon;
use crate::guest::{Guest, Kind};
use crate::lab::Lab;
use crate::programs::library::content;
use crate::programs::measure::{PAGES, median};
use anyhow::{Context, Result, ensure};
use copage_grants::entry::EntryMemory as _;
use copage_grants::xen::lib::ForeignMemory;
use copage_grants::{Access, Backend, DomId, FrameNo, Revocation, TableId, XenBackend};
use std::time::{Duration, Instant};

/// A session, not a domid.
const SESSION: DomId = DomId(700);
/// Entries that a round writes with the ledger.
const ENTRIES: usize = 1024;
/// Entries that a round stores without: those take so little time that fewer would measure the clock.
const RAW_ENTRIES: usize = 8192;
/// Entries of one call.
const BATCHES: [usize; 3] = [1, 16, 512];
/// Rounds; the first does not count.
const ROUNDS: usize = 10;
/// How long a guest's part may take.
const GUEST_LIMIT: Duration = Duration::from_secs(200);

/// Entries a us.
fn rate(entries: usize, time: Duration) -> f64 {
    entries as f64 / (time.as_secs_f64() * 1e6)
}

/// Entries written through backend and ledger, beside a bare loop that stores entries into the same
/// domain's table.
fn entries(lab: &Lab, domid: u16) -> Result<Vec<String>> {
    let backend = XenBackend::new(config(lab.work(), 8000))?;
    backend.bind(SESSION, domid)?;
    let granter = backend.granter(TableId(0)).context("no cache domain")?.0;
    let memory = ForeignMemory::open()?;
    let table_frames = memory.grant_table_frames(granter)?.min(64);
    let table = memory.grant_table(granter, table_frames)?;
    // The backend's own entries, while all of them are free.
    let raw = table.entries();
    let past_reserved = raw
        .len()
        .checked_sub(RAW_ENTRIES)
        .context("a short table")?;
    let raw = &raw[past_reserved..];
    let frames: Vec<FrameNo> = (0..ENTRIES as u32).map(FrameNo).collect();
    let (mut grants, mut answers) = (Vec::with_capacity(ENTRIES), Vec::new());
    let mut with_ledger = BATCHES.map(|batch| (batch, Vec::new()));
    let mut stored = Vec::new();
    for round in 0..ROUNDS {
        for (batch, rates) in &mut with_ledger {
            grants.clear();
            let begin = Instant::now();
            for frames in frames.chunks(*batch) {
                backend.grant(SESSION, Access::ReadOnly, frames, &mut grants)?;
            }
            let time = begin.elapsed();
            ensure!(grants.len() == ENTRIES, "{} granted", grants.len());
            answers.clear();
            backend.revoke(SESSION, &frames, &mut answers);
            let revoked = answers.iter().all(|a| *a == Revocation::Revoked);
            ensure!(revoked, "not all revoked");
            if round > 0 {
                rates.push(rate(ENTRIES, time));
            }
        }
        let free = raw.iter().all(|entry| entry.state().is_free());
        ensure!(free, "entries that are in use");
        let begin = Instant::now();
        for (entry, frame) in raw.iter().zip(5000..) {
            entry.publish(DomId(domid), Access::ReadOnly, frame, false);
        }
        let time = begin.elapsed();
        for entry in raw {
            entry.end();
        }
        if round > 0 {
            stored.push(rate(RAW_ENTRIES, time));
        }
    }
    super::frames::clean(&backend)?;
    backend.stop()?;
    let stored = median(stored);
    let line = |(batch, rates)| {
        let with_ledger = median(rates);
        format!(
            "entries with ledger, {batch} a call: {with_ledger:.2} a us, a bare loop that stores them \
             {stored:.0}: {:.0} times slower",
            stored / with_ledger
        )
    };
    Ok(with_ledger.into_iter().map(line).collect())
}

/// Shows a table; returns where it was measured.
pub fn measure(lab: &Lab) -> Result<String> {
    let pvh = Guest::start(lab, Kind::Pvh, "pvh", 192)?;
    let pv = Guest::start(lab, Kind::Pv, "pv", 192)?;
    lab.show(
        "measure: emulated, one processor: only ratios mean anything, and those of hypercalls, page faults \
         and atomic operations are not a processor's; medians of rounds in turns",
    )?;
    for line in entries(lab, pvh.domid())? {
        lab.show(&format!("measure: dom0 {line}"))?;
    }
    let share = lab.work().join("share");
    std::fs::create_dir_all(&share)?;
    std::fs::write(share.join("f"), content(1, PAGES))?;
    let mut daemon = Daemon::start(
        lab,
        &format!(
            "backend = \"xen\"\nframes_mib = 24\nlease_ttl_ms = 10000\nxen.cache_domain_mib = 64\n\
             [[guest]]\nname = \"pvh\"\ndomain = \"pvh\"\n\
             [[guest]]\nname = \"pv\"\ndomain = \"pv\"\n\
             [[export]]\nname = \"all\"\npath = {share:?}\n"
        ),
    )?;
    for guest in [&pvh, &pv] {
        let name = guest.name();
        let words = format!("copage-xen-lab do measure {name} all f");
        let said = guest.run_for(&words, GUEST_LIMIT)?;
        for line in said.text()?.lines() {
            lab.show(&format!("measure: {name:<4} {line}"))?;
        }
    }
    let stats = daemon.json("stats")?;
    std::fs::write(lab.log("stats"), stats.to_string())?;
    // Read once and resident from then on.
    let filled = &stats["counters"]["filled_pages"];
    ensure!(*filled == PAGES, "{filled} pages were read");
    let audit = daemon.copage("audit")?;
    ensure!(audit.success(), "{audit:?}");
    daemon.stop()?;
    Ok("mapping, faults and entries beside the bare operations, a PVH and a PV guest".into())
}
