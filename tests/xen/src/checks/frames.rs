//! Cache domains through the backend itself, without a daemon: frames, grants, revocation, and what is
//! found after a kill.

use crate::guest::{Background, Guest, Kind};
use crate::job::{Ended, Job};
use crate::lab::Lab;
use crate::programs::frames::{page_of, words};
use anyhow::{Context, Result, ensure};
use copage_grants::xen::lib::ForeignMemory;
use copage_grants::{
    Access, Backend, DomId, FrameNo, GrantError, HomeId, HomeSpec, PAGE_SIZE, PageIndex,
    Revocation, TrustClass, XenBackend, XenConfig,
};
use rustix::process::Signal;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const MIB: u32 = 64;
/// Entries of guests that unmap are cleared by their kernel a little later.
pub const SOON: Duration = Duration::from_secs(20);
/// How long a guest holds what it maps when it is not told to let go.
const LONG_S: u32 = 1000;
/// A session, not a domid.
pub const SESSION: DomId = DomId(700);
pub const OTHER: DomId = DomId(701);

pub fn config(run_dir: &Path, frames_max: u32) -> XenConfig {
    XenConfig {
        frames_max,
        cache_domain_mib: MIB,
        run_dir: run_dir.to_owned(),
        ..XenConfig::default()
    }
}

pub fn home_of(backend: &XenBackend, pages: u64) -> Result<HomeId> {
    Ok(backend.open_home(&HomeSpec {
        label: "f".into(),
        bytes: pages * PAGE_SIZE as u64,
        class: TrustClass::OWN,
    })?)
}

pub fn store(backend: &XenBackend, home: HomeId, page: u64, frame: u32) -> Result<()> {
    Ok(backend.store(home, PageIndex(page), &[FrameNo(frame)], &page_of(page))?)
}

/// Grants frames of one cache domain for reading: as the guest is told them.
pub fn grant(backend: &XenBackend, session: DomId, frames: &[FrameNo]) -> Result<String> {
    grant_as(backend, session, Access::ReadOnly, frames)
}

/// The same with another access.
pub fn grant_as(
    backend: &XenBackend,
    session: DomId,
    access: Access,
    frames: &[FrameNo],
) -> Result<String> {
    let mut grants = Vec::new();
    backend.grant(session, access, frames, &mut grants)?;
    let table = grants.first().context("nothing granted")?.table;
    let granter = backend.granter(table).context("a table of no domain")?;
    let refs: Vec<_> = grants.iter().map(|g| g.gref.0.to_string()).collect();
    Ok(format!("{} {}", granter.0, refs.join(",")))
}

pub fn revoke(backend: &XenBackend, session: DomId, frames: &[FrameNo]) -> Vec<Revocation> {
    let mut answers = Vec::new();
    backend.revoke(session, frames, &mut answers);
    answers
}

pub fn revoked_soon(
    lab: &Lab,
    backend: &XenBackend,
    session: DomId,
    frames: &[FrameNo],
) -> Result<()> {
    lab.wait("the entries to be free", SOON, || {
        let answers = revoke(backend, session, frames);
        let done = answers.iter().all(|a| *a != Revocation::StillMapped);
        Ok(done.then_some(()))
    })
}

pub fn clean(backend: &XenBackend) -> Result<()> {
    let audit = backend.audit();
    ensure!(audit.differences.is_empty(), "audit: {audit:?}");
    Ok(())
}

/// Maps in the guest, in the background, and waits until it is mapped.
pub fn map<'g, 'a>(lab: &Lab, guest: &'g Guest<'a>, told: &str) -> Result<Background<'g, 'a>> {
    let job = guest.spawn(&format!("copage-xen-lab do map {told} {LONG_S}"))?;
    lab.wait("the guest's mapping", SOON, || {
        let said = job.said()?;
        ensure!(job.poll()?.is_none(), "{}: {said}", guest.name());
        Ok(said.contains("mapped").then_some(()))
    })?;
    Ok(job)
}

pub fn pages_said(job: &Background<'_, '_>, pages: &[u64]) -> Result<()> {
    let said = job.said()?;
    for page in pages {
        let wanted = words(&page_of(*page));
        ensure!(said.contains(&wanted), "no {wanted} in {said}");
    }
    Ok(())
}

pub fn let_go(job: &Background<'_, '_>) -> Result<()> {
    job.signal(9)?;
    job.wait(SOON)?;
    Ok(())
}

