//! `copage umount`.

use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;

/// Takes a copage mount away, also one whose process is gone.
///
/// The process that served it ends by itself. umount(8) does the same.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage umount /mnt/usr
  copage umount --lazy /mnt/usr      out of sight now, ended with its last use")]
pub struct Args {
    /// Where the mount is
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// Detach mounts that are in use
    #[arg(short = 'z', long)]
    lazy: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for dir in &args.dirs {
        if let Err(e) = copage_mmap::mount::umount(dir, args.lazy) {
            eprintln!("copage umount: {:#}", anyhow::Error::from(e));
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}
