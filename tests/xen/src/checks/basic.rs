//! What shows that the laboratory itself works.

use crate::daemon::Daemon;
use crate::guest::{Guest, Kind, Setup};
use crate::job::Ended;
use crate::lab::Lab;
use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};

/// Versions of Xen and dom0, memory left for guests.
pub fn boot(lab: &Lab) -> Result<String> {
    let info = lab.sh("xl info")?;
    let field = |name: &str| -> Result<String> {
        let line = info.text()?.lines().find(|l| l.starts_with(name));
        let (_, value) = line
            .and_then(|l| l.split_once(':'))
            .with_context(|| format!("xl info: no {name}"))?;
        Ok(value.trim().to_owned())
    };
    let capabilities = lab.sh("cat /proc/xen/capabilities")?;
    ensure!(
        capabilities.text()?.contains("control_d"),
        "dom0 is not the control domain"
    );
    let devices = lab.sh("cd /dev/xen && ls gntdev gntalloc evtchn privcmd xenbus")?;
    devices.text()?;
    Ok(format!(
        "Xen {}, dom0 Linux {}, {} MiB free, virtualisation: {}",
        field("xen_version")?,
        field("release")?,
        field("free_memory")?,
        field("virt_caps")?,
    ))
}

/// A guest of each kind with each Linux, all at once.
pub fn guests(lab: &Lab) -> Result<String> {
    let mut guests: Vec<Guest<'_>> = Vec::new();
    for series in lab.series()? {
        for kind in [Kind::Pv, Kind::Pvh] {
            let mut setup = Setup::new(kind, &format!("{kind}-{series}"), 160);
            setup.series = Some(series.clone());
            guests.push(Guest::create(lab, &setup)?);
        }
    }
    let mut seen = Vec::new();
    for guest in &guests {
        let up = guest.ready()?;
        let release = guest.run("uname -r")?.text()?.to_owned();
        let kind = guest.run("cat /sys/hypervisor/guest_type")?;
        ensure!(
            guest.name().starts_with(&kind.text()?.to_lowercase()),
            "{} is {}",
            guest.name(),
            kind.text()?
        );
        let failing = guest.run("echo out; echo err >&2; exit 3")?;
        ensure!(
            (failing.ended, &*failing.stdout, &*failing.stderr)
                == (Ended::Exit(3), "out\n", "err\n"),
            "{failing:?}"
        );
        let long = guest.run("seq 2000")?;
        ensure!(long.text()?.lines().count() == 2000, "lines were lost");
        seen.push(format!(
            "{} with Linux {release} up after {:.0} s",
            kind.text()?,
            up.as_secs_f64()
        ));
    }
    for guest in guests {
        guest.destroy()?;
    }
    Ok(seen.join("; "))
}

