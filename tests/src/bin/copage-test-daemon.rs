//! A daemon of the tests: `copage serve` without its command line, over a backend that can be told
//! to fail.
//!
//! `copage-test-daemon CONFIG [PLAN]`. With a plan, even an empty one, every use that the daemon makes
//! of its backend is watched, and a use that breaks the backend's rules ends in exit code 3 after a
//! clean stop. A plan is a list of CALL:NTH:ERRNO with commas between: the NTH call of that kind
//! fails (NTH+: it and all later ones). Errno 28 (ENOSPC) is memory, 0 a full grant table.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use copage::config::Config;
use copage::serve::{Daemon, RunOptions};
use copage_grants::failing::{Call, FailWith, FailingBackend};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

fn main() -> Result<ExitCode> {
    let mut args = std::env::args().skip(1);
    let file = args
        .next()
        .context("usage: copage-test-daemon CONFIG [PLAN]")?;
    let text = std::fs::read_to_string(&file).with_context(|| file.clone())?;
    let config = Config::parse(&text).map_err(|errors| anyhow::anyhow!("{errors}"))?;
    let Some(plan) = args.next() else {
        Daemon::run(&config, RunOptions::default())?;
        return Ok(ExitCode::SUCCESS);
    };
    let steps = plan
        .split(',')
        .filter(|s| !s.is_empty())
        .map(step)
        .collect::<Result<Vec<_>>>()?;
    let watched = OnceLock::new();
    Daemon::run_over(&config, RunOptions::default(), |backend| {
        let failing = Arc::new(FailingBackend::new(backend));
        for &(call, nth, ever, with) in &steps {
            if ever {
                failing.fail_from(call, nth, with);
            } else {
                failing.fail_nth(call, nth, with);
            }
        }
        watched.get_or_init(|| Arc::clone(&failing));
        failing
    })?;
    let violations = watched.get().map(|w| w.violations()).unwrap_or_default();
    for violation in &violations {
        eprintln!("the backend's rules were broken: {violation}");
    }
    Ok(if violations.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(3)
    })
}

fn step(text: &str) -> Result<(Call, u64, bool, FailWith)> {
    let parts: Vec<&str> = text.split(':').collect();
    let [call, nth, errno] = parts[..] else {
        bail!("{text} is not CALL:NTH:ERRNO")
    };
    let call = match call {
        "open-home" => Call::OpenHome,
        "home-descriptor" => Call::HomeDescriptor,
        "store" => Call::Store,
        "load" => Call::Load,
        "discard" => Call::Discard,
        "grant" => Call::Grant,
        "force-out" => Call::ForceOut,
        other => bail!("there is no call {other}"),
    };
    let (nth, ever) = match nth.strip_suffix('+') {
        Some(nth) => (nth, true),
        None => (nth, false),
    };
    let with = match errno.parse()? {
        0 => FailWith::TableFull,
        libc::ENOSPC => FailWith::NoMemory,
        errno => FailWith::Errno(errno),
    };
    Ok((call, nth.parse()?, ever, with))
}
