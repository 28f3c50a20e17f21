//! The way back: a thread that looks for the daemon and, when one is there, opens everything again in a
//! new session. It moves no pages, so that they can become hollow meanwhile; it may be stuck in a
//! connect for as long as that takes, so nobody waits for it.

use crate::connect::{Dialer, hello};
use crate::error::{MmapError, Result};
use crate::limits::{RECONNECT_PAUSE_MAX, RECONNECT_PAUSE_MIN};
use crate::pager::told::Told;
use crate::pager::worker::Job;
use crate::quiet::Quiet;
use crate::session::{Session, ended};
use crate::shared::Shared;
use crate::stamp::SessionNo;
use copage_grants::Epoch;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Looks for a daemon after session `last`, at once or, after sessions that did not last, with pauses. The
/// pager hears of it. Dropping what this returns ends it.
pub(crate) fn look(
    shared: &Arc<Shared>,
    last: (SessionNo, Epoch),
    short_lives: u32,
) -> io::Result<Sender<()>> {
    let (looking, stop) = bounded(0);
    let shared = Arc::clone(shared);
    std::thread::Builder::new()
        .name("copage-return".into())
        .spawn(move || {
            Quiet::forever();
            run(&shared, last, short_lives, &stop);
        })?;
    Ok(looking)
}

fn run(shared: &Arc<Shared>, last: (SessionNo, Epoch), short_lives: u32, stop: &Receiver<()>) {
    let Some(dialer) = &shared.dialer else {
        return;
    };
    let longer = |pause: Duration| (pause * 2).min(RECONNECT_PAUSE_MAX);
    let mut pause = Duration::ZERO;
    for _ in 0..short_lives.min(10) {
        pause = longer(pause.max(RECONNECT_PAUSE_MIN));
    }
    loop {
        // Nothing is ever sent: it is dropped when nobody wants a daemon any more.
        if stop.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        match connect(shared, dialer, last) {
            Ok((session, hello_ms)) => {
                shared.tell(Told::Connected {
                    session: Arc::clone(&session),
                    hello_ms,
                });
                // Said first, asked afterwards: a pager that ends finds the session, or this sees it.
                if shared.line.lost().is_none() && open_all(shared, &session, stop).is_ok() {
                    shared.tell(Told::Returned(session.number()));
                }
                return;
            }
            Err(error) => tracing::debug!(%error, "no daemon yet"),
        }
        pause = longer(pause.max(RECONNECT_PAUSE_MIN / 2));
    }
}

fn connect(
    shared: &Shared,
    dialer: &Dialer,
    (number, epoch): (SessionNo, Epoch),
) -> Result<(Arc<Session>, u64)> {
    let channel = (dialer.dial)()?;
    let begun = hello(&channel, &dialer.name, false)?;
    if begun.welcome.epoch <= epoch {
        // Versions would go back.
        return Err(MmapError::Protocol(format!(
            "the daemon's epoch went back, from {} to {}",
            epoch.0, begun.welcome.epoch.0
        )));
    }
    let common = shared.line.common.clone();
    let session = Session::new(number.next(), begun.welcome, channel, common);
    Ok((Arc::new(session), begun.hello_ms))
}

/// Opens all files again that may be mapped. What is only read, and directories, are found again when
/// they are used.
fn open_all(shared: &Shared, session: &Arc<Session>, stop: &Receiver<()>) -> Result<()> {
    for file in shared.mappable_files() {
        let mut pause = RECONNECT_PAUSE_MIN;
        let opened = loop {
            match file.open_again(shared, session) {
                // The host is just writing it.
                Err(MmapError::Refused { errno, .. })
                    if errno == libc::EAGAIN && pause < RECONNECT_PAUSE_MAX =>
                {
                    // Dropped when this session is over, or all is: the next call tells.
                    let _ = stop.recv_timeout(pause);
                    pause *= 2;
                }
                other => break other,
            }
        };
        let job = match opened {
            Ok(Some(content)) => Job::Rebase {
                file: Arc::clone(&file),
                content,
                recall: None,
            },
            Ok(None) => continue,
            Err(MmapError::Lost(_)) => return Err(ended()),
            Err(error) => {
                tracing::warn!(%error, "a file is not mapped any more");
                Job::Refuse {
                    file: Arc::clone(&file),
                    error,
                }
            }
        };
        file.rebases.fetch_add(1, Ordering::SeqCst);
        let _ = shared.jobs.send(job);
    }
    Ok(())
}
