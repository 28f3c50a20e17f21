//! The mount: FUSE, its helper for ordinary users, passthrough files.

use super::{Finding, kernel};
use std::fs::File;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// `CAP_SYS_ADMIN`, linux/capability.h.
const CAP_SYS_ADMIN: u64 = 21;

pub(super) fn all() -> Vec<Finding> {
    let mut found = vec![device()];
    if !rustix::process::geteuid().is_root() {
        found.push(helper());
    }
    found.push(passthrough());
    found
}

fn device() -> Finding {
    let name = "fuse";
    let cost = "no copage mount; exec, ls, cat, cp and the library work";
    match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Finding::have(name, "/dev/fuse may be opened"),
        Err(error) => {
            let fix = match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    "chmod 666 /dev/fuse, as root (most systems have it so)"
                }
                _ => "modprobe fuse, as root (containers: pass --device /dev/fuse)",
            };
            Finding::lack(name, format!("/dev/fuse: {error}"), cost, fix)
        }
    }
}

fn helper() -> Finding {
    let name = "fusermount3";
    let found = in_path("fusermount3");
    let cost = "ordinary users cannot mount";
    let fix = "install fuse3 (apt install fuse3, dnf install fuse3)";
    match found.map(|path| (std::fs::metadata(&path), path)) {
        Some((Ok(meta), path)) if meta.permissions().mode() & 0o4000 != 0 => {
            Finding::have(name, format!("{}", path.display()))
        }
        Some((_, path)) => {
            let found = format!("{} is not set-user-id", path.display());
            Finding::lack(
                name,
                found,
                cost,
                "chmod u+s on it, as root, or a package that has it so",
            )
        }
        None => Finding::lack(name, "it is not in PATH", cost, fix),
    }
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// Is CAP_SYS_ADMIN effective, and of the machine rather than of a user namespace?
fn system_admin() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let whole = map.split_whitespace().eq(["0", "0", "4294967295"]);
    bits & (1 << CAP_SYS_ADMIN) != 0 && whole
}

fn passthrough() -> Finding {
    let name = "fuse passthrough";
    let cost = "mounts go through the page cache: a second copy, and not the shared frames";
    match (kernel::at_least(6, 9), system_admin()) {
        (true, true) => Finding::have(
            name,
            "Linux 6.9 or later and CAP_SYS_ADMIN (copage mount says whether it got it)",
        ),
        (false, _) => Finding::limited(name, "came with Linux 6.9", cost, "a newer kernel"),
        (true, false) => {
            let found = "the kernel has it, for CAP_SYS_ADMIN only";
            Finding::limited(name, found, cost, "run copage mount as root")
        }
    }
}
