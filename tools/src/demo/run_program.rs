//! A dynamic program run off the share, and where its text lies.

use super::report::Report;
use super::stage::{DaemonProcess, wait_until};
use anyhow::{Context, Result};
use copage_coherence::msg::OpenHow;
use copage_mmap::exec::text::{FileId, TextReport, mappings};
use copage_mmap::{Client, ConnectOptions};
use std::collections::HashSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Programs that are dynamic on common machines and can be made to wait for input.
const PROGRAMS: [(&str, &[&str]); 3] = [
    ("bin/bash", &["-c", "read line"]),
    ("bin/cat", &[]),
    ("bin/sort", &[]),
];

/// Runs one off the export `demo` and counts its text pages on shared frames.
pub fn show(report: &mut Report, daemon: &DaemonProcess, root: &Path) -> Result<()> {
    let Some((program, args)) = PROGRAMS.iter().find(|(path, _)| root.join(path).is_file()) else {
        let text = "no program to run below this directory (a file system with bin/bash has one)";
        report.line("exec", true, text);
        return Ok(());
    };
    // What a frame file is called by the kernel: pin the program and look.
    let client = Client::connect(&daemon.guest_socket(), &ConnectOptions::named("exec-check"))?;
    let file = client
        .attach("demo")?
        .resolve(program.as_bytes())?
        .open(OpenHow::Pin)?;
    let frames_dev = FileId::of(file.descriptor()?)?.dev;
    let mut runner = Command::new(std::env::current_exe()?)
        .arg("exec")
        .arg("--run-dir")
        .arg(daemon.run_dir())
        .args(["demo", program])
        .args(*args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .context("copage exec")?;
    let mut last = None;
    // Waiting for input: its text stops growing.
    wait_until(Duration::from_secs(10), || {
        let now = text_of_child(&runner, frames_dev)?.filter(|text| text.on_frames_pages > 0);
        let settled = now.is_some() && now == last;
        last = now;
        std::thread::sleep(Duration::from_millis(100));
        Ok(settled || runner.try_wait()?.is_some())
    })?;
    drop(runner.stdin.take());
    let status = runner.wait()?;
    let Some(text) = last else {
        report.line(
            "exec",
            false,
            format!("{program} off the share did not run: {status}"),
        );
        return Ok(());
    };
    let files = text.files.iter().filter(|file| file.on_frames).count();
    report.line(
        "exec",
        text.on_frames_pages > 0 && text.own_pages == 0,
        format!(
            "{program}, its loader and libraries run off the share: {} text pages of {files} files, all \
             on shared frames, {} copied, {} elsewhere (vdso)",
            text.on_frames_pages, text.own_pages, text.elsewhere_pages
        ),
    );
    Ok(())
}

/// The text of the program that `copage exec` runs as its child; `None` before there is one.
fn text_of_child(runner: &Child, frames_dev: (u32, u32)) -> Result<Option<TextReport>> {
    let pid = runner.id();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let child = children
        .ok()
        .and_then(|list| list.split_whitespace().next()?.parse::<u32>().ok());
    let Some(entries) = child.and_then(|child| mappings(child).ok()) else {
        return Ok(None);
    };
    let frames: HashSet<FileId> = entries
        .iter()
        .filter_map(|entry| entry.file)
        .filter(|file| file.dev == frames_dev)
        .collect();
    Ok(Some(TextReport::count(&entries, &frames)))
}
