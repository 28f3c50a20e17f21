//! The built command: exit codes, one plain line for each error, one JSON document for each `--json`,
//! against a daemon of its own.
//!
//! Cannot show: that what the daemon says of itself is so; other tests do.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use tempfile::TempDir;

fn copage(run_dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_copage"));
    command
        .args(args)
        .env("COPAGE_RUN_DIR", run_dir)
        .env_remove("COPAGE_LOG");
    command.env_remove("NOTIFY_SOCKET").stdin(Stdio::null());
    command
}

fn run(run_dir: &Path, args: &[&str]) -> Output {
    copage(run_dir, args).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// It failed with that code, and said so in one line.
#[track_caller]
fn fails(output: &Output, code: i32, piece: &str) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(
        text.starts_with("copage: ") && text.lines().count() == 1,
        "{text}"
    );
    assert!(text.contains(piece), "{text}");
    assert_eq!(stdout(output), "");
}

/// A daemon that ends with the test.
struct Daemon {
    child: Child,
    dir: TempDir,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        std::fs::create_dir(&share).unwrap();
        std::fs::write(share.join("file"), vec![b'x'; 10_000]).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let fd = writer.as_raw_fd().to_string();
        let export = format!("share={}", share.display());
        let args = [
            "serve",
            "--export",
            &export,
            "--frames-mib",
            "16",
            "--ready-fd",
            &fd,
        ];
        let child = copage(&dir.path().join("run"), &args)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(writer);
        let mut ready = String::new();
        // Not to its end: the daemon, and children of other tests, hold the other end.
        BufReader::new(std::fs::File::from(reader))
            .read_line(&mut ready)
            .unwrap();
        assert_eq!(ready, "READY\n");
        Self { child, dir }
    }

    fn run(&self, args: &[&str]) -> Output {
        run(&self.dir.path().join("run"), args)
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    #[track_caller]
    fn text(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        stdout(&output)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn usage_errors_are_one_line_and_2() {
    let none = Path::new("/nonexistent");
    fails(&run(none, &["serve", "--no-froce"]), 2, "--no-force");
    fails(&run(none, &["frobnicate"]), 2, "see copage --help");
    fails(&run(none, &["export", "add"]), 2, "<NAME>");
    fails(
        &run(
            none,
            &["serve", "--export", "a=/usr", "--export", "b=/usr/lib"],
        ),
        2,
        "must not overlap",
    );
    fails(
        &run(none, &["serve", "--export", "a=/nonexistent"]),
        2,
        "there is no such directory",
    );
    fails(
        &run(none, &["serve", "--config", "/nonexistent"]),
        2,
        "there is no such file",
    );
    let mut odd_log = copage(none, &["serve", "--export", "a=/usr"]);
    fails(
        &odd_log.env("COPAGE_LOG", "loud").output().unwrap(),
        2,
        "COPAGE_LOG=loud: give off, error",
    );
    let help = run(none, &[]);
    assert_eq!(help.status.code(), Some(2));
    let help = run(none, &["export", "add", "--help"]);
    assert!(help.status.success() && stdout(&help).contains("Examples:"));
    assert!(stdout(&run(none, &["--version"])).starts_with("copage "));
}

#[test]
fn without_a_daemon_the_line_says_what_to_do() {
    let none = Path::new("/nonexistent");
    for args in [
        &["guests"][..],
        &["audit", "--json"],
        &["stats"],
        &["stop"],
        &["budget", "64"],
    ] {
        fails(
            &run(none, args),
            1,
            "no daemon is running there; start one (copage serve)",
        );
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("admin.sock"), "").unwrap();
    fails(&run(dir.path(), &["guests"]), 1, "admin.sock");
}

#[test]
fn check_config_says_everything() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    let path = file.to_str().unwrap();
    std::fs::write(
        &file,
        "frame_mib = 1\n\n[[export]]\nname = \"a\"\npath = \"/nonexistent\"\n",
    )
    .unwrap();
    let bad = run(dir.path(), &["check-config", path]);
    assert_eq!(bad.status.code(), Some(2));
    let lines: Vec<_> = stderr(&bad).lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 2);
    assert!(
        lines[0].starts_with(&format!("copage: {path}:1: frame_mib: unknown key")),
        "{lines:?}"
    );
    assert!(
        lines[1].starts_with(&format!("copage: {path}:5: export.path: ")),
        "{lines:?}"
    );
    let json = run(dir.path(), &["check-config", "--json", path]);
    assert_eq!((json.status.code(), stderr(&json).as_str()), (Some(2), ""));
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["ok"], false);
    assert_eq!(json["problems"][1]["line"], 5);
    assert_eq!(json["problems"][1]["key"], "export.path");
    assert_eq!(json["problems"][1]["severity"], "error");
    // The daemon says the same, and does not start.
    let serve = run(dir.path(), &["serve", "--config", path]);
    assert_eq!(
        (serve.status.code(), stderr(&serve)),
        (Some(2), stderr(&bad))
    );

    let good = format!(
        "[[export]]\nname = \"a\"\npath = \"{}\"\nallow = []\n",
        dir.path().display()
    );
    std::fs::write(&file, good).unwrap();
    let good = run(dir.path(), &["check-config", path]);
    assert!(good.status.success() && stdout(&good).contains("good: 1 exports"));
    assert!(
        stderr(&good).contains(":4: warning: export.allow"),
        "{}",
        stderr(&good)
    );
    let json: Value =
        serde_json::from_slice(&run(dir.path(), &["check-config", "--json", path]).stdout).unwrap();
    assert_eq!(
        (&json["ok"], &json["problems"][0]["severity"]),
        (&true.into(), &"warning".into())
    );
}

