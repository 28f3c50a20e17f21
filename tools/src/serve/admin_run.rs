//! Slow requests of the administrator, on a thread of their own: what looks at every grant or page,
//! or may touch a disk.

use super::admin_types::{
    AdminReply, AuditCheck, AuditEntry, ExportEntry, FilePagesEntry, GrantLine, GrantsEntry,
    GuestGrantsEntry, PageRunEntry,
};
use super::exports::offer;
use super::limits::{ADMIN_CONNECTIONS_MAX, PAGE_RUNS_MAX};
use super::wake::Wake;
use copage_cache::{Cache, CacheError, CacheStats, ExportId, NodeRef};
use copage_grants::{Access, Backend, DomId, TableInfo};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// What the thread is to do.
#[derive(Debug)]
pub(super) enum Job {
    Audit,
    Stats,
    Pages {
        path: PathBuf,
        exports: Vec<(String, ExportId, PathBuf)>,
        names: Names,
    },
    Grants {
        guest: Option<String>,
        entries_max: usize,
        names: Names,
    },
    Reclaim {
        pages: u64,
    },
    Drop,
    SetBudget {
        frames: u32,
    },
    ExportAdd(ExportEntry),
    ExportRemove(ExportId),
}

/// The grant tables, and how many grants are in them.
#[derive(Debug)]
pub(super) struct Tables {
    pub tables: Vec<TableInfo>,
    pub grants: u64,
}

/// Names of the guests that have sessions, by domid.
pub(super) type Names = HashMap<DomId, String>;

/// What came of it.
#[derive(Debug)]
pub(super) enum Done {
    Reply(AdminReply),
    /// With the grant tables; the loop adds what only it knows.
    Stats(Box<CacheStats>, Tables),
    /// The loop enters it in its table.
    Added(ExportId, ExportEntry),
}

/// The threads, and the ways to them and back. What makes memory for a larger budget has a thread of its
/// own: it can take minutes, and the others are to be answered meanwhile.
pub(super) struct Runner {
    jobs: Sender<(u64, Job)>,
    budgets: Sender<(u64, Job)>,
    pub done: Receiver<(u64, Done)>,
}

impl Runner {
    /// Starts the threads. They end when this is dropped.
    pub(super) fn start(
        cache: &Arc<Cache>,
        backend: &Arc<dyn Backend>,
        wake: &Arc<Wake>,
    ) -> std::io::Result<Self> {
        let (answer, done) = unbounded();
        let start = |name: &str| {
            // One request of each connection at a time, so it cannot fill up.
            let (jobs, todo) = bounded::<(u64, Job)>(ADMIN_CONNECTIONS_MAX);
            let (cache, backend) = (Arc::clone(cache), Arc::clone(backend));
            let (wake, answer) = (Arc::clone(wake), Sender::clone(&answer));
            std::thread::Builder::new()
                .name(name.into())
                .spawn(move || {
                    for (conn, job) in todo {
                        let result = run(&cache, &*backend, job);
                        if answer.send((conn, result)).is_err() {
                            return;
                        }
                        wake.wake();
                    }
                })
                .map(|_| jobs)
        };
        Ok(Self {
            jobs: start("copage-admin")?,
            budgets: start("copage-budget")?,
            done,
        })
    }

    /// Hands over a request; `false`: the thread is busy with as many as there can be.
    pub(super) fn submit(&self, conn: u64, job: Job) -> bool {
        let to = match job {
            Job::SetBudget { .. } => &self.budgets,
            _ => &self.jobs,
        };
        to.try_send((conn, job)).is_ok()
    }
}

fn refused(error: &CacheError) -> AdminReply {
    AdminReply::Error {
        errno: error.errno(),
        text: error.to_string(),
    }
}

fn run(cache: &Cache, backend: &dyn Backend, job: Job) -> Done {
    Done::Reply(match job {
        Job::Audit => AdminReply::Audit(audit(cache)),
        Job::Stats => {
            let mut grants = 0;
            backend.each_grant(&mut |_| grants += 1);
            let tables = backend.tables();
            return Done::Stats(Box::new(cache.stats()), Tables { tables, grants });
        }
        Job::Pages {
            path,
            exports,
            names,
        } => match pages(cache, &path, &exports, &names) {
            Ok(entry) => AdminReply::Pages(entry),
            Err((errno, text)) => AdminReply::Error { errno, text },
        },
        Job::Grants {
            guest,
            entries_max,
            names,
        } => AdminReply::Grants(grants(backend, guest.as_deref(), entries_max, &names)),
        Job::Reclaim { pages } => AdminReply::Reclaimed {
            pages: cache.reclaim(pages),
        },
        Job::Drop => {
            let held = |s: &CacheStats| u64::from(s.frames_resident);
            let before = held(&cache.stats());
            cache.drop_all();
            let after = held(&cache.stats());
            AdminReply::Reclaimed {
                pages: before.saturating_sub(after),
            }
        }
        Job::SetBudget { frames } => match cache.set_frames_max(frames) {
            Ok(()) => AdminReply::Done,
            Err(error) => refused(&error),
        },
        Job::ExportAdd(entry) => match offer(cache, &entry) {
            Ok(id) => return Done::Added(id, entry),
            Err(error) => refused(&error),
        },
        Job::ExportRemove(id) => match cache.remove_export(id) {
            Ok(()) => AdminReply::Done,
            Err(error) => refused(&error),
        },
    })
}

