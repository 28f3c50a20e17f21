//! What a configuration must be beyond its single values: names, duplicates, references,
//! directories.

use super::Config;
use super::limits::{DOMAIN_NAME_BYTES_MAX, NAME_BYTES_MAX};
use super::problem::{Problem, Severity};
use std::collections::{BTreeMap, HashMap};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Stands for a name that is missing, which was said already. No name has this letter.
pub(super) const NO_NAME: &str = "\0";
/// Stands for a path that is missing or wrong, which was said already.
pub(super) const NO_PATH: &str = "\0";

/// One table of a list, by its place there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Item {
    Guest(usize),
    Export(usize),
}

/// Where things stand in the file.
#[derive(Debug, Default)]
pub(super) struct Lines(HashMap<(Item, &'static str), usize>);

impl Lines {
    /// `key` is empty for the table itself.
    pub(super) fn note(&mut self, item: Item, key: &'static str, line: usize) {
        self.0.insert((item, key), line);
    }

    fn of(&self, item: Item, key: &'static str) -> Option<usize> {
        self.0
            .get(&(item, key))
            .or_else(|| self.0.get(&(item, "")))
            .copied()
    }
}

/// The problems found, each placed where its value stands.
struct Found<'l> {
    lines: &'l Lines,
    problems: Vec<Problem>,
}

impl Found<'_> {
    fn add(&mut self, severity: Severity, item: Item, key: &'static str, text: String) {
        let table = match item {
            Item::Guest(_) => "guest",
            Item::Export(_) => "export",
        };
        let line = self.lines.of(item, key);
        self.problems.push(Problem {
            severity,
            line,
            key: format!("{table}.{key}"),
            text,
        });
    }

    fn error(&mut self, item: Item, key: &'static str, text: String) {
        self.add(Severity::Error, item, key, text);
    }

    /// ` in line N`, where it is known.
    fn at(&self, item: Item, key: &'static str) -> String {
        self.lines
            .of(item, key)
            .map_or(String::new(), |line| format!(" in line {line}"))
    }

    fn name(&mut self, item: Item, key: &'static str, name: &str) {
        if name == NO_NAME {
            return;
        }
        if let Err(text) = check_name(name) {
            self.error(item, key, text);
        }
    }
}

/// Can this name an export, a share group or a guest? The error says what is wrong with it.
///
/// The letters are those that need no quoting in `EXPORT:PATH`, `NAME=DIR`, shells and TOML.
pub fn check_name(name: &str) -> Result<(), String> {
    let shown: String = name.escape_debug().take(80).collect();
    if name.is_empty() {
        return Err("is empty; give 1 to 64 letters, digits, '-', '_' or '.'".to_owned());
    }
    if name.len() > NAME_BYTES_MAX {
        let len = name.len();
        return Err(format!(
            "\"{shown}\" has {len} bytes; at most {NAME_BYTES_MAX} are allowed"
        ));
    }
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if let Some(bad) = name.chars().find(|&c| !good(c)) {
        return Err(format!(
            "\"{shown}\" has {bad:?} in it; allowed are letters, digits, '-', '_' and '.'"
        ));
    }
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err(format!("\"{shown}\" must begin with a letter or a digit"));
    }
    Ok(())
}

/// Can this name a domain? The error says what is wrong with it.
pub fn check_domain(name: &str) -> Result<(), String> {
    let shown: String = name.escape_debug().take(80).collect();
    if name.is_empty() || name.len() > DOMAIN_NAME_BYTES_MAX {
        return Err(format!(
            "\"{shown}\" is no domain's name: those have 1 to {DOMAIN_NAME_BYTES_MAX} bytes"
        ));
    }
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.:+".contains(c);
    if let Some(bad) = name.chars().find(|&c| !good(c)) {
        return Err(format!(
            "\"{shown}\" has {bad:?} in it; domains' names have letters, digits and '-', '_', '.', ':', '+'"
        ));
    }
    if name.chars().all(|c| c.is_ascii_digit()) {
        return Err(format!(
            "\"{shown}\" would be a domid, and those are used again; give the domain's name or uuid"
        ));
    }
    Ok(())
}

