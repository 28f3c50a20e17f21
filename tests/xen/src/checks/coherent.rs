//! Guests on Xen that write one file, through the library.
//!
//! Cannot show what happens on several processors, nor how fast it is on hardware; what a loss of power does
//! to a disk is the disk's.

use crate::daemon::Daemon;
use crate::guest::{Background, Guest, Kind, Setup};
use crate::lab::Lab;
use crate::numbers::Numbers;
use anyhow::{Context, Result, ensure};
use copage_grants::PAGE_SIZE;
use copage_tests::acked::missing;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

const PAGES: u64 = 16;
const HOPS: u64 = 240;
/// Session lease and deadline of an invalidate, in ms: emulated guests get no processor for seconds at times.
const TERM_MS: u64 = 10_000;
const LIMIT: Duration = Duration::from_secs(360);
const SOON: Duration = Duration::from_secs(90);

struct Stage<'a> {
    share: PathBuf,
    guests: Vec<Guest<'a>>,
    daemon: Daemon<'a>,
}

impl<'a> Stage<'a> {
    fn new(lab: &'a Lab, setups: &[Setup]) -> Result<Self> {
        let share = lab.work().join("share");
        std::fs::create_dir(&share)?;
        std::fs::write(share.join("file"), vec![0; PAGES as usize * PAGE_SIZE])?;
        let guests: Vec<Guest<'_>> = setups
            .iter()
            .map(|setup| Guest::create(lab, setup))
            .collect::<Result<_>>()?;
        let mut configuration = format!(
            "backend = \"xen\"\nframes_mib = 8\nxen.cache_domain_mib = 64\n\
             lease_ttl_ms = {TERM_MS}\ninvalidate_deadline_ms = {TERM_MS}\n\
             [[export]]\nname = \"share\"\npath = {share:?}\nmode = \"coherent\"\n"
        );
        for guest in &guests {
            let name = guest.name();
            configuration += &format!("[[guest]]\nname = {name:?}\ndomain = {name:?}\n");
        }
        let daemon = Daemon::start(lab, &configuration)?;
        for guest in &guests {
            guest.ready()?;
        }
        Ok(Self {
            share,
            guests,
            daemon,
        })
    }

    fn guest(&self, number: usize) -> Result<&Guest<'a>> {
        self.guests.get(number).context("a guest")
    }

    fn spawn(&self, number: usize, words: &str) -> Result<Background<'_, 'a>> {
        self.guest(number)?
            .spawn(&format!("copage-xen-lab do {words}"))
    }

    fn run(&self, number: usize, words: &str) -> Result<String> {
        Ok(self.spawn(number, words)?.wait(LIMIT)?.text()?.to_owned())
    }

    /// The first word of a page in the host's file.
    fn on_disk(&self, page: u64) -> Result<u64> {
        let mut word = [0; 8];
        let file = std::fs::File::open(self.share.join("file"))?;
        file.read_exact_at(&mut word, page * PAGE_SIZE as u64)?;
        Ok(u64::from_le_bytes(word))
    }

    fn audited(&self) -> Result<()> {
        let audit = self.daemon.json("audit")?;
        ensure!(audit["ok"] == true, "{audit}");
        Ok(())
    }
}

fn says(lab: &Lab, job: &Background<'_, '_>, words: &str, limit: Duration) -> Result<()> {
    lab.wait(words, limit, || {
        let said = job.said()?;
        ensure!(!said.contains("WRONG"), "{said}");
        if !said.contains(words) && job.poll()?.is_some() {
            anyhow::bail!("it ended: {:?}", job.wait(Duration::from_secs(1))?);
        }
        Ok(said.contains(words).then_some(()))
    })
}

/// Three guests, a token that goes round, a guest that is destroyed and one that is paused with pages that it
/// writes.
pub fn coherent(lab: &Lab) -> Result<String> {
    let newest = lab.series()?.last().context("no guest kernels")?.clone();
    let stage = Stage::new(
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
        let output = job.wait(LIMIT)?;
        let said = output.text()?.trim().to_owned();
        seen.push(
            said.strip_prefix("done: ")
                .context(said.clone())?
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
    let stats = stage.daemon.json("stats")?;
    let rests = stats["frames_quarantined"].as_u64().unwrap_or(0);
    ensure!(
        rests > 0,
        "what it has mapped is not in quarantine: {stats}"
    );
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
        Ok((stage.daemon.json("stats")?["frames_quarantined"] == 0).then_some(()))
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
    let mut stage = Stage::new(
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
                    if let Some(ended) = job.poll()? {
                        anyhow::bail!(
                            "a writer ended ({ended:?}): {:?}",
                            job.wait(Duration::from_secs(1))?
                        );
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
