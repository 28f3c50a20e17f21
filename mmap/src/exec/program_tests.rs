//! The closure against this machine's own loader, over the host's file system as the share.
//!
//! Cannot show: frames, pins, or that the plan runs; tests/tests/exec.rs does.

use super::*;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A directory as a share. Absolute links lead to the host's root here: good enough for `/`.
struct Host(PathBuf);

impl Share for Host {
    type Node = PathBuf;
    type File = std::fs::File;

    fn look(&self, path: &[u8]) -> Result<Option<Place<PathBuf>>, ExecError> {
        let path = path.strip_prefix(b"/").unwrap_or(path);
        let Ok(full) = self.0.join(OsStr::from_bytes(path)).canonicalize() else {
            return Ok(None);
        };
        let meta = full.metadata().unwrap();
        let kind = if meta.is_dir() {
            FileKind::Directory
        } else {
            FileKind::Regular
        };
        let attr = Attr {
            kind,
            perm: (meta.mode() & 0o7777) as u16,
            nlink: 1,
            uid: meta.uid(),
            gid: meta.gid(),
            ino: meta.ino(),
            dev: meta.dev(),
            rdev: 0,
            bytes: meta.len(),
            blocks: 0,
            atime: (0, 0),
            mtime: (0, 0),
            ctime: (0, 0),
        };
        let Ok(within) = full.strip_prefix(&self.0) else {
            return Ok(None);
        };
        let path = [b"/", within.as_os_str().as_bytes()].concat();
        Ok(Some(Place {
            node: full,
            path,
            attr,
        }))
    }

    fn pin(&self, place: &Place<PathBuf>) -> Result<std::fs::File, ExecError> {
        std::fs::File::open(&place.node).map_err(|source| ExecError::Sys {
            call: "open",
            source,
        })
    }
}

fn root() -> Who {
    Who {
        uid: 0,
        gids: vec![0],
    }
}

fn plan_of(dir: &Path, path: &str) -> Result<Plan<std::fs::File>, ExecError> {
    plan(
        &Host(dir.to_path_buf()),
        path.as_bytes(),
        &root(),
        &Search::default(),
    )
}

/// What the machine's own loader loads, by `--list`.
fn listed(program: &str) -> HashSet<Vec<u8>> {
    let out = std::process::Command::new("ldd")
        .arg(program)
        .output()
        .unwrap();
    assert!(out.status.success());
    String::from_utf8(out.stdout)
        .unwrap()
        .lines()
        .filter_map(|line| {
            line.split_once(" => ")
                .map(|(name, _)| name.trim().as_bytes().to_vec())
        })
        .collect()
}

#[test]
fn the_closure_is_what_the_loader_loads() {
    let mut compared = 0;
    for program in [
        "/bin/ls",
        "/usr/bin/git",
        "/usr/bin/perl",
        "/usr/bin/gcc",
        "/usr/bin/ssh",
    ] {
        if !Path::new(program).exists() {
            continue;
        }
        let plan = plan_of(Path::new("/"), program).unwrap();
        if let Some(dynamic) = plan.dynamic {
            let ours: HashSet<_> = dynamic.libraries.iter().map(|l| l.name.clone()).collect();
            assert_eq!(ours, listed(program), "{program}");
            assert!(last_name(&dynamic.loader.path).starts_with(b"ld-"));
            compared += 1;
        }
    }
    assert!(compared > 0);
}

#[test]
fn an_export_of_usr_is_enough() {
    for path in ["/bin/ls", "bin/ls", "/usr/bin/ls", "ls"] {
        let plan = plan_of(Path::new("/usr"), path).unwrap();
        assert_eq!(plan.program.path, b"/bin/ls");
        assert!(
            plan.dynamic
                .unwrap()
                .libraries
                .iter()
                .any(|l| l.name == b"libc.so.6")
        );
    }
}