/// Two cache domains, a PVH and a PV guest: the same frames in both, refusals, revocation, the audit.
pub fn frames(lab: &Lab) -> Result<String> {
    let begin = Instant::now();
    let backend = XenBackend::new(config(lab.work(), 20_000))?;
    let made_ms = begin.elapsed().as_millis();
    let domains = lab.domains()?;
    ensure!(domains.len() == 2, "not two cache domains: {domains:?}");
    ensure!(
        domains
            .iter()
            .all(|d| d.name.starts_with("copage-cache-") && d.state.contains('p')),
        "{domains:?}"
    );
    let second = XenBackend::new(config(lab.work(), 20_000));
    ensure!(second.is_err(), "a second daemon got the same domains");
    clean(&backend)?;

    // Frames at both ends of both domains.
    let last = (1..20_000).find(|n| backend.in_one_table(&[FrameNo(0), FrameNo(*n)]) == 1);
    let border = last.context("one table")?;
    let places = [0, 1, border - 1, border, 19_999];
    let home = home_of(&backend, 5)?;
    for (page, frame) in (0..).zip(places) {
        store(&backend, home, page, frame)?;
    }
    for (page, frame) in (0..).zip(places) {
        let mut read = vec![0; PAGE_SIZE];
        backend.load(home, PageIndex(page), FrameNo(frame), &mut read)?;
        ensure!(read == page_of(page), "page {page} came back different");
    }
    let again = store(&backend, home, 0, 1);
    ensure!(again.is_err(), "stored into a frame that holds a page");
    ensure!(
        backend.present_pages(home)? == [(PageIndex(0), 5)],
        "{:?}",
        backend.present_pages(home)?
    );

    let pvh = Guest::start(lab, Kind::Pvh, "pvh", 160)?;
    let pv = Guest::start(lab, Kind::Pv, "pv", 160)?;
    let of_first = [FrameNo(0), FrameNo(1), FrameNo(border - 1)];
    let unbound = grant(&backend, SESSION, &of_first);
    ensure!(unbound.is_err(), "granted to nobody: {unbound:?}");
    backend.bind(SESSION, pvh.domid())?;
    backend.bind(OTHER, pv.domid())?;
    let told = grant(&backend, SESSION, &of_first)?;
    let told_other = grant(&backend, OTHER, &of_first)?;
    clean(&backend)?;

    let job = map(lab, &pvh, &told)?;
    let other = map(lab, &pv, &told_other)?;
    pages_said(&job, &[0, 1, 2])?;
    pages_said(&other, &[0, 1, 2])?;
    ensure!(
        revoke(&backend, SESSION, &of_first) == [Revocation::StillMapped; 3],
        "a mapped entry was revoked"
    );
    let discarded = backend.discard(home, PageIndex(0), &[FrameNo(0)]);
    ensure!(
        matches!(discarded, Err(GrantError::StillGranted(_))),
        "{discarded:?}"
    );
    // Somebody else's entry; a writable mapping of a read-only one; one that was never written.
    for (guest, words, what) in [
        (&pv, told.clone(), "another domain's entry"),
        (&pvh, format!("{told} 0 writable"), "a writable mapping"),
        (
            &pvh,
            format!("{} 4000", told.split(' ').next().unwrap_or("")),
            "a free entry",
        ),
    ] {
        let output = guest.run(&format!("copage-xen-lab do map {words}"))?;
        ensure!(
            !output.success() && output.stderr.contains("22"),
            "{what}: {output:?}"
        );
    }
    clean(&backend)?;

    let_go(&job)?;
    revoked_soon(lab, &backend, SESSION, &of_first)?;
    ensure!(
        backend.holder_count(FrameNo(0)) == 1,
        "the other guest holds it"
    );
    let gone = pvh.run(&format!("copage-xen-lab do map {told}"))?;
    ensure!(!gone.success(), "a revoked entry was mapped");
    pages_said(&other, &[0, 1, 2])?;

    // The guest dies with its mapping.
    drop(other);
    pv.destroy()?;
    revoked_soon(lab, &backend, OTHER, &of_first)?;
    let end = backend.domain_ended(OTHER);
    ensure!((end.revoked, end.still_mapped.len()) == (0, 0), "{end:?}");
    clean(&backend)?;

    // The audit sees what it is there for.
    audit_sees(&backend, home)?;
    for (page, frame) in (0..).zip(places) {
        backend.discard(home, PageIndex(page), &[FrameNo(frame)])?;
    }
    backend.close_home(home)?;
    clean(&backend)?;
    backend.stop()?;
    drop(backend);
    gone_soon(lab)?;
    Ok(format!(
        "two domains made in {made_ms} ms; the same frames in a PVH and a PV guest; mapped ones not \
         revoked; three refusals; the dead guest's entries free; both domains ended"
    ))
}

/// A record changed behind the backend's back, a grant entry too: both are told.
fn audit_sees(backend: &XenBackend, home: HomeId) -> Result<()> {
    let granter = backend
        .granter(copage_grants::TableId(0))
        .context("no domain")?;
    let memory = ForeignMemory::open()?;
    // Frame 0's record: the first of the second page that is used (gfn 513).
    let records = memory.map(granter.0, &[513])?;
    let view = records.bytes_mut().context("not writable")?;
    let before = view.read_only().read_u8(9).context("no byte")?;
    ensure!(view.write_u8(9, before ^ 1), "not written");
    let audit = backend.audit();
    ensure!(audit.differences.len() == 2, "a torn record: {audit:?}");
    ensure!(
        backend.present_pages(home)? == [(PageIndex(1), 4)],
        "{:?}",
        backend.present_pages(home)?
    );
    ensure!(view.write_u8(9, before), "not written");
    let table = memory.grant_table(granter.0, 1)?;
    use copage_grants::entry::EntryMemory as _;
    table.entries()[300].publish(DomId(9), Access::ReadOnly, 5000, false);
    let audit = backend.audit();
    ensure!(audit.differences.len() == 1, "a foreign entry: {audit:?}");
    table.entries()[300].end();
    clean(backend)
}

