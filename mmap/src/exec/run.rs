//! Starting a planned program and staying with it.

use super::closure::is_musl;
use super::elf::ReadAt;
use super::error::ExecError;
use super::private_dir::PrivateDir;
use super::program::{Dynamic, Part, Plan, Search, Who, last_name, plan};
use super::source::{Pinned, Source, Text};
use super::text::{FileId, TextReport};
use crate::export::Export;
use copage_grants::sys::{SignalFd, unblock_signals};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, Signal, WaitId, WaitIdOptions};
use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::Duration;

/// The most bytes of a loader that are looked through for the options it knows. glibc's has 200 KiB.
const LOADER_BYTES_MAX: usize = 4 << 20;

/// A program to be run off an export.
#[derive(Clone, Debug)]
pub struct Command {
    /// The program: a path of the export (see [`plan`]).
    pub path: OsString,
    /// Its arguments, without the program's name.
    pub args: Vec<OsString>,
    /// What is searched besides the defaults.
    pub search: Search,
}

/// A program that runs off an export. Dropping this does not end it, but its pins: keep it until
/// [`Running::wait`] has returned.
#[derive(Debug)]
pub struct Running {
    child: Child,
    pidfd: OwnedFd,
    plan: Plan<Pinned>,
    frames: HashSet<FileId>,
    /// What they are.
    parts: HashMap<FileId, Part<Pinned>>,
    /// The links by which the loader finds what it loads; removed when dropped.
    _links: PrivateDir,
}

/// What of some files is in this machine's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident {
    /// Files.
    pub files: usize,
    /// Pages of them in memory; `None`: the kernel does not tell.
    pub pages: Option<u64>,
    /// Pages that they have.
    pub of_pages: u64,
}

impl Command {
    /// Finds and pins all that the program needs and starts it. It inherits standard input, output
    /// and error, the environment and the directory, and is killed when this thread's process ends.
    ///
    /// To be called from a thread that lives as long as the program is to run: the kernel ties the
    /// death signal to the thread (prctl(2), PR_SET_PDEATHSIG).
    pub fn start(&self, export: &Export) -> Result<Running, ExecError> {
        self.start_from(export, Text::Frames)
    }

    /// As [`Self::start`], with pages from elsewhere than the shared frames.
    pub fn start_from(&self, export: &Export, text: Text<'_>) -> Result<Running, ExecError> {
        let who = Who::this_process();
        let source = Source { export, text };
        let plan = plan(&source, self.path.as_bytes(), &who, &self.search)?;
        let links = PrivateDir::new()?;
        let proc = proc_of_this_process()?;
        let at =
            |part: &Part<Pinned>| proc.join(part.file.descriptor().as_fd().as_raw_fd().to_string());
        let mut args = Vec::new();
        for (depth, (script, argument)) in plan.scripts.iter().enumerate().rev() {
            args.extend(argument.clone().map(OsString::from_vec));
            let link = links.link(
                &format!("script/{depth}"),
                last_name(&script.path),
                &at(script),
            )?;
            args.push(link.into_os_string());
        }
        args.extend(self.args.iter().cloned());
        // What the user typed is the program's own name, unless a script's interpreter runs.
        let argv0 = match plan.scripts.is_empty() {
            true => self.path.clone(),
            false => OsString::from_vec(plan.program.path.clone()),
        };
        let name = last_name(&plan.program.path);
        let program = links.link("bin", name, &at(&plan.program))?;
        let mut command = match &plan.dynamic {
            None => std::process::Command::new(program),
            Some(dynamic) => {
                // Under the program's name: it is what ps shows.
                let loader = links.link("loader", name, &at(&dynamic.loader))?;
                let mut command = std::process::Command::new(loader);
                command
                    .args(loader_options(dynamic, &links, &at, &argv0)?)
                    .arg(program);
                command
            }
        };
        command.args(args).arg0(argv0);
        let parent = rustix::process::getpid();
        // SAFETY: the closure runs in the forked child before exec: it makes three system calls, takes
        // no lock and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                // The parent may have died before the line above.
                if rustix::process::getppid() != Some(parent) {
                    return Err(rustix::io::Errno::SRCH.into());
                }
                // This process reads them; the program is to get its own.
                unblock_signals(&Running::SIGNALS)
            });
        }
        let parts = parts_of(&plan)?;
        let frames = parts.keys().copied().collect();
        let child = command.spawn().map_err(|source| ExecError::Sys {
            call: "starting it",
            source,
        })?;
        let pid = i32::try_from(child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        let pidfd = pid
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()))
            .map_err(|e| ExecError::Sys {
                call: "pidfd_open",
                source: e.into(),
            })?;
        Ok(Running {
            child,
            pidfd,
            plan,
            frames,
            parts,
            _links: links,
        })
    }
}

impl Running {
    /// The program's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What was found for it.
    pub fn plan(&self) -> &Plan<Pinned> {
        &self.plan
    }

    /// The files it runs from: frame files, or those that its [`Text`] says.
    pub fn frames(&self) -> &HashSet<FileId> {
        &self.frames
    }

    /// The path in the export of one of them.
    pub fn path_of(&self, file: FileId) -> Option<&[u8]> {
        let part = self.parts.get(&file)?;
        Some(&part.path)
    }

