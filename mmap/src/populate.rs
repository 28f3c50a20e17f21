//! Bringing a mapping's pages on request.

use crate::error::{MmapError, Result};
use crate::granted::Brought;
use crate::limits::{POPULATE_TRIES_MAX, WINDOW_PAGES_MAX};
use crate::mapped::Form;
use crate::mapping::{Mapping, PageError};
use crate::pager::told::Told;
use crate::stamp::Stamp;
use crate::uffd::Mode;
use copage_coherence::msg::{FaultHint, PageRange, Reply, Request};
use copage_grants::{PAGE_SIZE, PageIndex, pages_for};
use std::ops::Range;
use std::sync::Arc;

impl Mapping {
    pub(crate) fn bring(&self, range: Range<usize>, write: bool) -> Result<()> {
        let shared = self.client.shared();
        shared.line.check_process()?;
        if range.start > range.end || range.end > self.len {
            return Err(MmapError::Invalid(format!(
                "{}..{} is not a range of a mapping of {} bytes",
                range.start, range.end, self.len
            )));
        }
        if range.is_empty() {
            return Ok(());
        }
        let first = range.start / PAGE_SIZE;
        let end = range.end.div_ceil(PAGE_SIZE);
        self.mapped.try_again(shared, first, end)?;
        let step = WINDOW_PAGES_MAX as usize;
        let mut at = first;
        while at < end {
            // Windows end where the daemon's readahead and huge frames end.
            let place = self.mapped.first_page() as usize + at;
            let until = (at + (step - place % step)).min(end);
            self.bring_window(at, until, write)?;
            at = until;
        }
        Ok(())
    }

    /// Brings at most [`WINDOW_PAGES_MAX`] pages: asks for them, then maps them; again when they
    /// were taken back in between.
    fn bring_window(&self, first: usize, end: usize, write: bool) -> Result<()> {
        let shared = self.client.shared();
        let mut last = MmapError::Sys {
            call: "madvise(MADV_POPULATE)",
            errno: libc::EAGAIN,
        };
        for _ in 0..POPULATE_TRIES_MAX {
            self.ask(first, end, write)?;
            let own = write && self.mapped.form() == Form::Own;
            let mut brought = self.mapped.populate(first, end, write && !own);
            if own && brought.is_ok() {
                self.mapped.make_private(shared, first, end)?;
                brought = self.mapped.populate(first, end, true);
            }
            match brought {
                Ok(()) => return Ok(()),
                // EFAULT: a page was taken back, and is not waited for in user mode only; or it is
                // past the end by now. EHWPOISON: it was refused just now.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EFAULT | libc::EHWPOISON)) => {
                    last = MmapError::sys("madvise(MADV_POPULATE)", &e);
                    if let Some(why) = shared.line.lost() {
                        return Err(MmapError::Lost(why));
                    }
                }
                // Before Linux 5.14 pages are brought, and mapped at the first touch.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
                Err(e) => return Err(MmapError::sys("madvise(MADV_POPULATE)", &e)),
            }
        }
        match self.mapped.last_error() {
            Some(refused) if shared.uffd()?.mode() == Mode::Full => Err(refused.error),
            _ => Err(last),
        }
    }

    /// Asks the daemon for pages `first..end` of the mapping.
    fn ask(&self, first: usize, end: usize, write: bool) -> Result<()> {
        let shared = self.client.shared();
        let file = self.mapped.file();
        if file.is_counted() {
            return self.ask_counted(first, end, write);
        }
        let mut at = first;
        let mut stales = 0;
        while at < end {
            let page = self.mapped.first_page() + at as u64;
            let stamp = self.mapped.stamp();
            let file_bytes = file.content.lock().bytes;
            if self.mapped.first_page() + end as u64 > pages_for(file_bytes) {
                return Err(MmapError::Invalid(format!(
                    "the range ends past the end of the file, which has {file_bytes} bytes now"
                )));
            }
            let asked = shared.in_session(|session| {
                let now = session.number();
                let (Some(generation), Some(token)) = (stamp.within(now), file.token_in(now))
                else {
                    return Ok(None);
                };
                let request = Request::Fault {
                    file: token,
                    generation,
                    range: PageRange {
                        first: PageIndex(page),
                        count: (end - at) as u32,
                    },
                    hint: FaultHint::Populate,
                    access: copage_grants::Access::ReadOnly,
                };
                Ok(Some((now, session.call(&request)?)))
            });
            let Some((now, answer)) = asked? else {
                // What the session that serves gave is on its way to the mapping.
                self.settle()?;
                at = first;
                continue;
            };
            match answer.reply()? {
                Reply::Granted { range, .. } => {
                    let granted = range.first.0.saturating_add(range.count.into());
                    if granted <= page {
                        return Err(MmapError::Protocol("granted without the first page".into()));
                    }
                    at += ((granted - page) as usize).min(end - at);
                }
                Reply::Stale {
                    generation,
                    version,
                    bytes,
                } => {
                    stales += 1;
                    let newest = Stamp::new(now, generation);
                    if newest <= stamp || stales > POPULATE_TRIES_MAX {
                        return Err(MmapError::Protocol("stale without a newer content".into()));
                    }
                    let Some(fd) = answer.fd else {
                        return Err(MmapError::Protocol("stale without a descriptor".into()));
                    };
                    crate::rebase::rebase(
                        shared,
                        file,
                        crate::file::Content {
                            stamp: newest,
                            version,
                            bytes,
                            home: Some(Arc::new(fd)),
                            site: None,
                        },
                    );
                    self.check_refused()?;
                    at = first;
                }
                other => return Err(crate::client::unexpected("Granted", &other)),
            }
        }
        Ok(())
    }

    /// Fails if all of the mapping is SIGBUS.
    fn check_refused(&self) -> Result<()> {
        match self.mapped.last_error() {
            Some(PageError {
                offset: None,
                error,
            }) => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits until what the worker was told to do with mappings is done.
    fn settle(&self) -> Result<()> {
        self.client.shared().settle()?;
        self.check_refused()
    }

    /// Has pages `first..end` of the mapping brought where the daemon counts them. The pager asks: what it sends and what
    /// it says to be unmapped must keep their order ([`crate::granted`]).
    fn ask_counted(&self, first: usize, end: usize, write: bool) -> Result<()> {
        let shared = self.client.shared();
        let base = self.mapped.first_page();
        let (mut at, end) = (base + first as u64, base + end as u64);
        let mut again = 0;
        while at < end {
            let file_bytes = self.mapped.file().content.lock().bytes;
            if end > pages_for(file_bytes) {
                return Err(MmapError::Invalid(format!(
                    "the range ends past the end of the file, which has {file_bytes} bytes now"
                )));
            }
            let (tell, told) = crossbeam_channel::bounded(1);
            shared.tell(Told::Want {
                mapped: Arc::clone(&self.mapped),
                page: at,
                end,
                write,
                tell,
            });
            match told.recv() {
                Ok(Brought::Until(until)) if until > at => at = until,
                Ok(Brought::Until(_) | Brought::Again) => {
                    again += 1;
                    if again > POPULATE_TRIES_MAX {
                        return Err(MmapError::Sys {
                            call: "bringing pages that are taken back at once",
                            errno: libc::EAGAIN,
                        });
                    }
                    self.check_refused()?;
                }
                Ok(Brought::Failed(error)) => return Err(error),
                // The daemon is away.
                Err(_) => {
                    shared.line.session()?;
                }
            }
        }
        Ok(())
    }
}
