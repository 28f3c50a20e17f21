//! Guests that keep what they may write: a page that was asked back, and others' entries.
//!
//! What Xen's table says counts, not what a guest says: who stores next waits until the keeper is fenced, and goes
//! on with a copy; what the keeper stores from then on is in nobody's page.

use super::stage::{LIMIT, Stage, says};
use crate::guest::{Background, Kind, Setup};
use crate::lab::Lab;
use crate::programs::keeper::{UNMAP, WORD};
use crate::programs::library::content;
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// How long a guest may take to let go, in ms.
const TERM_MS: u64 = 5000;
/// The sessions' lease, in ms: long, because it is not what ends here.
const LEASE_MS: u64 = 20_000;
const PAGES: u64 = 64;
/// Of these, the pages that the guesser reads; nobody writes them.
const OWN: u64 = 40;
/// Entries that it tries: more than are in use.
const ENTRIES: u32 = 1024;
const SOON: Duration = Duration::from_secs(60);

pub fn hostile(lab: &Lab) -> Result<String> {
    let names = ["keeps-pvh", "keeps-pv", "honest"];
    let kinds = [Kind::Pvh, Kind::Pv, Kind::Pvh];
    let setups: Vec<Setup> = std::iter::zip(kinds, names)
        .map(|(kind, name)| Setup::new(kind, name, 160))
        .collect();
    let terms = format!("lease_ttl_ms = {LEASE_MS}\ninvalidate_deadline_ms = {TERM_MS}\n");
    let mut stage = Stage::new(lab, &setups, PAGES, &terms, &[])?;
    std::fs::write(stage.share.join("f"), content(1, PAGES))?;
    let mut seen = vec![others_entries(lab, &stage)?];
    let mut page = 0;
    for which in [0, 1] {
        for how in ["acks", "never"] {
            page += 1;
            seen.push(kept(lab, &stage, which, how, page)?);
        }
    }
    seen.push(stopped(lab, &stage)?);
    stage.daemon.stop()?;
    Ok(seen.join("; "))
}

/// A page that is asked back and kept.
fn kept(lab: &Lab, stage: &Stage<'_>, which: usize, how: &str, page: u64) -> Result<String> {
    let keeper = stage.spawn(which, &format!("keeper share file {page} {how}"))?;
    says(lab, &keeper, "keeps", SOON)?;
    let waited_ms = stored_after(stage, page, 300)?;
    ensure!(
        (TERM_MS - TERM_MS / 10..2 * TERM_MS).contains(&waited_ms),
        "{how}: another's store waited {waited_ms} ms, the deadline is {TERM_MS} ms"
    );
    says(lab, &keeper, "fenced DeadlineMissed", SOON)?;
    ensure!(
        how == "never" || keeper.said()?.contains("acked"),
        "it did not ack"
    );
    ensure!(
        stage.quarantined()? == 1,
        "{} frames in quarantine",
        stage.quarantined()?
    );
    stage.audited()?;
    // It stores on; nobody reads that.
    let later = stage.run(2, &format!("get share file {page} {WORD}"))?;
    std::thread::sleep(Duration::from_secs(1));
    for reader in [2, 1 - which] {
        let again = stage.run(reader, &format!("get share file {page} {WORD}"))?;
        ensure!(
            again == later,
            "{how}: word {WORD} went on: {later}, {again}"
        );
    }
    let copied: u64 = number(&later, "word ")?;
    stage.guest(which)?.run(&format!("touch {UNMAP}"))?.text()?;
    let said = keeper.wait(SOON)?.text()?.to_owned();
    stage.guest(which)?.run(&format!("rm {UNMAP}"))?.text()?;
    let stored: u64 = number(&said, "unmapped after ")?;
    ensure!(
        0 < copied && copied + 50 < stored,
        "{how}: {copied} in the copy, {stored} stored: it did not go on"
    );
    no_quarantine(lab, stage)?;
    let last = stage.run(2, &format!("get share file {page} {WORD}"))?;
    ensure!(
        last == later && stage.on_disk(page)? == 300,
        "{later}, {last}"
    );
    stage.audited()?;
    Ok(format!(
        "{}, {how}: another's store waited {waited_ms} ms (deadline {TERM_MS} ms), its frame in quarantine until it \
         unmapped; of {stored} numbers that it stored the page has those to {copied}",
        stage.guest(which)?.name()
    ))
}

/// A guest that reads a file tries the entries of the one that writes it.
fn others_entries(lab: &Lab, stage: &Stage<'_>) -> Result<String> {
    let page = PAGES - 1;
    let writer = stage.spawn(2, &format!("hold share f {page} 500"))?;
    says(lab, &writer, "holds", SOON)?;
    let mut seen = Vec::new();
    for which in [0, 1] {
        let guest = stage.guest(which)?;
        let domids = format!("0 {}", stage.guest(2)?.domid());
        let words = format!("guess share f {OWN} {ENTRIES} {domids}");
        seen.push(format!(
            "{}: {}",
            guest.name(),
            stage.run(which, &words)?.trim()
        ));
    }
    // It has what it had: nobody else had it, and nobody made it let go.
    ensure!(writer.poll()?.is_none(), "{:?}", writer.said()?);
    end(&writer)?;
    stage.audited()?;
    Ok(format!("beside a guest that writes: {}", seen.join("; ")))
}

/// A process with a page that it writes is stopped past its lease, and goes on.
fn stopped(lab: &Lab, stage: &Stage<'_>) -> Result<String> {
    let page = PAGES - 2;
    let holder = stage.spawn(0, &format!("hold share file {page} 200"))?;
    says(lab, &holder, "holds", SOON)?;
    holder.signal(19)?;
    let waited_ms = stored_after(stage, page, 300)?;
    ensure!(waited_ms < 2 * TERM_MS, "the writer waited {waited_ms} ms");
    let rests = stage.quarantined()?;
    ensure!(rests > 0, "what it has mapped is not in quarantine");
    std::thread::sleep(Duration::from_millis(LEASE_MS));
    holder.signal(18)?;
    let over = holder.wait(SOON)?;
    ensure!(
        !over.success() && !over.stdout.contains("WRONG"),
        "it went on: {over:?}"
    );
    no_quarantine(lab, stage)?;
    let found = stage.run(1, &format!("get share file {page}"))?;
    ensure!(found.trim() == "word 300", "{found}");
    stage.audited()?;
    Ok(format!(
        "a process stopped past its lease and resumed ended by {:?}; another's store waited {waited_ms} ms",
        over.ended
    ))
}

/// Another guest stores to the page and syncs: how long the store took, in ms.
fn stored_after(stage: &Stage<'_>, page: u64, value: u64) -> Result<u64> {
    let put = stage.run(2, &format!("put share file {page} {value}"))?;
    ensure!(stage.on_disk(page)? == value, "{}", stage.on_disk(page)?);
    number(&put, "stored ")
}

fn number(said: &str, before: &str) -> Result<u64> {
    let line = said.lines().find_map(|line| line.strip_prefix(before));
    Ok(line.with_context(|| said.to_owned())?.parse()?)
}

fn no_quarantine(lab: &Lab, stage: &Stage<'_>) -> Result<()> {
    lab.wait("the quarantine to drain", SOON, || {
        Ok((stage.quarantined()? == 0).then_some(()))
    })
}

fn end(job: &Background<'_, '_>) -> Result<()> {
    job.signal(9)?;
    job.wait(LIMIT)?;
    Ok(())
}
