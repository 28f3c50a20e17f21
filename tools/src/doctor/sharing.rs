//! The way of a page, tried in small: a frame file, a guest's mapping of it, a fault, a page taken
//! back, a 2 MiB frame, a guest that tries to write.

use super::{Finding, State, number};
use copage_grants::local::{FrameStore, LocalBackend, LocalConfig};
use copage_grants::{
    Access, Backend, DomId, FrameNo, GrantError, HomeId, HomeSpec, PAGE_SIZE, PageIndex, TrustClass,
};
use copage_mmap::UserfaultMode;
use copage_mmap::bare::BareService;
use copage_mmap::probe::userfault;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Pages of the frame file that is tried.
const PAGES: u32 = 4;
/// What its pages hold.
const MARK: u8 = 0xA5;

pub(super) fn all() -> Vec<Finding> {
    let mut found = Vec::new();
    let backend = match local(FrameStore::Auto) {
        Ok(backend) => backend,
        Err(error) => {
            found.push(
                Finding::lack(
                    "frame files",
                    format!("{error}"),
                    "there is nowhere to keep shared pages",
                    "a kernel with tmpfs and memfd_create, allowed here (seccomp?), and memory",
                )
                .needed(),
            );
            found.push(userfaultfd());
            return found;
        }
    };
    found.push(frame_files(&backend));
    found.push(enforcement(&backend));
    found.push(userfaultfd());
    if userfault().mode == UserfaultMode::Full {
        found.push(faults(&backend));
    }
    found.push(two_mib(&backend));
    found
}

fn local(store: FrameStore) -> Result<Arc<LocalBackend>, GrantError> {
    let config = LocalConfig {
        entries: 4096,
        store,
        ..LocalConfig::default()
    };
    Ok(Arc::new(LocalBackend::new(config)?))
}

/// A home of so many pages with its descriptor.
fn home(backend: &LocalBackend, pages: u32) -> Result<(HomeId, OwnedFd), GrantError> {
    let bytes = u64::from(pages) * PAGE_SIZE as u64;
    let home = backend.open_home(&HomeSpec {
        label: "doctor".into(),
        bytes,
        class: TrustClass::OWN,
    })?;
    Ok((home, backend.home_descriptor(home)?))
}

fn frame_files(backend: &LocalBackend) -> Finding {
    let name = "frame files";
    if backend.store_kind() == FrameStore::PrivateMount {
        return Finding::have(
            name,
            "on a private mount of their own, read-only for guests",
        )
        .needed();
    }
    Finding::limited(
        name,
        "memfds: a private mount (fsmount) is not allowed to this user",
        "guests of the daemon's own user can make their frames writable: they are cooperative, not contained",
        "run the daemon as root (CAP_SYS_ADMIN), Linux 5.12 or later",
    )
    .needed()
}

/// A guest of this user tries to write.
fn enforcement(backend: &LocalBackend) -> Finding {
    let name = "read-only";
    let cost = "a guest of the daemon's own user can change what other guests read";
    let fix = "run the daemon as root, or guests as other users than the daemon";
    match home(backend, 1) {
        Err(error) => Finding::lack(name, error.to_string(), cost, fix),
        Ok((_, descriptor)) => {
            let descriptor = File::from(descriptor);
            let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
            // Whoever owns a file may change its mode, unless the mount forbids it.
            let _ = descriptor.set_permissions(Permissions::from_mode(0o777));
            match File::options().write(true).open(path) {
                Err(error) => Finding::have(
                    name,
                    format!("making a frame file writable and reopening it fails ({error})"),
                ),
                Ok(_) => {
                    let found = "a guest of this user can make a frame file writable and reopen it";
                    Finding::limited(name, found, cost, fix)
                }
            }
        }
    }
}

fn userfaultfd() -> Finding {
    let name = "userfaultfd";
    let seen = userfault();
    let device = match File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
    {
        Ok(_) => "/dev/userfaultfd may be opened".to_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => "no /dev/userfaultfd".to_owned(),
        Err(error) => format!("/dev/userfaultfd: {error}"),
    };
    let sysctl = match number("/proc/sys/vm/unprivileged_userfaultfd") {
        Some(value) => format!("vm.unprivileged_userfaultfd = {value}"),
        None => "no vm.unprivileged_userfaultfd".to_owned(),
    };
    let settings = format!("{device}, {sysctl}");
    let fix = "setfacl -m u:USER:rw /dev/userfaultfd as root, or run the daemon as root: it then passes the device to its guests";
    let mut finding = match seen.mode {
        UserfaultMode::Full => Finding::have(
            name,
            format!("all faults are served, those of system calls too ({settings})"),
        ),
        UserfaultMode::UserModeOnly => Finding::limited(
            name,
            format!("faults of user mode only ({settings})"),
            "system calls on mapped pages that are not there fail with EFAULT; populate(range) first",
            fix,
        ),
        UserfaultMode::None => Finding::lack(
            name,
            format!("{} ({settings})", seen.why_none.unwrap_or_default()),
            "files can be read and mounted, not mapped by the library",
            "a kernel with CONFIG_USERFAULTFD that allows it here (containers: the seccomp filter must let userfaultfd through)",
        ),
    };
    if seen.mode != UserfaultMode::None && !seen.write_protect {
        finding = Finding::limited(
            name,
            finding.found,
            "no private writable mappings: no write protection of tmpfs files",
            "Linux 5.19 or later with CONFIG_PTE_MARKER_UFFD_WP",
        );
    }
    finding.needed()
}

