//! Who a domain is: by uuid or by name, never by its domid.

use crate::daemon::Daemon;
use crate::guest::{Background, Guest, Kind, Setup};
use crate::lab::Lab;
use crate::programs::library::{content, word};
use anyhow::{Context, Result, ensure};
use copage_grants::entry::EntryMemory as _;
use copage_grants::xen::lib::ForeignMemory;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::time::Duration;

const MEM_MIB: u64 = 128;
/// Pages of each export's file.
const PAGES: u64 = 64;
/// Entries that others try to map.
const TRIED: usize = 8;
/// Room for a guest's wait for a daemon that does not listen to it (15 s).
const REFUSED: Duration = Duration::from_secs(40);
const SOON: Duration = Duration::from_secs(30);

/// A daemon with exports `first` and `second`, each a file of known pages.
fn daemon<'l>(lab: &'l Lab, first: &str, second: &str, guests: &str) -> Result<Daemon<'l>> {
    let mut text =
        format!("backend = \"xen\"\nframes_mib = 8\nxen.cache_domain_mib = 64\n{guests}");
    for (version, (name, allow)) in (1..).zip([("first", first), ("second", second)]) {
        let share = lab.work().join(name);
        std::fs::create_dir(&share)?;
        std::fs::write(share.join("f"), content(version, PAGES))?;
        text += &format!("[[export]]\nname = \"{name}\"\npath = {share:?}\nallow = [{allow}]\n");
    }
    Daemon::start(lab, &text)
}

fn sessions(daemon: &Daemon<'_>) -> Result<Vec<Value>> {
    let guests = daemon.json("guests")?;
    Ok(guests["guests"].as_array().cloned().unwrap_or_default())
}

/// A process in the guest that holds every page of an export.
fn holding<'g, 'l>(lab: &Lab, guest: &'g Guest<'l>, export: &str) -> Result<Background<'g, 'l>> {
    let job = guest.spawn(&format!("exec copage-xen-lab do tree library {export}"))?;
    lab.wait("an export held", SOON, || {
        if job.poll()?.is_some() {
            let output = job.wait(Duration::from_secs(1))?;
            anyhow::bail!("{}: {output:?}", guest.name());
        }
        Ok(job.said()?.contains("sum").then_some(()))
    })?;
    Ok(job)
}

/// Whether it is let in to an export and reads what is there.
fn reads(guest: &Guest<'_>, export: &str, version: u64) -> Result<bool> {
    let words = format!("copage cat {export} f | tail -c 8 | od -An -tx8");
    let read = guest.run_for(&words, REFUSED)?;
    Ok(read.text()?.trim() == format!("{:016x}", word(version, PAGES - 1)))
}

/// The cache domain, and the numbers of its entries that name a domid and permit something, or that are in
/// use (`permits` false).
pub fn entries_of(lab: &Lab, domid: u16, permits: bool) -> Result<(u16, Vec<usize>)> {
    let domains = lab.domains()?;
    let cache = domains.iter().find(|d| d.name.starts_with("copage-cache-"));
    let granter = cache.context("no cache domain")?.domid;
    let memory = ForeignMemory::open()?;
    let table = memory.grant_table(granter, memory.grant_table_frames(granter)?)?;
    let named = table.entries().iter().enumerate().filter(|(_, entry)| {
        let state = entry.state();
        let wanted = if permits {
            state.access().is_some()
        } else {
            state.is_mapped()
        };
        state.dom.0 == domid && wanted
    });
    Ok((granter, named.map(|(gref, _)| gref).collect()))
}

/// How many of these entries the guest can map by itself.
fn maps(guest: &Guest<'_>, granter: u16, entries: &[usize]) -> Result<usize> {
    let refs: Vec<String> = entries.iter().take(TRIED).map(usize::to_string).collect();
    ensure!(refs.len() == TRIED, "{} entries", refs.len());
    let words = format!(
        "for r in {}; do copage-xen-lab do map {granter} $r; done; true",
        refs.join(" ")
    );
    let said = guest.run(&words)?;
    Ok(said.text()?.matches("mapped").count())
}