    /// Where its text lies now.
    pub fn text(&self) -> io::Result<TextReport> {
        TextReport::of(self.pid(), &self.frames)
    }

    /// What of the files it runs from is in this machine's own memory: for programs that do not run
    /// from shared frames.
    pub fn resident(&self) -> io::Result<Resident> {
        let mut all = Resident {
            files: 0,
            pages: Some(0),
            of_pages: 0,
        };
        for part in self.parts.values() {
            let pages = part.file.resident_pages()?;
            all.files += 1;
            all.of_pages += part.file.pages();
            all.pages = all.pages.zip(pages).map(|(all, pages)| all + pages);
        }
        Ok(all)
    }

    /// Waits for the program to end. `signals` that come meanwhile are passed on (but for those of
    /// the terminal's keys, which the program gets itself); when it is stopped this process stops
    /// too, and goes on with it. `tick` is called before each wait and says how long it may last.
    ///
    /// `signals` should hold those of [`Running::SIGNALS`].
    pub fn wait(
        &mut self,
        signals: &SignalFd,
        mut tick: impl FnMut(&Self) -> Option<Duration>,
    ) -> io::Result<ExitStatus> {
        loop {
            let timeout = tick(self).map(|wait| Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            });
            {
                let mut fds = [
                    PollFd::new(&self.pidfd, PollFlags::IN),
                    PollFd::new(signals, PollFlags::IN),
                ];
                match poll(&mut fds, timeout.as_ref()) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            while let Some(came) = signals.read()? {
                if came.signal == libc::SIGCHLD {
                    self.stop_with_child()?;
                // The terminal's keys are sent by no process, and to the program too.
                } else if came.pid != 0
                    && let Some(signal) = Signal::from_named_raw(came.signal)
                {
                    match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
                        // It has just ended.
                        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
            }
        }
    }

    /// The signals to take before [`Running::wait`], and before the session begins.
    pub const SIGNALS: [i32; 9] = [
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGTERM,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGWINCH,
    ];

    fn stop_with_child(&self) -> io::Result<()> {
        let options = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG;
        let stopped = match rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            Ok(status) => status.is_some_and(|s| s.stopped()),
            Err(rustix::io::Errno::CHILD) => false,
            Err(e) => return Err(e.into()),
        };
        if stopped {
            // A shell that waits for this process must see it stopped. The session's lease may run
            // out meanwhile: the program's frames stay whole, they are only no longer renewed.
            rustix::process::kill_process(rustix::process::getpid(), Signal::STOP)?;
        }
        Ok(())
    }
}

/// `/proc/PID/fd` of this process, by the number it has where /proc was mounted.
fn proc_of_this_process() -> Result<PathBuf, ExecError> {
    let own = std::fs::read_link("/proc/self").map_err(|source| ExecError::Sys {
        call: "reading /proc/self (is /proc mounted?)",
        source,
    })?;
    Ok(Path::new("/proc").join(own).join("fd"))
}

/// Options for the loader, up to the program's path.
fn loader_options(
    dynamic: &Dynamic<Pinned>,
    links: &PrivateDir,
    at: &dyn Fn(&Part<Pinned>) -> PathBuf,
    argv0: &OsStr,
) -> Result<Vec<OsString>, ExecError> {
    let lib = links.dir("lib")?;
    // The empty name is the program's own.
    let mut no_rpath = OsString::new();
    for library in &dynamic.libraries {
        let link = links.link("lib", &library.name, &at(&library.part))?;
        no_rpath.push(":");
        no_rpath.push(link);
    }
    let mut options: Vec<OsString> = vec!["--library-path".into(), lib.into_os_string()];
    if !is_musl(&dynamic.loader.path) {
        // Neither this machine's cache nor a run path may lead to this machine's libraries.
        options.extend(["--inhibit-cache".into(), "--inhibit-rpath".into(), no_rpath]);
    }
    if knows_argv0(&dynamic.loader)? {
        options.extend(["--argv0".into(), argv0.to_owned()]);
    }
    Ok(options)
}

/// glibc has `--argv0` since 2.33, musl since 1.2.2; older ones show the program the link's path.
fn knows_argv0(loader: &Part<Pinned>) -> Result<bool, ExecError> {
    let len = usize::try_from(loader.file.bytes()).unwrap_or(usize::MAX);
    let mut bytes = vec![0; len.min(LOADER_BYTES_MAX)];
    let got = loader
        .file
        .read_at(&mut bytes, 0)
        .map_err(|e| ExecError::Elf {
            path: String::from_utf8_lossy(&loader.path).into_owned(),
            source: e.into(),
        })?;
    Ok(bytes[..got].windows(5).any(|w| w == b"argv0"))
}

fn parts_of(plan: &Plan<Pinned>) -> Result<HashMap<FileId, Part<Pinned>>, ExecError> {
    let dynamic = plan.dynamic.iter();
    let libraries = dynamic
        .clone()
        .flat_map(|d| d.libraries.iter().map(|l| &l.part));
    let parts = dynamic
        .map(|d| &d.loader)
        .chain(libraries)
        .chain([&plan.program]);
    parts
        .map(|part| Ok((FileId::of(part.file.descriptor())?, part.clone())))
        .collect::<io::Result<_>>()
        .map_err(|source| ExecError::Sys {
            call: "fstat of a program's file",
            source,
        })
}
