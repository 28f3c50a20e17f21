//! A domain's uuid, as Xen's tools write it: `6ba7b810-9dad-11d1-80b4-00c04fd430c8`.

use std::fmt;
use std::str::FromStr;

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid(pub [u8; 16]);

/// Digits before each hyphen, and after the last.
const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];

impl FromStr for Uuid {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            let shown: String = text.escape_debug().take(60).collect();
            format!("\"{shown}\" is no uuid; give 32 hexadecimal digits as 8-4-4-4-12")
        };
        let groups = text.split('-').map(str::len);
        if !groups.eq(GROUPS) || !text.chars().all(|c| c == '-' || c.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let digits: String = text.chars().filter(|&c| c != '-').collect();
        let number = u128::from_str_radix(&digits, 16).map_err(|_| wrong())?;
        Ok(Self(number.to_be_bytes()))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = format!("{:032x}", u128::from_be_bytes(self.0));
        let mut rest = digits.as_str();
        for (number, len) in GROUPS.into_iter().enumerate() {
            let (group, after) = rest.split_at(len);
            rest = after;
            write!(f, "{}{group}", if number > 0 { "-" } else { "" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_read_and_written() {
        let text = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
        let uuid: Uuid = text.parse().unwrap();
        assert_eq!((uuid.0[0], uuid.0[15]), (0x6b, 0xc8));
        assert_eq!(uuid.to_string(), text);
        assert_eq!(text.to_uppercase().parse::<Uuid>().unwrap(), uuid);
        for bad in [
            "",
            "web",
            "6ba7b8109dad11d180b400c04fd430c8",
            "6ba7b810-9dad-11d1-80b4-00c04fd430cg",
            "6ba7b810-9dad-11d1-80b-400c04fd430c8",
            "+ba7b810-9dad-11d1-80b4-00c04fd430c8",
        ] {
            assert!(bad.parse::<Uuid>().is_err(), "{bad}");
        }
    }
}
