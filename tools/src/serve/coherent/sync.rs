//! What is dirty goes to the host's file: at Sync, by the clock, and page by page as the machine says.

use super::super::complete::Answer;
use super::super::ctx::Ctx;
use copage_cache::{CacheError, FileId};
use copage_grants::{DomId, FrameNo, PageIndex};

impl Ctx {
    /// Everything that anybody has stored in the file by now goes to the disk.
    pub(in crate::serve) fn strict_sync(&mut self, number: u64, id: FileId, dom: DomId) {
        let Some(file) = self.coherent.files.get(&id) else {
            let gone = Answer::failed(libc::ESTALE);
            self.coherent.answers.push_back((number, gone));
            return;
        };
        self.coherent.counts.told.syncs += 1;
        let pages = self.dirty_pages(id);
        self.cache
            .strict_sync(number, &file.file, Some(dom), pages, true);
    }

    fn dirty_pages(&self, id: FileId) -> Vec<(PageIndex, FrameNo)> {
        let dirty = self.machine.pages().dirty(id.0);
        dirty.map(|page| (page.page, page.frame)).collect()
    }

    /// The daemon stops: what is dirty goes to the disk, before nobody knows of it any more.
    pub(in crate::serve) fn last_sync(&mut self) {
        let dirty: Vec<FileId> = self.coherent.files.keys().copied().collect();
        for id in dirty {
            let pages = self.dirty_pages(id);
            let number = self.number();
            if let Some(file) = self.coherent.files.get(&id)
                && !pages.is_empty()
            {
                self.cache
                    .strict_sync(number, &file.file, None, pages, true);
            }
        }
    }

    /// Files whose dirty pages are due.
    pub(in crate::serve) fn write_back(&mut self) {
        while let Some(&(due_ms, id)) = self.coherent.due.first() {
            if due_ms > self.now_ms {
                return;
            }
            self.coherent.due.pop_first();
            let number = self.number();
            let pages = self.dirty_pages(id);
            let Some(file) = self.coherent.files.get_mut(&id) else {
                continue;
            };
            file.due_ms = None;
            if pages.is_empty() {
                self.forget_file(id);
            } else if !file.writing_back {
                file.writing_back = true;
                self.coherent.counts.told.writebacks += 1;
                self.cache
                    .strict_sync(number, &file.file, None, pages, false);
            }
        }
    }

    /// A sync has ended: a guest's, a write's, or one by the clock.
    pub(super) fn synced(&mut self, number: u64, id: FileId, result: Result<(), CacheError>) {
        if self.tickets.contains_key(&number) && !self.coherent.works.contains_key(&number) {
            let answer = match result {
                Ok(()) => Answer::Done,
                Err(error) => Answer::refused(&error),
            };
            self.coherent.answers.push_back((number, answer));
            return;
        }
        if self.write_synced(number, result) {
            return;
        }
        let still = self.machine.pages().dirty(id.0).next().is_some();
        let now_ms = self.now_ms;
        let Some(file) = self.coherent.files.get_mut(&id) else {
            return;
        };
        file.writing_back = false;
        if still && file.due_ms.is_none() {
            let due_ms = now_ms + u64::from(file.writeback_ms);
            file.due_ms = Some(due_ms);
            self.coherent.due.insert((due_ms, id));
        } else if !still {
            self.forget_file(id);
        }
    }
}
