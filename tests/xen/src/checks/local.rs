//! The local backend on the kernels of Debian's releases, which dom0 happens to run.
//!
//! Cannot show how it goes on these kernels without a hypervisor below: a PV dom0 has page tables that
//! are checked by Xen, and no huge pages.

use crate::lab::Lab;
use anyhow::{Result, ensure};
use std::time::Duration;

/// Emulated.
const DEMO_LIMIT: Duration = Duration::from_secs(240);

/// `copage demo` with processes as guests.
pub fn demo(lab: &Lab) -> Result<String> {
    let release = lab.sh("uname -r")?.text()?.to_owned();
    let demo = lab.sh_for("copage demo --guests 3 /usr", DEMO_LIMIT)?;
    std::fs::write(lab.log("txt"), format!("{}{}", demo.stdout, demo.stderr))?;
    let lines = demo.text()?.lines().count();
    ensure!(lines > 12, "{lines} lines: {}", demo.stdout);
    let mounted = lab.sh_for(
        "copage serve --backend local --export bin=/bin & \
         mkdir -p /mnt/bin; for n in $(seq 30); do copage stats >/dev/null 2>&1 && break; sleep 1; done; \
         copage mount bin /mnt/bin & \
         for n in $(seq 30); do test -f /mnt/bin/busybox && break; sleep 1; done; \
         cmp /bin/busybox /mnt/bin/busybox && /mnt/bin/busybox echo ran; \
         umount /mnt/bin; copage stop; wait",
        DEMO_LIMIT,
    )?;
    ensure!(mounted.text()?.contains("ran"), "{mounted:?}");
    Ok(format!(
        "Linux {release}: {lines} lines of the demo, all of them so; a program run off a mount"
    ))
}
