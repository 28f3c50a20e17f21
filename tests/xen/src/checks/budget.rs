//! The budget moves under guests that read: cache domains are made, emptied, ended, and found again.
//!
//! Shows that their memory is Xen's again, that a domain of which a guest has anything mapped stays until that
//! is gone, and that no moment of it is a bad one for the daemon to be killed. Cannot show how long it takes on
//! a real machine.

use crate::daemon::Daemon;
use crate::guest::{Background, Guest, Kind, Setup};
use crate::lab::Lab;
use crate::programs::library::content;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

const DOMAIN_MIB: u64 = 64;
/// Two domains: some MiB of each are not frames.
const SMALL_MIB: u64 = 64;
const SMALL_DOMAINS: usize = 2;
/// Five.
const LARGE_MIB: u64 = 256;
const LARGE_DOMAINS: usize = 5;
/// Pages of the file: more than two domains hold, so that the third is used.
const PAGES: u64 = 36_000;
/// Pages of the holder's file.
const HELD_PAGES: u64 = 32;
const SOON: Duration = Duration::from_secs(60);
const LATER: Duration = Duration::from_secs(150);
/// A read of free memory may be off by what other domains take and give meanwhile, in MiB.
const SLACK_MIB: u64 = 24;

fn free_mib(lab: &Lab) -> Result<u64> {
    let info = lab.sh("xl info free_memory")?;
    Ok(info.text()?.trim().parse()?)
}

fn cache_domains(lab: &Lab) -> Result<Vec<String>> {
    let domains = lab.domains()?.into_iter();
    let names = domains.map(|domain| domain.name);
    Ok(names.filter(|n| n.starts_with("copage-cache")).collect())
}

/// Until there are so many cache domains, as Xen has it, and none is draining.
fn wait_for(lab: &Lab, daemon: &Daemon<'_>, wanted: usize) -> Result<()> {
    let what = format!("{wanted} cache domains");
    lab.wait(&what, LATER, || {
        let draining = draining(&daemon.json("stats")?)?;
        Ok((draining == 0 && cache_domains(lab)?.len() == wanted).then_some(()))
    })
}

fn draining(stats: &Value) -> Result<usize> {
    let domains = stats["xen"]["cache_domains"].as_array();
    let domains = domains.context("no cache domains in stats")?.iter();
    Ok(domains.filter(|d| d["draining"] == true).count())
}

fn clean(daemon: &Daemon<'_>) -> Result<()> {
    let audit = daemon.json("audit")?;
    ensure!(audit["ok"] == true, "{audit}");
    Ok(())
}

fn set(daemon: &Daemon<'_>, mib: u64) -> Result<Duration> {
    let begin = Instant::now();
    daemon.copage(&format!("budget {mib}"))?.text()?;
    Ok(begin.elapsed())
}

/// Reads until the third cache domain has pages.
fn fill(lab: &Lab, daemon: &Daemon<'_>) -> Result<()> {
    lab.wait("pages in the third domain", LATER, || {
        let stats = daemon.json("stats")?;
        let used = &stats["xen"]["cache_domains"][2]["frames_used"];
        Ok(used.as_u64().is_some_and(|used| used > 500).then_some(()))
    })
}

fn right(readers: &[Background<'_, '_>]) -> Result<()> {
    for reader in readers {
        let said = reader.said()?;
        ensure!(!said.contains("WRONG"), "{said}");
        ensure!(reader.poll()?.is_none(), "a reader ended: {said}");
    }
    Ok(())
}

