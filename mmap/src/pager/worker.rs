//! What the pager must not do itself, because moving pages waits for the pager: a thread that does
//! nothing until a file changes, pages are taken back, or the session is lost.

use crate::error::{LostWhy, Result};
use crate::file::{Content, FileInner};
use crate::granted::{Brought, MapJob, Pages, Told};
use crate::mapped::Mapped;
use crate::mapping::MapKind;
use crate::quiet::Quiet;
use crate::rebase::{rebase, unmapped};
use crate::session::Shared;
use copage_coherence::msg::{Generation, PageRange, Request};
use copage_grants::{PAGE_SIZE, PageIndex};
use crossbeam_channel::{Receiver, Sender};
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
        recall: Option<u64>,
    },
    /// Take pages out of the page tables, then say so.
    Invalidate {
        file: Arc<FileInner>,
        generation: Generation,
        range: PageRange,
        recall: u64,
    },
    /// Map a batch of grants.
    Map(MapJob),
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
            shared.session.lose(LostWhy::Internal);
            break;
        }
    }
    let mappings = shared.space.lock().close();
    for mapped in &mappings {
        mapped.refuse_lost(shared);
    }
    // Nothing is left for the pager to read: no page of this session is registered any more.
    finished.store(true, Ordering::Release);
    shared.session.wake.signal();
    drop(mappings);
    shared.session.tell_lost();
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
        Job::Invalidate {
            file,
            generation,
            range,
            recall,
        } => {
            if file.granted() {
                let pages = Pages {
                    generation,
                    first: range.first.0,
                    count: range.count.into(),
                };
                take_back(shared, &file, pages, recall);
                return;
            }
            invalidate(shared, &file, generation, range);
            unmapped(
                shared,
                file.token,
                generation,
                range.first.0,
                range.count.into(),
            );
            shared.session.post(&Request::Ack { recall });
        }
        Job::Map(job) => {
            let outcome = crate::granted::map(shared, &job);
            let (number, pages) = (job.number, job.pages);
            let mut copies = job.mappings.iter().filter(|m| m.kind() == MapKind::Private);
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

fn do_rebase(shared: &Shared, file: &Arc<FileInner>, content: Content, recall: Option<u64>) {
    rebase(shared, file, content);
    // Down first, then wake: a fault that the pager let lie because the count was up is waiting by
    // now; one that comes later is served.
    file.rebases.fetch_sub(1, Ordering::SeqCst);
    if let Ok(uffd) = &shared.uffd {
        let mappings = shared.space.lock().of_file(file);
        for mapped in mappings {
            mapped.wake_all(uffd);
        }
    }
    if let Some(recall) = recall {
        if file.granted() {
            // Behind the word that the older content is unmapped, which the pager says.
            let pages = Pages {
                generation: Generation(0),
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
            shared.session.post(&Request::Ack { recall });
        }
    }
}

/// Takes granted pages back, then has the pager say so.
fn take_back(shared: &Shared, file: &Arc<FileInner>, pages: Pages, recall: u64) {
    let range = PageRange {
        first: PageIndex(pages.first),
        // It came as one.
        count: u32::try_from(pages.count).unwrap_or(u32::MAX),
    };
    let told = Told::TakenBack {
        file: Arc::clone(file),
        pages,
        recall: Some(recall),
    };
    #[cfg(test)]
    if let Ok(granted) = shared.granted()
        && granted.mutants.ack_first.load(Ordering::SeqCst)
    {
        shared.tell(told);
        std::thread::sleep(std::time::Duration::from_millis(1));
        return invalidate(shared, file, pages.generation, range);
    }
    invalidate(shared, file, pages.generation, range);
    shared.tell(told);
}

fn invalidate(shared: &Shared, file: &Arc<FileInner>, generation: Generation, range: PageRange) {
    let mappings = shared.space.lock().of_file(file);
    for mapped in mappings.iter().filter(|m| m.generation() == generation) {
        if let Some((first, end)) = mapped.clip(range.first.0, range.count)
            && let Err(e) = mapped.discard(shared, first, end)
        {
            // The daemon takes them by force, or fences: its table is the truth.
            tracing::warn!(error = %e, "pages could not be unmapped");
        }
    }
}
