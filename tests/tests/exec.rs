//! Programs run off a share: a dynamic one with its loader and libraries, from the frames; what comes
//! out of it, how it ends, and what cannot be run.
//!
//! Cannot show: musl's loader, and other machines' layouts; libraries that a program opens by dlopen.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_grants::sys::SignalFd;
use copage_mmap::exec::{Command, ExecError, Running, Search, Text};
use copage_mmap::mount::{Detached, Target};
use copage_mmap::{Client, ConnectOptions, DaemonAt, Export};
use copage_tests::daemon::{Daemon, Setup};
use copage_tests::tree::Tree;
use copage_tests::wait;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

/// A second export, of the machine's `/usr`, and room for what its programs pin.
fn daemon(tree: &Tree) -> Daemon {
    let setup = Setup {
        frames_mib: 128,
        tables: "[[export]]\nname = \"usr\"\npath = \"/usr\"\nmode = \"ro\"\nallow = [\"*\"]\n"
            .into(),
        ..Setup::default()
    };
    Daemon::start(tree, &setup)
}

fn attach(daemon: &Daemon, export: &str) -> Export {
    let client = Client::connect(&daemon.socket(), &ConnectOptions::default()).unwrap();
    client.attach(export).unwrap()
}

fn command(path: &str, args: &[&str]) -> Command {
    Command {
        path: path.into(),
        args: args.iter().map(Into::into).collect(),
        search: Search::default(),
    }
}

/// Runs to the end. The signals are taken in this test's thread only: none is sent here.
fn status(export: &Export, path: &str, args: &[&str]) -> ExitStatus {
    let mut running = command(path, args).start(export).unwrap();
    let signals = SignalFd::new(&Running::SIGNALS).unwrap();
    running
        .wait(&signals, |_| Some(Duration::from_millis(20)))
        .unwrap()
}

fn refused(export: &Export, path: &str) -> ExecError {
    command(path, &[]).start(export).map(|_| ()).unwrap_err()
}

