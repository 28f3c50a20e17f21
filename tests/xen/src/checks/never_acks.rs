//! A guest that lets nothing go that is asked back: fenced in time, what it holds kept from others and
//! charged to it, nobody else held up by it.

use crate::daemon::Daemon;
use crate::guest::{Background, Guest, Kind, Setup};
use crate::lab::Lab;
use crate::programs::library::content;
use crate::programs::mute::{AGAIN, UNMAP};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Pages of each file.
const PAGES: u64 = 768;
/// How long a guest may take to let go, in ms.
const TERM_MS: u64 = 5000;
/// The sessions' lease, in ms: long, because it is not what ends here.
const LEASE_MS: u64 = 15_000;
/// What two clocks may differ in it, in ms: 1 %.
const DRIFT_MS: u64 = TERM_MS / 100;
/// What one emulated processor may be busy with, in ms.
const SLACK_MS: u64 = 2500;
const SOON: Duration = Duration::from_secs(40);

fn said<'o>(
    lab: &Lab,
    job: &Background<'_, '_>,
    words: &str,
    out: &'o mut String,
) -> Result<&'o str> {
    lab.wait(words, SOON, || {
        *out = job.said()?;
        if let Some(ended) = job.poll()? {
            bail!("{words}: it ended: {ended:?}: {:?}", job.wait(SOON)?);
        }
        Ok(out.contains(words).then_some(()))
    })?;
    let line = out.lines().rfind(|line| line.contains(words));
    line.context("a line")
}

fn quarantined(daemon: &Daemon<'_>) -> Result<u64> {
    let stats = daemon.json("stats")?;
    stats["frames_quarantined"].as_u64().context("no number")
}

/// Frames that `guest` is charged with.
fn charged(daemon: &Daemon<'_>, guest: &str) -> Result<u64> {
    let stats = daemon.json("stats")?;
    let charges = stats["charges"].as_array().cloned().unwrap_or_default();
    let of_guest = charges.iter().find(|c| c["guest"] == guest);
    Ok(of_guest.and_then(|c| c["frames"].as_u64()).unwrap_or(0))
}

fn audit(daemon: &Daemon<'_>) -> Result<Value> {
    let audit = daemon.json("audit")?;
    ensure!(audit["ok"] == true, "{audit}");
    Ok(audit)
}

/// The next content, in place; how long it took to be let, in ms. The kernel holds the writer up until
/// guests have let go, or the daemon has given up on them.
fn rewrite(path: &Path, version: u64) -> Result<u64> {
    let begin = Instant::now();
    let file = OpenOptions::new().write(true).open(path)?;
    let waited = begin.elapsed().as_millis() as u64;
    file.write_all_at(&content(version, PAGES), 0)?;
    Ok(waited)
}

/// One that says nothing, and one that says what is not so, beside one that reads.
pub fn never_acks(lab: &Lab) -> Result<String> {
    let share = lab.work().join("share");
    std::fs::create_dir(&share)?;
    for name in ["f", "other"] {
        std::fs::write(share.join(name), content(1, PAGES))?;
    }
    let mute = Guest::create(lab, &Setup::new(Kind::Pvh, "mute", 160))?;
    let honest = Guest::create(lab, &Setup::new(Kind::Pv, "honest", 160))?;
    let mut daemon = Daemon::start(
        lab,
        &format!(
            "backend = \"xen\"\nframes_mib = 16\nxen.cache_domain_mib = 64\n\
             lease_ttl_ms = {LEASE_MS}\ninvalidate_deadline_ms = {TERM_MS}\n\
             limits.frames_mib = 4\n\
             [[guest]]\nname = \"mute\"\ndomain = \"mute\"\n\
             [[guest]]\nname = \"honest\"\ndomain = \"honest\"\n\
             [[export]]\nname = \"share\"\npath = {share:?}\n"
        ),
    )?;
    mute.ready()?;
    honest.ready()?;
    let file = share.join("f");
    let mut seen = Vec::new();
    for (version, how) in [(1, "never"), (2, "acks"), (3, "never")] {
        let dies = version == 3;
        mute.run(&format!("rm -f {UNMAP} {AGAIN}"))?.text()?;
        let holder = mute.spawn(&format!(
            "exec copage-xen-lab do mute share f {PAGES} {version} {how}"
        ))?;
        let mut out = String::new();
        said(lab, &holder, "mapped", &mut out)?;
        let next = version + 1;
        let reader = honest.spawn(&format!(
            "copage-xen-lab do library honest share f 1 {next}"
        ))?;
        said(lab, &reader, "waiting for a change", &mut out)?;

        let waited_ms = rewrite(&file, next)?;
        let longest_ms = TERM_MS + DRIFT_MS + SLACK_MS;
        ensure!(waited_ms < longest_ms, "the writer waited {waited_ms} ms");
        let begin = Instant::now();
        let read = reader.wait(SOON)?;
        ensure!(read.text()?.ends_with("done"), "{read:?}");
        let shown_ms = begin.elapsed().as_millis();
        if how == "never" {
            let line = said(lab, &holder, "fenced", &mut out)?.to_owned();
            let ms: u64 = line
                .split(' ')
                .find_map(|word| word.parse().ok())
                .context(line.clone())?;
            ensure!(line.contains("DeadlineMissed"), "{line}");
            ensure!((TERM_MS - SLACK_MS..longest_ms).contains(&ms), "{line}");
            said(lab, &holder, "lost", &mut out)?;
            seen.push(format!("{how}: {line}"));
        } else {
            said(lab, &holder, "acks", &mut out)?;
            ensure!(!out.contains("fenced"), "{out}");
        }
        // What the table shows as mapped is nobody else's, and its own to pay for.
        lab.wait("its frames to be in quarantine", SOON, || {
            Ok((quarantined(&daemon)? >= PAGES).then_some(()))
        })?;
        let frames = charged(&daemon, "mute")?;
        ensure!(frames >= PAGES, "charged with {frames} frames");
        audit(&daemon)?;
        mute.write_file(AGAIN, b"other")?;
        let line = said(lab, &holder, "again", &mut out)?.to_owned();
        ensure!(line.contains("quota"), "{line}");
        seen.push(format!(
            "{how}: a writer waited {waited_ms} ms, the other guest had the new version {shown_ms} ms later; \
             {} frames in quarantine, {frames} charged; {line}",
            quarantined(&daemon)?
        ));
        if dies {
            ensure!(holder.poll()?.is_none(), "{:?}", holder.said()?);
            break;
        }
        mute.write_file(UNMAP, b"now")?;
        said(lab, &holder, "unmapped", &mut out)?;
        lab.wait("quarantine to end with the mapping", SOON, || {
            Ok((quarantined(&daemon)? == 0).then_some(()))
        })?;
        mute.write_file(AGAIN, b"other")?;
        let pages = format!("again: {PAGES} pages");
        said(lab, &holder, &pages, &mut out)?;
        holder.signal(9)?;
        holder.wait(SOON)?;
    }
    mute.destroy()?;
    let begin = Instant::now();
    lab.wait("quarantine to end with the guest", SOON, || {
        Ok((quarantined(&daemon)? == 0).then_some(()))
    })?;
    seen.push(format!(
        "quarantine ended {} ms after the guest",
        begin.elapsed().as_millis()
    ));
    audit(&daemon)?;
    daemon.stop()?;
    honest.destroy()?;
    Ok(seen.join("; "))
}
