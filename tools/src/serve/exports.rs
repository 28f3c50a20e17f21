//! The exports by name, and who may use them.

use super::admin_types::ExportEntry;
use crate::config::limits::WRITEBACK_MS_DEFAULT;
use crate::config::{ExportConfig, Mode};
use copage_cache::{Cache, CacheError, ExportId, ExportMode, ExportSpec};
use std::collections::BTreeMap;

/// One export.
#[derive(Clone, Debug)]
struct Export {
    id: ExportId,
    entry: ExportEntry,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Exports {
    by_name: BTreeMap<String, Export>,
}

impl From<&ExportConfig> for ExportEntry {
    fn from(config: &ExportConfig) -> Self {
        Self {
            name: config.name.clone(),
            path: config.path.clone(),
            mode: config.mode.to_string(),
            allow: config.allow.clone(),
            group: config.group.clone(),
            writeback_ms: (config.mode == Mode::Coherent).then_some(config.writeback_ms),
        }
    }
}

/// Opens an export in the cache; it may touch a disk.
pub(super) fn offer(cache: &Cache, entry: &ExportEntry) -> Result<ExportId, CacheError> {
    let mode = match entry.mode.parse() {
        Ok(Mode::Ro) => ExportMode::ReadOnly,
        Ok(Mode::Coherent) => ExportMode::Coherent,
        Err(text) => {
            let text = format!("export {}: {text}", entry.name);
            return Err(CacheError::BadConfig(text));
        }
    };
    cache.add_export(ExportSpec {
        name: entry.name.clone(),
        path: entry.path.clone(),
        group: entry.group.clone().unwrap_or_else(|| entry.name.clone()),
        mode,
    })
}

impl Exports {
    /// Adds one that the cache has opened.
    pub(super) fn insert(&mut self, id: ExportId, entry: ExportEntry) {
        self.by_name
            .insert(entry.name.clone(), Export { id, entry });
    }

    /// Takes one out; the cache still has it.
    pub(super) fn remove(&mut self, name: &str) -> Option<ExportId> {
        self.by_name.remove(name).map(|e| e.id)
    }

    /// All, by name.
    pub(super) fn list(&self) -> Vec<ExportEntry> {
        self.by_name.values().map(|e| e.entry.clone()).collect()
    }

    /// By name and number.
    pub(super) fn ids(&self) -> Vec<(String, ExportId, std::path::PathBuf)> {
        let all = self.by_name.values();
        all.map(|e| (e.entry.name.clone(), e.id, e.entry.path.clone()))
            .collect()
    }

    fn by_id(&self, id: ExportId) -> Option<&ExportEntry> {
        let mut all = self.by_name.values();
        all.find(|e| e.id == id).map(|e| &e.entry)
    }

    /// May guests write it?
    pub(super) fn is_coherent(&self, id: ExportId) -> bool {
        let entry = self.by_id(id);
        entry.is_some_and(|entry| entry.mode.parse() == Ok(Mode::Coherent))
    }

    /// How long what guests store stays out of the host's files, in ms.
    pub(super) fn writeback_ms(&self, id: ExportId) -> u32 {
        let said = self.by_id(id).and_then(|entry| entry.writeback_ms);
        said.unwrap_or(WRITEBACK_MS_DEFAULT)
    }

    /// Lets a guest use an export.
    pub(super) fn allow(&mut self, export: &str, guest: &str) {
        if let Some(export) = self.by_name.get_mut(export)
            && !allows(&export.entry, guest)
        {
            export.entry.allow.push(guest.to_owned());
        }
    }

    /// Takes a guest from an export's list.
    pub(super) fn disallow(&mut self, export: &str, guest: &str) {
        if let Some(export) = self.by_name.get_mut(export) {
            export.entry.allow.retain(|name| name != guest);
        }
    }

    /// May everybody use it?
    pub(super) fn allows_all(&self, export: &str) -> bool {
        let export = self.by_name.get(export);
        export.is_some_and(|e| e.entry.allow.iter().any(|name| name == "*"))
    }

    /// Names that a guest may use, each ended by NUL.
    pub(super) fn names_for(&self, guest: &str) -> Vec<u8> {
        let mut names = Vec::new();
        for export in self.by_name.values().filter(|e| allows(&e.entry, guest)) {
            names.extend_from_slice(export.entry.name.as_bytes());
            names.push(0);
        }
        names
    }

    /// The export of that name, or the errno and text for the guest.
    pub(super) fn attach(&self, name: &[u8], guest: &str) -> Result<ExportId, (i32, String)> {
        let shown = String::from_utf8_lossy(name);
        let found = std::str::from_utf8(name)
            .ok()
            .and_then(|n| self.by_name.get(n));
        match found {
            None => Err((libc::ENOENT, format!("there is no export {shown:?}"))),
            Some(e) if !allows(&e.entry, guest) => {
                let text = format!("export {shown:?} does not allow guest {guest:?}");
                Err((libc::EACCES, text))
            }
            Some(e) => Ok(e.id),
        }
    }
}

fn allows(entry: &ExportEntry, guest: &str) -> bool {
    entry.allow.iter().any(|name| name == "*" || name == guest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_lists_name_names() {
        let mut exports = Exports::default();
        let entry = |name: &str, allow: &[&str]| ExportEntry {
            name: name.into(),
            path: "/".into(),
            mode: "ro".into(),
            allow: allow.iter().map(|&a| a.into()).collect(),
            group: None,
            writeback_ms: None,
        };
        exports.insert(ExportId(0), entry("all", &["*"]));
        exports.insert(ExportId(1), entry("some", &["web", "db"]));
        exports.insert(ExportId(2), entry("none", &[]));
        assert_eq!(exports.names_for("web"), b"all\0some\0");
        assert_eq!(exports.names_for("other"), b"all\0");
        assert_eq!(exports.attach(b"some", "db"), Ok(ExportId(1)));
        assert_eq!(
            exports.attach(b"some", "other").unwrap_err().0,
            libc::EACCES
        );
        assert_eq!(exports.attach(b"none", "web").unwrap_err().0, libc::EACCES);
        assert_eq!(exports.attach(b"gone", "web").unwrap_err().0, libc::ENOENT);
        assert_eq!(exports.attach(b"\xff", "web").unwrap_err().0, libc::ENOENT);
        assert_eq!(exports.remove("all"), Some(ExportId(0)));
        assert_eq!(exports.names_for("other"), b"");
    }
}
