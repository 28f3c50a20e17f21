//! The kernel: its version, its settings, what it runs on.

use super::Finding;
use copage_grants::xen::{Presence, Role, here};

/// Where the policy of huge pages in shared memory stands.
const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

pub(super) fn release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// `6.18.44-x` as (6, 18).
fn parse(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Is the kernel of this version or later? What cannot be told is believed to be.
pub(super) fn at_least(major: u32, minor: u32) -> bool {
    parse(&release()).is_none_or(|version| version >= (major, minor))
}

pub(super) fn version() -> Finding {
    let release = release();
    let fix = "a newer kernel (6.9 or later has all that is used)";
    // Each with what is lost before it; the first that is too new counts.
    let later = [
        (
            5,
            12,
            "frame files that even root cannot make writable (mount_setattr)",
        ),
        (5, 14, "populating mappings ahead (MADV_POPULATE_READ)"),
        (
            5,
            19,
            "private writable mappings (write protection of tmpfs files)",
        ),
        (6, 1, "2 MiB frames (MADV_COLLAPSE)"),
        (
            6,
            6,
            "figures of the host's page cache, and cheap refusals (cachestat, UFFDIO_POISON)",
        ),
        (
            6,
            9,
            "mounts whose files are the shared frames (FUSE passthrough)",
        ),
    ];
    let lost: Vec<_> = later
        .iter()
        .filter(|&&(major, minor, _)| !at_least(major, minor))
        .map(|&(_, _, what)| what)
        .collect();
    if !at_least(5, 11) {
        let cost = "userfaultfd for ordinary users came with Linux 5.11; older ones are not tried";
        return Finding::lack("kernel", format!("Linux {release}"), cost, fix).needed();
    }
    if lost.is_empty() {
        Finding::have("kernel", format!("Linux {release}")).needed()
    } else {
        Finding::limited("kernel", format!("Linux {release}"), &lost.join("; "), fix).needed()
    }
}

/// The choice in `always [never] advise`.
fn chosen(policy: &str) -> Option<&str> {
    policy.split('[').nth(1)?.split(']').next()
}

/// Which policies are dangerous: a write of one page that allocates 2 MiB makes its neighbours be
/// there as zeros. That frame files are right nevertheless is tried under "frame files".
pub(super) fn huge_policy() -> Finding {
    let name = "huge page policy";
    let Ok(text) = std::fs::read_to_string(SHMEM_ENABLED) else {
        return Finding::limited(
            name,
            "this kernel has no huge pages for shared memory",
            "no 2 MiB frames: random reads are about a third slower than they could be",
            "a kernel with CONFIG_TRANSPARENT_HUGEPAGE",
        );
    };
    let policy = chosen(&text).unwrap_or("unknown").to_owned();
    match policy.as_str() {
        "never" | "advise" | "deny" => Finding::have(
            name,
            format!("shmem_enabled is {policy}: no page is there that was not filled"),
        ),
        "always" | "within_size" => Finding::limited(
            name,
            format!(
                "shmem_enabled is {policy}: huge pages come unasked to files off a private mount"
            ),
            "without CAP_SYS_ADMIN, frames are filled page by page, which is slower",
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, as root",
        ),
        _ => Finding::limited(
            name,
            format!("shmem_enabled is {policy}: huge pages come unasked to all shared memory"),
            "dangerous: pages would be there as zeros without having been filled; the daemon refuses to start where that happens",
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, as root",
        ),
    }
}

/// Only where there is something to say.
pub(super) fn xen() -> Option<Finding> {
    describe(&here())
}

/// Where the parts of Xen come from.
const XEN_FIX: &str = "modprobe -a xen-gntdev xen-gntalloc xen-evtchn xen-privcmd; the package of Xen's \
    libraries (Debian: libxengnttab1, libxenevtchn1, libxenstore4 in a guest; xen-system-amd64 in the control domain)";

fn describe(presence: &Presence) -> Option<Finding> {
    let name = "xen";
    match (presence.role, &presence.missing) {
        (Role::None, _) => None,
        (Role::Control, None) => Some(Finding::have(
            name,
            "the control domain of a Xen host: copage serve shares frames between its guests",
        )),
        (Role::Guest, None) => Some(Finding::have(
            name,
            "a Xen guest: commands connect to the daemon in the control domain, when it has attached this domain",
        )),
        (Role::Control, Some(missing)) => Some(Finding::limited(
            name,
            format!("the control domain of a Xen host; {missing}"),
            "copage serve serves processes of this domain only, not the host's guests",
            XEN_FIX,
        )),
        (Role::Guest, Some(missing)) => Some(Finding::limited(
            name,
            format!("a Xen guest; {missing}"),
            "this guest cannot use the exports of the control domain",
            XEN_FIX,
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_xen_offers_is_told() {
        let told = |role, missing: Option<&str>| {
            let missing = missing.map(str::to_owned);
            describe(&Presence { role, missing })
        };
        assert_eq!(told(Role::None, Some("no Xen here")), None);
        for role in [Role::Guest, Role::Control] {
            assert!(told(role, None).unwrap().fix.is_none());
            let lacks = told(role, Some("missing: libxengnttab.so.1")).unwrap();
            assert!(lacks.found.contains("libxengnttab.so.1") && lacks.fix.is_some());
        }
    }

    #[test]
    fn versions_and_policies_are_read() {
        assert_eq!(parse("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(parse("5.4-rc1"), Some((5, 4)));
        assert_eq!(parse("odd"), None);
        assert!(parse("6.10") > parse("6.9.1"));
        assert_eq!(
            chosen("always within_size advise [never] deny force\n"),
            Some("never")
        );
        assert_eq!(chosen("none"), None);
    }
}