/// Names, duplicates and references; nothing outside the text is looked at.
pub(super) fn names(config: &Config, lines: &Lines) -> Vec<Problem> {
    let mut found = Found {
        lines,
        problems: Vec::new(),
    };
    let mut names: BTreeMap<&str, Item> = BTreeMap::new();
    let mut uids: BTreeMap<u32, (Item, &str)> = BTreeMap::new();
    let mut domains: BTreeMap<String, (Item, &str)> = BTreeMap::new();
    for (index, guest) in config.guests.iter().enumerate() {
        let item = Item::Guest(index);
        found.name(item, "name", &guest.name);
        if guest.name == NO_NAME {
            continue;
        }
        if let Some(&first) = names.get(guest.name.as_str()) {
            let at = found.at(first, "name");
            found.error(
                item,
                "name",
                format!("guest \"{}\" is there twice, first{at}", guest.name),
            );
            continue;
        }
        names.insert(&guest.name, item);
        if guest.domain.is_some() && guest.uuid.is_some() {
            let text = "is there beside domain; one of the two says who it is".to_owned();
            found.error(item, "uuid", text);
        }
        if let Some(domain) = &guest.domain
            && let Err(text) = check_domain(domain)
        {
            found.error(item, "domain", text);
        }
        let uuid = guest.uuid.map(|uuid| ("uuid", uuid.to_string()));
        let named = guest.domain.clone().map(|domain| ("domain", domain));
        for (key, domain) in named.into_iter().chain(uuid) {
            if let Some(&(first, name)) = domains.get(&domain) {
                let at = found.at(first, key);
                let text = format!("{domain} is guest \"{name}\" already{at}");
                found.error(item, key, text);
            } else {
                domains.insert(domain, (item, &guest.name));
            }
        }
        let Some(uid) = guest.uid else { continue };
        if let Some(&(first, name)) = uids.get(&uid) {
            let at = found.at(first, "uid");
            let text = format!("uid {uid} is guest \"{name}\" already{at}; one uid is one guest");
            found.error(item, "uid", text);
        } else {
            uids.insert(uid, (item, &guest.name));
        }
    }
    let guests = names;
    let mut names: BTreeMap<&str, Item> = BTreeMap::new();
    for (index, export) in config.exports.iter().enumerate() {
        let item = Item::Export(index);
        found.name(item, "name", &export.name);
        if let Some(group) = &export.group {
            found.name(item, "group", group);
        }
        if export.name != NO_NAME {
            if let Some(&first) = names.get(export.name.as_str()) {
                let at = found.at(first, "name");
                let text = format!("export \"{}\" is there twice, first{at}", export.name);
                found.error(item, "name", text);
            } else {
                names.insert(&export.name, item);
            }
        }
        allowed(&mut found, item, &export.allow, &guests);
    }
    found.problems
}

fn allowed(found: &mut Found<'_>, item: Item, allow: &[String], guests: &BTreeMap<&str, Item>) {
    if allow.is_empty() {
        let text = "nobody may use this export; name guests, or \"*\" for all".to_owned();
        found.add(Severity::Warning, item, "allow", text);
    }
    for name in allow.iter().filter(|name| *name != "*") {
        if let Err(text) = check_name(name) {
            found.error(item, "allow", text);
        } else if !guests.contains_key(name.as_str()) && !is_uid_name(name, guests) {
            let text = format!(
                "no [[guest]] is called \"{name}\"; only root and the daemon's own user can take that name"
            );
            found.add(Severity::Warning, item, "allow", text);
        }
    }
}

/// `uid-N` is who uid N is while no guest is configured.
fn is_uid_name(name: &str, guests: &BTreeMap<&str, Item>) -> bool {
    guests.is_empty()
        && name
            .strip_prefix("uid-")
            .is_some_and(|uid| uid.parse::<u32>().is_ok())
}

/// The directories of the exports: there, directories, readable, none twice, none in another.
pub(super) fn directories(config: &Config, lines: &Lines) -> Vec<Problem> {
    let mut found = Found {
        lines,
        problems: Vec::new(),
    };
    let mut seen: Vec<Directory<'_>> = Vec::new();
    for (index, export) in config.exports.iter().enumerate() {
        if export.path == Path::new(NO_PATH) {
            continue;
        }
        let item = Item::Export(index);
        let (real, meta) = match look(&export.path) {
            Ok(found) => found,
            Err(text) => {
                found.error(item, "path", format!("{}: {text}", export.path.display()));
                continue;
            }
        };
        let this = Directory {
            item,
            name: &export.name,
            real,
            id: (meta.dev(), meta.ino()),
        };
        for other in &seen {
            let relation = if this.id == other.id || this.real == other.real {
                "is the same directory as"
            } else if this.real.starts_with(&other.real) {
                "lies in"
            } else if other.real.starts_with(&this.real) {
                "holds"
            } else {
                continue;
            };
            let text = format!(
                "{} {relation} {} of export \"{}\"{}; exports must not overlap",
                export.path.display(),
                other.real.display(),
                other.name,
                found.at(other.item, "path"),
            );
            found.error(item, "path", text);
        }
        seen.push(this);
    }
    found.problems
}

/// A directory that was seen.
struct Directory<'c> {
    item: Item,
    name: &'c str,
    real: PathBuf,
    id: (u64, u64),
}

/// Where a directory really is; the error is the text for its owner.
fn look(path: &Path) -> Result<(PathBuf, Metadata), String> {
    let meta = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such directory".to_owned(),
        _ => error.to_string(),
    })?;
    if !meta.is_dir() {
        return Err("is not a directory".to_owned());
    }
    std::fs::read_dir(path).map_err(|error| format!("cannot be listed: {error}"))?;
    let real = std::fs::canonicalize(path).map_err(|error| error.to_string())?;
    Ok((real, meta))
}
