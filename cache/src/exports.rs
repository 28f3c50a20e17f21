//! Exports: the host's directories that are offered.

use crate::config::{ExportId, ExportInfo, ExportMode, ExportSpec};
use crate::error::CacheError;
use crate::tree::{Kind, NodeRef, Nodes};
use parking_lot::RwLock;
use rustix::fs::{Mode, OFlags};
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Debug)]
struct Export {
    spec: ExportSpec,
    group: u32,
    root: NodeRef,
}

#[derive(Debug, Default)]
struct Registry {
    live: BTreeMap<ExportId, Export>,
    /// Share groups by name, numbered for keys. A group's number is not used again.
    groups: BTreeMap<Arc<str>, u32>,
    next: u32,
}

/// The exports of one cache.
#[derive(Debug, Default)]
pub(crate) struct Exports {
    registry: RwLock<Registry>,
}

impl Exports {
    pub(crate) fn add(&self, mut spec: ExportSpec, nodes: &Nodes) -> Result<ExportId, CacheError> {
        let bad = |spec: &ExportSpec, why: String| CacheError::BadExport {
            name: spec.name.clone(),
            path: spec.path.display().to_string(),
            why,
        };
        spec.check_labels().map_err(|why| bad(&spec, why.into()))?;
        if !spec.path.is_absolute() {
            return Err(bad(&spec, "the path must be absolute".into()));
        }
        let real = spec
            .path
            .canonicalize()
            .map_err(|e| bad(&spec, e.to_string()))?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&real, flags, Mode::empty())
            .map_err(|e| bad(&spec, std::io::Error::from(e).to_string()))?;

        let mut registry = self.registry.write();
        for other in registry.live.values() {
            if other.spec.name == spec.name {
                return Err(bad(&spec, "there is an export of this name already".into()));
            }
            if real.starts_with(&other.spec.path) || other.spec.path.starts_with(&real) {
                let why = format!(
                    "it overlaps export {} ({})",
                    other.spec.name,
                    other.spec.path.display()
                );
                return Err(bad(&spec, why));
            }
        }
        let id = ExportId(registry.next);
        let (root, _) = nodes.adopt(id, fd)?;
        if root.kind != Kind::Directory {
            return Err(bad(&spec, "it is not a directory".into()));
        }
        registry.next += 1;
        let groups = registry.groups.len() as u32;
        let group = *registry
            .groups
            .entry(spec.group.as_str().into())
            .or_insert(groups);
        spec.path = real;
        registry.live.insert(id, Export { spec, group, root });
        Ok(id)
    }

    pub(crate) fn remove(&self, id: ExportId) -> Result<(), CacheError> {
        self.registry
            .write()
            .live
            .remove(&id)
            .map(drop)
            .ok_or(CacheError::NoSuchExport)
    }

    pub(crate) fn list(&self) -> Vec<ExportInfo> {
        let registry = self.registry.read();
        registry
            .live
            .iter()
            .map(|(id, e)| ExportInfo {
                id: *id,
                spec: e.spec.clone(),
            })
            .collect()
    }

    pub(crate) fn root(&self, id: ExportId) -> Result<NodeRef, CacheError> {
        let registry = self.registry.read();
        registry
            .live
            .get(&id)
            .map(|e| e.root.clone())
            .ok_or(CacheError::NoSuchExport)
    }

    pub(crate) fn check_live(&self, id: ExportId) -> Result<(), CacheError> {
        self.group(id).map(drop)
    }

    /// The number of the export's share group.
    pub(crate) fn group(&self, id: ExportId) -> Result<u32, CacheError> {
        self.group_and_mode(id).map(|(group, _)| group)
    }

    /// The same, and what may be done with the export.
    pub(crate) fn group_and_mode(&self, id: ExportId) -> Result<(u32, ExportMode), CacheError> {
        self.registry
            .read()
            .live
            .get(&id)
            .map(|e| (e.group, e.spec.mode))
            .ok_or(CacheError::Withdrawn)
    }
}
