//! Operations at random in three guests, beside a host that changes the files and the budget.
//!
//! A change counts as made a second after it was written: while the host has a file open for writing,
//! the daemon has no lease on it and hears of changes by notification. Cannot show what happens on
//! several processors.

use crate::daemon::Daemon;
use crate::guest::{Background, Guest, Kind, Setup};
use crate::lab::Lab;
use crate::numbers::Numbers;
use crate::programs::random::{FILES, VERSIONS, content};
use crate::store::Store;
use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Of each guest; some more than ten thousand in all.
const OPERATIONS: u32 = 3400;
const SEED: u64 = 20_261;
/// The budget moves between these, in MiB; the files are 17.
const BUDGET: [u32; 2] = [4, 10];
/// When a change has to be seen at the latest.
const SETTLED: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(400);

/// The host's side.
struct Host {
    share: PathBuf,
    store: Store,
    /// Nodes of the guests.
    nodes: Vec<String>,
    /// Of each file: the oldest version that may be seen, the newest, and since when it is that.
    versions: [(u64, u64, Instant); FILES.len()],
}

impl Host {
    fn tell(&mut self) -> Result<()> {
        let pairs = self.versions.map(|(low, high, _)| format!("{low}-{high}"));
        let text = pairs.join(" ");
        for node in &self.nodes {
            self.store.write(node, text.as_bytes())?;
        }
        Ok(())
    }

    /// The next version of a file, in place: all of it, or as a program does that writes bit by bit.
    fn change(&mut self, file: usize, pieces: usize) -> Result<()> {
        self.versions[file].1 += 1;
        self.tell()?;
        let bytes = content(file, self.versions[file].1);
        let open = File::options()
            .write(true)
            .open(self.share.join(file.to_string()))?;
        let piece = bytes.len().div_ceil(pieces);
        for (n, part) in bytes.chunks(piece).enumerate() {
            open.write_all_at(part, (n * piece) as u64)?;
        }
        drop(open);
        self.versions[file].2 = Instant::now();
        Ok(())
    }

    /// Changes that have to be seen by now are the only ones.
    fn settle(&mut self) -> Result<()> {
        for (low, high, since) in &mut self.versions {
            if since.elapsed() > SETTLED {
                *low = *high;
            }
        }
        self.tell()
    }
}

pub fn random(lab: &Lab) -> Result<String> {
    let share = lab.work().join("share");
    std::fs::create_dir(&share)?;
    for file in 0..FILES.len() {
        std::fs::write(share.join(file.to_string()), content(file, 1))?;
    }
    let newest = lab.series()?.last().context("no guest kernels")?.clone();
    let setups = [
        Setup::new(Kind::Pvh, "random-pvh", 160),
        Setup::new(Kind::Pv, "random-pv", 160),
        Setup {
            series: Some(newest),
            ..Setup::new(Kind::Pvh, "random-new", 160)
        },
    ];
    let guests: Vec<Guest<'_>> = setups
        .iter()
        .map(|setup| Guest::create(lab, setup))
        .collect::<Result<_>>()?;
    let mut configuration = format!(
        "backend = \"xen\"\nframes_mib = {}\nxen.cache_domain_mib = 64\n\
         lease_ttl_ms = 20000\n[[export]]\nname = \"share\"\npath = {share:?}\n",
        BUDGET[1]
    );
    for guest in &guests {
        let name = guest.name();
        configuration += &format!("[[guest]]\nname = {name:?}\ndomain = {name:?}\n");
    }
    let mut daemon = Daemon::start(lab, &configuration)?;
    let node = |guest: &Guest<'_>| format!("/local/domain/{}/{VERSIONS}", guest.domid());
    let mut host = Host {
        share,
        store: Store::of_dom0()?,
        nodes: guests.iter().map(node).collect(),
        versions: [(1, 1, Instant::now()); FILES.len()],
    };
    for guest in &guests {
        guest.ready()?;
    }
    host.tell()?;
    let jobs = (SEED..)
        .zip(&guests)
        .map(|(seed, guest)| {
            guest.spawn(&format!(
                "copage-xen-lab do random share {seed} {OPERATIONS}"
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    let done = play(&daemon, &mut host, &jobs);
    done.with_context(|| format!("seeds {SEED} and the next two"))?;
    let mut seen = Vec::new();
    for (job, guest) in jobs.iter().zip(&guests) {
        let output = job.wait(LIMIT)?;
        let last = output.text()?.lines().last().unwrap_or_default();
        let last = last.strip_prefix("done: ").context("it is not done")?;
        seen.push(format!("{}: {last}", guest.name()));
    }
    let audit = daemon.json("audit")?;
    ensure!(audit["ok"] == true, "{audit}");
    let stats = daemon.json("stats")?;
    let reclaimed = &stats["counters"]["reclaimed_granted_pages"];
    ensure!(
        reclaimed.as_u64().unwrap_or(0) > 0,
        "nothing was taken back: {stats}"
    );
    daemon.stop()?;
    let changes: u64 = host.versions.iter().map(|(_, high, _)| high - 1).sum();
    Ok(format!(
        "seeds {SEED} to {}: {}; {changes} changes by the host, {reclaimed} granted pages taken back",
        SEED + 2,
        seen.join("; ")
    ))
}

/// Changes files and budget until all have ended.
fn play(daemon: &Daemon<'_>, host: &mut Host, jobs: &[Background<'_, '_>]) -> Result<()> {
    let mut numbers = Numbers::new(SEED + 100);
    let begin = Instant::now();
    loop {
        match numbers.below(10) {
            0..5 => {
                let file = numbers.below(FILES.len());
                let pieces = [1, 3, 17][numbers.below(3)];
                host.change(file, pieces)?;
            }
            5..7 => {
                let mib = BUDGET[0] + numbers.below((BUDGET[1] - BUDGET[0]) as usize + 1) as u32;
                daemon.copage(&format!("budget {mib}"))?.text()?;
            }
            7 => {
                daemon.copage("reclaim 4")?.text()?;
            }
            _ => std::thread::sleep(Duration::from_millis(300)),
        }
        host.settle()?;
        let mut running = 0;
        for job in jobs {
            match job.poll()? {
                None => running += 1,
                Some(ended) if ended != crate::job::Ended::Exit(0) => {
                    bail!("{ended:?}: {:?}", job.wait(LIMIT)?);
                }
                Some(_) => {}
            }
        }
        if running == 0 {
            return Ok(());
        }
        ensure!(begin.elapsed() < LIMIT, "not done after {LIMIT:?}");
    }
}
