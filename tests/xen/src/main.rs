//! The laboratory's own program, one for all places:
//!
//! ```text
//! copage-xen-lab list | limit [NAME…]       on any machine: which checks there are, how long they may take
//! copage-xen-lab split N [NAME…]            on any machine: the checks in N parts, a line each
//! copage-xen-lab run --dir DIR [NAME…]      in dom0: runs checks, writes DIR/results
//! copage-xen-lab shell                      in dom0: starts a guest for a person
//! copage-xen-lab in GUEST COMMAND…          in dom0: a command in a guest
//! copage-xen-lab pipe GUEST -- PROGRAM…     in dom0: a program in a guest, with this one's input and output
//! copage-xen-lab agent                      in a guest: does what dom0 asks for
//! copage-xen-lab do PROGRAM [ARGUMENT…]     in a guest: a program that a check needs there
//! ```
#![forbid(unsafe_code)]

mod agent;
mod checks;
mod daemon;
mod guest;
mod hostile;
mod job;
mod lab;
mod numbers;
mod output;
mod pipe;
mod programs;
mod records;
mod runner;
mod store;

use anyhow::{Context, Result, bail};
use checks::{CHECKS, Check};
use guest::{Guest, Kind};
use lab::Lab;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long the emulated machine may take to boot, in s.
const BOOT_S: u64 = 90;

fn main() -> ExitCode {
    perform().unwrap_or_else(|error| {
        eprintln!("copage-xen-lab: {error:#}");
        ExitCode::FAILURE
    })
}

fn perform() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match &words[..] {
        ["list"] => {
            for Check {
                name,
                limit_s,
                shows,
                nightly,
                ..
            } in CHECKS
            {
                let when = if *nightly {
                    "nightly: only when named; "
                } else {
                    ""
                };
                println!("{name:<14} {shows} ({when}at most {limit_s} s)");
            }
        }
        ["limit", names @ ..] => {
            let chosen = chosen(names)?;
            let each = |c: &&Check| c.limit_s + runner::GRACE.as_secs();
            println!("{}", BOOT_S + chosen.iter().map(each).sum::<u64>());
        }
        ["split", machines, names @ ..] => {
            for part in split(&chosen(names)?, machines.parse()?) {
                println!("{}", part.join(" "));
            }
        }
        ["run", "--dir", dir, names @ ..] => {
            if !runner::run(&chosen(names)?, Path::new(dir))? {
                return Ok(ExitCode::FAILURE);
            }
        }
        ["shell"] => shell()?,
        ["in", name, command @ ..] => return in_guest(name, &command.join(" ")),
        ["pipe", name, "--", program @ ..] => return pipe::run(name, program),
        ["pipe-warden", domid, pipe] => pipe::warden(domid.parse()?, pipe)?,
        ["agent"] => agent::serve()?,
        ["do", name, arguments @ ..] => {
            // What the library has to say, for who looks why a program ended.
            tracing_subscriber::fmt()
                .with_ansi(false)
                .with_writer(std::io::stderr)
                .init();
            let program = programs::PROGRAMS.iter().find(|p| p.0 == *name);
            program
                .with_context(|| format!("no such program: {name}"))?
                .1(arguments)?;
        }
        _ => bail!("copage-xen-lab list|limit|split|run|shell|in|pipe|agent|do …"),
    }
    Ok(ExitCode::SUCCESS)
}

fn chosen(names: &[&str]) -> Result<Vec<&'static Check>> {
    if names.is_empty() {
        return Ok(CHECKS.iter().filter(|c| !c.nightly).collect());
    }
    let find = |name: &&str| {
        let found = CHECKS.iter().find(|c| c.name == *name);
        found.with_context(|| format!("no check is named {name} (see --list)"))
    };
    names.iter().map(find).collect()
}

/// Checks for so many machines, none of them idle, about as long for each, each in the table's order.
fn split(checks: &[&'static Check], machines: usize) -> Vec<Vec<&'static str>> {
    let mut longest_first: Vec<&&Check> = checks.iter().collect();
    longest_first.sort_by_key(|check| std::cmp::Reverse(check.limit_s));
    let mut parts = vec![(0, Vec::new()); machines.clamp(1, checks.len().max(1))];
    for check in longest_first {
        if let Some((sum_s, names)) = parts.iter_mut().min_by_key(|(sum_s, _)| *sum_s) {
            *sum_s += check.limit_s;
            names.push(check.name);
        }
    }
    let place = |name: &&str| checks.iter().position(|check| check.name == *name);
    for (_, names) in &mut parts {
        names.sort_by_key(place);
    }
    parts.into_iter().map(|(_, names)| names).collect()
}

/// Leaves a guest running behind.
fn shell() -> Result<()> {
    let lab = Lab::new("shell", Path::new("/share"))?;
    let guest = Guest::create(&lab, &guest::Setup::new(Kind::Pvh, "guest1", 192))?;
    println!("waiting for a guest …");
    guest.ready()?;
    println!(
        "guest1 is domain {}: `guest COMMAND…` runs a command in it, `xl console guest1` is its console, \
         `exit` ends all",
        guest.domid()
    );
    std::mem::forget(guest);
    Ok(())
}

fn in_guest(name: &str, command: &str) -> Result<ExitCode> {
    let lab = Lab::new("shell", Path::new("/share"))?;
    let domid = lab.sh(&format!("xl domid {name}"))?.text()?.parse()?;
    let guest = Guest::existing(&lab, name, domid, Instant::now())?;
    let output = guest.run_for(command, Duration::from_secs(3600));
    std::mem::forget(guest);
    let output = output?;
    print!("{}", output.stdout);
    eprint!("{}", output.stderr);
    Ok(match output.ended {
        job::Ended::Exit(code) => ExitCode::from(u8::try_from(code).unwrap_or(255)),
        job::Ended::Signal(_) => ExitCode::FAILURE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_every_check_is_in_one_machine() {
        let all = chosen(&[]).unwrap();
        for machines in [1, 2, 3, 100] {
            let parts = split(&all, machines);
            let mut names: Vec<&str> = parts.concat();
            assert!(parts.len() <= machines && parts.iter().all(|part| !part.is_empty()));
            let mut known: Vec<&str> = all.iter().map(|check| check.name).collect();
            names.sort_unstable();
            known.sort_unstable();
            assert_eq!(names, known);
        }
        // In the order of the table, and neither machine much longer at it than the other.
        let parts = split(&all, 2);
        assert_eq!(
            parts[0]
                .iter()
                .chain(&parts[1])
                .filter(|name| **name == "boot")
                .count(),
            1
        );
        let limit =
            |part: &Vec<&str>| -> u64 { chosen(part).unwrap().iter().map(|c| c.limit_s).sum() };
        assert!(limit(&parts[0]).abs_diff(limit(&parts[1])) < 200);
    }
}
