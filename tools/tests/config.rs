//! Configurations, good and bad: every mistake is told, with its line and its key.
//!
//! Cannot show: that the daemon does what the settings say.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage::config::{BackendChoice, Config, ConfigErrors, Limits, Mode, Severity};
use std::path::{Path, PathBuf};

/// The lines of problems, without warnings.
fn errors(text: &str) -> Vec<String> {
    match Config::parse(text) {
        Ok(_) => Vec::new(),
        Err(errors) => errors.lines(),
    }
}

#[test]
fn an_empty_text_is_all_defaults() {
    assert_eq!(Config::parse("").unwrap(), Config::default());
}

#[test]
fn every_key_is_read() {
    let config = Config::parse(
        r#"
        run_dir = "/run/elsewhere"
        backend = "xen"
        xen = { cache_domain_mib = 64, domain_sessions_max = 5 }
        frames_mib = 0x40
        lease_ttl_ms = 1_000
        invalidate_deadline_ms = 700
        host_settle_ms = 0
        fill_threads = 7
        readahead_kib = 64
        pin_file_mib = 9
        huge = false
        force = false
        limits = { grants_max = 1000, handles_max = 100, files_max = 10, pinned_mib = 1, frames_mib = 8 }
        [[guest]]
        name = "web"
        uid = 1001
        limits.files_max = 11
        [[guest]]
        name = "named-only"
        [[guest]]
        name = "vm"
        domain = "web-vm:1"
        [[guest]]
        name = "by-uuid"
        uuid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
        [[export]]
        name = "libs"
        path = "/usr/lib"
        mode = "ro"
        allow = ["web"]
        group = "g.1"
        "#,
    )
    .unwrap();
    assert_eq!(config.run_dir, Path::new("/run/elsewhere"));
    assert_eq!((config.frames_mib, config.frames_max()), (64, 64 * 256));
    assert_eq!(
        (config.lease_ttl_ms, config.invalidate_deadline_ms),
        (1000, 700)
    );
    assert_eq!((config.host_settle_ms, config.fill_threads), (0, 7));
    assert_eq!((config.readahead_kib, config.pin_file_mib), (64, 9));
    assert!(!config.huge && !config.force);
    assert_eq!(config.backend, BackendChoice::Xen);
    let xen = (config.xen.cache_domain_mib, config.xen.domain_sessions_max);
    assert_eq!(xen, (64, 5));
    assert_eq!(config.guests[2].domain.as_deref(), Some("web-vm:1"));
    assert_eq!(config.guests[3].uuid.unwrap().0[..2], [0x6b, 0xa7]);
    let limits = Limits {
        grants_max: 1000,
        handles_max: 100,
        files_max: 10,
        pinned_mib: 1,
        frames_mib: Some(8),
    };
    assert_eq!(config.limits, limits);
    assert_eq!(
        config.guests[0].limits,
        Limits {
            files_max: 11,
            ..limits
        }
    );
    assert_eq!(
        (config.guests[0].uid, config.guests[1].uid),
        (Some(1001), None)
    );
    assert_eq!(
        (limits.pinned_pages_max(), limits.frames_max()),
        (256, 2048)
    );
    let export = &config.exports[0];
    assert_eq!(
        (export.mode, export.group(), &export.allow[..]),
        (Mode::Ro, "g.1", &["web".into()][..])
    );
}

