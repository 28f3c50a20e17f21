//! The coherent files that the loop knows: open ones, and those that have pages in frames still.

use super::super::ctx::Ctx;
use super::exclusive::{Exclusive, Running};
use copage_cache::{CachedFile, FileId};
use copage_coherence::strict::Place;
use std::collections::VecDeque;
use std::sync::Arc;

/// One of them.
#[derive(Debug)]
pub(in crate::serve) struct CoFile {
    pub file: Arc<CachedFile>,
    /// How long what is stored stays out of the host's file, in ms.
    pub writeback_ms: u32,
    /// Works under way.
    pub active: usize,
    /// Works that wait for what needs the file for itself.
    pub parked: VecDeque<u64>,
    /// What needs the file for itself: the first of them runs, or waits for works under way.
    pub exclusive: VecDeque<Exclusive>,
    pub running: Option<Running>,
    /// How often it was begun anew.
    pub tries: u32,
    /// When dirty pages are written to the host's file next, in ms; `None`: no page is dirty.
    pub due_ms: Option<u64>,
    /// A write-back is under way.
    pub writing_back: bool,
}

impl CoFile {
    pub(super) fn is_exclusive(&self) -> bool {
        !self.exclusive.is_empty()
    }

    fn is_quiet(&self) -> bool {
        self.active == 0 && !self.is_exclusive() && self.parked.is_empty() && !self.writing_back
    }
}

impl Ctx {
    /// A session has the file open.
    pub(in crate::serve) fn know_file(&mut self, file: &Arc<CachedFile>, writeback_ms: u32) {
        let known = self.coherent.files.entry(file.id);
        let known = known.or_insert_with(|| CoFile {
            file: file.clone(),
            writeback_ms,
            active: 0,
            parked: VecDeque::new(),
            exclusive: VecDeque::new(),
            running: None,
            tries: 0,
            due_ms: None,
            writing_back: false,
        });
        known.writeback_ms = writeback_ms;
    }

    /// Forgets a file that nobody has open and no page of which is anywhere.
    pub(in crate::serve) fn forget_file(&mut self, id: FileId) {
        let Some(file) = self.coherent.files.get(&id) else {
            return;
        };
        if file.is_quiet()
            && !self.openers.contains_key(&id)
            && self.machine.pages().pages_of(id.0).next().is_none()
        {
            if let Some(due_ms) = file.due_ms {
                self.coherent.due.remove(&(due_ms, id));
            }
            self.coherent.files.remove(&id);
        }
    }

    /// A page may be dirty from now on.
    pub(super) fn dirtied(&mut self, place: Place) {
        let id = FileId(place.file);
        let now_ms = self.now_ms;
        if let Some(file) = self.coherent.files.get_mut(&id)
            && file.due_ms.is_none()
        {
            let due_ms = now_ms + u64::from(file.writeback_ms);
            file.due_ms = Some(due_ms);
            self.coherent.due.insert((due_ms, id));
        }
    }
}
