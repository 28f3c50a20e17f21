//! How files are shown: modes, times, names.

use copage_mmap::{Attr, FileKind};
use serde_json::{Value, json};
use std::io::IsTerminal;

/// `drwxr-xr-x`.
pub fn mode(attr: &Attr) -> String {
    let kind = match attr.kind {
        FileKind::Regular => '-',
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        FileKind::Other => '?',
    };
    let perm = attr.perm;
    let mut text = String::from(kind);
    for (shift, special, letters) in [
        (6, 0o4000, ['s', 'S']),
        (3, 0o2000, ['s', 'S']),
        (0, 0o1000, ['t', 'T']),
    ] {
        let bits = perm >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, perm & special != 0) {
            (true, false) => 'x',
            (false, false) => '-',
            (true, true) => letters[0],
            (false, true) => letters[1],
        });
    }
    text
}

/// What a file is, in one word.
pub fn kind(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Regular => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::Other => "other",
    }
}

/// `2026-11-20 14:05:09Z`.
pub fn time((seconds, _): (i64, u32)) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!(
        "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{:02}Z",
        second % 60
    )
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar: days are counted
/// from the first of March of year 0, so that the leap day is a year's last.
fn civil(days: i64) -> (i64, i64, i64) {
    // 719,468 days lie between 0000-03-01 and 1970-01-01; 146,097 make 400 years.
    let from_march = days.saturating_add(719_468);
    let (era, of_era) = (
        from_march.div_euclid(146_097),
        from_march.rem_euclid(146_097),
    );
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

/// A name for standard output: as it is, but on a terminal without what would drive it.
pub fn name(name: &[u8]) -> Vec<u8> {
    if !std::io::stdout().is_terminal() {
        return name.to_vec();
    }
    match core::str::from_utf8(name) {
        Ok(text) => text
            .chars()
            .map(|c| if c.is_control() { '?' } else { c })
            .collect::<String>()
            .into(),
        Err(_) => name
            .iter()
            .map(|&b| if (32..127).contains(&b) { b } else { b'?' })
            .collect(),
    }
}

/// A file as JSON. Names that are not UTF-8 are also given as hexadecimal bytes.
pub fn json(name: &[u8], attr: &Attr) -> Value {
    let mut value = json!({
        "name": String::from_utf8_lossy(name),
        "kind": kind(attr.kind),
        "mode": format!("{:04o}", attr.perm),
        "links": attr.nlink,
        "uid": attr.uid,
        "gid": attr.gid,
        "bytes": attr.bytes,
        "blocks_512": attr.blocks,
        "inode": attr.ino,
        "device": attr.dev,
        "atime_s": attr.atime.0,
        "atime_ns": attr.atime.1,
        "mtime_s": attr.mtime.0,
        "mtime_ns": attr.mtime.1,
        "ctime_s": attr.ctime.0,
        "ctime_ns": attr.ctime.1,
    });
    if core::str::from_utf8(name).is_err() {
        let hex: String = name.iter().map(|b| format!("{b:02x}")).collect();
        value["name_hex"] = hex.into();
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        assert_eq!(time((0, 0)), "1970-01-01 00:00:00Z");
        assert_eq!(time((951_782_400, 0)), "2000-02-29 00:00:00Z");
        assert_eq!(time((1_709_251_199, 9)), "2024-02-29 23:59:59Z");
        assert_eq!(time((-1, 0)), "1969-12-31 23:59:59Z");
        assert_eq!(time((4_107_542_400, 0)), "2100-03-01 00:00:00Z");
        let _ = time((i64::MAX, 0));
        let _ = time((i64::MIN, 0));
    }

    #[test]
    fn modes_are_those_of_ls() {
        let attr = |kind, perm| Attr {
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            ino: 1,
            dev: 1,
            rdev: 0,
            bytes: 0,
            blocks: 0,
            atime: (0, 0),
            mtime: (0, 0),
            ctime: (0, 0),
        };
        assert_eq!(mode(&attr(FileKind::Directory, 0o1777)), "drwxrwxrwt");
        assert_eq!(mode(&attr(FileKind::Regular, 0o4755)), "-rwsr-xr-x");
        assert_eq!(mode(&attr(FileKind::Regular, 0o2640)), "-rw-r-S---");
        assert_eq!(mode(&attr(FileKind::Symlink, 0o777)), "lrwxrwxrwx");
    }
}
