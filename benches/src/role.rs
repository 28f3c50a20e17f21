//! The processes that a bench is made of: this program again, in another role.

use anyhow::{Context, Result, bail};
use std::ffi::OsString;
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
}

/// Announces a role as the first argument; not a thing to type.
const FLAG: &str = "--role";

impl Role {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Daemon, "daemon"),
        (Self::Guest, "guest"),
        (Self::Mount, "mount"),
        (Self::Exec, "exec"),
        (Self::BareServer, "bare-server"),
    ];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(role, _)| *role == self).map_or("", |(_, name)| name)
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
    let role = Role::ALL.iter().find(|(_, n)| name == *n).map(|(role, _)| *role);
    Some(match role {
        Some(Role::Daemon) => daemon(&rest),
        Some(Role::Guest) => crate::guest::main(&rest),
        Some(Role::Mount) => mount(&rest),
        Some(Role::Exec) => exec(&rest),
        Some(Role::BareServer) => crate::bare::server_main(&rest),
        None => Err(anyhow::anyhow!("no role {name:?}")),
    })
}

fn daemon(args: &[OsString]) -> Result<()> {
    let [_config, _run_dir] = args else { bail!("CONFIG RUN_DIR") };
    bail!("not yet")
}

fn mount(args: &[OsString]) -> Result<()> {
    let [_socket, _export, _dir] = args else { bail!("SOCKET EXPORT DIR") };
    bail!("not yet")
}

fn exec(args: &[OsString]) -> Result<()> {
    let [_socket, _program, _rest @ ..] = args else { bail!("SOCKET PROGRAM ARGUMENT…") };
    bail!("not yet")
}