/// Each bad text, and what its only error must say (all of the pieces).
#[test]
fn bad_texts_are_told_with_line_and_key() {
    let export = "[[export]]\nname = \"a\"\npath = \"/usr\"\n";
    let cases: &[(&str, &[&str])] = &[
        (
            "\n\nframe_mib = 3",
            &["line 3: frame_mib: unknown key", "did you mean frames_mib?"],
        ),
        (
            "colour = 1",
            &[
                "line 1: colour: unknown key",
                "known here: run_dir, backend, xen, frames_mib",
            ],
        ),
        (
            "[limits]\nhandles = 3",
            &["line 2: limits.handles: unknown", "limits.handles_max?"],
        ),
        ("\"a\\nb\" = 3", &["line 1: a\\nb: unknown key"]),
        (
            "[exports]\nname = \"a\"",
            &["line 1: exports: unknown key; did you mean export?"],
        ),
        (
            "frames_mib = \"1G\"",
            &["line 1: frames_mib: is a string; give a whole number from 4 to 2097152 MiB"],
        ),
        ("frames_mib = 1.5", &["frames_mib: is the fraction 1.5"]),
        (
            "frames_mib = 3",
            &["frames_mib: is 3 MiB; give a whole number from 4 to"],
        ),
        ("frames_mib = -1", &["frames_mib: is -1 MiB"]),
        (
            "frames_mib = 99999999999999999999999",
            &["frames_mib: is 99999999999999999999999 MiB"],
        ),
        ("frames_mib = 1979-05-27", &["frames_mib: is a date"]),
        ("frames_mib = {}", &["frames_mib: is a table"]),
        (
            "\nlease_ttl_ms = 99",
            &["line 2: lease_ttl_ms: is 99 ms; give a whole number from 100 to 600000 ms"],
        ),
        ("fill_threads = 0", &["fill_threads: is 0 threads"]),
        (
            "readahead_kib = 96",
            &["readahead_kib: is 96 KiB; give a power of two"],
        ),
        ("force = 1", &["force: is the number 1; give true or false"]),
        (
            "run_dir = \"run\"",
            &["run_dir: \"run\" does not begin at the root"],
        ),
        (
            "limits = 3",
            &["line 1: limits: is the number 3; give a table: a line [limits]"],
        ),
        (
            "limits = { pinned_mib = true }",
            &["limits.pinned_mib: is true"],
        ),
        (
            "[export]\nname = \"a\"\npath = \"/usr\"",
            &[
                "line 1: export: is a table; give one or more tables, each begun by a line [[export]]",
            ],
        ),
        ("export = [1]", &["export: is the number 1"]),
        (
            "[[export]]\nname = \"a\"",
            &["line 1: export.path: is missing"],
        ),
        (
            "\n[[export]]\npath = \"/usr\"",
            &["line 2: export.name: is missing"],
        ),
        (
            "[[export]]\nname = 3\npath = \"/usr\"",
            &["line 2: export.name: is the number 3; give a string"],
        ),
        (
            "[[export]]\nname = \"a\"\npath = \"usr\"",
            &["line 3: export.path: \"usr\" does not begin at the root"],
        ),
        (
            "[[export]]\nname = \"\"\npath = \"/usr\"",
            &["line 2: export.name: is empty"],
        ),
        (
            "[[export]]\nname = \"a/b\"\npath = \"/usr\"",
            &["export.name: \"a/b\" has '/' in it"],
        ),
        (
            "[[export]]\nname = \"a:b\"\npath = \"/usr\"",
            &["has ':' in it"],
        ),
        (
            "[[export]]\nname = \"..\"\npath = \"/usr\"",
            &["\"..\" must begin with a letter"],
        ),
        (
            "[[export]]\nname = \"a\\u0000\"\npath = \"/usr\"",
            &["export.name: \"a\\0\" has '\\0' in it"],
        ),
        (
            "[[export]]\nname = \"ü\"\npath = \"/usr\"",
            &["has 'ü' in it"],
        ),
        (
            "[[guest]]\nname = \"*\"",
            &["line 2: guest.name: \"*\" has '*' in it"],
        ),
        ("[[guest]]\nuid = 1", &["line 1: guest.name: is missing"]),
        (
            "[[guest]]\nname = \"a\"\nuid = -5",
            &["line 3: guest.uid: is -5; give a whole number from 0 to 4294967294"],
        ),
        (
            "[[guest]]\nname = \"a\"\nuid = 4294967295",
            &["guest.uid: is 4294967295"],
        ),
        (
            "[[guest]]\nname = \"a\"\n[guest.limits]\nfiles_max = 0",
            &["line 4: guest.limits.files_max: is 0 files"],
        ),
        (
            "[[guest]]\nname = \"a\"\n[[guest]]\nname = \"a\"",
            &["line 4: guest.name: guest \"a\" is there twice, first in line 2"],
        ),
        (
            "[[guest]]\nname = \"a\"\nuid = 5\n[[guest]]\nname = \"b\"\nuid = 5",
            &["line 6: guest.uid: uid 5 is guest \"a\" already in line 3"],
        ),
        (
            "backend = \"kvm\"",
            &["line 1: backend: \"kvm\" is no backend; give \"auto\", \"local\" or \"xen\""],
        ),
        (
            "[xen]\ncache_domain_mib = 8",
            &["line 2: xen.cache_domain_mib: is 8 MiB; give a whole number from 16 to 4096 MiB"],
        ),
        (
            "[[guest]]\nname = \"a\"\ndomain = \"7\"",
            &["line 3: guest.domain: \"7\" would be a domid, and those are used again"],
        ),
        (
            "[[guest]]\nname = \"a\"\nuuid = \"7\"",
            &["line 3: guest.uuid: \"7\" is no uuid"],
        ),
        (
            "[[guest]]\nname = \"a\"\ndomain = \"d\"\n[[guest]]\nname = \"b\"\ndomain = \"d\"",
            &["line 6: guest.domain: d is guest \"a\" already in line 3"],
        ),
        (
            &format!("{export}mode = \"coherend\""),
            &[
                "line 4: export.mode: \"coherend\" is no mode; give \"ro\" or \"coherent\"; did you mean \"coherent\"?",
            ],
        ),
        (
            &format!("{export}mode = \"cow\""),
            &["mode \"cow\" is not built yet"],
        ),
        (
            &format!("{export}mode = \"shm\""),
            &["mode \"shm\" is not built yet"],
        ),
        (
            &format!("{export}mode = \"rw\""),
            &["\"rw\" is no mode; give \"ro\" or \"coherent\""],
        ),
        (
            &format!("{export}writeback_ms = 100"),
            &["export.writeback_ms: is of coherent exports only"],
        ),
        (
            &format!("{export}mode = \"coherent\"\nwriteback_ms = 1"),
            &["is 1 ms; give a whole number from 50 to 60000 ms"],
        ),
        (
            &format!("{export}mode = true"),
            &["export.mode: is true; give a string like \"ro\""],
        ),
        (
            &format!("{export}allow = \"web\""),
            &["line 4: export.allow: is a string; give a list of strings"],
        ),
        (
            &format!("{export}allow = [\n\"a\",\n7]"),
            &["line 6: export.allow: is the number 7"],
        ),
        (
            &format!("{export}allow = [\"a b\"]"),
            &["export.allow: \"a b\" has ' ' in it"],
        ),
        (
            &format!("{export}group = \"a b\""),
            &["line 4: export.group: \"a b\" has ' ' in it"],
        ),
        (
            &format!("{export}pth = 3"),
            &["line 4: export.pth: unknown key; did you mean export.path?"],
        ),
        (
            &format!("{export}{export}"),
            &["line 5: export.name: export \"a\" is there twice, first in line 2"],
        ),
        ("frames_mib = ", &["line 1: not TOML"]),
        ("a = 1\n[[[\n", &["line 2: not TOML"]),
        (
            "force = true\nforce = true",
            &["line 2: not TOML: duplicate key"],
        ),
    ];
    for (text, pieces) in cases {
        // What is not TOML may be told in several lines; the rest is one mistake each.
        let found = errors(text);
        assert!(!found.is_empty(), "accepted: {text}");
        let syntax = pieces.iter().any(|piece| piece.contains("not TOML"));
        let errors: Vec<_> = found.iter().filter(|l| !l.contains("warning: ")).collect();
        assert!(syntax || errors.len() == 1, "{text}\n{found:#?}");
        for piece in *pieces {
            assert!(
                errors[0].contains(piece),
                "{text}\nwants {piece}\n{found:#?}"
            );
        }
    }
}