#[test]
fn scripts_lead_to_their_interpreter() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str, text: &str, mode| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let whole = Path::new("/");
    let sh = make("sh", "#! /bin/sh -e x \necho\n", 0o755);
    let plan = plan_of(whole, &sh).unwrap();
    assert_eq!(plan.scripts.len(), 1);
    assert_eq!(plan.scripts[0].1.as_deref(), Some(&b"-e x"[..]));
    let env = make("env", "#!/usr/bin/env sh", 0o755);
    let plan = plan_of(whole, &env).unwrap();
    assert_eq!(plan.scripts[0].1, None);
    assert!(plan.dynamic.is_some());
    let nested = make("nested", &format!("#!{sh}\n"), 0o755);
    assert_eq!(plan_of(whole, &nested).unwrap().scripts.len(), 2);

    let own = make(
        "loop",
        &format!("#!{}\n", dir.path().join("loop").display()),
        0o755,
    );
    assert!(matches!(
        plan_of(whole, &own),
        Err(ExecError::ScriptsTooDeep { .. })
    ));
    let none = make("none", "#!/no/such/interpreter\n", 0o755);
    assert!(matches!(
        plan_of(whole, &none),
        Err(ExecError::NotFound { .. })
    ));
    for (name, text) in [
        ("rel", "#!sh\n"),
        ("blank", "#!  \n"),
        ("nul", "#!/bin/\0sh\n"),
    ] {
        let path = make(name, text, 0o755);
        assert!(
            matches!(plan_of(whole, &path), Err(ExecError::Script { .. })),
            "{name}"
        );
    }
    let long = make("long", &format!("#!/{}", "x".repeat(400)), 0o755);
    assert!(matches!(
        plan_of(whole, &long),
        Err(ExecError::Script { .. })
    ));
}

#[test]
fn what_cannot_run_says_why() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str, bytes: &[u8], mode| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let try_one = |name: &str| plan_of(dir.path(), name).map(|_| ()).unwrap_err();
    std::fs::create_dir(dir.path().join("dir")).unwrap();
    assert!(matches!(try_one("dir"), ExecError::Directory { .. }));
    assert!(matches!(try_one("nothing"), ExecError::NotFound { .. }));
    assert_eq!(try_one("nothing").exit_status(), 127);
    make("empty", b"", 0o755);
    assert!(matches!(try_one("empty"), ExecError::Empty { .. }));
    make("text", b"hello\n", 0o755);
    assert!(matches!(
        try_one("text"),
        ExecError::Elf {
            source: ElfError::NotElf,
            ..
        }
    ));
    let mut ls = std::fs::read("/bin/ls").unwrap();
    make("nox", &ls, 0o644);
    assert!(matches!(try_one("nox"), ExecError::NotExecutable { .. }));
    // The program alone: its loader is not in the export.
    make("alone", &ls, 0o755);
    assert!(matches!(try_one("alone"), ExecError::NoLoader { .. }));
    ls[18] = 243;
    make("foreign", &ls, 0o755);
    assert!(matches!(try_one("foreign"), ExecError::Foreign { .. }));
    ls.truncate(100);
    make("cut", &ls, 0o755);
    assert!(matches!(
        try_one("cut"),
        ExecError::Elf {
            source: ElfError::Damaged(_),
            ..
        }
    ));
    let mut core = std::fs::read("/bin/ls").unwrap();
    core[16] = 4;
    make("core", &core, 0o755);
    assert!(matches!(try_one("core"), ExecError::NotAProgram { .. }));
}

#[test]
fn a_missing_library_is_named_with_where_it_was_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("lib64")).unwrap();
    std::fs::create_dir(dir.path().join("bin")).unwrap();
    let elf = Elf::read(&std::fs::File::open("/bin/ls").unwrap()).unwrap();
    let interp = elf.interp.unwrap();
    let interp = Path::new(OsStr::from_bytes(&interp));
    let to = dir.path().join(interp.strip_prefix("/").unwrap());
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    std::fs::copy(interp, to).unwrap();
    std::fs::copy("/bin/ls", dir.path().join("bin/ls")).unwrap();
    match plan_of(dir.path(), "ls").map(|_| ()).unwrap_err() {
        ExecError::NoLibrary { library, by, dirs } => {
            assert!(library.starts_with("lib") && by == "/bin/ls" && dirs.contains("/usr/lib"));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn permission_bits_count_as_in_execve() {
    let host = Host("/".into());
    let attr = |perm| Attr {
        perm,
        uid: 5,
        gid: 7,
        ..host.look(b"/").unwrap().unwrap().attr
    };
    let who = |uid, gid| Who {
        uid,
        gids: vec![gid],
    };
    assert!(who(0, 0).may_execute(&attr(0o010)) && !who(0, 0).may_execute(&attr(0o666)));
    assert!(who(5, 0).may_execute(&attr(0o100)) && !who(5, 7).may_execute(&attr(0o011)));
    assert!(who(9, 7).may_execute(&attr(0o010)) && !who(9, 7).may_execute(&attr(0o101)));
    assert!(who(9, 9).may_execute(&attr(0o001)) && !who(9, 9).may_execute(&attr(0o110)));
}
