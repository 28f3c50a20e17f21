//! Guests on Xen that write one file, through the library.
//!
//! Cannot show what happens on several processors, nor how fast it is on hardware; what a loss of power does
//! to a disk is the disk's.

use super::stage::{LIMIT, Stage, said, says, why_ended};
use crate::guest::{Background, Kind, Setup};
use crate::lab::Lab;
use crate::numbers::Numbers;
use anyhow::{Context, Result, ensure};
use copage_grants::PAGE_SIZE;
use copage_tests::acked::missing;
use std::time::Duration;

const PAGES: u64 = 16;
const HOPS: u64 = 240;
/// How long a guest may take to let go, in ms: emulated guests get no processor for seconds at times.
const TERM_MS: u64 = 10_000;
/// The sessions' lease, in ms: longer, because it is not what ends here.
const LEASE_MS: u64 = 20_000;
const SOON: Duration = Duration::from_secs(90);

fn stage<'a>(lab: &'a Lab, setups: &[Setup]) -> Result<Stage<'a>> {
    let terms = format!("lease_ttl_ms = {LEASE_MS}\ninvalidate_deadline_ms = {TERM_MS}\n");
    Stage::new(lab, setups, PAGES, &terms, &[])
}

/// Three guests, a token that goes round, a guest that is destroyed and one that is paused with pages that it
/// writes.
pub fn coherent(lab: &Lab) -> Result<String> {
    let newest = lab.series()?.last().context("no guest kernels")?.clone();
    let stage = stage(
        lab,
        &[
            Setup::new(Kind::Pvh, "writes-pvh", 160),
            Setup::new(Kind::Pv, "writes-pv", 160),
            Setup {
                series: Some(newest),
                ..Setup::new(Kind::Pvh, "writes-new", 160)
            },
        ],
    )?;
    let jobs = (0..3)
        .map(|n| stage.spawn(n, &format!("relay share file {n} 3 {HOPS}")))
        .collect::<Result<Vec<_>>>()?;
    let mut seen = Vec::new();
    for job in &jobs {
        let said = said(job, LIMIT)?;
        let said = said.trim();
        seen.push(
            said.strip_prefix("done: ")
                .with_context(|| said.to_owned())?
                .to_owned(),
        );
    }
    drop(jobs);
    stage.audited()?;
    let relayed = stage.daemon.json("stats")?["strict"].clone();
    let (ended, waited) = ends(lab, stage)?;
    Ok(format!(
        "a token round three guests, every word beside it as its giver left it: {}; unshared {}, asked for {}, \
         saved {}; {ended}; {waited}",
        seen.join("; "),
        relayed["granted_write"],
        relayed["recalls"],
        relayed["saves"]
    ))
}

fn ends(lab: &Lab, mut stage: Stage<'_>) -> Result<(String, String)> {
    // What was synced is there; what was stored after it may be.
    let holder = stage.spawn(2, "hold share file 5 100")?;
    says(lab, &holder, "holds", SOON)?;
    drop(holder);
    stage.guests.pop().context("a guest to end")?.destroy()?;
    let found = stage.run(0, "get share file 5")?;
    ensure!(["word 100", "word 101"].contains(&found.trim()), "{found}");
    let ended = format!(
        "of a guest destroyed while it wrote, {} is there (100 synced, 101 stored)",
        found.trim()
    );

    let holder = stage.spawn(1, "hold share file 6 200")?;
    says(lab, &holder, "holds", SOON)?;
    let paused = stage.guest(1)?.domid();
    lab.sh(&format!("xl pause {paused}"))?.text()?;
    let put = stage.run(0, "put share file 6 300")?;
    let waited_ms: u64 = put
        .lines()
        .find_map(|line| line.strip_prefix("stored "))
        .context("no time")?
        .parse()?;
    ensure!(
        stage.on_disk(6)? == 300,
        "the host's file: {}",
        stage.on_disk(6)?
    );
    let rests = stage.quarantined()?;
    ensure!(rests > 0, "what it has mapped is not in quarantine");
    // One term, the drift, and what an emulated machine takes for the rest.
    ensure!(waited_ms < 2 * TERM_MS, "the writer waited {waited_ms} ms");
    stage.audited()?;
    lab.sh(&format!("xl unpause {paused}"))?.text()?;
    let over = holder.wait(SOON)?;
    ensure!(
        !over.success() && !over.stdout.contains("WRONG"),
        "it went on: {over:?}"
    );
    drop(holder);
    lab.wait("the quarantine to drain", SOON, || {
        Ok((stage.quarantined()? == 0).then_some(()))
    })?;
    let found = stage.run(0, "get share file 6")?;
    ensure!(
        found.trim() == "word 300",
        "what a fenced guest stored later is there: {found}"
    );
    stage.audited()?;
    stage.daemon.stop()?;
    Ok((
        ended,
        format!(
            "a guest paused while it wrote: another's store waited {waited_ms} ms (deadline {TERM_MS} ms), {rests} frames in \
             quarantine until it was resumed and ended"
        ),
    ))
}

