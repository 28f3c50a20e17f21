//! What the pager must not do itself, because moving pages waits for the pager: a thread that does
//! nothing until a file changes, pages are taken back, or the session is lost.

use super::moved::MoveJob;
use super::told::Told;
use crate::error::{LostWhy, MmapError, Result};
use crate::file::{Content, FileInner};
use crate::granted::{Brought, MapJob, MapOutcome, Pages};
use crate::mapped::{Form, Mapped};
use crate::quiet::Quiet;
use crate::rebase::{hollow, rebase, unmapped};
use crate::session::Recall;
use crate::shared::Shared;
use crate::stamp::{SessionNo, Stamp};
use copage_coherence::msg::PageRange;
use copage_grants::{PAGE_SIZE, PageIndex};
use crossbeam_channel::{Receiver, Sender};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// One thing to do.
pub(crate) enum Job {
    /// Show a newer content, then say so if a notice asked (`recall`). The file's `rebases` was
    /// raised by who sends this.
    Rebase {
        file: Arc<FileInner>,
        content: Content,
        recall: Option<Recall>,
    },
    /// The file is not there in the new session: its mappings are SIGBUS. As with a rebase, its
    /// `rebases` was raised.
    Refuse {
        file: Arc<FileInner>,
        error: MmapError,
    },
    /// Nobody vouches any more for what sessions up to this one gave.
    Hollow(SessionNo),
    /// Take pages out of the page tables, then say so.
    Invalidate {
        file: Arc<FileInner>,
        stamp: Stamp,
        range: PageRange,
        recall: Option<Recall>,
    },
    /// Map a batch of grants.
    Map(MapJob),
    /// Map pages for writing.
    Move(MoveJob),
    /// Its length is another: pages that were behind its end may be there now.
    Resized(Arc<FileInner>),
    /// Tell a caller to look again: what was before it is done.
    Again(Sender<Brought>),
    /// Put what was read in place of a missing private page.
    Restore {
        mapped: Arc<Mapped>,
        file_page: u64,
        bytes: Result<Box<[u8; PAGE_SIZE]>>,
    },
    /// Unmap.
    Unmap(Arc<Mapped>),
    /// The session is lost: everything becomes SIGBUS. The last job.
    Lost,
}

/// The worker's thread. Ends after [`Job::Lost`]; `finished` tells the pager that it may end too.
pub(crate) fn run(shared: &Arc<Shared>, jobs: &Receiver<Job>, finished: &AtomicBool) {
    Quiet::forever();
    while let Ok(job) = jobs.recv() {
        if matches!(job, Job::Lost) {
            break;
        }
        // A bug here must not leave threads waiting in their faults: it ends the session.
        if catch_unwind(AssertUnwindSafe(|| work(shared, job))).is_err() {
            shared.line.lose(LostWhy::Internal);
            break;
        }
    }
    let mappings = shared.space.lock().close();
    let error = shared.line.lost_error();
    for mapped in &mappings {
        mapped.refuse(shared, &error);
    }
    // Nothing is left for the pager to read: no page of this client is registered any more.
    finished.store(true, Ordering::Release);
    shared.line.common.wake.signal();
    drop(mappings);
    shared.line.tell_lost();
    // Mappings dropped while they were refused.
    while let Ok(job) = jobs.try_recv() {
        if let Job::Unmap(mapped) = job {
            mapped.unmap(shared);
        }
    }
}

fn work(shared: &Shared, job: Job) {
    match job {
        Job::Rebase {
            file,
            content,
            recall,
        } => do_rebase(shared, &file, content, recall),
        Job::Refuse { file, error } => {
            let mappings = shared.space.lock().of_file(&file);
            for mapped in mappings {
                mapped.refuse(shared, &error);
            }
            // As after a rebase.
            file.rebases.fetch_sub(1, Ordering::SeqCst);
            wake_file(shared, &file);
        }
        Job::Hollow(last) => {
            for file in shared.mappable_files() {
                if file.content.lock().stamp.session() <= last {
                    hollow(shared, &file);
                }
            }
        }
        Job::Invalidate {
            file,
            stamp,
            range,
            recall,
        } => {
            let pages = Pages {
                stamp,
                first: range.first.0,
                count: range.count.into(),
            };
            if file.is_counted() {
                take_back(shared, &file, pages, recall);
                return;
            }
            invalidate(shared, &file, stamp, range);
            unmapped(shared, &file, stamp, pages.first, pages.count);
            if let Some(recall) = recall {
                recall.ack();
            }
        }
        Job::Map(job) => {
            let outcome = crate::granted::map(shared, &job);
            let (number, pages) = (job.number, job.pages);
            let mut copies = job.mappings.iter().filter(|m| m.form() == Form::Own);
            let copied = copies.next().map(|mapped| Arc::clone(mapped.file()));
            // What it held goes first: a mapping may have ended meanwhile.
            drop(job);
            shared.tell(Told::Mapped { number, outcome });
            // Behind that, as nothing is given back that is on its way. What another mapping has
            // mapped stays so: the daemon looks at the table.
            if let Some(file) = copied {
                shared.tell(Told::GivenBack { file, pages });
            }
        }
        Job::Move(job) => {
            let outcome = move_in(shared, &job);
            let number = job.number;
            drop(job);
            shared.tell(Told::Mapped { number, outcome });
        }
        Job::Resized(file) => {
            let mappings = shared.space.lock().of_file(&file);
            for mapped in mappings {
                mapped.renew_refused(shared);
            }
        }
        Job::Again(tell) => {
            // The caller waits for exactly this.
            let _ = tell.send(Brought::Again);
        }
        Job::Restore {
            mapped,
            file_page,
            bytes,
        } => mapped.restore(shared, file_page, bytes),
        Job::Unmap(mapped) => {
            mapped.unmap(shared);
            // Granted ones are there still; of others it does nothing.
            shared.space.lock().remove(&mapped);
        }
        // The end of `run`'s loop.
        Job::Lost => {}
    }
}