#[test]
fn names_have_at_most_64_bytes() {
    let text = |len| {
        format!(
            "[[export]]\nname = \"{}\"\npath = \"/usr\"",
            "n".repeat(len)
        )
    };
    assert!(Config::parse(&text(64)).is_ok());
    assert!(errors(&text(65))[0].contains("has 65 bytes; at most 64 are allowed"));
    assert!(errors(&text(300))[0].len() < 200);
}

#[test]
fn all_errors_are_told_at_once_by_line() {
    let found =
        errors("frames_mib = 1\nx = 1\n[[export]]\nmode = \"cow\"\n[limits]\ngrants_max = 0\n");
    let starts = [
        "line 1: frames_mib",
        "line 2: x:",
        "line 3: export.name",
        "line 3: export.path",
    ];
    assert_eq!(found.len(), 6, "{found:#?}");
    for (line, start) in found.iter().zip(starts) {
        assert!(line.starts_with(start), "{line} {start}");
    }
    assert!(found[4].starts_with("line 4: export.mode") && found[5].starts_with("line 6: limits."));
}

#[test]
fn many_errors_are_counted() {
    let text: String = (0..300).map(|n| format!("k{n} = 1\n")).collect();
    let found = errors(&text);
    assert_eq!(found.len(), 101);
    assert_eq!(found[100], "and 200 more like these");
    let exports = "[[export]]\nname = \"a\"\npath = \"/\"\n".repeat(1025);
    assert!(
        errors(&exports)
            .iter()
            .any(|line| line.contains("there are 1025 of them; at most 1024"))
    );
}

