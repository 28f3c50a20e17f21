//! Starting a dynamic program off the share.

use crate::daemon::{Daemon, DaemonOptions};
use crate::files;
use crate::mounted::Mounted;
use crate::process::Faults;
use crate::role::{self, Role};
use crate::setting::Setting;
use crate::stats::interleaved;
use crate::table::{Row, Unit};
use crate::tree::{ARGUMENT, Program};
use anyhow::{Result, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

const NAME: &str = "exec";
/// Where a tmpfs is found on most machines.
const TMPFS: &str = "/dev/shm";

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let program = match Program::find() {
        Ok(program) => program,
        Err(error) => {
            rows.push(
                Row::new(NAME, "execve off the share", Unit::Seconds)
                    .note(format!("not here: {error:#}")),
            );
            return Ok(());
        }
    };
    let dir = setting.subdir("exec")?;
    let (flat, root) = (dir.join("flat"), dir.join("root"));
    program.copy_flat(&flat)?;
    program.copy_rooted(&root)?;
    let tmpfs = tmpfs_dir();
    if let Ok(tmpfs) = &tmpfs {
        program.copy_flat(&tmpfs.path().join("flat"))?;
        program.copy_rooted(&tmpfs.path().join("root"))?;
    }
    let tmpfs = tmpfs
        .as_ref()
        .map(|t| t.path())
        .map_err(|e| format!("{e:#}"));
    let options = DaemonOptions::ro(256, true);
    let daemon = Daemon::start(setting, &dir, options)?;
    through_mount(setting, &daemon, &program, &flat, &tmpfs, rows)?;
    // The command's own export is rooted where the program's paths are.
    let daemon = Daemon::start(setting, &root, options)?;
    by_command(setting, &daemon, &program, &tmpfs, rows)
}

fn tmpfs_dir() -> Result<tempfile::TempDir> {
    ensure!(
        files::filesystem(Path::new(TMPFS))? == "tmpfs",
        "{TMPFS} is no tmpfs"
    );
    Ok(tempfile::Builder::new()
        .prefix("copage-bench-")
        .tempdir_in(TMPFS)?)
}

/// Starts programs one after the other: seconds for each, and their faults.
fn time(runs: u32, mut command: Command, faults: &mut (u64, u64)) -> Result<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let (before, begin) = (Faults::of_children()?, Instant::now());
    for _ in 0..runs {
        let status = command.status()?;
        ensure!(status.success(), "{command:?}: {status}");
    }
    let seconds = begin.elapsed().as_secs_f64();
    let all = Faults::of_children()?.since(before);
    *faults = (all.0 / u64::from(runs), all.1 / u64::from(runs));
    Ok(seconds / f64::from(runs))
}

fn check(what: &str, mut command: Command, expected: &[u8]) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    ensure!(
        output.status.success() && output.stdout == expected,
        "WRONG BYTES: {what}: {} {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn through_mount(
    setting: &Setting,
    daemon: &Daemon,
    program: &Program,
    flat: &Path,
    tmpfs: &Result<&Path, String>,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let what = format!(
        "execve {} off the mount, loader and libraries too",
        program.name()
    );
    let row = || Row::new(NAME, what.clone(), Unit::Seconds);
    let mounted = match Mounted::start(setting, daemon) {
        Ok(mounted) => mounted,
        Err(error) => {
            rows.push(row().note(format!("not here: {error:#}")));
            return Ok(());
        }
    };
    let below_mount = mounted.dir().join("flat");
    let on_tmpfs = tmpfs.as_ref().map(|t| t.join("flat")).ok();
    let dirs: [PathBuf; 4] = [
        below_mount.clone(),
        on_tmpfs.clone().unwrap_or(below_mount),
        flat.to_owned(),
        flat.to_owned(),
    ];
    let expected = program.output()?;
    for dir in &dirs {
        check(
            &format!("{} in {}", program.name(), dir.display()),
            program.command_flat(dir),
            &expected,
        )?;
    }
    // The mount says nothing of how it serves a file; the daemon knows what it has pinned.
    let open = std::fs::File::open(dirs[0].join(program.name()))?;
    let how = match daemon.stats()?.frames_pinned {
        0 => "the mount goes through the page cache: no frame is pinned",
        _ => "passthrough files on pinned frames",
    };
    drop(open);
    let mut faults = [(0, 0); 4];
    let sizes = &setting.sizes;
    let samples = interleaved::<4>(sizes.reps, |side, _| {
        let command = || program.command_flat(&dirs[side]);
        if side < 3 {
            return time(sizes.exec_runs, command(), &mut faults[side]);
        }
        let runs = (sizes.exec_runs / 10).max(2);
        let mut sum = 0.0;
        for _ in 0..runs {
            for file in program.files_flat(flat) {
                files::chill(&file)?;
            }
            sum += time(1, command(), &mut faults[side])?;
        }
        Ok(sum / f64::from(runs))
    })?;
    rows.push(match (&on_tmpfs, tmpfs) {
        (Some(_), _) => row()
            .copage(&samples[0])
            .against("tmpfs", &samples[1])
            .ratio_at_most(1.05)
            .faults(faults[0], faults[1])
            .note(how),
        (None, why) => row()
            .copage(&samples[0])
            .note(format!("not compared with tmpfs: {why:?}")),
    });
    for (side, name) in [(2, "warm"), (3, "cold (aim: below it)")] {
        rows.push(
            row()
                .copage(&samples[0])
                .against(format!("{} {name}", setting.native()), &samples[side])
                .faults(faults[0], faults[side]),
        );
    }
    Ok(())
}

/// `copage exec`, the whole command: connect, plan, pin, start, wait. Beside it, the same program
/// started by its loader from a tmpfs, by a process that does nothing else.
fn by_command(
    setting: &Setting,
    daemon: &Daemon,
    program: &Program,
    tmpfs: &Result<&Path, String>,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let expected = program.output()?;
    let ours = || -> Result<Command> {
        let mut command = role::command(Role::Exec)?;
        command
            .arg(daemon.socket())
            .arg(program.path())
            .arg(ARGUMENT);
        Ok(command)
    };
    let what = format!("copage exec {}: the whole command", program.name());
    let row = Row::new(NAME, what.clone(), Unit::Seconds);
    let Ok(tmpfs) = tmpfs else {
        rows.push(row.note("not here: no tmpfs to compare with"));
        return Ok(());
    };
    let theirs = || program.command_rooted(&tmpfs.join("root"));
    check(&what, ours()?, &expected)?;
    check("the loader on tmpfs", theirs(), &expected)?;
    let mut faults = [(0, 0); 2];
    let runs = (setting.sizes.exec_runs / 4).max(2);
    let [copage, loader] = interleaved::<2>(setting.sizes.reps, |side, _| {
        let command = if side == 0 { ours()? } else { theirs() };
        time(runs, command, &mut faults[side])
    })?;
    rows.push(
        row.copage(&copage)
            .against("the loader started on tmpfs", &loader)
            .faults(faults[0], faults[1])
            .note("a process and a session for each start; no budget"),
    );
    Ok(())
}
