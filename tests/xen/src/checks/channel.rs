//! The control channel: guests find the daemon, talk to it over rings, and end; and hostile ones.

use crate::daemon::Daemon;
use crate::guest::{Background, Guest, Kind, Setup};
use crate::lab::Lab;
use anyhow::{Result, bail, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Guest memory, in MiB.
const MEM_MIB: u64 = 128;

/// A daemon with one export of a few files, and the domain that is in its configuration.
fn daemon<'l>(lab: &'l Lab, configured: &str) -> Result<Daemon<'l>> {
    let share = lab.work().join("share");
    std::fs::create_dir(&share)?;
    let long: Vec<u8> = (0..1_500_000u32)
        .flat_map(|n| (n ^ 0x5a5a).to_le_bytes())
        .collect();
    std::fs::write(share.join("long"), long.get(..3_000_001).unwrap_or(&long))?;
    std::fs::write(share.join("short"), "short\n")?;
    Daemon::start(
        lab,
        &format!(
            "backend = \"xen\"\nframes_mib = 32\nxen.cache_domain_mib = 64\n\
             [[guest]]\nname = \"first\"\ndomain = \"{configured}\"\n\
             [[export]]\nname = \"share\"\npath = {share:?}\nallow = [\"first\"]\n"
        ),
    )
}

fn same_file(lab: &Lab, guest: &Guest<'_>, seconds: u64) -> Result<()> {
    let here = lab.sh(&format!("md5sum < {}/share/long", lab.work().display()))?;
    let limit = Duration::from_secs(seconds);
    let there = guest.run_for("copage cat share long | md5sum", limit)?;
    ensure!(
        here.text()? == there.text()?,
        "{}: another file came: {there:?}",
        guest.name()
    );
    Ok(())
}

fn sessions(daemon: &Daemon<'_>) -> Result<Vec<Value>> {
    let guests = daemon.json("guests")?;
    Ok(guests["guests"].as_array().cloned().unwrap_or_default())
}

fn counter(daemon: &Daemon<'_>, name: &str) -> Result<u64> {
    let stats = daemon.json("stats")?;
    Ok(stats["counters"][name].as_u64().unwrap_or(0))
}

/// Waits until the daemon has so many sessions.
fn wait_sessions(lab: &Lab, daemon: &Daemon<'_>, count: usize) -> Result<Duration> {
    let begin = Instant::now();
    lab.wait(
        &format!("{count} sessions"),
        Duration::from_secs(20),
        || Ok((sessions(daemon)?.len() == count).then_some(())),
    )?;
    Ok(begin.elapsed())
}

/// A session in a guest that lasts, once it is up.
fn lasting<'g, 'l>(lab: &Lab, guest: &'g Guest<'l>) -> Result<Background<'g, 'l>> {
    let session = guest.spawn("exec copage-xen-lab do session")?;
    lab.wait("a session", Duration::from_secs(30), || {
        if let Some(ended) = session.poll()? {
            bail!("the session ended: {ended:?}: {}", session.said()?);
        }
        Ok(session.said()?.contains("up").then_some(()))
    })?;
    Ok(session)
}