fn load(dir: &Path, text: &str) -> Result<copage::config::Loaded, ConfigErrors> {
    let file = dir.join("c.toml");
    std::fs::write(&file, text).unwrap();
    Config::load(&file)
}

#[test]
fn directories_are_there_and_do_not_overlap() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    for name in ["a/in", "b", "ab"] {
        std::fs::create_dir_all(dir.join(name)).unwrap();
    }
    std::fs::write(dir.join("file"), "").unwrap();
    std::os::unix::fs::symlink(dir.join("a/in"), dir.join("link")).unwrap();
    let exports = |paths: &[&str]| -> String {
        let one = |(n, path): (usize, &&str)| {
            format!(
                "[[export]]\nname = \"e{n}\"\npath = \"{}\"\n",
                dir.join(path).display()
            )
        };
        paths.iter().enumerate().map(one).collect()
    };
    let cases: &[(&[&str], &str)] = &[
        (&["a", "b", "ab"], ""),
        (
            &["gone"],
            "c.toml:3: export.path: DIR/gone: there is no such directory",
        ),
        (
            &["file"],
            "c.toml:3: export.path: DIR/file: is not a directory",
        ),
        (&["file/x"], "Not a directory"),
        (
            &["a", "a"],
            "c.toml:6: export.path: DIR/a is the same directory as DIR/a of export \"e0\" in line 3",
        ),
        (&["a", "b/../a"], "is the same directory as"),
        (
            &["a", "a/in"],
            "c.toml:6: export.path: DIR/a/in lies in DIR/a of export \"e0\" in line 3; exports must not overlap",
        ),
        (
            &["b", "a/in", "a"],
            "c.toml:9: export.path: DIR/a holds DIR/a/in of export \"e1\" in line 6",
        ),
        (&["a", "link"], "DIR/link lies in DIR/a"),
        (&["link", "a/in"], "is the same directory as"),
    ];
    for (paths, wanted) in cases {
        let wanted = wanted.replace("DIR", dir.to_str().unwrap());
        match load(&dir, &exports(paths)) {
            Ok(_) => assert_eq!(wanted, "", "{paths:?}"),
            Err(errors) => {
                let lines = errors.lines();
                assert_eq!(lines.len(), 1, "{lines:#?}");
                assert!(
                    !wanted.is_empty() && lines[0].contains(&wanted),
                    "{lines:#?}\n{wanted}"
                );
                assert!(lines[0].starts_with(dir.join("c.toml").to_str().unwrap()));
            }
        }
    }
}

