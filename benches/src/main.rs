//! `copage-bench`: copage beside what it is measured against, in one run, printed as ratios.
//!
//! Nothing here fails because it is slow. Wrong bytes fail.
#![forbid(unsafe_code)]

mod bare;
mod broadcast;
mod budget;
mod daemon;
mod exec;
mod fault;
mod files;
mod granting;
mod guest;
mod idle;
mod limits;
mod memory;
mod mount;
mod mounted;
mod pattern;
mod process;
mod reader;
mod role;
mod setting;
mod stats;
mod sync;
mod table;
mod together;
mod touch;
mod tree;
mod warm;
mod write;

use anyhow::{Result, bail};
use clap::Parser;
use limits::Sizes;
use setting::Setting;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use table::Row;

/// One bench.
struct Bench {
    name: &'static str,
    about: &'static str,
    run: fn(&Setting, &mut Vec<Row>) -> Result<()>,
}

const BENCHES: [Bench; 10] = [
    Bench {
        name: "warm",
        about: "reading through a warm mapping",
        run: warm::run,
    },
    Bench {
        name: "touch",
        about: "first touch by the library",
        run: touch::run,
    },
    Bench {
        name: "mount",
        about: "first touch through the mount",
        run: mount::run,
    },
    Bench {
        name: "exec",
        about: "starting a dynamic program off the share",
        run: exec::run,
    },
    Bench {
        name: "memory",
        about: "memory when 1, 4, 16 guests map one file",
        run: memory::run,
    },
    Bench {
        name: "grant",
        about: "granting, against storing raw entries",
        run: granting::run,
    },
    Bench {
        name: "fault",
        about: "fault to first byte; mapped pages a second",
        run: fault::run,
    },
    Bench {
        name: "write",
        about: "writing to pages that others read or write",
        run: write::run,
    },
    Bench {
        name: "budget",
        about: "a random working set over the budget",
        run: budget::run,
    },
    Bench {
        name: "idle",
        about: "wake-ups and memory of an idle daemon",
        run: idle::run,
    },
];

/// Measures copage beside native mappings, bare fault services and raw stores, and prints ratios.
///
/// A ratio is copage's median through the other's; values are medians with [smallest - largest].
/// The exit code says whether every byte was right, not whether a budget is met.
#[derive(Parser)]
#[command(
    name = "copage-bench",
    after_help = "Examples:\n  \
    copage-bench                  everything, some minutes\n  \
    copage-bench --quick          everything small: a smoke test\n  \
    copage-bench warm mount       two of them\n  \
    copage-bench --json > r.json  for other programs"
)]
struct Args {
    /// Benches to run; none named: all.
    names: Vec<String>,
    /// Small sizes: every row and every check, in under a minute.
    #[arg(long)]
    quick: bool,
    /// Print one JSON document instead of the table.
    #[arg(long)]
    json: bool,
    /// List the benches.
    #[arg(long)]
    list: bool,
    /// Where the test files go: on a real disk's file system (up to 1 GiB).
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    let done = match role::play() {
        Some(played) => played.map(|()| true),
        None => run(&Args::parse()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("copage-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs what was asked for; `false` when a bench failed.
fn run(args: &Args) -> Result<bool> {
    if args.list {
        for bench in &BENCHES {
            println!("{:8} {}", bench.name, bench.about);
        }
        return Ok(true);
    }
    if let Some(name) = args
        .names
        .iter()
        .find(|n| BENCHES.iter().all(|b| b.name != n.as_str()))
    {
        bail!("there is no bench {name:?}; --list names them");
    }
    let chosen = BENCHES
        .iter()
        .filter(|b| args.names.is_empty() || args.names.iter().any(|n| n == b.name));
    let setting = Setting::new(Sizes::new(args.quick), args.dir.clone())?;
    let machine = machine(&setting);
    if !args.json {
        println!("{machine}");
    }
    let (mut rows, mut failed) = (Vec::new(), Vec::new());
    for bench in chosen {
        let begin = Instant::now();
        eprint!("{} …", bench.about);
        let result = (bench.run)(&setting, &mut rows);
        eprintln!(" {:.1} s", begin.elapsed().as_secs_f64());
        if let Err(error) = result {
            eprintln!("copage-bench: {}: {error:#}", bench.name);
            failed.push(format!("{}: {error:#}", bench.name));
        }
    }
    if args.json {
        let document = serde_json::json!({
            "machine": machine,
            "quick": args.quick,
            "rows": rows,
            "failed": failed,
        });
        println!("{}", serde_json::to_string_pretty(&document)?);
    } else {
        print!("{}", table::render(&rows));
        let judged = rows.iter().filter(|r| r.met.is_some()).count();
        let met = rows.iter().filter(|r| r.met == Some(true)).count();
        println!("{met} of {judged} budgets met; every byte that was read was checked");
    }
    Ok(failed.is_empty())
}

/// What the figures were taken on.
fn machine(setting: &Setting) -> String {
    let uname = rustix::system::uname();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let in_memory = if setting.in_memory() {
        " (IN MEMORY: native figures are not those of a page cache over a disk; use --dir)"
    } else {
        ""
    };
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?");
    let quick = if setting.sizes.quick {
        "; --quick: the figures mean little"
    } else {
        ""
    };
    format!(
        "{} {}, {cpus} CPUs, load {load} at the start; test files on {}{in_memory} in {}{quick}",
        uname.sysname().to_string_lossy(),
        uname.release().to_string_lossy(),
        setting.filesystem,
        setting.dir().display(),
    )
}