pub fn gone_soon(lab: &Lab) -> Result<()> {
    let gone = || {
        let left = lab.domains()?;
        Ok(left
            .iter()
            .all(|d| !d.name.starts_with("copage-cache"))
            .then_some(()))
    };
    lab.wait("the cache domains' end", SOON, gone)
}

/// Another process that has four frames granted to the guest, and what it said: as the guest is told them.
pub fn held(lab: &Lab, guest: &Guest<'_>, access: &str) -> Result<(Job, String)> {
    let mut command = Command::new("copage-xen-lab");
    command
        .args(["do", "hold-frames"])
        .arg(lab.work())
        .args([&guest.domid().to_string(), access]);
    let mut holder = Job::start(command, lab.work(), "holder")?;
    let said = lab.wait("the first daemon", Duration::from_secs(90), || {
        if let Some(ended) = holder.wait(Duration::ZERO)? {
            anyhow::bail!("{ended:?}: {}", std::fs::read_to_string(&holder.err)?);
        }
        let said = std::fs::read_to_string(&holder.out)?;
        Ok(said.strip_suffix('\n').map(str::to_owned))
    })?;
    Ok((holder, said))
}

/// A daemon is killed with pages mapped; what the next one finds, keeps, and gets back.
pub fn found_again(lab: &Lab) -> Result<String> {
    let guest = Guest::start(lab, Kind::Pvh, "guest", 160)?;
    let (mut holder, said) = held(lab, &guest, "")?;
    let before = lab.domains()?;
    let job = map(lab, &guest, &said)?;
    pages_said(&job, &[0, 1, 2, 3])?;
    holder.signal(Signal::KILL);
    let ended = holder.wait(SOON)?;
    ensure!(ended == Some(Ended::Signal(9)), "{ended:?}");

    let begin = Instant::now();
    let backend = XenBackend::new(config(lab.work(), 1000))?;
    let found_ms = begin.elapsed().as_millis();
    ensure!(
        lab.domains()? == before,
        "{:?}, before {before:?}",
        lab.domains()?
    );
    let mut left = Vec::new();
    backend.unusable_frames(&mut left);
    ensure!(left == [0, 1, 2, 3].map(FrameNo), "left over: {left:?}");
    let audit = backend.audit();
    ensure!(audit.left_over == 4, "{audit:?}");
    clean(&backend)?;
    let home = home_of(&backend, 8)?;
    let refused = store(&backend, home, 0, 2);
    ensure!(refused.is_err(), "stored into a frame that a guest maps");
    store(&backend, home, 0, 5)?;
    // Numbers rest: the guest might map one that the first daemon told it.
    backend.bind(SESSION, guest.domid())?;
    let early = grant(&backend, SESSION, &[FrameNo(5)]);
    ensure!(
        early.is_err(),
        "granted before numbers have rested: {early:?}"
    );
    let granted = lab.wait("a first grant", SOON, || {
        Ok(grant(&backend, SESSION, &[FrameNo(5)]).ok())
    })?;
    let rested_ms = begin.elapsed().as_millis();
    ensure!(rested_ms >= 5000, "{rested_ms} ms");
    let new = map(lab, &guest, &granted)?;
    pages_said(&new, &[0])?;
    // What it had mapped is as it was.
    pages_said(&job, &[0, 1, 2, 3])?;
    clean(&backend)?;
    let stayed = backend.stop();
    ensure!(
        stayed
            .as_ref()
            .is_err_and(|e| e.to_string().contains("copage-cache-0")),
        "stopped under a guest's mappings: {stayed:?}"
    );
    drop(backend);

    // Another life: first the old mapping goes, then the new one.
    let backend = XenBackend::new(config(lab.work(), 1000))?;
    let mut left = Vec::new();
    backend.unusable_frames(&mut left);
    ensure!(left == [0, 1, 2, 3, 5].map(FrameNo), "left over: {left:?}");
    let_go(&job)?;
    let wait_for = |wanted: &[FrameNo]| {
        lab.wait("frames that nobody maps", SOON, || {
            let mut left = Vec::new();
            backend.unusable_frames(&mut left);
            Ok((left == wanted).then_some(()))
        })
    };
    wait_for(&[FrameNo(5)])?;
    let home = home_of(&backend, 8)?;
    store(&backend, home, 1, 2)?;
    ensure!(store(&backend, home, 2, 5).is_err(), "it is mapped");
    clean(&backend)?;
    drop(new);
    guest.destroy()?;
    wait_for(&[])?;
    clean(&backend)?;
    backend.stop()?;
    drop(backend);
    gone_soon(lab)?;
    Ok(format!(
        "killed with 4 pages mapped, found again in {found_ms} ms; they stayed as they were and unused \
         until unmapped; first grant {rested_ms} ms after the restart; both ends of it clean"
    ))
}
