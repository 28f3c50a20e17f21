//! Private mappings of granted files: copies.
//!
//! The memory is anonymous and registered MISSING|WP. A batch is copied by the hypervisor (grant
//! copy: nothing is mapped, nothing counts against maptrack) into a buffer and put in place
//! write-protected, a page at a time and only where nothing is, by UFFDIO_COPY: a reader sees a
//! whole page or waits. The first store to a page faults and is counted as with every private
//! mapping. Once copied, the entries are given back (by the worker, when the request is done with).

use super::{Granted, MapJob, MapOutcome};
use crate::error::MmapError;
use crate::mapped::{Mapped, span};
use crate::shared::Shared;
use copage_grants::PAGE_SIZE;

impl Mapped {
    pub(super) fn copy_batch(
        &self,
        shared: &Shared,
        granted: &Granted,
        job: &MapJob,
    ) -> MapOutcome {
        let Some((first, end)) = self.clip(job.pages.first, job.refs.len() as u32) else {
            return MapOutcome::Done;
        };
        let skip = (self.first_page() + first as u64 - job.pages.first) as usize;
        let refs = &job.refs[skip..skip + (end - first)];
        let mut pages = vec![[0; PAGE_SIZE]; refs.len()];
        let copied = granted.device.copy(job.granter, refs, &mut pages);
        // Copied before this is asked: the bytes are those of the pages if it still holds.
        if !granted.still(job) {
            return MapOutcome::Spoiled;
        }
        if let Err(e) = copied {
            return MapOutcome::Failed(MmapError::sys("grant copy", &e));
        }
        let uffd = match shared.uffd() {
            Ok(uffd) => uffd,
            Err(error) => return MapOutcome::Failed(error),
        };
        let mut lock = self.lock(shared);
        let Some(ops) = lock.ops() else {
            return MapOutcome::Done;
        };
        if ops.region.is_none() || ops.refused || self.stamp() != job.pages.stamp {
            return MapOutcome::Done;
        }
        // What a rebase passed over gets the newest content otherwise, and what is refused stays so.
        let mut at = first;
        while at < end {
            let skipped = |p: &usize| ops.behind.get(*p) || ops.refused_pages.contains(p);
            let until = (at..end).find(skipped).unwrap_or(end);
            if at < until {
                let run = &pages[at - first..until - first];
                if let Err(e) = uffd.copy_protected(self.addr() + span(at), run) {
                    return MapOutcome::Failed(MmapError::sys("UFFDIO_COPY", &e));
                }
            }
            at = until + 1;
        }
        MapOutcome::Done
    }
}