fn program(tree: &Tree, name: &str, bytes: &[u8], mode: u32) {
    fs::write(tree.file(name), bytes).unwrap();
    fs::set_permissions(tree.file(name), fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn local_a_dynamic_program_runs_with_its_text_on_frames() {
    let tree = Tree::new();
    let mut daemon = daemon(&tree);
    let export = attach(&daemon, "usr");
    let mut running = command("bin/sleep", &["30"]).start(&export).unwrap();
    let dynamic = running
        .plan()
        .dynamic
        .clone()
        .expect("sleep is dynamic here");
    assert!(
        dynamic
            .libraries
            .iter()
            .any(|l| l.name.starts_with(b"libc.so"))
    );
    // It has only begun where all is mapped and less was run.
    let text = wait::some(Duration::from_secs(20), "the program's text", || {
        running.text().ok().filter(|text| {
            let files = text.files.iter().filter(|f| f.on_frames).count();
            files >= 3 && text.on_frames_pages > 50
        })
    });
    assert_eq!(text.own_pages, 0, "{text:?}");
    // Elsewhere is the vdso and nothing of this machine's files.
    assert!(
        text.files
            .iter()
            .all(|file| file.on_frames || file.pages == 0),
        "{text:?}"
    );
    let pid = rustix::process::Pid::from_raw(running.pid().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let signals = SignalFd::new(&Running::SIGNALS).unwrap();
    let status = running
        .wait(&signals, |_| Some(Duration::from_millis(20)))
        .unwrap();
    assert_eq!(status.signal(), Some(libc::SIGTERM));
    drop(running);
    drop(export);
    daemon.audit_clean();
}

#[test]
fn local_a_program_gets_its_arguments_and_gives_its_status() {
    let tree = Tree::new();
    let mut daemon = daemon(&tree);
    let export = attach(&daemon, "usr");
    let out = tree.at("out");
    let script = format!("printf '%s|' \"$0\" \"$@\" > {}; exit 7", out.display());
    let ended = status(
        &export,
        "/usr/bin/sh",
        &["-c", &script, "name", "a b", "-x", ""],
    );
    assert_eq!(ended.code(), Some(7));
    assert_eq!(fs::read_to_string(&out).unwrap(), "name|a b|-x||");
    // The program knows itself by the name that was typed, and inherits no descriptor.
    let script = format!(
        "echo \"$0\" > {}; ls /proc/self/fd | wc -l >> {}",
        out.display(),
        out.display()
    );
    fs::write(tree.at("in"), &script).unwrap();
    assert!(status(&export, "bash", &[tree.at("in").to_str().unwrap()]).success());
    assert_eq!(
        status(&export, "sh", &["-c", "kill -9 $$"]).signal(),
        Some(libc::SIGKILL)
    );
    drop(export);
    daemon.audit_clean();
}

/// This process reads the signals that it passes on: the program must not inherit them blocked.
#[test]
fn local_a_program_gets_its_signals() {
    let tree = Tree::new();
    let daemon = daemon(&tree);
    let export = attach(&daemon, "usr");
    let signals = SignalFd::new(&Running::SIGNALS).unwrap();
    let script = "trap 'exit 5' TERM; kill -TERM $$; exit 6";
    let mut running = command("bash", &["-c", script]).start(&export).unwrap();
    let ended = running.wait(&signals, |_| None).unwrap();
    assert_eq!(ended.code(), Some(5), "{ended:?}");
}

#[test]
fn local_a_change_on_the_host_does_not_touch_a_program_that_runs() {
    let tree = Tree::new();
    let sleep = fs::read("/bin/sleep").unwrap();
    for dir in ["lib64", "lib"] {
        fs::create_dir(tree.file(dir)).unwrap();
    }
    // A whole small system: the program, and the loader and libraries that it names.
    program(&tree, "sleep", &sleep, 0o755);
    let usr = daemon(&tree);
    let plan = command("bin/sleep", &["0"])
        .start(&attach(&usr, "usr"))
        .unwrap()
        .plan()
        .clone();
    let dynamic = plan.dynamic.unwrap();
    let from_usr =
        |path: &[u8]| fs::read(format!("/usr{}", String::from_utf8_lossy(path))).unwrap();
    let interp = String::from_utf8_lossy(&dynamic.loader.path).into_owned();
    let name = interp.rsplit('/').next().unwrap();
    program(
        &tree,
        &format!("lib64/{name}"),
        &from_usr(&dynamic.loader.path),
        0o755,
    );
    for library in &dynamic.libraries {
        let name = String::from_utf8_lossy(&library.name).into_owned();
        program(
            &tree,
            &format!("lib/{name}"),
            &from_usr(&library.part.path),
            0o644,
        );
    }
    let export = attach(&usr, "export");
    let mut running = command("sleep", &["1"]).start(&export).unwrap();
    fs::write(tree.file("sleep"), b"no program any more").unwrap();
    let signals = SignalFd::new(&Running::SIGNALS).unwrap();
    let ended = running
        .wait(&signals, |_| Some(Duration::from_millis(20)))
        .unwrap();
    assert!(ended.success(), "{ended:?}");
    wait::until(Duration::from_secs(5), "the change", || {
        matches!(
            command("sleep", &[]).start(&export),
            Err(ExecError::Elf { .. })
        )
    });
}

#[test]
fn local_what_cannot_run_says_why() {
    let tree = Tree::new();
    program(&tree, "empty", b"", 0o755);
    program(&tree, "text", b"hello", 0o755);
    program(&tree, "nox", b"\x7fELF", 0o644);
    program(&tree, "cut", b"\x7fELF\x02\x01\x01", 0o755);
    program(&tree, "lost", b"#!/bin/nowhere\n", 0o755);
    let mut foreign = fs::read("/bin/sleep").unwrap();
    foreign[18] = 243;
    program(&tree, "foreign", &foreign, 0o755);
    std::os::unix::fs::symlink("/bin/sleep", tree.file("out")).unwrap();
    let mut daemon = daemon(&tree);
    let export = attach(&daemon, "export");
    fs::create_dir(tree.file("dir")).unwrap();
    assert!(matches!(
        refused(&export, "dir"),
        ExecError::Directory { .. }
    ));
    assert!(matches!(refused(&export, "empty"), ExecError::Empty { .. }));
    assert!(matches!(refused(&export, "text"), ExecError::Elf { .. }));
    assert!(matches!(
        refused(&export, "nox"),
        ExecError::NotExecutable { .. }
    ));
    assert!(matches!(refused(&export, "cut"), ExecError::Elf { .. }));
    assert!(matches!(
        refused(&export, "lost"),
        ExecError::NotFound { .. }
    ));
    assert!(matches!(
        refused(&export, "foreign"),
        ExecError::Foreign { .. }
    ));
    assert!(matches!(
        refused(&export, "out"),
        ExecError::NotFound { .. }
    ));
    assert_eq!(refused(&export, "none").exit_status(), 127);
    let usr = attach(&daemon, "usr");
    assert!(matches!(refused(&usr, "lib"), ExecError::Directory { .. }));
    drop((export, usr));
    daemon.audit_clean();
}

#[test]
fn local_many_programs_run_at_once_and_leave_nothing() {
    let tree = Tree::new();
    let mut daemon = daemon(&tree);
    let export = attach(&daemon, "usr");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..5 {
                    assert!(status(&export, "bin/true", &[]).success());
                }
            });
        }
    });
    drop(export);
    daemon.audit_clean();
}