#[test]
fn local_displays_and_their_json() {
    let daemon = Daemon::start();
    assert_eq!(daemon.text(&["guests"]), "no guests are connected\n");
    assert_eq!(
        daemon.json(&["guests", "--json"])["guests"],
        Value::Array(Vec::new())
    );
    assert_eq!(
        daemon.json(&["export", "list", "--json"])["exports"][0]["name"],
        "share"
    );
    assert_eq!(daemon.text(&["cat", "share", "file"]).len(), 10_000);

    let host = daemon.dir.path().join("share/file");
    for file in ["share:file", "share:/file", host.to_str().unwrap()] {
        let pages = daemon.json(&["pages", "--json", file]);
        assert_eq!(
            (&pages["bytes"], &pages["cached"]),
            (&10_000.into(), &true.into())
        );
        assert_eq!(pages["resident_pages"], 3);
        assert_eq!(pages["runs"][0]["count"], 3);
    }
    assert!(
        daemon
            .text(&["pages", "share:file"])
            .contains("3 of 3 pages held (12.0 KiB)")
    );
    // By a way that the export was not named by.
    let link = daemon.dir.path().join("link");
    std::os::unix::fs::symlink(&host, &link).unwrap();
    assert_eq!(
        daemon.json(&["pages", "--json", link.to_str().unwrap()])["resident_pages"],
        3
    );
    fails(
        &daemon.run(&["pages", "/proc/self/status"]),
        1,
        "is in no export",
    );
    fails(&daemon.run(&["pages", "share:none"]), 1, "copage: ");
    fails(&daemon.run(&["pages", "share:../x"]), 2, "without '..'");

    let stats = daemon.json(&["stats", "--json", "--host-cache"]);
    assert_eq!(
        (&stats["frames_max"], &stats["frames_used"]),
        (&4096.into(), &3.into())
    );
    assert_eq!(stats["counters"]["filled_pages"], 3);
    assert!(stats["rss_anon_bytes"].as_u64() > Some(100_000));
    assert!(stats["host_cache"].is_null() || stats["host_cache"]["files"] == 1);
    assert!(
        daemon
            .text(&["stats"])
            .contains("12.0 KiB of 16.0 MiB used")
    );

    let audit = daemon.run(&["audit"]);
    assert!(audit.status.success() && stdout(&audit).contains("everything agrees"));
    let audit = daemon.json(&["audit", "--json"]);
    assert_eq!(
        (&audit["ok"], audit["checks"].as_array().unwrap().len() >= 2),
        (&true.into(), true)
    );
    assert_eq!(daemon.text(&["grants"]), "nothing is granted\n");
    assert_eq!(daemon.json(&["grants", "--json", "--list"])["total"], 0);
}

