//! Which daemon, and as whom.

use anyhow::{Context, Result};
use copage_grants::xen::{Role, here};
use copage_mmap::{Client, ConnectOptions, DaemonAt, Export};
use std::io;
use std::path::PathBuf;

/// Which daemon to connect to, and as whom.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Where {
    /// The daemon's run directory [default: $COPAGE_RUN_DIR, else /run/copage for root, else
    /// $XDG_RUNTIME_DIR/copage]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// The daemon's guest socket [default: guest.sock in the run directory]
    #[arg(long, value_name = "PATH", conflicts_with = "run_dir")]
    pub socket: Option<PathBuf>,
    /// Where the daemon is: `xen`, in the control domain of this Xen guest, or its guest socket
    /// [default: the socket if there is one, in a Xen guest else xen]
    #[arg(long, value_name = "xen|SOCKET", conflicts_with_all = ["run_dir", "socket"])]
    pub connect: Option<PathBuf>,
    /// The guest's name, as access lists know it [default: what the daemon makes of your uid]
    #[arg(long = "as", value_name = "NAME")]
    pub name: Option<String>,
}

impl Where {
    /// The socket.
    pub fn socket(&self) -> PathBuf {
        if let Some(socket) = &self.socket {
            return socket.clone();
        }
        self.run_dir().join("guest.sock")
    }

    /// The run directory: of the daemon, and of what is kept for programs that run.
    pub(super) fn run_dir(&self) -> PathBuf {
        let from_env = || std::env::var_os("COPAGE_RUN_DIR").map(PathBuf::from);
        self.run_dir
            .clone()
            .or_else(from_env)
            .unwrap_or_else(crate::config::default_run_dir)
    }

    /// The daemon: by a socket, or, in a Xen guest without one, by the control channel.
    pub fn daemon(&self) -> DaemonAt {
        match &self.connect {
            Some(place) if place.as_os_str() == "xen" => return DaemonAt::Xen,
            Some(socket) => return DaemonAt::Socket(socket.clone()),
            None => {}
        }
        let socket = self.socket();
        let said = self.socket.is_some() || self.run_dir.is_some();
        if !said && !socket.exists() && here().role == Role::Guest {
            return DaemonAt::Xen;
        }
        DaemonAt::Socket(socket)
    }

    /// What to tell the daemon of oneself. Commands read or mount and never map by the library, so
    /// they ask for no userfaultfd.
    pub fn options(&self) -> ConnectOptions {
        ConnectOptions {
            name: self.name.clone().unwrap_or_default(),
            userfault: copage_mmap::UserfaultPolicy::None,
            ..ConnectOptions::default()
        }
    }

    /// A session.
    pub fn connect(&self) -> Result<Client> {
        let daemon = self.daemon();
        Client::connect_at(&daemon, &self.options()).map_err(|e| {
            let kind = io::Error::from_raw_os_error(e.errno()).kind();
            let down = matches!(
                kind,
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            );
            let hint = if down && daemon != DaemonAt::Xen {
                "; is a daemon running? (`copage serve`; --run-dir says where another one is)"
            } else {
                ""
            };
            anyhow::anyhow!("cannot connect to {daemon}: {e}{hint}")
        })
    }

    /// An export, with a session of its own.
    pub fn attach(&self, export: &str) -> Result<Export> {
        let client = self.connect()?;
        client.attach(export).with_context(|| {
            let known = client.exports().unwrap_or_default();
            match known.is_empty() {
                true => format!("export {export} (there is none that you may use)"),
                false => format!("export {export} (you may use: {})", known.join(", ")),
            }
        })
    }
}
