//! The nodes of xenstore: paths made, paths and values of guests taken apart.

use super::limits::{SESSION_NAME_BYTES_MAX, VALUE_BYTES_MAX};

/// Below a domain's own nodes, or, for the domain itself, relative.
pub(super) const BASE: &str = "data/copage";
/// The value of `state` when all the others are written.
pub(super) const READY: &[u8] = b"ready";

pub(super) const VERSION_NODE: &str = "version";
pub(super) const RING_REF: &str = "ring-ref";
pub(super) const PORT_TO_DAEMON: &str = "port-to-daemon";
pub(super) const PORT_TO_GUEST: &str = "port-to-guest";
pub(super) const STATE: &str = "state";
/// Written by the daemon: why it refused.
pub(super) const REFUSAL: &str = "refused";

/// Where all domains' nodes are.
pub(super) const DOMAINS: &str = "/local/domain";

pub(super) fn domain(domid: u16, node: &str) -> String {
    format!("{DOMAINS}/{domid}/{node}")
}

/// Where a domain's sessions are.
pub(super) fn sessions(domid: u16) -> String {
    domain(domid, BASE)
}

/// One session's nodes.
pub(super) fn session(domid: u16, session: &str) -> String {
    format!("{DOMAINS}/{domid}/{BASE}/{session}")
}

/// Can this name a session? Letters, digits and hyphens only, so that no path leads elsewhere.
pub(super) fn is_session(name: &str) -> bool {
    (1..=SESSION_NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// What changed below a domain's sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Changed<'p> {
    /// The node above all sessions, or the watch has just begun.
    All,
    /// A session's `state`.
    State(&'p str),
    /// Something that does not matter.
    Other,
}

/// Takes the path of an event apart.
pub(super) fn changed(domid: u16, path: &str) -> Changed<'_> {
    let Some(rest) = path.strip_prefix(sessions(domid).as_str()) else {
        return Changed::Other;
    };
    if rest.is_empty() {
        return Changed::All;
    }
    let parts = rest.strip_prefix('/').and_then(|rest| rest.split_once('/'));
    match parts {
        Some((session, STATE)) if is_session(session) => Changed::State(session),
        _ => Changed::Other,
    }
}

/// A number as guests write it: decimal digits and nothing else.
pub(super) fn number(value: &[u8]) -> Option<u32> {
    if value.len() > VALUE_BYTES_MAX || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// A domid, as `/local/domain` lists it.
pub(super) fn domid(name: &str) -> Option<u16> {
    let number = u16::try_from(number(name.as_bytes())?).ok()?;
    (number < crate::DomId::FIRST_RESERVED).then_some(number)
}

/// The uuid in `/vm/UUID`, which the toolstack writes.
pub(super) fn uuid(vm: &[u8]) -> Option<[u8; 16]> {
    let text = std::str::from_utf8(vm).ok()?.strip_prefix("/vm/")?;
    let text = text.get(..36)?;
    let digits: String = text.chars().filter(|&c| c != '-').collect();
    let good = digits.len() == 32 && digits.chars().all(|c| c.is_ascii_hexdigit());
    if !good {
        return None;
    }
    Some(u128::from_str_radix(&digits, 16).ok()?.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_events_are_taken_apart() {
        let at = |path: &'static str| changed(5, path);
        assert_eq!(at("/local/domain/5/data/copage"), Changed::All);
        assert_eq!(
            at("/local/domain/5/data/copage/a-1/state"),
            Changed::State("a-1")
        );
        for other in [
            "",
            "/local/domain/5/data",
            "/local/domain/5/data/copagex/a/state",
            "/local/domain/55/data/copage/a/state",
            "/local/domain/5/data/copage/a",
            "/local/domain/5/data/copage/a/version",
            "/local/domain/5/data/copage/a/b/state",
            "/local/domain/5/data/copage//state",
            "/local/domain/5/data/copage/../state",
            "/local/domain/5/data/copage/a_b/state",
            "/local/domain/5/data/copage/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa/state",
        ] {
            assert_eq!(at(other), Changed::Other, "{other}");
        }
    }

    #[test]
    fn values_are_numbers_or_nothing() {
        assert_eq!(number(b"4294967295"), Some(u32::MAX));
        for bad in [
            &b""[..],
            b"4294967296",
            b"-1",
            b"+1",
            b" 1",
            b"1\n",
            b"1\0",
            b"0x1",
            b"\xff",
            b"00000000000000001",
        ] {
            assert_eq!(number(bad), None, "{bad:?}");
        }
        assert_eq!(domid("7"), Some(7));
        assert_eq!(
            (domid("32752"), domid("70000"), domid("x")),
            (None, None, None)
        );
        let vm = b"/vm/6ba7b810-9dad-11d1-80b4-00c04fd430c8";
        assert_eq!(uuid(vm).map(|u| (u[0], u[15])), Some((0x6b, 0xc8)));
        // A restarted domain's has a number behind it.
        assert!(uuid(b"/vm/6ba7b810-9dad-11d1-80b4-00c04fd430c8-1").is_some());
        assert_eq!(uuid(b"/vm/web"), None);
        assert_eq!(
            uuid("/vm/ä6ba7b810-9dad-11d1-80b4-00c04fd430c".as_bytes()),
            None
        );
    }
}
