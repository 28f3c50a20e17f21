//! Runs checks one after the other, each with a machine as after boot.

use crate::checks::Check;
use crate::lab::Lab;
use anyhow::{Result, anyhow};
use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// What a check gets beyond its limit until its waits have noticed that it is over.
pub const GRACE: Duration = Duration::from_secs(20);

/// Runs them; a line each goes to `results` in `logs`. Whether all passed.
pub fn run(checks: &[&'static Check], logs: &Path) -> Result<bool> {
    let mut results = File::options()
        .create(true)
        .append(true)
        .open(logs.join("results"))?;
    let mut all = true;
    for (done, check) in checks.iter().enumerate() {
        let begin = Instant::now();
        let (outcome, ended) = one(check, logs);
        let seconds = begin.elapsed().as_secs_f64();
        let name = check.name;
        let line = match &outcome {
            Ok(seen) => format!("ok     {name:<14} {seen} ({seconds:.1} s)\n"),
            Err(error) => {
                all = false;
                let _ = std::process::Command::new("sh")
                    .arg("-c")
                    .arg("xl list; xl dmesg | tail -n 60; dmesg | tail -n 60; tail -n 40 /var/log/xen/*.log")
                    .stdout(File::create(logs.join(format!("{name}.machine.txt")))?)
                    .status();
                // One line a check, whatever a program said.
                let why = format!("{error:#}").replace('\n', " | ");
                format!("FAILED {name:<14} {why} ({seconds:.1} s)\n")
            }
        };
        results.write_all(line.as_bytes())?;
        if !ended {
            let left = checks.len() - done - 1;
            let line = format!("FAILED {name:<14} does not end; {left} more not run\n");
            results.write_all(line.as_bytes())?;
            return Ok(false);
        }
    }
    Ok(all)
}

/// What it saw, and whether it ended.
fn one(check: &'static Check, logs: &Path) -> (Result<String>, bool) {
    let lab = match Lab::new(check.name, logs) {
        Ok(lab) => Arc::new(lab),
        Err(error) => return (Err(error), true),
    };
    let (done, outcome) = mpsc::channel();
    let in_thread = Arc::clone(&lab);
    let thread = std::thread::spawn(move || {
        let outcome = catch_unwind(AssertUnwindSafe(|| (check.run)(&in_thread)));
        drop(in_thread);
        // The runner may have given up on it.
        let _ = done.send(outcome.unwrap_or_else(|panic| Err(panicked(&*panic))));
    });
    let limit = Duration::from_secs(check.limit_s);
    let mut result = outcome.recv_timeout(limit);
    if result.is_err() {
        lab.give_up();
        result = outcome.recv_timeout(GRACE);
    }
    let Ok(result) = result else {
        let late = anyhow!("not done within {limit:?}");
        return (Err(late), false);
    };
    // It has sent its last word.
    let _ = thread.join();
    let cleaned = match Arc::try_unwrap(lab) {
        Ok(lab) => lab.clean_up(),
        Err(_) => Err(anyhow!("the check left threads behind")),
    };
    (result.and_then(|seen| cleaned.map(|()| seen)), true)
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> anyhow::Error {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    anyhow!("panicked: {}", text.unwrap_or("no text"))
}