/// The daemon killed again and again while guests store and sync: every store that was acknowledged is in the
/// host's file, read from there by nobody of copage.
pub fn kills(lab: &Lab) -> Result<String> {
    many(lab, 10)
}

/// The same, more often.
pub fn hundred_kills(lab: &Lab) -> Result<String> {
    many(lab, 100)
}

fn many(lab: &Lab, kills: u32) -> Result<String> {
    let mut stage = stage(
        lab,
        &[
            Setup::new(Kind::Pvh, "acked-pvh", 160),
            Setup::new(Kind::Pv, "acked-pv", 160),
        ],
    )?;
    let bytes = vec![0; PAGES as usize * PAGE_SIZE];
    std::fs::write(stage.share.join("other"), bytes)?;
    let mut numbers = Numbers::new(u64::from(std::process::id()));
    let mut acked = [0; 2];
    {
        let Stage {
            share,
            guests,
            daemon,
        } = &mut stage;
        let files = ["file", "other"];
        let jobs = guests
            .iter()
            .zip(files)
            .map(|(guest, file)| guest.spawn(&format!("copage-xen-lab do writer share {file}")))
            .collect::<Result<Vec<_>>>()?;
        for _ in 0..kills {
            let wanted = acked.map(|n| n + 20);
            for (job, (n, wanted)) in jobs.iter().zip(acked.iter_mut().zip(wanted)) {
                *n = lab.wait("stores to be acknowledged", SOON, || {
                    if job.poll()?.is_some() {
                        return Err(why_ended(job));
                    }
                    Ok(last_acked(job)?.filter(|n| *n >= wanted))
                })?;
            }
            std::thread::sleep(Duration::from_millis(numbers.below(800) as u64));
            daemon.kill()?;
            for (job, (n, file)) in jobs.iter().zip(acked.iter_mut().zip(files)) {
                *n = last_acked(job)?.unwrap_or(0);
                all_there(&share.join(file), *n)?;
            }
            daemon.again()?;
        }
    }
    stage.audited()?;
    stage.daemon.stop()?;
    Ok(format!(
        "{kills} kills while two guests (PVH, PV) stored and synced: {} and {} acknowledged stores, all in the host's files \
         after each kill",
        acked[0], acked[1]
    ))
}

fn last_acked(job: &Background<'_, '_>) -> Result<Option<u64>> {
    let said = job.said()?;
    let last = said
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("acked "));
    Ok(last.map(str::parse).transpose()?)
}

/// Is every store up to `acked` in the file, or a later one to the same page?
fn all_there(path: &std::path::Path, acked: u64) -> Result<()> {
    let bytes = std::fs::read(path)?;
    if let Some((n, found)) = missing(&bytes, PAGES, acked) {
        anyhow::bail!(
            "{path:?}: store {n} was acknowledged (the last was {acked}), and {found:?} is there"
        );
    }
    Ok(())
}
