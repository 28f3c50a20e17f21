//! `copage demo`: a daemon and four guest processes on this machine's own files, every figure
//! measured while one watches.

pub mod agent;
pub mod cast;
pub mod deaths;
pub mod files;
pub mod hypervisor;
pub mod memory;
pub mod pattern;
pub mod proto;
pub mod ratios;
pub mod report;
pub mod run_program;
pub mod scenario;
pub mod stage;
pub mod writes;

use anyhow::{Context, Result};
use cast::{Cast, Part};
use clap::Args;
use proto::{Answer, Order};
use report::{Report, mib};
use scenario::Scene;
use stage::{DaemonProcess, Guest, ask_all};
use std::path::PathBuf;
use std::process::ExitCode;

/// What `copage demo` takes.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  copage demo                 share this machine's libraries and programs (/usr) among four guests
  copage demo /srv/images     share files of your own
  copage demo --json          the same figures for a program

Needs no configuration, writes only below a temporary directory and ends by itself in under half a
minute. Exit code 1: something shown was not so.")]
pub struct DemoArgs {
    /// The directory whose files are shared.
    #[arg(value_name = "DIR", default_value = "/usr")]
    pub dir: PathBuf,
    /// Guest processes.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(3..=16))]
    pub guests: u16,
    /// One JSON document instead of lines.
    #[arg(long)]
    pub json: bool,
    /// Guests of a hypervisor that somebody else has started: a file that says how to reach them.
    #[arg(long, hide = true)]
    pub cast: Option<PathBuf>,
}

/// What the hidden `copage demo-agent` takes: one guest of the demo.
#[derive(Args, Clone, Debug)]
pub struct AgentArgs {
    /// The daemon's socket for guests; `xen`: over the ring of a Xen guest.
    #[arg(long)]
    pub connect: String,
    /// The guest's name.
    #[arg(long)]
    pub name: String,
}

/// Nanoseconds on CLOCK_MONOTONIC, which all processes of one machine share.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // The clock starts at boot: neither part is negative.
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Writes a file and waits until it is on the disk, so that reading it from there later does not
/// have to wait for that.
fn write_durably(path: &std::path::Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    std::io::Write::write_all(&mut file, bytes)?;
    file.sync_all()
}

/// Runs the hidden guest.
pub fn run_agent(args: &AgentArgs) -> Result<ExitCode> {
    if args.connect == "xen" {
        // Why an access was refused, for who looks into a guest's console why it ended.
        tracing_subscriber::fmt()
            .with_ansi(false)
            .with_max_level(tracing::Level::INFO)
            .with_writer(std::io::stderr)
            .init();
    }
    agent::run(&args.connect, &args.name)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the demo.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    let mut report = Report::new(args.json);
    let cast = args.cast.as_deref().map(Cast::read).transpose()?;
    let scale = cast.as_ref().map_or(cast::LOCAL, |_| cast::XEN);
    let on = match &cast {
        Some(cast) => on_hypervisor(cast),
        None => on_this_machine(args.guests),
    };
    report.line(
        "machine",
        true,
        format!("{on}, sharing {}", args.dir.display()),
    );
    let dir = tempfile::Builder::new()
        .prefix("copage-demo-")
        .tempdir()
        .context("a directory")?;
    let root = std::fs::canonicalize(&args.dir).with_context(|| {
        format!(
            "{}: give a directory with files to share",
            args.dir.display()
        )
    })?;
    let files = files::choose(&root, scale.files_bytes_max, scale.files_max)?;
    let scratch = dir.path().join("scratch");
    std::fs::create_dir(&scratch)?;
    let written = dir.path().join(writes::EXPORT);
    std::fs::create_dir(&written)?;
    let begin = std::time::Instant::now();
    let domains = cast.as_ref().map(|cast| cast.guests.as_slice());
    let dirs = [
        ("demo", &*root, "ro"),
        ("scratch", &*scratch, "ro"),
        (writes::EXPORT, &*written, "coherent"),
    ];
    let config = scenario::config(&scale, dirs, domains);
    let mut daemon = DaemonProcess::start(dir.path(), &config)?;
    let parts = match cast {
        Some(cast) => cast.guests,
        None => (1..=args.guests)
            .map(|n| Part::process(&daemon.guest_socket(), &format!("guest{n}")))
            .collect::<Result<_>>()?,
    };
    let mut guests = parts.iter().map(Guest::start).collect::<Result<Vec<_>>>()?;
    let domids: Vec<_> = ask_all(&mut guests, &Order::Connect)?
        .into_iter()
        .map(|answer| match answer {
            Answer::Connected { domid } => format!("d{domid}"),
            other => format!("{other:?}"),
        })
        .collect();
    report.line(
        "guests",
        true,
        format!(
            "one daemon and {} connected after {:.0} ms, frame budget {}",
            domids.join(" "),
            begin.elapsed().as_secs_f64() * 1e3,
            mib(scale.frames_mib << 20),
        ),
    );
    let mut scene = Scene {
        report: &mut report,
        scale,
        hypervisor: args.cast.is_some(),
        daemon: &mut daemon,
        guests,
        files: &files,
        scratch,
        written,
    };
    if scene.hypervisor {
        let before = scene.guest_caches()?;
        scene.share_files()?;
        scene.memory_of_domains(&before)?;
        scene.frame_of_domains()?;
    } else {
        let left = scene.share_files()?;
        scene.memory(left)?;
        scene.frame()?;
        run_program::show(scene.report, scene.daemon, &root)?;
    }
    scene.host_change()?;
    scene.write()?;
    scene.killed()?;
    if scene.hypervisor {
        scene.paused()?;
    } else {
        scene.stopped()?;
    }
    scene.daemon_killed()?;
    scene.budget()?;
    scene.audit()?;
    let scratch = scene.scratch.clone();
    let hypervisor = scene.hypervisor;
    drop(scene);
    if !hypervisor {
        ratios::show(&mut report, &daemon.guest_socket(), &scratch)?;
        report.note(&format!(
            "\nNext:  copage serve --export usr={0} &      a daemon of your own\n       \
             copage mount usr /mnt              ordinary programs open, map and run files from /mnt\n       \
             copage exec usr bin/ls -l /        a program, its loader and its libraries off the share\n       \
             copage pages usr:bin/ls; copage grants; copage audit; copage doctor",
            root.display()
        ));
    }
    report.finish()?;
    Ok(if report.all_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn on_this_machine(guests: u16) -> String {
    format!(
        "local backend on Linux {}, {}: {guests} guests are processes",
        rustix::system::uname().release().to_string_lossy(),
        if rustix::process::geteuid().is_root() {
            "as root"
        } else {
            "as an ordinary user"
        },
    )
}

fn on_hypervisor(cast: &Cast) -> String {
    let guests: Vec<_> = cast
        .guests
        .iter()
        .map(|part| format!("{} ({})", part.name, part.kind))
        .collect();
    format!("{}: {}", cast.hypervisor, guests.join(", "))
}
