//! Guests for which the hypervisor tracks fewer mappings than their programs want.
//!
//! Shows that the library then gives old windows back and reading goes on, with another process in the same
//! guest that holds many mappings. Cannot show that a guest without any left reads: its pages are SIGBUS.

use crate::checks::identity::entries_of;
use crate::daemon::Daemon;
use crate::guest::{Guest, Kind, Setup};
use crate::lab::Lab;
use crate::programs::library::content;
use anyhow::{Result, ensure};
use std::time::Duration;

/// Frames of 256 entries each.
const MAPTRACK_FRAMES: usize = 4;
const TRACKED: usize = MAPTRACK_FRAMES * 256;
/// Pages that are read: three times what a PVH guest can map, six times what a PV guest can.
const PAGES: u64 = 3000;
/// Pages that another process holds: half of what a PV guest can map.
const HELD: u64 = 250;
const LIMIT: Duration = Duration::from_secs(150);

/// A PVH and a PV guest that may map a third of the file, then half of that.
pub fn maptrack(lab: &Lab) -> Result<String> {
    let mut configuration =
        String::from("backend = \"xen\"\nframes_mib = 20\nxen.cache_domain_mib = 64\n");
    for (name, version, pages) in [("all", 1, PAGES), ("held", 2, HELD)] {
        let share = lab.work().join(name);
        std::fs::create_dir(&share)?;
        std::fs::write(share.join("f"), content(version, pages))?;
        configuration += &format!("[[export]]\nname = \"{name}\"\npath = {share:?}\n");
    }
    let mut guests = Vec::new();
    for (kind, name) in [(Kind::Pvh, "few-pvh"), (Kind::Pv, "few-pv")] {
        configuration += &format!("[[guest]]\nname = {name:?}\ndomain = {name:?}\n");
        let more = vec![format!("max_maptrack_frames = {MAPTRACK_FRAMES}")];
        let setup = Setup {
            more,
            ..Setup::new(kind, name, 160)
        };
        guests.push(Guest::create(lab, &setup)?);
    }
    let mut daemon = Daemon::start(lab, &configuration)?;
    let mut seen = Vec::new();
    for guest in &guests {
        guest.ready()?;
        let name = guest.name();
        let words = format!("copage-xen-lab do library {name} all f 8 1");
        let mut most = Vec::new();
        let mut other = None;
        for held in [0, HELD as usize] {
            if held > 0 {
                let job = guest.spawn("exec copage-xen-lab do tree library held")?;
                lab.wait("the other process", LIMIT, || {
                    ensure!(job.poll()?.is_none(), "{name}: it ended: {}", job.said()?);
                    Ok(job.said()?.contains("sum").then_some(()))
                })?;
                other = Some(job);
            }
            let job = guest.spawn(&words)?;
            let mut in_use = 0;
            let ended = lab.wait("a program that reads all", LIMIT, || {
                in_use = entries_of(lab, guest.domid(), false)?.1.len().max(in_use);
                job.poll()
            });
            let said = job.wait(Duration::from_secs(1))?;
            ensure!(
                ended.is_ok() && said.success(),
                "{name}, {held} held: {said:?}"
            );
            // A PV guest's kernel maps a page twice: for the program, and for itself.
            let most_pages = if name == "few-pv" {
                TRACKED / 2
            } else {
                TRACKED
            };
            // Else the bound was not met, and nothing was shown.
            ensure!(
                in_use > most_pages / 2 && in_use <= most_pages,
                "{name}: {in_use} entries in use, {most_pages} can be"
            );
            most.push(format!(
                "{in_use} at most, {}",
                said.stdout.lines().nth(1).unwrap_or_default()
            ));
        }
        drop(other);
        seen.push(format!(
            "{name}: {}",
            most.join("; beside another process ")
        ));
    }
    let audit = daemon.copage("audit")?;
    ensure!(audit.success(), "{audit:?}");
    daemon.stop()?;
    Ok(format!(
        "{TRACKED} mappings, {PAGES} pages: {}",
        seen.join("; ")
    ))
}