fn wake_file(shared: &Shared, file: &Arc<FileInner>) {
    if let Ok(uffd) = &shared.uffd {
        let mappings = shared.space.lock().of_file(file);
        for mapped in mappings {
            mapped.wake_all(uffd);
        }
    }
}

fn do_rebase(shared: &Shared, file: &Arc<FileInner>, content: Content, recall: Option<Recall>) {
    let stamp = content.stamp;
    rebase(shared, file, content);
    // Down first, then wake: a fault that the pager let lie because the count was up is waiting by
    // now; one that comes later is served.
    file.rebases.fetch_sub(1, Ordering::SeqCst);
    wake_file(shared, file);
    if let Some(recall) = recall {
        if file.is_counted() {
            // Behind the word that the older content is unmapped, which the pager says.
            let pages = Pages {
                stamp,
                first: 0,
                count: 0,
            };
            let recall = Some(recall);
            let file = Arc::clone(file);
            shared.tell(Told::TakenBack {
                file,
                pages,
                recall,
            });
        } else {
            recall.ack();
        }
    }
}

/// Takes granted pages back, then has the pager say so.
fn take_back(shared: &Shared, file: &Arc<FileInner>, pages: Pages, recall: Option<Recall>) {
    let range = PageRange {
        first: PageIndex(pages.first),
        // It came as one.
        count: u32::try_from(pages.count).unwrap_or(u32::MAX),
    };
    let told = Told::TakenBack {
        file: Arc::clone(file),
        pages,
        recall,
    };
    #[cfg(test)]
    if let Ok(granted) = shared.granted()
        && granted.mutants.ack_first.load(Ordering::SeqCst)
    {
        shared.tell(told);
        std::thread::sleep(std::time::Duration::from_millis(1));
        return invalidate(shared, file, pages.stamp, range);
    }
    invalidate(shared, file, pages.stamp, range);
    shared.tell(told);
}

/// Maps pages for writing wherever they are waited for.
fn move_in(shared: &Shared, job: &MoveJob) -> MapOutcome {
    let Some(token) = job.file.token_in(job.session.number()) else {
        return MapOutcome::Spoiled;
    };
    let site = job.file.content.lock().site.clone();
    let Some(site) = site else {
        return MapOutcome::Spoiled;
    };
    let from = match site.source(&job.session, token, job.place) {
        Ok(Some(from)) => from,
        // The session ended, or the file of all writers was replaced.
        Ok(None) | Err(MmapError::Lost(_)) => return MapOutcome::Spoiled,
        Err(error) => return MapOutcome::Failed(error),
    };
    for mapped in &job.mappings {
        if job.crowded {
            mapped.give_home(shared);
        }
        let still = || !job.spoiled.load(Ordering::SeqCst) && job.session.has_lease();
        match mapped.move_in(shared, &job.pages, from.as_fd(), still) {
            Ok(true) => {}
            Ok(false) => return MapOutcome::Spoiled,
            Err(error) => return MapOutcome::Failed(error),
        }
    }
    MapOutcome::Done
}

/// Unmaps pages in every mapping of the file, of every open of it.
fn invalidate(shared: &Shared, file: &Arc<FileInner>, stamp: Stamp, range: PageRange) {
    let site = file.content.lock().site.clone();
    let mappings = match &site {
        Some(site) => shared.of_site(site),
        None => shared.space.lock().of_file(file),
    };
    for mapped in mappings.iter().filter(|m| m.stamp() == stamp) {
        let Some((first, end)) = mapped.clip(range.first.0, range.count) else {
            continue;
        };
        mapped.take_home(shared, first, end);
        if let Err(e) = mapped.discard(shared, first, end) {
            // The daemon takes them by force, or fences: its table is the truth.
            tracing::warn!(error = %e, "pages could not be unmapped");
        }
    }
}