/// A PVH and a PV guest read an export over rings; who is not attached is not let in.
pub fn rings(lab: &Lab) -> Result<String> {
    let pvh = Guest::create(lab, &Setup::new(Kind::Pvh, "ring-pvh", MEM_MIB))?;
    let pv = Guest::create(lab, &Setup::new(Kind::Pv, "ring-pv", MEM_MIB))?;
    let mut daemon = daemon(lab, "ring-pvh")?;
    pvh.ready()?;
    pv.ready()?;
    let listed = pvh.run("copage ls share")?;
    ensure!(listed.text()? == "long\nshort", "{listed:?}");
    same_file(lab, &pvh, 60)?;
    // Not attached: nobody watches it.
    let begin = Instant::now();
    let stranger = pv.run_for("copage ls share", Duration::from_secs(40))?;
    ensure!(
        !stranger.success(),
        "a domain that is not attached was let in"
    );
    ensure!(stranger.stderr.contains("copage attach"), "{stranger:?}");
    let waited = begin.elapsed().as_secs();
    daemon.copage("attach ring-pv share")?.text()?;
    same_file(lab, &pv, 60)?;
    let lasting = lasting(lab, &pv)?;
    let found = sessions(&daemon)?;
    ensure!(
        found.len() == 1
            && found[0]["name"] == "ring-pv"
            && found[0]["domain"]["domid"] == pv.domid()
            && found[0]["domain"]["name"] == "ring-pv",
        "{found:?}"
    );
    let refused = pv.run("copage ls share --as first")?;
    ensure!(
        !refused.success() && refused.stderr.contains("may not connect as"),
        "{refused:?}"
    );
    let out = daemon.copage("detach ring-pv")?;
    ensure!(out.text()?.contains("1 sessions fenced"), "{out:?}");
    let ended = lasting.wait(Duration::from_secs(20))?;
    ensure!(ended.stdout.contains("lost"), "{ended:?}");
    let left = lab.sh(&format!("xenstore-ls /local/domain/{}/data", pvh.domid()))?;
    ensure!(!left.stdout.contains("ring-ref"), "nodes stay: {left:?}");
    daemon.stop()?;
    pvh.destroy()?;
    pv.destroy()?;
    Ok(format!(
        "PVH and PV read 3 MB by rings; not attached: refused after {waited} s; detached: fenced"
    ))
}

/// A session ends at once when its process is killed, when its domain is destroyed, and for the guest
/// when the daemon is.
pub fn deaths(lab: &Lab) -> Result<String> {
    let pvh = Guest::start(lab, Kind::Pvh, "mortal", MEM_MIB)?;
    let mut daemon = daemon(lab, "mortal")?;
    let session = lasting(lab, &pvh)?;
    session.signal(9)?;
    let process = wait_sessions(lab, &daemon, 0)?;
    ensure!(
        counter(&daemon, "fenced_lease_expired")? == 0,
        "only its lease ended it"
    );
    let session = lasting(lab, &pvh)?;
    daemon.kill()?;
    let begin = Instant::now();
    let ended = session.wait(Duration::from_secs(20))?;
    let killed = begin.elapsed();
    ensure!(ended.stdout.contains("lost"), "{ended:?}");
    daemon.again()?;
    same_file(lab, &pvh, 60)?;
    let _session = lasting(lab, &pvh)?;
    let domid = pvh.domid();
    lab.sh(&format!("xl destroy {domid}"))?.text()?;
    let destroyed = wait_sessions(lab, &daemon, 0)?;
    ensure!(
        counter(&daemon, "fenced_lease_expired")? == 0,
        "only its lease ended it"
    );
    let audit = daemon.json("audit")?;
    ensure!(audit["ok"] == true, "{audit}");
    daemon.stop()?;
    Ok(format!(
        "sessions ended {} ms after the process was killed, {} ms after the domain was destroyed; the guest heard {} ms after the daemon was killed",
        process.as_millis(),
        destroyed.as_millis(),
        killed.as_millis()
    ))
}

/// Eight guests at once.
pub fn eight(lab: &Lab) -> Result<String> {
    let mut guests = Vec::new();
    for number in 0..8 {
        let kind = if number % 2 == 0 { Kind::Pv } else { Kind::Pvh };
        guests.push(Guest::create(
            lab,
            &Setup::new(kind, &format!("many-{number}"), MEM_MIB),
        )?);
    }
    let mut daemon = daemon(lab, "many-0")?;
    for guest in &guests {
        guest.ready()?;
        daemon
            .copage(&format!("attach {} share", guest.name()))?
            .text()?;
    }
    let mut running = Vec::new();
    for guest in &guests {
        running.push((
            guest,
            lasting(lab, guest)?,
            guest.spawn("copage cat share long | md5sum")?,
        ));
    }
    ensure!(
        sessions(&daemon)?.len() >= 8,
        "not all are connected at once"
    );
    let here = lab.sh(&format!("md5sum < {}/share/long", lab.work().display()))?;
    for (guest, _, read) in &running {
        let read = read.wait(Duration::from_secs(120))?;
        ensure!(read.text()? == here.text()?, "{}: {read:?}", guest.name());
    }
    for (_, session, _) in &running {
        session.signal(9)?;
    }
    wait_sessions(lab, &daemon, 0)?;
    drop(running);
    daemon.stop()?;
    for guest in guests {
        guest.destroy()?;
    }
    Ok("4 PV and 4 PVH guests connected at once, each read 3 MB, all ended".into())
}

