//! What answers the kernel, whatever a mount's place is.

use super::core::Core;
use super::error::MountError;
use super::fs::ShareFs;
use super::limits;
use super::link::{Link, Target};
use super::open::Form;
use super::workers::{Change, Job, opener, watch_changes};
use crate::export::ExportMode;
use crossbeam_channel::{Receiver, Sender};
use fuser::{BackingId, Session};
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};

fn sys(call: &'static str) -> impl Fn(io::Error) -> MountError {
    move |source| MountError::Sys { call, source }
}

/// A session with the daemon that no mount uses yet.
pub(super) struct Prepared {
    core: Arc<Core>,
    want_passthrough: bool,
    /// The most that the kernel may read ahead; `None`: what it likes.
    readahead_bytes: Option<u32>,
    jobs: (Sender<Job>, Receiver<Job>),
    changes: (Sender<Change>, Receiver<Change>),
}

impl Prepared {
    pub(super) fn new(
        target: Target,
        want_passthrough: bool,
        readahead_bytes: Option<u32>,
        may_be_coherent: bool,
    ) -> Result<Self, MountError> {
        let link = Link::new(target)?;
        let mode = link.last().export.mode();
        let coherent = mode == ExportMode::Coherent && may_be_coherent;
        if mode != ExportMode::ReadOnly && !coherent {
            return Err(MountError::Mode {
                export: link.target().export.clone(),
            });
        }
        Ok(Self {
            core: Arc::new(Core::new(link, coherent)),
            want_passthrough: want_passthrough && !coherent,
            readahead_bytes,
            jobs: crossbeam_channel::unbounded(),
            changes: crossbeam_channel::unbounded(),
        })
    }

    pub(super) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// What the kernel's requests are for.
    pub(super) fn file_system(&self) -> ShareFs {
        ShareFs {
            core: self.core.clone(),
            jobs: self.jobs.0.clone(),
            changes: self.changes.0.clone(),
            want_passthrough: self.want_passthrough,
            readahead_bytes: self.readahead_bytes,
        }
    }

    /// Answers the kernel from now on.
    pub(super) fn serve(self, session: Session<ShareFs>) -> Result<Server, MountError> {
        let Self {
            core,
            want_passthrough,
            jobs: (jobs, job_queue),
            changes: (changes, change_queue),
            ..
        } = self;
        // The file system has its own: the threads end when it does.
        drop(jobs);
        let why = match core.is_coherent() {
            true => {
                Some("guests write the export, and shared mappings of its files are refused".into())
            }
            false => no_passthrough(&session, &core, want_passthrough),
        };
        let _ = core.notifier.set(session.notifier());
        for number in 0..limits::OPENERS {
            let (core, queue, changes) = (core.clone(), job_queue.clone(), changes.clone());
            thread::Builder::new()
                .name(format!("copage-open-{number}"))
                .spawn(move || opener(&core, &queue, &changes))
                .map_err(sys("starting a thread"))?;
        }
        drop(changes);
        let watched = core.clone();
        thread::Builder::new()
            .name("copage-changes".into())
            .spawn(move || watch_changes(&watched, &change_queue))
            .map_err(sys("starting a thread"))?;
        let (ended, running) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|e| sys("pipe")(e.into()))?;
        let thread = thread::Builder::new()
            .name("copage-mount".into())
            .spawn(move || {
                let result = session.run();
                drop(running);
                match result {
                    // As it ended one of the threads had just taken a request (fuse_dev_do_read).
                    Err(e) if e.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
                    result => result,
                }
            })
            .map_err(sys("starting a thread"))?;
        let form = match (core.is_coherent(), core.passthrough()) {
            (true, _) => Form::Direct,
            (false, true) => Form::Frames,
            (false, false) => Form::PageCache,
        };
        Ok(Server {
            form,
            why,
            thread: Mutex::new(Some(thread)),
            ended,
        })
    }
}

/// Runs until the mount is over.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) form: Form,
    /// Why files are not on frames.
    pub(super) why: Option<String>,
    thread: Mutex<Option<JoinHandle<io::Result<()>>>>,
    /// Hung up when it has ended.
    pub(super) ended: OwnedFd,
}

impl Server {
    pub(super) fn is_running(&self) -> bool {
        let thread = self.thread.lock();
        thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Waits for its end.
    pub(super) fn join(&self) -> io::Result<()> {
        match self.thread.lock().take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("the mount's server panicked")),
            None => Ok(()),
        }
    }
}

/// The kernel's end of a FUSE connection.
pub(super) fn device() -> Result<File, MountError> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => MountError::NoDevice { source },
            _ => MountError::NoFuse { source },
        })
}

/// Turns passthrough off where the kernel will refuse it, and says why in words for the user.
fn no_passthrough(session: &Session<ShareFs>, core: &Core, wanted: bool) -> Option<String> {
    if !wanted {
        return Some("passthrough was not wanted".into());
    }
    if !core.passthrough() {
        return Some("this kernel has no FUSE passthrough (Linux 6.9 and later have it)".into());
    }
    // The kernel looks at the right to do it before it looks at the file, and takes no device: EPERM
    // says no, anything else that it would do.
    let answer = BackingId::create_raw(session.as_fd(), session.as_fd());
    let refused = matches!(&answer, Err(e) if e.raw_os_error() == Some(libc::EPERM));
    refused.then(|| {
        core.passthrough.store(false, Ordering::Relaxed);
        "passthrough needs CAP_SYS_ADMIN in the first user namespace (root outside containers)"
            .into()
    })
}
