//! The daemon killed with SIGKILL again and again under guests that have pages mapped.
//!
//! Shows that pages which were mapped never change, that the next daemon finds what the last one left,
//! and that guests which connect again go on. Cannot show what a loss of power does: dom0 and the
//! cache domains live on.

use crate::daemon::Daemon;
use crate::guest::{Background, Guest, Kind, Setup};
use crate::lab::Lab;
use crate::programs::library::content;
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};

/// Pages of the file; the budget holds a third of them, so that frames are used again all the time.
const PAGES: u64 = 3072;
/// How long guests may take to read again after a restart: entries rest for 5 s first.
const AGAIN: Duration = Duration::from_secs(60);

fn sessions(reader: &Background<'_, '_>) -> Result<usize> {
    let said = reader.said()?;
    ensure!(!said.contains("WRONG"), "{said}");
    Ok(said.matches("session").count())
}

/// Ten.
pub fn ten(lab: &Lab) -> Result<String> {
    kills(lab, 10)
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
        let words = "while :; do copage-xen-lab do reader share file; [ $? = 1 ] && exit 1; done";
        readers.push(guest.spawn(words)?);
    }
    let all_read = |least: &[usize]| {
        lab.wait("all guests to read again", AGAIN, || {
            let mut counts = Vec::new();
            for reader in &readers {
                counts.push(sessions(reader)?);
            }
            let more = counts.iter().zip(least).all(|(now, least)| now > least);
            Ok(more.then_some(counts))
        })
    };
    let mut counts = all_read(&vec![0; readers.len()])?;
    let mut slowest = Duration::ZERO;
    let mut draw = u64::from(std::process::id());
    for _ in 0..kills {
        draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_millis((draw >> 33) % 3000));
        daemon.kill()?;
        std::thread::sleep(Duration::from_millis((draw >> 20) % 500));
        daemon.again()?;
        let begin = Instant::now();
        counts = all_read(&counts)?;
        slowest = slowest.max(begin.elapsed());
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
        "{kills} kills, {} sessions, no wrong page, every audit clean; reading again {:.1} s after a restart at \
         the latest",
        counts.iter().sum::<usize>(),
        slowest.as_secs_f64()
    ))
}
