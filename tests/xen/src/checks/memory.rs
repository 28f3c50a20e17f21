//! Memory that three guests which read one tree take from the host in all, by each way there is to share it.
//!
//! Every way is measured alike: the free memory of the hypervisor, of dom0 and of the guests together,
//! before and while all three guests hold every page of the tree mapped. What is less is what was taken,
//! by whatever: cache domains, page caches, processes, tables. The tree is on a disk, and each way begins
//! with cold caches. Cannot show: times, and what is given back when memory gets short.

use crate::daemon::Daemon;
use crate::guest::{Background, Guest, Kind, Setup};
use crate::lab::Lab;
use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};

/// A guest: twice what its own copy of the tree needs.
const GUEST_MIB: u64 = 256;
/// How long a guest may take to read the tree.
const READ: Duration = Duration::from_secs(300);
/// How long a mount may take.
const MOUNTED: Duration = Duration::from_secs(60);
/// Where dom0 has the disk with the tree mounted.
const TREE: &str = "/run/tree";
/// A block device needs a script in dom0 that says which device it is; Xen's own needs a host with udev.
const SCRIPT: &str = "/etc/xen/scripts/lab-block";
const SCRIPT_WORDS: &str = "#!/bin/sh\n\
    [ \"$1\" = add ] || exit 0\n\
    xenstore-write \"$XENBUS_PATH/physical-device\" \"$(stat -c %t:%T /dev/vda)\" \
    \"$XENBUS_PATH/hotplug-status\" connected\n";

/// A way to read a tree.
struct Way {
    name: &'static str,
    /// What brings it to a guest at `/mnt/tree`; nothing: the library finds it.
    mount: &'static str,
    /// Does it need the daemon?
    daemon: bool,
}

const NINE: &str = "9pfs";
const WAYS: [Way; 4] = [
    Way {
        name: "copage library",
        mount: "",
        daemon: true,
    },
    Way {
        name: "copage mount",
        mount: "exec copage mount tree /mnt/tree",
        daemon: true,
    },
    Way {
        name: NINE,
        mount: "mount -t 9p -o trans=xen,version=9p2000.L,ro,cache=loose tree /mnt/tree",
        daemon: false,
    },
    Way {
        name: "block device",
        mount: "mount -t ext4 -o ro /dev/xvda /mnt/tree",
        daemon: false,
    },
];

/// KiB free: with the hypervisor, in dom0, in each guest.
struct Free {
    xen: u64,
    dom0: u64,
    guests: Vec<u64>,
}

fn of_meminfo(text: &str) -> Result<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix("MemFree:"));
    let words = line.context("no MemFree")?.trim().trim_end_matches(" kB");
    Ok(words.parse()?)
}

