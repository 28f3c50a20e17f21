//! Is this machine a Xen guest, or the control domain, and what does it lack?

use std::fs;
use std::path::Path;

/// What this kernel is to the hypervisor under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// There is no Xen under it.
    None,
    /// A guest.
    Guest,
    /// The control domain (dom0).
    Control,
}

/// See [`here`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presence {
    /// What this kernel is.
    pub role: Role,
    /// What is missing to be what the role needs, as a sentence; `None`: nothing.
    pub missing: Option<String>,
}

/// `XENFEAT_dom0` (xen/features.h), a bit of /sys/hypervisor/properties/features.
const XENFEAT_DOM0: u32 = 11;

/// A library and the devices of which one must be there.
struct Need(&'static str, &'static [&'static str]);

const GUEST_NEEDS: [Need; 4] = [
    Need("libxenevtchn.so.1", &["/dev/xen/evtchn"]),
    Need("libxengnttab.so.1", &["/dev/xen/gntdev"]),
    Need("libxengnttab.so.1", &["/dev/xen/gntalloc"]),
    Need(
        "libxenstore.so.4",
        &["/run/xenstored/socket", "/dev/xen/xenbus"],
    ),
];

const CONTROL_NEEDS: [Need; 5] = [
    Need("libxenforeignmemory.so.1", &["/dev/xen/privcmd"]),
    Need(
        "libxenhypfs.so.1",
        &["/dev/xen/hypercall", "/dev/xen/privcmd"],
    ),
    Need("libxenevtchn.so.1", &["/dev/xen/evtchn"]),
    Need("libxengnttab.so.1", &["/dev/xen/gntdev"]),
    Need(
        "libxenstore.so.4",
        &[
            "/run/xenstored/socket",
            "/var/run/xenstored/socket",
            "/dev/xen/xenbus",
        ],
    ),
];

/// Looks at this machine. Loads the libraries, opens nothing.
pub fn here() -> Presence {
    let hypervisor = fs::read_to_string("/sys/hypervisor/type").unwrap_or_default();
    if hypervisor.trim() != "xen" {
        return Presence {
            role: Role::None,
            missing: Some("no Xen here: this kernel does not run on Xen".to_owned()),
        };
    }
    let role =
        role_of(&fs::read_to_string("/sys/hypervisor/properties/features").unwrap_or_default());
    let needs: &[Need] = match role {
        Role::Control => &CONTROL_NEEDS,
        _ => &GUEST_NEEDS,
    };
    Presence {
        role,
        missing: missing(needs),
    }
}

/// By the hypervisor's features, in hexadecimal.
fn role_of(features: &str) -> Role {
    match u64::from_str_radix(features.trim(), 16) {
        Ok(bits) if bits & (1 << XENFEAT_DOM0) != 0 => Role::Control,
        _ => Role::Guest,
    }
}

fn missing(needs: &[Need]) -> Option<String> {
    let mut lines = Vec::new();
    for Need(library, devices) in needs {
        if let Err(why) = super::load::open(library) {
            lines.push(format!("{library} ({why})"));
        }
        if !devices.iter().any(|device| Path::new(device).exists()) {
            lines.push(devices.join(" or "));
        }
    }
    lines.dedup();
    (!lines.is_empty()).then(|| format!("missing: {}", lines.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_control_domain_is_told_by_its_feature() {
        // As a dom0 and a PVH guest of Xen 4.17 show them.
        assert_eq!(role_of("00002f05\n"), Role::Control);
        assert_eq!(role_of("00002705\n"), Role::Guest);
        assert_eq!(role_of(""), Role::Guest);
    }

    /// Cannot show anything of a machine that has it all.
    #[test]
    fn local_what_is_missing_is_named() {
        let needs = [Need("libno-such-thing.so.1", &["/dev/no-such-thing"])];
        let text = missing(&needs).unwrap();
        assert!(text.contains("libno-such-thing.so.1"), "{text}");
        assert!(text.contains("/dev/no-such-thing"), "{text}");
        if here().role == Role::None {
            let text = here().missing.unwrap();
            assert!(text.starts_with("no Xen here"), "{text}");
        }
    }

    /// The libraries may be there or not; the devices are not.
    #[test]
    fn local_without_xen_every_handle_is_a_plain_error() {
        if here().role != Role::None {
            println!("skipped: this is a Xen machine");
            return;
        }
        use crate::xen::lib::*;
        let errors = [
            Evtchn::open().err(),
            Gnttab::open().err(),
            GrantShare::open().err(),
            ForeignMemory::open().err(),
            Hypfs::open().err(),
            Store::open().err(),
        ];
        for error in errors {
            let error = error.unwrap();
            assert!(matches!(error, XenError::Missing { .. }), "{error:?}");
            assert!(error.to_string().starts_with("no Xen here: "), "{error}");
            assert_eq!(error.errno(), libc::ENODEV);
        }
    }
}
