//! The guest's library over real grants: what the stand-in of its own tests cannot show.

use crate::daemon::Daemon;
use crate::guest::{Guest, Kind, Setup};
use crate::lab::Lab;
use crate::programs::library::content;
use anyhow::{Context, Result, ensure};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Twice and more what the daemon may keep: pages are taken back all the time.
const PAGES: u64 = 3000;

/// Guests of each kind map one file that does not fit the budget, read at random while pages are taken
/// back, store privately, and see a change.
pub fn library(lab: &Lab) -> Result<String> {
    let share = lab.work().join("share");
    std::fs::create_dir_all(&share)?;
    let path = share.join("f");
    std::fs::write(&path, content(1, PAGES))?;
    let newest = lab.series()?.last().context("no guest kernels")?.clone();
    let setups = [
        Setup::new(Kind::Pvh, "pvh-old", 192),
        Setup::new(Kind::Pv, "pv-old", 192),
        Setup {
            series: Some(newest),
            ..Setup::new(Kind::Pvh, "pvh-new", 192)
        },
    ];
    let guests: Vec<Guest<'_>> = setups
        .iter()
        .map(|setup| Guest::create(lab, setup))
        .collect::<Result<_>>()?;
    for guest in &guests {
        guest.ready()?;
    }
    let mut configuration = String::from("backend = \"xen\"\nframes_mib = 5\n");
    for guest in &guests {
        let name = guest.name();
        configuration += &format!("[[guest]]\nname = {name:?}\ndomain = {name:?}\n");
    }
    configuration += &format!("[[export]]\nname = \"all\"\npath = {share:?}\n");
    configuration += "[xen]\ncache_domain_mib = 64\n";
    let mut daemon = Daemon::start(lab, &configuration)?;
    let mut seen = Vec::new();
    let jobs = guests
        .iter()
        .map(|guest| {
            guest.spawn(&format!(
                "copage-xen-lab do library {} all f 20 2",
                guest.name()
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    let wait = |words: &str, limit_s: u64| -> Result<()> {
        for (job, guest) in jobs.iter().zip(&guests) {
            lab.wait(words, Duration::from_secs(limit_s), || {
                let said = job.said()?;
                if said.contains(words) {
                    return Ok(Some(()));
                }
                if job.poll()?.is_some() {
                    // It may have said so in its last moment.
                    if job.said()?.contains(words) {
                        return Ok(Some(()));
                    }
                    let output = job.wait(Duration::from_secs(1))?;
                    anyhow::bail!("{}: {}", guest.name(), output.stderr.trim());
                }
                Ok(None)
            })?;
        }
        Ok(())
    };
    wait("waiting for a change", 120)?;
    let audit = daemon.copage("audit")?;
    ensure!(audit.success(), "{audit:?}");
    let stats = daemon.copage("stats")?;
    std::fs::write(lab.log("stats"), stats.stdout)?;
    let file = std::fs::OpenOptions::new().write(true).open(&path)?;
    file.write_all_at(&content(2, PAGES), 0)?;
    drop(file);
    wait("done", 90)?;
    for (job, guest) in jobs.iter().zip(&guests) {
        let said = job.said()?;
        let words: Vec<&str> = said.lines().take(4).collect();
        seen.push(format!("{}: {}", guest.name(), words.join(", ")));
    }
    let audit = daemon.copage("audit")?;
    ensure!(audit.success(), "{audit:?}");
    daemon.stop()?;
    Ok(seen.join("; "))
}