/// What checks are made of works: commands in a guest with limits, in the background, files, a guest's
/// end.
pub fn helpers(lab: &Lab) -> Result<String> {
    let guest = Guest::start(lab, Kind::Pv, "helped", 160)?;
    let bytes: Vec<u8> = (0..20_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    guest.write_file("/tmp/file", &bytes)?;
    let here = lab.work().join("file");
    std::fs::write(&here, &bytes)?;
    let sum = lab.sh("md5sum < file")?;
    ensure!(
        guest.run("md5sum < /tmp/file")?.text()? == sum.text()?,
        "a file came out different"
    );
    let sleeper = guest.spawn("echo first; sleep 1000")?;
    ensure!(sleeper.poll()?.is_none(), "it ended by itself");
    ensure!(sleeper.said()? == "first\n", "{}", sleeper.said()?);
    sleeper.signal(15)?;
    let slept = sleeper.wait(Duration::from_secs(10))?;
    ensure!(
        (slept.ended, &*slept.stdout) == (Ended::Signal(15), "first\n"),
        "{slept:?}"
    );
    ensure!(
        guest.run_for("sleep 1000", Duration::from_secs(1)).is_err(),
        "a limit was not kept"
    );
    let begin = Instant::now();
    for _ in 0..20 {
        guest.run("copage-xen-lab do echo")?.text()?;
    }
    let each_ms = begin.elapsed().as_millis() / 20;
    guest.spawn("sleep 1; poweroff -f")?;
    guest.wait_gone(Duration::from_secs(30))?;
    ensure!(
        guest.console()?.contains("lab: guest up"),
        "its console was lost"
    );
    Ok(format!(
        "files, signals, limits, a guest's end; a command in a guest takes {each_ms} ms"
    ))
}

/// A daemon in dom0 is asked, killed, started again over what it left, and stopped.
pub fn daemon(lab: &Lab) -> Result<String> {
    let mut daemon = Daemon::start(
        lab,
        "[[export]]\nname = \"etc\"\npath = \"/etc\"\nmode = \"ro\"\n",
    )?;
    let first = daemon.pid()?;
    daemon.kill()?;
    daemon.again()?;
    ensure!(daemon.pid()? != first, "it was not killed");
    let domains = lab.domains()?;
    let names: Vec<_> = domains.iter().map(|d| &*d.name).collect();
    let audit = daemon.json("audit")?;
    ensure!(audit["ok"] == true, "audit: {audit}");
    daemon.stop()?;
    Ok(format!(
        "killed, started again with domains {}, audit clean, stopped",
        names.join(" ")
    ))
}

/// `copage doctor` runs and its JSON is whole; what it finds is shown, not judged.
pub fn doctor(lab: &Lab) -> Result<String> {
    let guest = Guest::start(lab, Kind::Pvh, "doctor", 192)?;
    let mut seen = Vec::new();
    for (place, output) in [
        ("dom0", lab.sh("copage doctor --json")?),
        ("guest", guest.run("copage doctor --json")?),
    ] {
        let report = output.json()?;
        let findings = report["findings"].as_array().context("no findings")?;
        let lacking: Vec<_> = findings
            .iter()
            .filter(|f| f["state"] == "lack")
            .filter_map(|f| f["name"].as_str())
            .collect();
        seen.push(format!(
            "{place}: {} findings, lacking: {}",
            findings.len(),
            lacking.join(", ")
        ));
    }
    Ok(seen.join("; "))
}

/// A domain that never runs, as the cache's are: PVH, paused, its kernel a few bytes with the note by
/// which a PVH kernel names its entry.
pub fn cache_domain(lab: &Lab) -> Result<String> {
    let kernel = lab.work().join("stub");
    std::fs::write(&kernel, stub_kernel())?;
    let config = lab.work().join("stub.cfg");
    let text = format!(
        "name = \"stub\"\ntype = \"pvh\"\nmemory = 64\nvcpus = 1\nkernel = {kernel:?}\n\
         max_grant_frames = 256\nmax_grant_version = 1\n"
    );
    std::fs::write(&config, text)?;
    lab.sh(&format!("xl create -q -p {}", config.display()))?
        .text()?;
    let domains = lab.domains()?;
    let [stub] = &domains[..] else {
        anyhow::bail!("not one domain: {domains:?}");
    };
    ensure!(
        stub.name == "stub" && stub.state.contains('p'),
        "not paused: {stub:?}"
    );
    lab.sh("xl destroy stub")?.text()?;
    ensure!(lab.domains()?.is_empty(), "it is still there");
    Ok(format!(
        "domain {} of {} MiB, state {}, then gone",
        stub.domid, stub.mem_mib, stub.state
    ))
}

/// An ELF file of one note (XEN_ELFNOTE_PHYS32_ENTRY, 18) and three instructions (cli; hlt; jmp to
/// hlt) at 1 MiB.
fn stub_kernel() -> Vec<u8> {
    const CODE: u32 = 0x10_0000;
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let word = |file: &mut Vec<u8>, n: u32| file.extend(n.to_le_bytes());
    let half = |file: &mut Vec<u8>, n: u16| file.extend(n.to_le_bytes());
    // Elf32_Ehdr: executable, 80386, entry, program headers behind it, no sections.
    half(&mut file, 2);
    half(&mut file, 3);
    for n in [1, CODE, 52, 0, 0] {
        word(&mut file, n);
    }
    for n in [52, 32, 2, 40, 0, 0] {
        half(&mut file, n);
    }
    // Elf32_Phdr twice: the code (PT_LOAD), the note (PT_NOTE).
    for header in [
        [1, 116, CODE, CODE, 4, 4, 5, 4],
        [4, 120, 0, 0, 20, 20, 4, 4],
    ] {
        for n in header {
            word(&mut file, n);
        }
    }
    file.extend([0xfa, 0xf4, 0xeb, 0xfd]);
    for n in [4, 4, 18] {
        word(&mut file, n);
    }
    file.extend(b"Xen\0");
    word(&mut file, CODE);
    file
}
