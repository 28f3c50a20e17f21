//! What stops cache domains from being made, and what follows when one is destroyed by hand.

use crate::checks::frames::{
    SESSION, clean, config, grant, home_of, let_go, map, pages_said, store,
};
use crate::guest::{Guest, Kind};
use crate::lab::Lab;
use crate::programs::frames::{page_of, words};
use anyhow::{Result, ensure};
use copage_grants::xen::lib::Hypfs;
use copage_grants::{Backend, FrameNo, XenBackend, XenConfig};

const PARAM: &str = "/params/gnttab_max_frames";

fn refused(config: XenConfig) -> Result<String> {
    match XenBackend::new(config) {
        Ok(_) => anyhow::bail!("it was made"),
        Err(error) => Ok(error.to_string()),
    }
}

/// The bound on grant tables is raised; what cannot be had is an error that says what to do.
pub fn limits(lab: &Lab) -> Result<String> {
    let hypfs = Hypfs::open()?;
    let before = hypfs.read(PARAM)?;
    hypfs.write(PARAM, "64")?;
    let backend = XenBackend::new(config(lab.work(), 1000))?;
    let raised = hypfs.read(PARAM)?;
    ensure!(raised.trim().parse::<u32>()? > 64, "{raised} frames");
    let taken = refused(config(lab.work(), 1000))?;
    ensure!(taken.contains("another daemon"), "{taken}");
    // A smaller budget is the same domain; other sizes are another one.
    drop(backend);
    let other = XenConfig {
        grant_frames: Some(16),
        ..config(lab.work(), 1000)
    };
    let old = lab.domains()?;
    let backend = XenBackend::new(other)?;
    let new = lab.domains()?;
    ensure!(
        new.len() == 1 && old[0].domid != new[0].domid,
        "{old:?} {new:?}"
    );
    clean(&backend)?;
    backend.stop()?;
    drop(backend);

    let too_large = refused(XenConfig {
        cache_domain_mib: 2048,
        ..config(lab.work(), 4 * 2048 * 256)
    })?;
    ensure!(too_large.contains("Out of memory"), "{too_large}");
    let left = lab.domains()?;
    ensure!(left.is_empty(), "left behind by a failed start: {left:?}");
    let no_xl = refused(XenConfig {
        xl: "/no/such/xl".into(),
        ..config(lab.work(), 1000)
    })?;
    ensure!(no_xl.contains("/no/such/xl"), "{no_xl}");
    let no_table = refused(XenConfig {
        grant_frames: Some(u32::MAX),
        ..config(lab.work(), 1000)
    })?;
    ensure!(no_table.contains("gnttab_max_frames="), "{no_table}");
    hypfs.write(PARAM, before.trim())?;
    Ok(format!(
        "gnttab_max_frames 64 raised to {}; more memory than there is refused, and no domain left; \
         refused: {no_table}",
        raised.trim()
    ))
}

/// A cache domain is destroyed while a guest maps it: the guest reads on, the audit tells, a new start
/// makes another.
pub fn destroyed(lab: &Lab) -> Result<String> {
    let guest = Guest::start(lab, Kind::Pvh, "guest", 160)?;
    let backend = XenBackend::new(config(lab.work(), 1000))?;
    let home = home_of(&backend, 3)?;
    store(&backend, home, 0, 0)?;
    store(&backend, home, 1, 1)?;
    backend.bind(SESSION, guest.domid())?;
    let told = grant(&backend, SESSION, &[FrameNo(0)])?;
    let unused = grant(&backend, SESSION, &[FrameNo(1)])?;
    let job = map(lab, &guest, &told)?;
    lab.sh("xl destroy copage-cache-0")?.text()?;
    pages_said(&job, &[0])?;
    let audit = backend.audit();
    ensure!(
        audit
            .differences
            .iter()
            .any(|line| line.contains("is gone")),
        "{audit:?}"
    );
    // Its memory is ours until we let go of it. Whether more can be mapped is Xen's to say: what is
    // mapped are the right pages.
    store(&backend, home, 2, 2)?;
    let mut more = Vec::new();
    for (what, told, page) in [("a mapped entry", &told, 0), ("an unused one", &unused, 1)] {
        let output = guest.run(&format!("copage-xen-lab do map {told}"))?;
        let right = output.stdout.contains(&words(&page_of(page)));
        ensure!(!output.success() || right, "{what}: {output:?}");
        more.push(format!(
            "{what} {}",
            if right { "maps" } else { "does not" }
        ));
    }
    drop(backend);
    let backend = XenBackend::new(config(lab.work(), 1000))?;
    let mut left = Vec::new();
    backend.unusable_frames(&mut left);
    ensure!(left.is_empty(), "left over in a new domain: {left:?}");
    clean(&backend)?;
    pages_said(&job, &[0])?;
    let zombie = lab.domains()?;
    ensure!(zombie.iter().any(|d| d.state.contains('d')), "{zombie:?}");
    let_go(&job)?;
    lab.wait("the old domain's end", crate::lab::COMMAND_LIMIT, || {
        let domains = lab.domains()?;
        Ok(domains.iter().all(|d| !d.state.contains('d')).then_some(()))
    })?;
    backend.stop()?;
    Ok(format!(
        "the guest read on, the audit told ({} afterwards), a new start made another domain, the old \
         one went with its last mapping",
        more.join(", ")
    ))
}