#[test]
fn local_orders_are_obeyed() {
    let daemon = Daemon::start();
    let more = daemon.dir.path().join("more");
    std::fs::create_dir(&more).unwrap();
    let path = more.to_str().unwrap();
    assert!(
        daemon
            .text(&["export", "add", "more", path, "--allow", "web"])
            .starts_with("exported ")
    );
    fails(&daemon.run(&["export", "add", "more", path]), 1, "more");
    fails(
        &daemon.run(&["export", "add", "in", "/nonexistent"]),
        1,
        "copage: ",
    );
    let list = daemon.json(&["export", "list", "--json"]);
    assert_eq!(list["exports"][0]["allow"][0], "web");
    assert!(
        daemon
            .text(&["export", "list"])
            .contains("more   ro    web    more")
    );
    daemon.json(&["export", "remove", "--json", "more"]);
    fails(&daemon.run(&["export", "remove", "more"]), 1, "more");

    daemon.text(&["cat", "share", "file"]);
    assert_eq!(
        daemon.json(&["reclaim", "--json", "--unused"])["reclaimed_pages"],
        3
    );
    assert!(daemon.text(&["reclaim", "1"]).contains("0 B taken back"));
    assert_eq!(daemon.json(&["budget", "--json", "8"])["frames_mib"], 8);
    assert_eq!(daemon.json(&["stats", "--json"])["frames_max"], 2048);
    fails(&daemon.run(&["fence", "nobody"]), 1, "nobody");

    // A second daemon in the same place is refused and harms nothing.
    let export = format!("x={path}");
    let second = daemon.run(&["serve", "--export", &export, "--log", "off"]);
    fails(&second, 1, "is running in");
    let mut daemon = daemon;
    daemon.text(&["stop"]);
    assert!(daemon.child.wait().unwrap().success());
    assert!(!daemon.dir.path().join("run/admin.sock").exists());
    let mut log = String::new();
    daemon
        .child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut log)
        .unwrap();
    assert!(log.contains("INFO") && log.contains("stopped"), "{log}");
}

#[test]
fn local_a_closed_pipe_is_silent() {
    let daemon = Daemon::start();
    let mut watch = copage(
        &daemon.dir.path().join("run"),
        &["stats", "--watch", "--json"],
    )
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    let mut out = BufReader::new(watch.stdout.take().unwrap());
    let mut first = String::new();
    out.read_line(&mut first).unwrap();
    assert_eq!(
        serde_json::from_str::<Value>(&first).unwrap()["backend"],
        "local"
    );
    drop(out);
    let ended = watch.wait_with_output().unwrap();
    assert_eq!(
        (ended.status.code(), ended.stderr.as_slice()),
        (Some(0), &b""[..])
    );
}

#[test]
fn local_a_watched_daemon_that_ends_is_told() {
    let daemon = Daemon::start();
    let watch = copage(&daemon.dir.path().join("run"), &["stats", "--watch"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    drop(daemon);
    let ended = watch.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert!(stderr(&ended).starts_with("copage: "), "{}", stderr(&ended));
}

#[test]
fn local_doctor_finds_this_machine_able() {
    let output = run(Path::new("/nonexistent"), &["doctor", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        output.status.success(),
        report["local_sharing"] == true,
        "{report}"
    );
    assert!(
        output.status.success(),
        "files cannot be shared here: {report:#}"
    );
    let findings = report["findings"].as_array().unwrap();
    for finding in findings {
        assert!(
            finding["name"].is_string() && finding["found"].is_string(),
            "{finding}"
        );
        let state = finding["state"].as_str().unwrap();
        assert!(["have", "limited", "lack"].contains(&state), "{finding}");
    }
    assert!(findings.len() > 12);
}