fn free(lab: &Lab, guests: &[Guest<'_>]) -> Result<Free> {
    let info = lab.sh("xl info free_memory")?;
    let meminfo = "cat /proc/meminfo";
    let of_guest = |guest: &Guest<'_>| of_meminfo(guest.run(meminfo)?.text()?);
    Ok(Free {
        xen: info.text()?.trim().parse::<u64>()? * 1024,
        dom0: of_meminfo(lab.sh(meminfo)?.text()?)?,
        guests: guests.iter().map(of_guest).collect::<Result<_>>()?,
    })
}

/// MiB that `now` has less than `before`.
fn taken(before: u64, now: u64) -> f64 {
    (before as f64 - now as f64) / 1024.0
}

/// Empties all caches.
fn chill(lab: &Lab, guests: &[Guest<'_>]) -> Result<()> {
    let words = "sync; echo 3 > /proc/sys/vm/drop_caches";
    lab.sh(words)?.text()?;
    for guest in guests {
        guest.run(words)?.text()?;
    }
    Ok(())
}

/// What device models keep in memory already, in MiB.
fn device_models(lab: &Lab) -> Result<f64> {
    let pss = lab.sh(
        "for p in $(pidof qemu); do grep ^Pss: /proc/$p/smaps_rollup; done | awk '{ s += $2 } END { print s + 0 }'",
    )?;
    Ok(pss.text()?.parse::<f64>()? / 1024.0)
}

/// What a reader says once it holds all pages.
fn said(lab: &Lab, guest: &Guest<'_>, job: &Background<'_, '_>) -> Result<String> {
    lab.wait("a guest that holds the tree", READ, || {
        let said = job.said()?;
        if job.poll()?.is_some() {
            let output = job.wait(Duration::from_secs(1))?;
            anyhow::bail!("{}: {output:?}", guest.name());
        }
        Ok(said.contains("sum").then(|| said.trim().to_owned()))
    })
}

fn configuration(guests: &[Guest<'_>], pages: u64) -> String {
    // A few pages more than the tree has, and what a cache domain needs for itself.
    let mib = pages.div_ceil(256) + 1;
    let mut text = format!(
        "backend = \"xen\"\nframes_mib = {mib}\nxen.cache_domain_mib = {}\n\
         [[export]]\nname = \"tree\"\npath = {TREE:?}\n",
        mib + 6
    );
    for guest in guests {
        let name = guest.name();
        text += &format!("[[guest]]\nname = {name:?}\ndomain = {name:?}\n");
    }
    text
}

/// Reads by one way. The line of the table, and its MiB in all.
fn measure(
    lab: &Lab,
    guests: &[Guest<'_>],
    way: &Way,
    expected: &str,
    pages: u64,
) -> Result<(String, f64)> {
    let begin = Instant::now();
    chill(lab, guests)?;
    let models = if way.name == NINE {
        device_models(lab)?
    } else {
        0.0
    };
    let before = free(lab, guests)?;
    let mut daemon = match way.daemon {
        true => Some(Daemon::start(lab, &configuration(guests, pages))?),
        false => None,
    };
    let mut mounts = Vec::new();
    let mut readers = Vec::new();
    for guest in guests {
        let words = if way.mount.is_empty() {
            "exec copage-xen-lab do tree library tree"
        } else {
            mounts.push(guest.spawn(&format!("mkdir -p /mnt/tree; {}", way.mount))?);
            lab.wait("the mount", MOUNTED, || {
                let mounted = guest.run("grep -q ' /mnt/tree ' /proc/mounts")?;
                Ok(mounted.success().then_some(()))
            })?;
            "exec copage-xen-lab do tree files /mnt/tree"
        };
        readers.push((guest, guest.spawn(words)?));
    }
    for (guest, reader) in &readers {
        let said = said(lab, guest, reader)?;
        ensure!(said == expected, "{}: {said}, not {expected}", guest.name());
    }
    let now = free(lab, guests)?;
    for (_, reader) in readers {
        reader.signal(9)?;
        reader.wait(Duration::from_secs(20))?;
    }
    if !way.mount.is_empty() {
        for guest in guests {
            guest.run("umount /mnt/tree")?.text()?;
        }
    }
    if let Some(daemon) = &mut daemon {
        let audit = daemon.copage("audit")?;
        ensure!(audit.success(), "{audit:?}");
        daemon.stop()?;
    }
    let (xen, dom0) = (
        taken(before.xen, now.xen),
        taken(before.dom0, now.dom0) + models,
    );
    let each: Vec<f64> = before
        .guests
        .iter()
        .zip(&now.guests)
        .map(|(before, now)| taken(*before, *now))
        .collect();
    let all = xen + dom0 + each.iter().sum::<f64>();
    let size = pages as f64 / 256.0;
    let shown: Vec<String> = each.iter().map(|mib| format!("{mib:.0}")).collect();
    let line = format!(
        "{:<15} {all:>5.0} MiB  {:>4.2} of the tree  ({xen:.0} taken from the hypervisor, {dom0:.0} in dom0, {} in \
         the guests){}",
        way.name,
        all / size,
        shown.join(" + "),
        if models > 0.0 {
            format!("; {models:.0} of dom0's are the three device models")
        } else {
            String::new()
        }
    );
    lab.show(&format!(
        "memory: {line} ({:.0} s)",
        begin.elapsed().as_secs_f64()
    ))?;
    Ok((way.name.to_owned(), all / size))
}

/// Shows a table; returns the ratios.
pub fn memory(lab: &Lab) -> Result<String> {
    lab.sh(&format!(
        "mkdir -p {TREE}; grep -q {TREE} /proc/mounts || mount -t ext4 -o ro /dev/vda {TREE}"
    ))?
    .text()?;
    std::fs::write(SCRIPT, SCRIPT_WORDS)?;
    lab.sh(&format!("chmod +x {SCRIPT}"))?.text()?;
    // Dom0's own reading of the tree is what all others are compared with.
    let mut own = lab.spawn(&format!("exec copage-xen-lab do tree files {TREE}"))?;
    let expected = lab.wait("dom0's own reading", READ, || {
        let said = std::fs::read_to_string(&own.out)?;
        ensure!(own.wait(Duration::ZERO)?.is_none(), "it ended: {said}");
        Ok(said.contains("sum").then(|| said.trim().to_owned()))
    })?;
    drop(own);
    let pages: u64 = expected
        .split(", ")
        .nth(1)
        .and_then(|words| words.strip_suffix(" pages"))
        .context("pages")?
        .parse()?;
    let newest = lab.series()?.last().context("no guest kernels")?.clone();
    // QEMU 10, which comes with 4.20, makes no 9pfs backend: "Device 'xen-backend' does not support hotplugging".
    let minor: u32 = lab.sh("xl info xen_minor")?.text()?.trim().parse()?;
    let has_9pfs = minor < 19;
    let mut more = vec![format!(
        "disk = [\"format=raw,vdev=xvda,access=r,backendtype=phy,script={SCRIPT},target=/dev/vda\"]"
    )];
    if has_9pfs {
        more.extend([
            format!("p9 = [\"tag=tree,security_model=none,path={TREE}\"]"),
            "device_model_version = \"qemu-xen\"".to_owned(),
            "device_model_override = \"/images/qemu/run\"".to_owned(),
        ]);
    }
    let setup = |kind, name, series| Setup {
        series,
        more: more.clone(),
        ..Setup::new(kind, name, GUEST_MIB)
    };
    let guests = [
        Guest::create(lab, &setup(Kind::Pvh, "tree-pvh", None))?,
        Guest::create(lab, &setup(Kind::Pv, "tree-pv", None))?,
        Guest::create(lab, &setup(Kind::Pvh, "tree-new", Some(newest)))?,
    ];
    for guest in &guests {
        guest.ready()?;
    }
    lab.show(&format!(
        "memory: three guests (PVH, PV, PVH with the newest Linux) hold every page of a tree mapped: {expected}; \
         memory taken from the host in all"
    ))?;
    let mut ratios = Vec::new();
    for way in WAYS.iter().filter(|way| has_9pfs || way.name != NINE) {
        let (name, ratio) =
            measure(lab, &guests, way, &expected, pages).with_context(|| way.name.to_owned())?;
        ratios.push((name, ratio));
    }
    for guest in guests {
        guest.destroy()?;
    }
    lab.sh(&format!("umount {TREE}"))?.text()?;
    let shown: Vec<String> = ratios
        .iter()
        .map(|(name, r)| format!("{name} {r:.2}"))
        .collect();
    let [library, others @ ..] = ratios.as_slice() else {
        anyhow::bail!("no ratios");
    };
    // One copy and what it takes to share it, against a copy in each guest: with less between them, somebody
    // did not hold the tree, or the pages were not shared.
    for other in others {
        ensure!(other.1 > 2.5 && other.1 > library.1 * 1.7, "{shown:?}");
    }
    Ok(format!(
        "of the tree's size, three guests: {}{}",
        shown.join(", "),
        if has_9pfs {
            ""
        } else {
            "; 9pfs not measured: this QEMU makes no such device"
        }
    ))
}