/// A guest that writes garbage into xenstore and into its ring, rings without end, floods: the daemon
/// and another guest go on.
pub fn hostile(lab: &Lab) -> Result<String> {
    let evil = Guest::create(lab, &Setup::new(Kind::Pv, "evil", MEM_MIB))?;
    let honest = Guest::create(lab, &Setup::new(Kind::Pvh, "honest", MEM_MIB))?;
    let mut daemon = daemon(lab, "honest")?;
    evil.ready()?;
    honest.ready()?;
    daemon.copage("attach evil share")?.text()?;
    let mut seen = Vec::new();
    for what in ["nodes", "ring", "flood", "storm"] {
        let attack = evil.spawn(&format!("copage-xen-lab do hostile {what}"))?;
        let before = counter(&daemon, "loop_rounds")?;
        let begin = Instant::now();
        same_file(lab, &honest, 100)?;
        let took = begin.elapsed();
        let rounds = counter(&daemon, "loop_rounds")? - before;
        let attack = attack.wait(Duration::from_secs(100))?;
        let said = attack.text()?.lines().last().unwrap_or_default().to_owned();
        seen.push(format!(
            "{what}: {said}; {rounds} turns of the loop, {} ms to read",
            took.as_millis()
        ));
    }
    wait_sessions(lab, &daemon, 0)?;
    let audit = daemon.json("audit")?;
    ensure!(audit["ok"] == true, "{audit}");
    let stats = daemon.json("stats")?;
    ensure!(
        stats["xen"]["channel"]["floods"] != 0,
        "a flood was listened to: {stats}"
    );
    seen.push(format!("{}", stats["xen"]["channel"]));
    daemon.stop()?;
    evil.destroy()?;
    honest.destroy()?;
    Ok(seen.join("; "))
}

/// A mount in a guest, through its page cache: ordinary programs read from it and run off it.
pub fn mount(lab: &Lab) -> Result<String> {
    let guest = Guest::start(lab, Kind::Pvh, "mounting", 160)?;
    let mut daemon = daemon(lab, "mounting")?;
    let share = lab.work().join("share");
    std::fs::copy("/bin/busybox", share.join("busybox"))?;
    let mounted = guest.spawn("mkdir /mnt/s && exec copage mount share /mnt/s")?;
    lab.wait("the mount", Duration::from_secs(60), || {
        if let Some(ended) = mounted.poll()? {
            bail!("the mount ended: {ended:?}: {}", mounted.said()?);
        }
        Ok(guest.run("test -f /mnt/s/short")?.success().then_some(()))
    })?;
    let here = lab.sh(&format!("md5sum < {}", share.join("long").display()))?;
    let there = guest.run_for("md5sum < /mnt/s/long", Duration::from_secs(60))?;
    ensure!(
        here.text()? == there.text()?,
        "another file came: {there:?}"
    );
    let ran = guest.run_for("/mnt/s/busybox echo ran", Duration::from_secs(60))?;
    ensure!(ran.text()? == "ran", "{ran:?}");
    let refused = guest.run("echo x > /mnt/s/short")?;
    ensure!(!refused.success(), "the mount could be written");
    guest.run("umount /mnt/s")?.text()?;
    let ended = mounted.wait(Duration::from_secs(20))?;
    ensure!(ended.success(), "{ended:?}");
    daemon.stop()?;
    guest.destroy()?;
    Ok("3 MB read and a program run off a mount in a PVH guest".into())
}