/// A mapping whose pages come by faults, and go by force.
fn faults(backend: &Arc<LocalBackend>) -> Finding {
    let name = "faults and force";
    let cost = "guests would not get the pages that they touch";
    let fix = "please report this with the kernel's version";
    match try_faults(backend) {
        Ok(()) => Finding::have(
            name,
            "a page that was touched was filled, taken back from under its mapping, and filled again",
        )
        .needed(),
        Err(why) => Finding::lack(name, why, cost, fix).needed(),
    }
}

fn try_faults(backend: &Arc<LocalBackend>) -> Result<(), String> {
    let text = |error: GrantError| error.to_string();
    let (home, descriptor) = home(backend, PAGES).map_err(text)?;
    // Before anybody waits for it: can pages be stored at all?
    backend
        .store(home, PageIndex(0), &[FrameNo(0)], &[MARK; PAGE_SIZE])
        .map_err(text)?;
    let fills = Arc::new(AtomicU32::new(0));
    let (filler, count) = (Arc::clone(backend), Arc::clone(&fills));
    let mapping = BareService::start(
        descriptor.as_fd(),
        PAGES as usize * PAGE_SIZE,
        move |page| {
            count.fetch_add(1, Ordering::Relaxed);
            // At most PAGES pages are mapped.
            let frames = [FrameNo(page as u32)];
            let stored = filler.store(home, PageIndex(page), &frames, &[MARK; PAGE_SIZE]);
            stored.map_err(io::Error::other)?;
            Ok(page..page + 1)
        },
    )
    .map_err(|error| format!("mapping with userfaultfd: {error}"))?;
    let look = |page: usize| mapping.as_volatile().read_u8(page * PAGE_SIZE);
    let fill_count = || fills.load(Ordering::Relaxed);
    let see = |what: &str, page: usize, wanted: u32| match (look(page), fill_count()) {
        (Some(MARK), seen) if seen == wanted => Ok(()),
        (byte, seen) => Err(format!(
            "{what}: {byte:02x?} after {seen} faults, not {wanted}"
        )),
    };
    see("a page that was there", 0, 0)?;
    see("a page that was not", 2, 1)?;
    let dom = DomId(1);
    backend
        .grant(dom, Access::ReadOnly, &[FrameNo(2)], &mut Vec::new())
        .map_err(text)?;
    backend
        .force_out(home, PageIndex(2), &[FrameNo(2)], &mut |_, _| {})
        .map_err(text)?;
    see("a page that was taken back", 2, 2)
}

/// 2 MiB frames by MADV_COLLAPSE.
fn two_mib(backend: &LocalBackend) -> Finding {
    let name = "2 MiB frames";
    let cost = "random reads are about a third slower than they could be";
    let pages = copage_grants::limits::HUGE_PAGES as u32;
    let tried = (|| {
        let (home, _descriptor) = home(backend, pages)?;
        let frames: Vec<FrameNo> = (0..pages).map(FrameNo).collect();
        let data = vec![MARK; pages as usize * PAGE_SIZE];
        backend.store(home, PageIndex(0), &frames, &data)?;
        backend.make_huge(home, PageIndex(0))
    })();
    match tried {
        Ok(true) => Finding::have(name, "512 pages became one huge frame (MADV_COLLAPSE)"),
        Ok(false) => {
            let deny = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
            let denied = deny.is_ok_and(|policy| policy.contains("[deny]"));
            let fix = match (
                denied,
                Path::new("/sys/kernel/mm/transparent_hugepage").exists(),
            ) {
                (true, _) => {
                    "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, as root"
                }
                (false, true) => "Linux 6.1 or later, and memory that is not in small pieces",
                (false, false) => "a kernel with CONFIG_TRANSPARENT_HUGEPAGE",
            };
            Finding::new(name, State::Limited, "the kernel made none (MADV_COLLAPSE)")
                .with(cost, fix)
        }
        Err(error) => Finding::limited(name, error.to_string(), cost, "2 MiB of memory for frames"),
    }
}