#[test]
fn odd_access_lists_are_warnings() {
    let dir = tempfile::tempdir().unwrap();
    let with = |head: &str, allow: &str| {
        let path = dir.path().display();
        let text = format!("{head}[[export]]\nname = \"a\"\npath = \"{path}\"\nallow = {allow}\n");
        load(dir.path(), &text).unwrap()
    };
    assert_eq!(with("", "[\"*\"]").warnings, []);
    assert_eq!(with("", "[\"uid-1000\"]").warnings, []);
    assert_eq!(
        with("[[guest]]\nname = \"web\"\n", "[\"web\"]").warnings,
        []
    );
    let nobody = with("", "[]").lines();
    assert!(
        nobody[0].contains("c.toml:4: warning: export.allow: nobody may use"),
        "{nobody:?}"
    );
    let unknown = with("[[guest]]\nname = \"web\"\n", "[\"wbe\", \"uid-5\"]");
    assert_eq!(unknown.warnings.len(), 2);
    assert!(
        unknown.lines()[0]
            .contains("c.toml:6: warning: export.allow: no [[guest]] is called \"wbe\"")
    );
    assert_eq!(unknown.warnings[0].severity, Severity::Warning);
}

#[test]
fn files_that_cannot_be_read_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let text = |path: &Path| Config::load(path).unwrap_err().to_string();
    assert!(text(&dir.path().join("none")).contains("there is no such file; write one"));
    assert!(text(dir.path()).contains("cannot be read: Is a directory"));
    let file = dir.path().join("f");
    std::fs::write(&file, b"frames_mib = 4\n# \xff\n").unwrap();
    assert!(text(&file).contains("is not UTF-8 in line 2"));
    std::fs::write(&file, vec![b'#'; (1 << 20) + 1]).unwrap();
    assert!(text(&file).contains("is longer than 1024 KiB"));
}

/// The page of documentation: its example loads and is the defaults, its tables name every key.
#[test]
fn the_documented_example_loads() {
    let page = include_str!("../../docs/configuration.md");
    let example = page
        .split("```toml\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let config = Config::parse(example).unwrap();
    let defaults = Config::default();
    let plain = Config {
        guests: Vec::new(),
        exports: Vec::new(),
        ..config.clone()
    };
    assert_eq!(plain, defaults);
    assert_eq!(config.exports[0].path, PathBuf::from("/usr/lib"));
    assert_eq!(config.guests[0].limits.frames_mib, Some(512));

    // A key that nobody knows lists those that are known: each has a row with its default.
    let known = |text: &str| -> Vec<String> {
        let line = errors(text).remove(0);
        let list = line.split("known here: ").nth(1).unwrap().to_owned();
        list.split(", ").map(str::to_owned).collect()
    };
    let tables = ["limits", "guest", "export", "xen"];
    let places = [
        "zzzzz = 1",
        "[limits]\nzzzzz = 1",
        "[xen]\nzzzzz = 1",
        "[[guest]]\nname = \"a\"\nzzzzz = 1",
        "[[export]]\nname = \"a\"\npath = \"/a\"\nzzzzz = 1",
    ];
    for key in places.iter().flat_map(|text| known(text)) {
        let row = format!("| `{key}` |");
        assert!(
            tables.contains(&key.as_str()) || page.contains(&row),
            "no row for {key}"
        );
    }
    for (key, value) in [
        ("frames_mib", defaults.frames_mib),
        ("lease_ttl_ms", defaults.lease_ttl_ms.into()),
        (
            "invalidate_deadline_ms",
            defaults.invalidate_deadline_ms.into(),
        ),
        ("host_settle_ms", defaults.host_settle_ms.into()),
        ("fill_threads", defaults.fill_threads.into()),
        ("readahead_kib", defaults.readahead_kib.into()),
        ("pin_file_mib", defaults.pin_file_mib),
        ("grants_max", defaults.limits.grants_max),
        ("handles_max", defaults.limits.handles_max.into()),
        ("files_max", defaults.limits.files_max.into()),
        ("pinned_mib", defaults.limits.pinned_mib),
    ] {
        let row = page
            .lines()
            .find(|line| line.starts_with(&format!("| `{key}` |")))
            .unwrap();
        assert_eq!(row.split(" | ").nth(2).unwrap(), value.to_string(), "{key}");
        // The range as the error says it: the page and the code have one truth.
        let section = if page.find(row) > page.find("## `[limits]`") {
            "[limits]\n"
        } else {
            ""
        };
        let error = errors(&format!("{section}{key} = 99999999999999")).remove(0);
        let range = error.split("from ").nth(1).unwrap();
        assert!(row.contains(range), "{key}: {range}\n{row}");
    }
}