fn ended(lab: &Lab, guest: Guest<'_>) -> Result<()> {
    let domid = guest.domid();
    guest.destroy()?;
    lab.wait("the number to be free", SOON, || {
        Ok(lab
            .domains()?
            .iter()
            .all(|d| d.domid != domid)
            .then_some(()))
    })
}

fn audit(daemon: &Daemon<'_>) -> Result<Value> {
    let audit = daemon.json("audit")?;
    ensure!(audit["ok"] == true, "{audit}");
    Ok(audit)
}

/// A domain with pages mapped and a session dies, and another gets its very domid: with the daemon there, with
/// the daemon dead, and while what the dead one had mapped was left over from an earlier daemon.
pub fn domid_reused(lab: &Lab) -> Result<String> {
    let old = Guest::start(lab, Kind::Pvh, "old", MEM_MIB)?;
    let domid = old.domid();
    let again = |name: &str| -> Result<Guest<'_>> {
        let setup = Setup {
            domid: Some(domid),
            ..Setup::new(Kind::Pv, name, MEM_MIB)
        };
        let guest = Guest::create(lab, &setup)?;
        ensure!(guest.domid() == domid, "domain {}", guest.domid());
        guest.ready()?;
        Ok(guest)
    };
    let known = "[[guest]]\nname = \"old\"\ndomain = \"old\"\n";
    let mut daemon = daemon(lab, "\"old\"", "\"new\", \"third\"", known)?;

    let held = holding(lab, &old, "first")?;
    let (granter, entries) = entries_of(lab, domid, true)?;
    ensure!(entries.len() as u64 >= PAGES, "{} entries", entries.len());
    // A program of its own maps them as well as the library.
    let own = maps(&old, granter, &entries)?;
    ensure!(own == TRIED, "the old one maps {own} of {TRIED} itself");
    drop(held);
    ended(lab, old)?;
    let new = again("new")?;
    let left = entries_of(lab, domid, true)?.1.len();
    ensure!(left == 0, "{left} entries still name the old one");
    let got = maps(&new, granter, &entries)?;
    ensure!(got == 0, "the new one maps {got} of the old one's pages");
    ensure!(sessions(&daemon)?.is_empty(), "it is taken for the old one");
    let stranger = new.run_for("copage ls first", REFUSED)?;
    ensure!(!stranger.success(), "it is let in: {stranger:?}");
    daemon.copage("attach new second")?.text()?;
    ensure!(
        reads(&new, "second", 2)?,
        "attached, it reads something else"
    );
    for words in ["copage ls first", "copage ls first --as old"] {
        let refused = new.run_for(words, REFUSED)?;
        ensure!(!refused.success(), "{words}: {refused:?}");
    }
    audit(&daemon)?;

    // The same while there is no daemon that could revoke anything.
    let held = holding(lab, &new, "second")?;
    let (_, entries) = entries_of(lab, domid, true)?;
    daemon.kill()?;
    drop(held);
    ended(lab, new)?;
    let third = again("third")?;
    let unwatched = maps(&third, granter, &entries)?;
    daemon.again()?;
    let got = maps(&third, granter, &entries)?;
    ensure!(got == 0, "{got} entries outlive a start of the daemon");
    audit(&daemon)?;

    // What is mapped when a daemon starts permits nothing beyond that mapping, whoever has the domid then.
    daemon.copage("attach third second")?.text()?;
    let held = holding(lab, &third, "second")?;
    let (_, entries) = entries_of(lab, domid, true)?;
    let refs: Vec<String> = entries.iter().take(TRIED).map(usize::to_string).collect();
    let words = format!(
        "exec copage-xen-lab do map {granter} {} 600",
        refs.join(",")
    );
    let raw = third.spawn(&words)?;
    lab.wait("a mapping", SOON, || {
        Ok(raw.said()?.contains("mapped").then_some(()))
    })?;
    held.signal(9)?;
    drop(held);
    daemon.kill()?;
    daemon.again()?;
    let mapped = entries_of(lab, domid, false)?.1.len();
    ensure!(mapped == TRIED, "{mapped} entries in use");
    let pid = Pid::from_raw(i32::try_from(daemon.pid()?)?).context("a daemon")?;
    kill_process(pid, Signal::STOP)?;
    drop(raw);
    ended(lab, third)?;
    let fourth = again("fourth")?;
    let got = maps(&fourth, granter, &entries)?;
    kill_process(pid, Signal::CONT)?;
    ensure!(
        got == 0,
        "{got} entries left over from the dead one can be mapped"
    );
    lab.wait("the frames to come back", SOON, || {
        let stats = daemon.json("stats")?;
        Ok((stats["frames_quarantined"] == 0).then_some(()))
    })?;
    audit(&daemon)?;
    fourth.destroy()?;
    daemon.stop()?;
    Ok(format!(
        "domain {domid} four times: nothing of the dead one's could be mapped, was taken for it, or stayed; \
         with no daemon running the next one maps {unwatched} of {TRIED} of its pages"
    ))
}

