//! The threads that write to the host's files. They are not those that read: a disk that takes long to write
//! does not hold up who reads, nor a sync who hands a page on.

use crate::cache::Cache;
use crate::error::CacheError;
use crate::file::CachedFile;
use crate::fill::Buffer;
use crate::limits::{SAVE_THREADS, SYNC_THREADS};
use crate::pool::Pool;
use copage_grants::{DomId, FrameNo, PageIndex, Version};
use parking_lot::Mutex;
use std::sync::Arc;

/// What is asked of them.
#[derive(Debug)]
pub(crate) enum DiskJob {
    Save {
        file: Arc<CachedFile>,
        page: PageIndex,
        version: Version,
    },
    Sync {
        ticket: u64,
        file: Arc<CachedFile>,
        who: Option<DomId>,
        pages: Vec<(PageIndex, FrameNo)>,
        durable: bool,
    },
    Reserve {
        ticket: u64,
        file: Arc<CachedFile>,
        first: u32,
        end: u32,
    },
    Resize {
        ticket: u64,
        file: Arc<CachedFile>,
        bytes: u64,
    },
}

/// See the module.
pub(crate) struct DiskWork {
    saves: Pool<DiskJob>,
    syncs: Pool<DiskJob>,
    /// The threads are there: the first coherent export starts them.
    is_started: Mutex<bool>,
}

impl DiskWork {
    pub(crate) fn new() -> Self {
        // Bounded by what the machine has under way: one save a page, and what sessions ask for.
        Self {
            saves: Pool::new(usize::MAX),
            syncs: Pool::new(usize::MAX),
            is_started: Mutex::new(false),
        }
    }

    pub(crate) fn stop(&self) {
        self.saves.stop();
        self.syncs.stop();
    }
}

impl Cache {
    pub(crate) fn start_disk_work(&self) -> Result<(), CacheError> {
        let mut is_started = self.disk_work.is_started.lock();
        if std::mem::replace(&mut *is_started, true) {
            return Ok(());
        }
        let pools = [
            ("save", SAVE_THREADS, &self.disk_work.saves),
            ("sync", SYNC_THREADS, &self.disk_work.syncs),
        ];
        for (name, threads, pool) in pools {
            for n in 0..threads {
                let weak = self.me.clone();
                let mut buffer = Buffer::new();
                pool.spawn(format!("{name}-{n}"), move |job| {
                    let Some(cache) = weak.upgrade() else {
                        return false;
                    };
                    cache.run_disk_job(job, &mut buffer);
                    true
                })?;
            }
        }
        Ok(())
    }

    fn run_disk_job(&self, job: DiskJob, buffer: &mut Buffer) {
        match job {
            DiskJob::Save {
                file,
                page,
                version,
            } => {
                let result = self.save_pages(&file, &[page], buffer);
                self.answer_save(&file, page, version, result);
            }
            DiskJob::Sync {
                ticket,
                file,
                who,
                pages,
                durable,
            } => {
                let result = self.run_sync(&file, who, pages, durable, buffer);
                self.answer_sync(ticket, &file, result);
            }
            DiskJob::Reserve {
                ticket,
                file,
                first,
                end,
            } => {
                let result = self.run_reserve(&file, first, end);
                self.answer_reserve(ticket, &file, result);
            }
            DiskJob::Resize {
                ticket,
                file,
                bytes,
            } => {
                let result = self.run_strict_resize(&file, bytes);
                self.answer_resize(ticket, &file, result);
            }
        }
    }

    /// Has a thread do it; answers by an error when the cache stops.
    pub(crate) fn push_disk_job(&self, job: DiskJob) {
        let pool = match &job {
            DiskJob::Sync { durable: true, .. } => &self.disk_work.syncs,
            _ => &self.disk_work.saves,
        };
        let Err(job) = pool.push(job) else {
            return;
        };
        let stopped = CacheError::Stopped;
        match job {
            DiskJob::Save {
                file,
                page,
                version,
            } => self.answer_save(&file, page, version, Err(stopped)),
            DiskJob::Sync { ticket, file, .. } => self.answer_sync(ticket, &file, Err(stopped)),
            DiskJob::Reserve { ticket, file, .. } => {
                self.answer_reserve(ticket, &file, Err(stopped));
            }
            DiskJob::Resize { ticket, file, .. } => {
                self.answer_resize(ticket, &file, Err(stopped));
            }
        }
    }
}