/// See the module.
pub fn budget(lab: &Lab) -> Result<String> {
    let share = lab.work().join("share");
    std::fs::create_dir(&share)?;
    std::fs::write(share.join("file"), content(1, PAGES))?;
    std::fs::write(share.join("held"), content(1, HELD_PAGES))?;
    let setups = [
        Setup::new(Kind::Pvh, "reads-pvh", 192),
        Setup::new(Kind::Pv, "reads-pv", 192),
        Setup::new(Kind::Pvh, "holds", 160),
    ];
    let guests = setups
        .iter()
        .map(|setup| Guest::create(lab, setup))
        .collect::<Result<Vec<_>>>()?;
    let mut configuration = format!(
        "backend = \"xen\"\nframes_mib = {SMALL_MIB}\nxen.cache_domain_mib = {DOMAIN_MIB}\n\
         [[export]]\nname = \"share\"\npath = {share:?}\n"
    );
    for guest in &guests {
        let name = guest.name();
        configuration += &format!("[[guest]]\nname = {name:?}\ndomain = {name:?}\n");
    }
    let mut daemon = Daemon::start(lab, &configuration)?;
    for guest in &guests {
        guest.ready()?;
    }
    let forever =
        "while :; do copage-xen-lab do reader share file; [ $? = 1 ] && exit 1; sleep 0.2; done";
    let readers = [guests[0].spawn(forever)?, guests[1].spawn(forever)?];
    wait_for(lab, &daemon, SMALL_DOMAINS)?;
    let small_free = free_mib(lab)?;

    // More than there is: refused with Xen's reason, and nothing changed.
    let big = Setup::new(Kind::Pvh, "big", small_free.saturating_sub(DOMAIN_MIB * 2));
    let big = Guest::create(lab, &big)?;
    lab.sh(&format!("xl pause {}", big.domid()))?.text()?;
    for asked in [LARGE_MIB, 1 << 20] {
        let refused = daemon.copage(&format!("budget {asked}"))?;
        let why = &refused.stderr;
        ensure!(
            !refused.success() && (why.contains("emory") || why.contains("at most 256")),
            "{refused:?}"
        );
        // The first words say what was refused; xl's own follow, which are many.
        let first: String = why.trim().chars().take(120).collect();
        lab.show(&format!("budget: refused, as it should be: {first}"))?;
    }
    wait_for(lab, &daemon, SMALL_DOMAINS)?;
    let stats = daemon.json("stats")?;
    ensure!(stats["frames_max"] == SMALL_MIB * 256, "{stats}");
    big.destroy()?;
    lab.wait("memory of the big guest", SOON, || {
        Ok((free_mib(lab)? + SLACK_MIB >= small_free).then_some(()))
    })?;

    let made = set(&daemon, LARGE_MIB)?;
    wait_for(lab, &daemon, LARGE_DOMAINS)?;
    let taken = small_free.saturating_sub(free_mib(lab)?);
    let more_mib = (LARGE_DOMAINS - SMALL_DOMAINS) as u64 * DOMAIN_MIB;
    ensure!(
        taken + SLACK_MIB >= more_mib,
        "{taken} MiB taken for {more_mib}"
    );
    fill(lab, &daemon)?;
    let holder = guests[2].spawn("copage-xen-lab do reader share held")?;
    lab.wait("the holder", SOON, || {
        Ok(holder.said()?.contains("session").then_some(()))
    })?;
    clean(&daemon)?;
    lab.show("budget: larger: domains made and in use")?;

    // What a paused guest has mapped keeps its domain, and no other.
    lab.sh(&format!("xl pause {}", guests[2].domid()))?.text()?;
    let lowered = set(&daemon, SMALL_MIB)?;
    let stats = daemon.json("stats")?;
    ensure!(stats["frames_max"] == SMALL_MIB * 256, "{stats}");
    lab.wait("all domains but the held one to end", LATER, || {
        right(&readers)?;
        Ok((cache_domains(lab)?.len() == SMALL_DOMAINS + 1).then_some(()))
    })?;
    let ended = Instant::now();
    lab.wait("the holder to be quarantined", SOON, || {
        let stats = daemon.json("stats")?;
        let quarantined = stats["frames_quarantined"].as_u64().context("no number")?;
        Ok((quarantined > 0).then_some(()))
    })?;
    std::thread::sleep(Duration::from_secs(10));
    ensure!(
        draining(&daemon.json("stats")?)? == 1,
        "{}",
        daemon.json("stats")?
    );
    clean(&daemon)?;
    lab.show("budget: smaller: one domain is held by a paused guest")?;
    lab.sh(&format!("xl unpause {}", guests[2].domid()))?
        .text()?;
    wait_for(lab, &daemon, SMALL_DOMAINS)?;
    let held_s = ended.elapsed().as_secs();
    let back = lab.wait("memory back with Xen", SOON, || {
        let free = free_mib(lab)?;
        Ok((free + SLACK_MIB >= small_free).then_some(free))
    })?;
    right(&readers)?;
    clean(&daemon)?;

    // Up again while they drain.
    set(&daemon, LARGE_MIB)?;
    fill(lab, &daemon)?;
    set(&daemon, SMALL_MIB)?;
    set(&daemon, LARGE_MIB)?;
    wait_for(lab, &daemon, LARGE_DOMAINS)?;
    fill(lab, &daemon)?;
    clean(&daemon)?;
    lab.show("budget: up while draining")?;

    // Killed while it drains, and while it makes: the next one goes on with what there is.
    for after_ms in [100, 1500] {
        set(&daemon, SMALL_MIB)?;
        std::thread::sleep(Duration::from_millis(after_ms));
        daemon.kill()?;
        daemon.again()?;
        wait_for(lab, &daemon, SMALL_DOMAINS)?;
        right(&readers)?;
        clean(&daemon)?;
        let raising = lab.spawn(&format!("copage budget {LARGE_MIB}"))?;
        std::thread::sleep(Duration::from_millis(after_ms));
        daemon.kill()?;
        drop(raising);
        daemon.again()?;
        wait_for(lab, &daemon, SMALL_DOMAINS)?;
        right(&readers)?;
        clean(&daemon)?;
        set(&daemon, LARGE_MIB)?;
        fill(lab, &daemon)?;
    }
    right(&readers)?;
    for reader in readers {
        reader.signal(9)?;
    }
    for guest in guests {
        guest.destroy()?;
    }
    daemon.stop()?;
    let left = cache_domains(lab)?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(format!(
        "{SMALL_MIB} to {LARGE_MIB} MiB in {:.1} s, {taken} MiB taken; to {SMALL_MIB} MiB in {:.1} s, all but one \
         domain ended, the last {held_s} s later when its guest let go, {back} MiB free of {small_free} before; up \
         while draining; killed twice while draining, twice while making: found again",
        made.as_secs_f64(),
        lowered.as_secs_f64()
    ))
}