/// A mount without a place, of the export of `/usr`.
fn detached(daemon: &Daemon) -> Detached {
    Detached::new(&Target {
        daemon: DaemonAt::Socket(daemon.socket()),
        connect: ConnectOptions::default(),
        export: "usr".into(),
    })
    .unwrap()
}

fn may_mount() -> bool {
    let may = rustix::process::geteuid().is_root() && fs::File::open("/dev/fuse").is_ok();
    if !may {
        println!("skipped: no FUSE, or not root");
    }
    may
}

/// What a guest of a hypervisor does, on this machine: cannot show that its pages are not executed from
/// frames there.
#[test]
fn local_a_program_runs_from_the_page_cache_by_a_mount_without_a_place() {
    if !may_mount() {
        return;
    }
    let tree = Tree::new();
    let mut daemon = daemon(&tree);
    let export = attach(&daemon, "usr");
    let mount = detached(&daemon);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("copage:usr"), "{mounts}");
    assert!(!mount.in_use());
    let out = tree.at("out");
    // Its child outlives it, and runs on from the mount.
    let script = format!(
        "(sleep 1; while [ -e {0} ]; do echo > {0}3; done; echo child >> {0}2) & echo \"$0\" > {0}; kill -9 $$",
        out.display()
    );
    let text = Text::PageCache(mount.root());
    let mut running = command("bash", &["-c", &script])
        .start_from(&export, text)
        .unwrap();
    drop(export);
    let signals = SignalFd::new(&Running::SIGNALS).unwrap();
    let ended = running.wait(&signals, |_| None).unwrap();
    assert_eq!(ended.signal(), Some(libc::SIGKILL));
    assert_eq!(fs::read_to_string(&out).unwrap(), "bash\n");
    // From its second round on it hardly touches a page that was not touched yet.
    let round = tree.at("out3");
    for _ in 0..2 {
        let _ = fs::remove_file(&round);
        wait::until(Duration::from_secs(20), "the child's rounds", || {
            round.exists()
        });
    }
    let first = running.resident().unwrap();
    let pages = first.pages.expect("this kernel tells");
    assert!(first.files >= 3, "{first:?}");
    assert!(pages > 50 && pages < first.of_pages, "{first:?}");
    drop(running);
    assert!(mount.in_use(), "the child runs from it");

    // A second program off the same files copies nothing more.
    let export = attach(&daemon, "usr");
    let mut running = command("bash", &["-c", &script])
        .start_from(&export, Text::PageCache(mount.root()))
        .unwrap();
    running.wait(&signals, |_| None).unwrap();
    let second = running.resident().unwrap();
    assert_eq!(
        (second.files, second.of_pages),
        (first.files, first.of_pages)
    );
    // But for a page or two that this run came by and the first did not.
    let more = second.pages.unwrap().saturating_sub(pages);
    assert!(more < pages / 10, "{second:?} after {first:?}");
    drop((running, export));

    fs::remove_file(&out).unwrap();
    mount.end().unwrap();
    // The mount is over, so they were: with their work done.
    let said = fs::read_to_string(tree.at("out2")).unwrap();
    assert_eq!(said, "child\nchild\n");
    daemon.audit_clean();
}

#[test]
fn local_a_program_runs_from_copies_of_whole_files() {
    let tree = Tree::new();
    let mut daemon = daemon(&tree);
    let export = attach(&daemon, "usr");
    let out = tree.at("out");
    let script = format!("echo \"$0\" > {}; exit 7", out.display());
    let mut running = command("bash", &["-c", &script])
        .start_from(&export, Text::Copies)
        .unwrap();
    drop(export);
    let signals = SignalFd::new(&Running::SIGNALS).unwrap();
    let ended = running.wait(&signals, |_| None).unwrap();
    assert_eq!(ended.code(), Some(7));
    assert_eq!(fs::read_to_string(&out).unwrap(), "bash\n");
    let resident = running.resident().unwrap();
    assert_eq!(resident.pages, Some(resident.of_pages), "{resident:?}");
    // They can be written by nobody.
    let copy = running.plan().program.file.descriptor();
    let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(copy));
    let writer = fs::File::options().write(true).open(again);
    if let Ok(mut writer) = writer {
        let written = std::io::Write::write(&mut writer, b"x");
        assert!(written.is_err(), "{written:?}");
    }
    drop(running);
    daemon.audit_clean();
}