fn audit(cache: &Cache) -> AuditEntry {
    let start = Instant::now();
    let report = cache.audit();
    let ok = report.is_clean();
    let cache_check = format!(
        "cache against ledger and frames ({} files, {} grants, {} last pages read)",
        report.files, report.grants, report.tails
    );
    AuditEntry {
        ok,
        checks: vec![
            AuditCheck {
                name: "ledger against grant tables".to_owned(),
                checked: report.ledger.entries.max(report.ledger.grants),
                differences: report.ledger.differences,
            },
            AuditCheck {
                name: cache_check,
                checked: report.frames,
                differences: report.differences,
            },
        ],
        took_ms: u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}

fn name_of(names: &Names, dom: DomId) -> String {
    names
        .get(&dom)
        .cloned()
        .unwrap_or_else(|| format!("({})", dom.0))
}

fn grants(
    backend: &dyn Backend,
    guest: Option<&str>,
    entries_max: usize,
    names: &Names,
) -> GrantsEntry {
    let mut found = GrantsEntry::default();
    let mut by_dom: BTreeMap<u16, (u64, u64)> = BTreeMap::new();
    backend.each_grant(&mut |grant| {
        if guest.is_some_and(|g| names.get(&grant.dom).is_none_or(|n| n != g)) {
            return;
        }
        let counts = by_dom.entry(grant.dom.0).or_default();
        counts.0 += 1;
        counts.1 += u64::from(grant.mapped);
        if found.entries.len() < entries_max {
            found.entries.push(GrantLine {
                guest: name_of(names, grant.dom),
                dom: grant.dom.0,
                table: grant.grant.table.0,
                granter: backend.granter(grant.grant.table).map(|dom| dom.0),
                gref: grant.grant.gref.0,
                frame: grant.frame.0,
                writable: grant.access == Access::ReadWrite,
                mapped: grant.mapped,
            });
        }
    });
    for (dom, (grants, mapped)) in by_dom {
        found.total += grants;
        found.mapped += mapped;
        let guest = name_of(names, DomId(dom));
        found.guests.push(GuestGrantsEntry {
            guest,
            dom,
            grants,
            mapped,
        });
    }
    found
}

/// The export that a path begins with, and the rest: `EXPORT/path`, or a path of the host.
fn split<'a>(
    path: &'a Path,
    exports: &'a [(String, ExportId, PathBuf)],
) -> Option<(ExportId, &'a Path)> {
    if path.is_absolute() {
        return exports
            .iter()
            .find_map(|(_, id, root)| path.strip_prefix(root).ok().map(|rest| (*id, rest)));
    }
    let mut parts = path.components();
    let Some(Component::Normal(first)) = parts.next() else {
        return None;
    };
    let (_, id, _) = exports.iter().find(|(name, _, _)| first == name.as_str())?;
    Some((*id, parts.as_path()))
}

/// Symbolic links are not followed: what is asked for is what is there.
fn walk(cache: &Cache, export: ExportId, rest: &Path) -> Result<NodeRef, CacheError> {
    let mut node = cache.root(export)?;
    for part in rest.components() {
        match part {
            Component::Normal(name) => {
                node = cache.lookup(&node, name.as_encoded_bytes())?.0;
            }
            Component::CurDir => {}
            _ => return Err(CacheError::BadName("'..' in a path of an export")),
        }
    }
    Ok(node)
}

fn pages(
    cache: &Cache,
    path: &Path,
    exports: &[(String, ExportId, PathBuf)],
    names: &Names,
) -> Result<FilePagesEntry, (i32, String)> {
    let Some((export, rest)) = split(path, exports) else {
        return Err((libc::ENOENT, format!("{} is in no export", path.display())));
    };
    let node = walk(cache, export, rest).map_err(|e| (e.errno(), e.to_string()))?;
    let mut entry = FilePagesEntry {
        path: path.to_owned(),
        cached: false,
        bytes: 0,
        generation: 0,
        version: String::new(),
        resident_pages: 0,
        huge_pages: 0,
        grants: 0,
        pinned: false,
        host_bounded: false,
        quarantined_pages: 0,
        runs: Vec::new(),
    };
    let Some(found) = cache.pages(&node).map_err(|e| (e.errno(), e.to_string()))? else {
        return Ok(entry);
    };
    entry.cached = true;
    entry.bytes = found.bytes;
    entry.generation = found.generation;
    entry.version = found.version.to_string();
    entry.resident_pages = found.resident;
    entry.pinned = found.pins > 0;
    entry.host_bounded = found.host_bounded;
    entry.quarantined_pages = found.quarantined;
    for run in &found.runs {
        let count = u64::from(run.count);
        entry.huge_pages += if run.huge { count } else { 0 };
        entry.grants += count * run.holders.len() as u64;
    }
    entry.runs = found
        .runs
        .iter()
        .take(PAGE_RUNS_MAX)
        .map(|run| PageRunEntry {
            first: run.first.0,
            count: run.count.into(),
            huge: run.huge,
            holders: run.holders.iter().map(|dom| name_of(names, *dom)).collect(),
            strict: None,
        })
        .collect();
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_exports_or_lie_below_them() {
        let exports = [
            ("libs".to_owned(), ExportId(1), PathBuf::from("/usr/lib")),
            ("etc".to_owned(), ExportId(2), PathBuf::from("/etc")),
        ];
        let at = |path: &'static str| split(Path::new(path), &exports);
        assert_eq!(at("libs/a/b"), Some((ExportId(1), Path::new("a/b"))));
        assert_eq!(at("/etc/passwd"), Some((ExportId(2), Path::new("passwd"))));
        assert_eq!(at("/usr/library"), None);
        assert_eq!(at("other/a"), None);
        assert_eq!(at("../etc"), None);
        assert_eq!(at(""), None);
    }
}
