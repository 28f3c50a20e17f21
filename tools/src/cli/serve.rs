//! `copage serve`.

use crate::config::limits::FRAMES_MIB;
use crate::config::{BackendChoice, Config, DEFAULT_FILE, ExportConfig, Loaded, check_name};
use crate::serve::{Daemon, RunOptions};
use anyhow::{Context, Result};
use clap::ValueEnum;
use clap::builder::{OsStringValueParser, TypedValueParser};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tracing_subscriber::filter::LevelFilter;

/// Is the daemon: exports directories to guests until it is told to stop.
///
/// Stays in the foreground and logs to standard error. It says READY by sd_notify(3) when
/// $NOTIFY_SOCKET is there, and by --ready-fd. SIGTERM, SIGINT or `copage stop` end it cleanly.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage serve                                        as /etc/copage/copage.toml says
  copage serve --export usr=/usr                      no file: one export, defaults for the rest
  copage serve --export usr=/usr --export img=/srv/images --frames-mib 256
  copage serve --config ./copage.toml --run-dir /tmp/copage --log debug
  copage serve --export usr=/usr --no-force           as Xen is: only guests unmap")]
pub struct Args {
    /// The configuration file [default: /etc/copage/copage.toml, unless --export is given]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where guest.sock and admin.sock are made [default: $COPAGE_RUN_DIR, else what the file says,
    /// else /run/copage for root, else $XDG_RUNTIME_DIR/copage]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Export a directory read-only to all guests (repeatable)
    #[arg(long = "export", value_name = "NAME=DIR", value_parser = OsStringValueParser::new().try_map(export))]
    exports: Vec<ExportConfig>,
    /// The budget of frames, in MiB
    #[arg(long, value_name = "N",
          value_parser = clap::value_parser!(u64).range(*FRAMES_MIB.start()..=*FRAMES_MIB.end()))]
    frames_mib: Option<u64>,
    /// What holds the frames: auto, local or xen [default: what the file says, else auto]
    #[arg(long, value_name = "WHICH")]
    backend: Option<BackendChoice>,
    /// Do not take pages back by force
    #[arg(long)]
    no_force: bool,
    /// Write READY and a newline to this descriptor once guests can connect
    #[arg(long, value_name = "FD")]
    ready_fd: Option<u32>,
    /// How much to log [default: $COPAGE_LOG, else info]
    #[arg(long, value_name = "LEVEL")]
    log: Option<Level>,
}

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Level {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<Level> for LevelFilter {
    fn from(level: Level) -> Self {
        match level {
            Level::Off => Self::OFF,
            Level::Error => Self::ERROR,
            Level::Warn => Self::WARN,
            Level::Info => Self::INFO,
            Level::Debug => Self::DEBUG,
            Level::Trace => Self::TRACE,
        }
    }
}

/// `NAME=DIR`; the directory may have any bytes, and further `=`.
fn export(text: OsString) -> Result<ExportConfig, String> {
    let bytes = text.as_bytes();
    let Some(at) = bytes.iter().position(|&byte| byte == b'=') else {
        return Err("give NAME=DIR, as in usr=/usr".to_owned());
    };
    let name = std::str::from_utf8(&bytes[..at]).map_err(|_| "the name is not UTF-8".to_owned())?;
    check_name(name).map_err(|text| format!("the name {text}"))?;
    let dir = Path::new(OsStr::from_bytes(&bytes[at + 1..]));
    let dir = std::path::absolute(dir).map_err(|error| format!("the directory: {error}"))?;
    Ok(ExportConfig::new(name, dir))
}

/// Runs it, until the daemon stops.
pub fn run(args: &Args) -> Result<ExitCode> {
    start_log(args.log)?;
    let Loaded {
        config,
        file,
        warnings,
    } = load(args)?;
    for warning in &warnings {
        let file = file.as_deref().unwrap_or(Path::new("")).display();
        tracing::warn!(%file, line = warning.line, "{}: {}", warning.key, warning.text);
    }
    tracing::info!(
        exports = config.exports.len(),
        frames_mib = config.frames_mib,
        run_dir = %config.run_dir.display(),
        "copage {} starts",
        env!("CARGO_PKG_VERSION")
    );
    Daemon::run(
        &config,
        RunOptions {
            ready_fd: args.ready_fd,
        },
    )?;
    tracing::info!("stopped");
    Ok(ExitCode::SUCCESS)
}

/// What the file says and what the command line says over it.
fn load(args: &Args) -> Result<Loaded> {
    let file = match (&args.config, args.exports.is_empty()) {
        (Some(file), _) => Some(file.as_path()),
        (None, true) => Some(Path::new(DEFAULT_FILE)),
        (None, false) => None,
    };
    let mut loaded = match file {
        Some(file) => Config::load(file)?,
        None => Loaded {
            config: Config::default(),
            file: None,
            warnings: Vec::new(),
        },
    };
    let config = &mut loaded.config;
    let from_env = std::env::var_os("COPAGE_RUN_DIR").filter(|dir| !dir.is_empty());
    if let Some(dir) = args.run_dir.clone().or_else(|| from_env.map(PathBuf::from)) {
        config.run_dir = std::path::absolute(dir).context("--run-dir")?;
    }
    if let Some(frames_mib) = args.frames_mib {
        config.frames_mib = frames_mib;
    }
    config.force &= !args.no_force;
    config.backend = args.backend.unwrap_or(config.backend);
    if !args.exports.is_empty() {
        config.exports.extend(args.exports.iter().cloned());
        // Against each other and against those of the file; warnings were told by the file.
        loaded.config = loaded.config.check()?.config;
    }
    Ok(loaded)
}

fn start_log(level: Option<Level>) -> Result<()> {
    let level = match (level, std::env::var("COPAGE_LOG")) {
        (Some(level), _) => level,
        (None, Ok(name)) if !name.is_empty() => Level::from_str(&name, true).map_err(|_| {
            let text = format!("COPAGE_LOG={name}: give off, error, warn, info, debug or trace");
            crate::output::Usage(text)
        })?,
        _ => Level::Info,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::from(level))
        .with_writer(std::io::stderr)
        .with_target(false);
    // The journal puts its own time before each line. Another subscriber (of a program that uses
    // this as a library) stays.
    let _ = match std::env::var_os("JOURNAL_STREAM") {
        Some(_) => tracing::subscriber::set_global_default(log.without_time().finish()),
        None => tracing::subscriber::set_global_default(log.finish()),
    };
    Ok(())
}
