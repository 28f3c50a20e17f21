//! Hostile programs in guests, with the grant driver in their hands: what is not theirs cannot be had,
//! what is read-only cannot be written, beside a guest that reads all the time.
//!
//! Cannot show what another processor's page tables would allow: there is the emulated one only.

use crate::daemon::Daemon;
use crate::guest::{Guest, Kind, Setup};
use crate::job::Ended;
use crate::lab::Lab;
use crate::programs::library::content;
use anyhow::{Context, Result, ensure};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Pages of the file that all read.
const PAGES: u64 = 600;
/// Of these, the attacker's.
const OWN: u64 = 40;
/// Entries that it tries: more than are in use.
const ENTRIES: u32 = 2048;
const LIMIT: Duration = Duration::from_secs(120);
/// What the page that is to be run says when it runs: `mov eax, 77; ret`.
const CODE: [u8; 6] = [0xb8, 77, 0, 0, 0, 0xc3];
const RAN: &str = "exit 77";

pub fn hostile(lab: &Lab) -> Result<String> {
    let share = lab.work().join("share");
    std::fs::create_dir(&share)?;
    std::fs::write(share.join("f"), content(1, PAGES))?;
    let mut code = CODE.to_vec();
    code.resize(4096, 0xc3);
    std::fs::write(share.join("code"), &code)?;
    let names = ["evil-pvh", "evil-pv", "victim"];
    let kinds = [Kind::Pvh, Kind::Pv, Kind::Pvh];
    let guests: Vec<Guest<'_>> = names
        .iter()
        .zip(kinds)
        .map(|(name, kind)| Guest::create(lab, &Setup::new(kind, name, 160)))
        .collect::<Result<_>>()?;
    let mut configuration = format!(
        "backend = \"xen\"\nframes_mib = 8\nxen.cache_domain_mib = 64\n\
         lease_ttl_ms = 20000\n[[export]]\nname = \"share\"\npath = {share:?}\n"
    );
    for name in names {
        configuration += &format!("[[guest]]\nname = {name:?}\ndomain = {name:?}\n");
    }
    let mut daemon = Daemon::start(lab, &configuration)?;
    for guest in &guests {
        guest.ready()?;
    }
    let victim = guests.last().context("a victim")?;
    let reader = victim.spawn("copage-xen-lab do library victim share f 100 2")?;
    lab.wait("the victim's first page", LIMIT, || {
        Ok(reader.said()?.contains("first page").then_some(()))
    })?;
    let mut seen = Vec::new();
    for guest in &guests[..2] {
        let name = guest.name();
        let domids = format!("0 {} {}", victim.domid(), guest.domid());
        let words = format!("copage-xen-lab do guess share f {OWN} {ENTRIES} {domids}");
        let guessed = guest.run_for(&words, LIMIT)?;
        seen.push(format!("{name}: {}", guessed.text()?));
        for way in [
            "read",
            "map-writable",
            "map-private-writable",
            "make-writable",
            "nothing-then-writable",
            "copy-to",
        ] {
            let words = format!("copage-xen-lab do granted share f {way}");
            let done = guest.run_for(&words, LIMIT)?;
            let said = done.text()?;
            // That something is done at all is seen by the first.
            let fine = match way {
                "read" => said == "read: exit 0",
                // The driver refuses it.
                "map-writable" | "map-private-writable" => said == format!("{way}: exit 12"),
                "copy-to" => said == "copy-to: exit 15",
                // A store that is thrown away, or a signal.
                _ => true,
            };
            ensure!(fine, "{name}: {said}");
            if way.ends_with("-writable") || way == "copy-to" {
                seen.push(format!("{name}: {said}"));
            }
        }
        ensure!(reader.poll()?.is_none(), "{:?}", reader.said()?);
    }
    let audit = daemon.json("audit")?;
    ensure!(audit["ok"] == true, "{audit}");
    for guest in &guests[..2] {
        seen.push(format!("{}: {}", guest.name(), run_the_page(lab, guest)?));
    }
    ensure!(reader.poll()?.is_none(), "{:?}", reader.said()?);
    lab.wait("the victim's reading", LIMIT, || {
        ensure!(reader.poll()?.is_none(), "{:?}", reader.wait(LIMIT)?);
        Ok(reader
            .said()?
            .contains("waiting for a change")
            .then_some(()))
    })?;
    let file = std::fs::File::options().write(true).open(share.join("f"))?;
    file.write_all_at(&content(2, PAGES), 0)?;
    drop(file);
    let read = reader.wait(LIMIT)?;
    ensure!(read.text()?.ends_with("done"), "{read:?}");
    let audit = daemon.json("audit")?;
    ensure!(audit["ok"] == true, "{audit}");
    daemon.stop()?;
    Ok(seen.join("; "))
}

/// Tries to run a granted page; that is the program's end, or the guest's.
fn run_the_page(lab: &Lab, guest: &Guest<'_>) -> Result<String> {
    let mut seen = Vec::new();
    for way in ["map-executable", "make-executable", "make-all"] {
        let words = format!("copage-xen-lab do granted share code {way}");
        let done = guest.spawn(&words)?.wait(LIMIT);
        match done {
            Ok(done) => {
                ensure!(
                    !done.stdout.contains(RAN),
                    "a granted page was run: {done:?}"
                );
                ensure!(done.ended == Ended::Exit(0), "{done:?}");
                seen.push(done.stdout.trim().to_owned());
            }
            // It is gone: the hypervisor ends a guest that does this.
            Err(error) => {
                guest.wait_gone(LIMIT).context(error)?;
                let log = lab.sh("xl dmesg | grep -i crash | tail -n 1")?;
                seen.push(format!("{way}: the guest's end ({})", log.stdout.trim()));
                break;
            }
        }
    }
    Ok(seen.join(", "))
}
