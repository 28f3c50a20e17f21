//! The daemon killed with SIGKILL again and again under guests that have pages mapped.
//!
//! Shows that pages which were mapped never change, that the next daemon finds what the last one left,
//! and that programs in guests go on: none is ever ended by SIGBUS. Cannot show what a loss of power does:
//! dom0 and the cache domains live on.

use crate::daemon::Daemon;
use crate::guest::{Background, Guest, Kind, Setup};
use crate::lab::Lab;
use crate::numbers::Numbers;
use crate::programs::library::content;
use anyhow::{Result, bail, ensure};
use std::time::{Duration, Instant};

/// Pages of the file; the budget holds a third of them, so that frames are used again all the time.
const PAGES: u64 = 3072;
/// How long guests may take to read again after a restart: entries rest for 5 s first.
const AGAIN: Duration = Duration::from_secs(60);

/// How often a reader has gone on with another daemon; `None`: it has not read yet.
fn sessions(reader: &Background<'_, '_>) -> Result<Option<u32>> {
    let said = reader.said()?;
    ensure!(!said.contains("WRONG"), "{said}");
    if reader.poll()?.is_some() {
        bail!("a reader ended: {:?}", reader.wait(AGAIN)?);
    }
    let last = said.lines().rev().find_map(|l| l.strip_prefix("session "));
    Ok(last.map(str::parse).transpose()?)
}

/// Ten.
pub fn ten(lab: &Lab) -> Result<String> {
    kills(lab, 10)
}

/// Two hundred.
pub fn two_hundred(lab: &Lab) -> Result<String> {
    kills(lab, 200)
}

fn kills(lab: &Lab, kills: u32) -> Result<String> {
    let share = lab.work().join("share");
    std::fs::create_dir(&share)?;
    std::fs::write(share.join("file"), content(1, PAGES))?;
    let setup = |kind, name| Setup::new(kind, name, 160);
    let guests = [
        Guest::create(lab, &setup(Kind::Pvh, "kept-pvh"))?,
        Guest::create(lab, &setup(Kind::Pv, "kept-pv"))?,
    ];
    let mut daemon = Daemon::start(
        lab,
        &format!(
            "backend = \"xen\"\nframes_mib = 4\nxen.cache_domain_mib = 64\nlease_ttl_ms = 5000\n\
             [[guest]]\nname = \"kept-pvh\"\ndomain = \"kept-pvh\"\n\
             [[guest]]\nname = \"kept-pv\"\ndomain = \"kept-pv\"\n\
             [[export]]\nname = \"share\"\npath = {share:?}\n"
        ),
    )?;
    let mut readers = Vec::new();
    for guest in &guests {
        guest.ready()?;
        readers.push(guest.spawn("copage-xen-lab do reader share file")?);
    }
    let all_read = |least: &[u32]| {
        lab.wait("all guests to read again", AGAIN, || {
            let mut counts = Vec::new();
            for reader in &readers {
                counts.push(sessions(reader)?);
            }
            let more = counts
                .iter()
                .zip(least)
                .all(|(now, least)| *now >= Some(*least));
            Ok(more.then(|| counts.into_iter().flatten().collect::<Vec<u32>>()))
        })
    };
    let mut counts = all_read(&vec![0; readers.len()])?;
    let mut slowest = Duration::ZERO;
    let mut numbers = Numbers::new(u64::from(std::process::id()));
    for kill in 1..=kills {
        std::thread::sleep(Duration::from_millis(numbers.below(3000) as u64));
        daemon.kill()?;
        // Most are shorter than a lease; after the others what was mapped has been taken back.
        let away = if kill % 5 == 0 {
            6000
        } else {
            numbers.below(500) as u64
        };
        std::thread::sleep(Duration::from_millis(away));
        daemon.again()?;
        let begin = Instant::now();
        // One session after the other in one process: each has read with this daemon.
        let least: Vec<u32> = counts.iter().map(|count| count + 1).collect();
        counts = all_read(&least)?;
        slowest = slowest.max(begin.elapsed());
        lab.wait("what the last daemon left to go", AGAIN, || {
            let stats = daemon.json("stats")?;
            Ok((stats["frames_quarantined"] == 0).then_some(()))
        })?;
        let audit = daemon.json("audit")?;
        ensure!(audit["ok"] == true, "{audit}");
    }
    for reader in readers {
        reader.signal(9)?;
    }
    for guest in guests {
        guest.destroy()?;
    }
    lab.wait("quarantine to drain", AGAIN, || {
        let stats = daemon.json("stats")?;
        let left = [&stats["frames_quarantined"], &stats["grants"]];
        Ok(left.iter().all(|n| **n == 0).then_some(()))
    })?;
    let audit = daemon.json("audit")?;
    ensure!(audit["ok"] == true, "{audit}");
    daemon.stop()?;
    Ok(format!(
        "{kills} kills, readers of one process each went on {counts:?} times, no SIGBUS, no wrong page, nothing \
         left over, every audit clean; reading again {:.1} s after a restart at the latest",
        slowest.as_secs_f64()
    ))
}