/// Guests by uuid and by name, renamed, and one after the other.
pub fn identity(lab: &Lab) -> Result<String> {
    const UUID: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    const LATER: &str = "6ba7b811-9dad-11d1-80b4-00c04fd430c8";
    let with_uuid = |name: &str, uuid: &str| Setup {
        more: vec![format!("uuid = \"{uuid}\"")],
        ..Setup::new(Kind::Pv, name, MEM_MIB)
    };
    let one = Guest::create(lab, &with_uuid("anything", UUID))?;
    let two = Guest::create(lab, &Setup::new(Kind::Pvh, "web", MEM_MIB))?;
    let known = format!(
        "[[guest]]\nname = \"by-uuid\"\nuuid = \"{UUID}\"\n\
         [[guest]]\nname = \"by-name\"\ndomain = \"web\"\n"
    );
    let mut daemon = daemon(lab, "\"by-uuid\"", "\"by-name\"", &known)?;
    one.ready()?;
    two.ready()?;
    let refused = |guest: &Guest<'_>, export: &str| -> Result<()> {
        let out = guest.run_for(&format!("copage ls {export}"), REFUSED)?;
        ensure!(!out.success(), "{} reads {export}: {out:?}", guest.name());
        Ok(())
    };
    ensure!(
        reads(&one, "first", 1)? && reads(&two, "second", 2)?,
        "not let in"
    );
    refused(&one, "second")?;
    refused(&two, "first")?;

    // Renamed while it has pages mapped: what it has it keeps, new sessions are by the new name.
    let held = holding(lab, &two, "second")?;
    lab.sh("xl rename web elsewhere")?.text()?;
    lab.sh("xl rename anything web")?.text()?;
    ensure!(
        reads(&one, "first", 1)?,
        "a new name changed who the uuid is"
    );
    refused(&one, "second")?;
    refused(&two, "second")?;
    let seen = sessions(&daemon)?;
    ensure!(
        seen.len() == 1 && seen[0]["name"] == "by-name" && held.poll()?.is_none(),
        "the session that there was: {seen:?}"
    );
    held.signal(9)?;
    drop(held);
    ended(lab, two)?;
    lab.sh("xl rename web anything")?.text()?;

    // The next one of a name is that guest, the next one without the uuid is not.
    daemon.copage(&format!("attach {LATER} first"))?.text()?;
    let web = Guest::create(lab, &Setup::new(Kind::Pv, "web", MEM_MIB))?;
    let later = Guest::create(lab, &with_uuid("later", LATER))?;
    web.ready()?;
    later.ready()?;
    ensure!(
        reads(&web, "second", 2)?,
        "the next one of the name is not let in"
    );
    ensure!(
        reads(&later, "first", 1)?,
        "attached by uuid before it was there"
    );
    ended(lab, one)?;
    lab.sh("xl rename web anything")?.text()?;
    refused(&web, "first")?;
    audit(&daemon)?;
    daemon.copage(&format!("detach {LATER}"))?.text()?;
    refused(&later, "first")?;
    ended(lab, web)?;
    ended(lab, later)?;
    daemon.stop()?;
    Ok("by uuid whatever the name; a renamed guest keeps its session and gets no other; the next domain of a \
        name is that guest, of a name whose guest has a uuid is nobody"
        .into())
}
