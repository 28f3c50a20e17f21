//! What the administrator is shown of coherent files.

use super::super::admin_types::{
    FilePagesEntry, LeaseHolder, LeasePage, LeasesEntry, PageRunEntry, StrictRun,
};
use super::super::core::Core;
use super::super::limits::PAGE_RUNS_MAX;
use copage_coherence::strict::{DAEMON, HolderState, PageState, State};
use copage_grants::{Access, Epoch};
use std::path::{Component, Path, PathBuf};

/// A state's name.
fn name_of(state: State) -> &'static str {
    match state {
        State::Away => "away",
        State::Free => "free",
        State::Shared => "shared",
        State::Exclusive => "exclusive",
        State::SharedRw => "shared-rw",
    }
}

impl Core {
    /// The pages of coherent files, of one or of all, at most so many.
    pub(in crate::serve) fn leases(&self, path: Option<&Path>, pages_max: usize) -> LeasesEntry {
        let mut found = LeasesEntry::default();
        let wanted = path.map(|path| self.host_path(path));
        let mut files: Vec<_> = self.ctx.coherent.files.iter().collect();
        files.sort_unstable_by_key(|(id, _)| **id);
        for (id, file) in files {
            let path = file.file.path();
            if wanted.as_ref().is_some_and(|wanted| *wanted != path) {
                continue;
            }
            for state in self.ctx.machine.pages().pages_of(id.0) {
                if found.pages.len() >= pages_max {
                    found.more = true;
                    return found;
                }
                found.pages.push(self.lease(&path, &state));
            }
        }
        found
    }

    /// Puts the pages of a coherent file, as the machine has them, in the place of what the cache says.
    pub(in crate::serve) fn show_strict(&self, entry: &mut FilePagesEntry) {
        let wanted = self.host_path(&entry.path);
        let mut files = self.ctx.coherent.files.iter();
        let Some((id, _)) = files.find(|(_, file)| file.file.path() == wanted) else {
            return;
        };
        let mut runs: Vec<PageRunEntry> = Vec::new();
        for page in self.ctx.machine.pages().pages_of(id.0) {
            if page.frame.is_none() {
                continue;
            }
            let next = self.run_of(&page);
            let goes_on = |run: &&mut PageRunEntry| {
                run.first + run.count == next.first
                    && (&run.holders, &run.strict) == (&next.holders, &next.strict)
            };
            if let Some(run) = runs.last_mut().filter(goes_on) {
                run.count += 1;
            } else if runs.len() < PAGE_RUNS_MAX {
                runs.push(next);
            } else {
                break;
            }
        }
        entry.runs = runs;
    }

    fn run_of(&self, page: &PageState) -> PageRunEntry {
        let names = |writers: bool| {
            let of = |holder: &&HolderState| !writers || holder.access == Access::ReadWrite;
            let holders = page.holders.iter().filter(of);
            holders.map(|holder| self.guest_of(holder.epoch)).collect()
        };
        PageRunEntry {
            first: page.page.0,
            count: 1,
            huge: false,
            holders: names(false),
            strict: Some(StrictRun {
                state: name_of(page.state).to_owned(),
                version: page.version.to_string(),
                dirty: page.dirty,
                writers: names(true),
            }),
        }
    }

    fn lease(&self, path: &Path, page: &PageState) -> LeasePage {
        let holder = |holder: &HolderState| LeaseHolder {
            guest: self.guest_of(holder.epoch),
            epoch: holder.epoch.0,
            writable: holder.access == Access::ReadWrite,
            leaving: holder.leaving,
        };
        let work = if page.placing {
            Some("filling")
        } else if page.saving {
            Some("saving")
        } else {
            None
        };
        let waiting = page.wants.iter().map(|want| match want.who {
            Some((epoch, Access::ReadOnly)) => format!("{}:ro", self.guest_of(epoch)),
            Some((epoch, Access::ReadWrite)) => format!("{}:rw", self.guest_of(epoch)),
            None => "(take)".to_owned(),
        });
        LeasePage {
            file: path.to_owned(),
            page: page.page.0,
            state: name_of(page.state).to_owned(),
            version: page.version.to_string(),
            dirty: page.dirty,
            work: work.map(str::to_owned),
            holders: page.holders.iter().map(holder).collect(),
            waiting: waiting.collect(),
            since_ms: self.ctx.now_ms.saturating_sub(page.since_ms),
        }
    }

    fn guest_of(&self, epoch: Epoch) -> String {
        if epoch == DAEMON {
            return "(daemon)".to_owned();
        }
        let conn = self.ctx.by_epoch.get(&epoch);
        let session = conn
            .and_then(|id| self.conns.get(id))
            .and_then(|conn| conn.session.as_ref());
        session.map_or_else(|| format!("({})", epoch.0), |s| s.name.to_string())
    }

    /// `EXPORT/path` as a path of the host; others as they are.
    fn host_path(&self, path: &Path) -> PathBuf {
        let mut parts = path.components();
        let Some(Component::Normal(first)) = parts.next() else {
            return path.to_owned();
        };
        let exports = self.ctx.exports.ids();
        let export = exports.iter().find(|(name, ..)| first == name.as_str());
        export.map_or_else(
            || path.to_owned(),
            |(_, _, root)| {
                let root = std::path::absolute(root).unwrap_or_else(|_| root.clone());
                root.join(parts.as_path())
            },
        )
    }
}
