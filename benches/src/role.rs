//! The processes that a bench is made of: this program again, in another role.

use crate::daemon::EXPORT;
use anyhow::{Context, Result, bail, ensure};
use copage::config::Config;
use copage::serve::{Daemon, RunOptions};
use copage_grants::sys::SignalFd;
use copage_mmap::exec::{self, Running, Search};
use copage_mmap::{Client, ConnectOptions, mount};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a process of the benches is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A daemon: CONFIG RUN_DIR.
    Daemon,
    /// A guest: see [`crate::guest`].
    Guest,
    /// A mount: SOCKET EXPORT DIR.
    Mount,
    /// A program run off the export: SOCKET PROGRAM ARGUMENT….
    Exec,
    /// The far end of a bare fault service: see [`crate::bare`].
    BareServer,
    /// Sends back what it is sent: see [`crate::broadcast`].
    Echo,
}

/// Announces a role as the first argument; not a thing to type.
const FLAG: &str = "--role";

impl Role {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Daemon, "daemon"),
        (Self::Guest, "guest"),
        (Self::Mount, "mount"),
        (Self::Exec, "exec"),
        (Self::BareServer, "bare-server"),
        (Self::Echo, "echo"),
    ];

    fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(role, _)| *role == self)
            .map_or("", |(_, name)| name)
    }
}

/// A command that runs this program in `role`; the caller adds its arguments.
pub fn command(role: Role) -> Result<Command> {
    let program = std::env::current_exe().context("this program's own path")?;
    let mut command = Command::new(program);
    command.args([FLAG, role.name()]);
    Ok(command)
}

/// Plays the role that the command line names, if it names one.
pub fn play() -> Option<Result<()>> {
    let mut args = std::env::args_os().skip(1);
    if args.next()? != FLAG {
        return None;
    }
    let name = args.next()?;
    let rest: Vec<OsString> = args.collect();
    let role = Role::ALL
        .iter()
        .find(|(_, n)| name == *n)
        .map(|(role, _)| *role);
    Some(match role {
        Some(Role::Daemon) => daemon(&rest),
        Some(Role::Guest) => crate::guest::main(&rest),
        Some(Role::Mount) => mount(&rest),
        Some(Role::Exec) => exec(&rest),
        Some(Role::BareServer) => crate::bare::server_main(&rest),
        Some(Role::Echo) => crate::broadcast::echo_main(),
        None => Err(anyhow::anyhow!("no role {name:?}")),
    })
}

fn daemon(args: &[OsString]) -> Result<()> {
    let [config, run_dir] = args else {
        bail!("CONFIG RUN_DIR")
    };
    let mut config = Config::load(Path::new(config))?.config;
    config.run_dir = PathBuf::from(run_dir);
    Daemon::run(&config, RunOptions::default())?;
    Ok(())
}

fn mount(args: &[OsString]) -> Result<()> {
    let [socket, export, dir] = args else {
        bail!("SOCKET EXPORT DIR")
    };
    let mounted = mount::mount(&mount::Options {
        target: mount::Target {
            daemon: copage_mmap::DaemonAt::Socket(PathBuf::from(socket)),
            connect: ConnectOptions::default(),
            export: export.to_string_lossy().into_owned(),
        },
        dir: PathBuf::from(dir),
        allow_other: false,
        nonempty: false,
        passthrough: true,
    })?;
    match mounted.wait(None)? {
        mount::Event::Ended(result) => Ok(result?),
        mount::Event::Signal(_) => bail!("a signal, though none was asked for"),
    }
}

fn exec(args: &[OsString]) -> Result<()> {
    let [socket, program, rest @ ..] = args else {
        bail!("SOCKET PROGRAM ARGUMENT…")
    };
    // Before the session, whose threads would be struck else.
    let signals = SignalFd::new(&Running::SIGNALS)?;
    let client = Client::connect(Path::new(socket), &ConnectOptions::default())?;
    let command = exec::Command {
        path: program.clone(),
        args: rest.to_vec(),
        search: Search::default(),
    };
    let mut running = command.start(&client.attach(EXPORT)?)?;
    let status = running.wait(&signals, |_| None)?;
    ensure!(
        status.success(),
        "{}: {status}",
        Path::new(program).display()
    );
    Ok(())
}
