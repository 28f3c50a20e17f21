//! From TOML to [`Config`]: every key there is, read once.

use super::check::{self, Item, Lines};
use super::limits;
use super::nearest::nearest;
use super::problem::Problem;
use super::read::{Reader, Section};
use super::{BackendChoice, Config, ExportConfig, GuestConfig, Limits, Mode, Uuid, XenConfig};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use toml::de::DeTable;

/// The modes there are.
const MODES: [&str; 2] = ["ro", "coherent"];
/// Modes that the design has and this version has not.
const MODES_LATER: [&str; 2] = ["cow", "shm"];

/// Reads all of `text`; what is wrong is among the problems, and its default in the configuration.
pub(super) fn parse(text: &str) -> (Config, Lines, Vec<Problem>) {
    let mut reader = Reader::new(text);
    let mut lines = Lines::default();
    let (document, syntax) = DeTable::parse_recoverable(text);
    for error in &syntax {
        let line = error.span().map(|span| reader.line(&span));
        let text = error.message().lines().collect::<Vec<_>>().join(", ");
        reader.error(line, "", format!("not TOML: {text}"));
    }
    let top = Section::new(&reader, "", 1, document.get_ref());
    let config = config(&mut reader, top, &mut lines);
    // What a broken line leaves behind is guesswork; errors about it would only confuse.
    if syntax.is_empty() {
        reader.problems.extend(check::names(&config, &lines));
    } else {
        reader.problems.truncate(syntax.len());
    }
    (config, lines, reader.problems)
}

fn config(reader: &mut Reader<'_>, mut top: Section<'_, '_>, lines: &mut Lines) -> Config {
    let mut config = Config::default();
    if let Some(found) = top.string(reader, "run_dir", "/run/copage") {
        if !found.value.starts_with('/') {
            reader.error(Some(found.line), "run_dir", absolute(&found.value));
        }
        config.run_dir = PathBuf::from(found.value);
    }
    let r = reader;
    if let Some(found) = top.string(r, "backend", "auto") {
        match found.value.parse() {
            Ok(backend) => config.backend = backend,
            Err(text) => r.error(Some(found.line), "backend", text),
        }
    }
    if let Some(section) = top.section(r, "xen", "xen.") {
        config.xen = xen(r, section);
    }
    set(
        &mut config.frames_mib,
        top.number(r, "frames_mib", &limits::FRAMES_MIB, "MiB"),
    );
    set32(
        &mut config.lease_ttl_ms,
        top.number(r, "lease_ttl_ms", &limits::LEASE_TTL_MS, "ms"),
    );
    let deadline = &limits::INVALIDATE_DEADLINE_MS;
    set32(
        &mut config.invalidate_deadline_ms,
        top.number(r, "invalidate_deadline_ms", deadline, "ms"),
    );
    set32(
        &mut config.host_settle_ms,
        top.number(r, "host_settle_ms", &limits::HOST_SETTLE_MS, "ms"),
    );
    set32(
        &mut config.fill_threads,
        top.number(r, "fill_threads", &limits::FILL_THREADS, "threads"),
    );
    if let Some(found) = top.number(r, "readahead_kib", &limits::READAHEAD_KIB, "KiB") {
        if !found.value.is_power_of_two() {
            let text = format!(
                "is {} KiB; give a power of two from 4 to 2048 KiB",
                found.value
            );
            r.error(Some(found.line), "readahead_kib", text);
        }
        set32(&mut config.readahead_kib, Some(found));
    }
    set(
        &mut config.pin_file_mib,
        top.number(r, "pin_file_mib", &limits::PIN_FILE_MIB, "MiB"),
    );
    config.huge = top.boolean(r, "huge").unwrap_or(config.huge);
    config.force = top.boolean(r, "force").unwrap_or(config.force);
    config.share_bounced = top.boolean(r, "share_bounced").or(config.share_bounced);
    if let Some(section) = top.section(r, "limits", "limits.") {
        config.limits = limits_of(r, section, config.limits);
    }
    let guests = top.sections(r, "guest", "guest.");
    within(r, "guest", guests.len(), limits::GUESTS_MAX);
    for (index, section) in guests.into_iter().take(limits::GUESTS_MAX).enumerate() {
        config
            .guests
            .push(guest(r, section, config.limits, &mut |key, line| {
                lines.note(Item::Guest(index), key, line);
            }));
    }
    let exports = top.sections(r, "export", "export.");
    within(r, "export", exports.len(), limits::EXPORTS_MAX);
    for (index, section) in exports.into_iter().take(limits::EXPORTS_MAX).enumerate() {
        config.exports.push(export(r, section, &mut |key, line| {
            lines.note(Item::Export(index), key, line);
        }));
    }
    top.finish(r);
    config
}

fn within(reader: &mut Reader<'_>, key: &str, count: usize, max: usize) {
    if count > max {
        reader.error(
            None,
            key,
            format!("there are {count} of them; at most {max} are allowed"),
        );
    }
}

fn set(to: &mut u64, found: Option<super::read::Found<u64>>) {
    if let Some(found) = found {
        *to = found.value;
    }
}

/// The ranges of 32-bit settings end below 2^32, so that nothing is refused here.
fn set32(to: &mut u32, found: Option<super::read::Found<u64>>) {
    if let Some(value) = found.and_then(|found| u32::try_from(found.value).ok()) {
        *to = value;
    }
}

const _: () = {
    const fn fits(range: &RangeInclusive<u64>) {
        assert!(*range.end() <= u32::MAX as u64);
    }
    fits(&limits::LEASE_TTL_MS);
    fits(&limits::INVALIDATE_DEADLINE_MS);
    fits(&limits::HOST_SETTLE_MS);
    fits(&limits::FILL_THREADS);
    fits(&limits::READAHEAD_KIB);
    fits(&limits::HANDLES_MAX);
    fits(&limits::FILES_MAX);
    fits(&limits::UID);
    fits(&limits::DOMAIN_SESSIONS_MAX);
    fits(&limits::WRITEBACK_MS);
};

fn xen(r: &mut Reader<'_>, mut section: Section<'_, '_>) -> XenConfig {
    let mut xen = XenConfig::default();
    let range = &limits::CACHE_DOMAIN_MIB;
    set(
        &mut xen.cache_domain_mib,
        section.number(r, "cache_domain_mib", range, "MiB"),
    );
    let range = &limits::DOMAIN_SESSIONS_MAX;
    set32(
        &mut xen.domain_sessions_max,
        section.number(r, "domain_sessions_max", range, "sessions"),
    );
    section.finish(r);
    xen
}

fn limits_of(r: &mut Reader<'_>, mut section: Section<'_, '_>, general: Limits) -> Limits {
    let mut limits = general;
    set(
        &mut limits.grants_max,
        section.number(r, "grants_max", &limits::GRANTS_MAX, "grants"),
    );
    set32(
        &mut limits.handles_max,
        section.number(r, "handles_max", &limits::HANDLES_MAX, "handles"),
    );
    set32(
        &mut limits.files_max,
        section.number(r, "files_max", &limits::FILES_MAX, "files"),
    );
    set(
        &mut limits.pinned_mib,
        section.number(r, "pinned_mib", &limits::PINNED_MIB, "MiB"),
    );
    if let Some(found) = section.number(r, "frames_mib", &limits::GUEST_FRAMES_MIB, "MiB") {
        limits.frames_mib = Some(found.value);
    }
    section.finish(r);
    limits
}

type Note<'n> = &'n mut dyn FnMut(&'static str, usize);

fn name(
    r: &mut Reader<'_>,
    section: &mut Section<'_, '_>,
    example: &str,
    note: Note<'_>,
) -> String {
    note("", section.line);
    let before = r.problems.len();
    match section.string(r, "name", example) {
        Some(found) => {
            note("name", found.line);
            found.value
        }
        None => {
            // Of a wrong type: that was said already.
            if r.problems.len() == before {
                section.missing(r, "name", &format!("a name, as in name = \"{example}\""));
            }
            check::NO_NAME.to_owned()
        }
    }
}

fn guest(
    r: &mut Reader<'_>,
    mut section: Section<'_, '_>,
    general: Limits,
    note: Note<'_>,
) -> GuestConfig {
    let name = name(r, &mut section, "web", note);
    let uid = section.number(r, "uid", &limits::UID, "").map(|found| {
        note("uid", found.line);
        // The range ends below 2^32.
        found.value as u32
    });
    let domain = section.string(r, "domain", "web-vm").map(|found| {
        note("domain", found.line);
        found.value
    });
    let example = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    let uuid = section.string(r, "uuid", example).and_then(|found| {
        note("uuid", found.line);
        found
            .value
            .parse::<Uuid>()
            .map_err(|text| r.error(Some(found.line), "guest.uuid", text))
            .ok()
    });
    let limits = match section.section(r, "limits", "guest.limits.") {
        Some(section) => limits_of(r, section, general),
        None => general,
    };
    section.finish(r);
    GuestConfig {
        name,
        uid,
        domain,
        uuid,
        limits,
    }
}

fn export(r: &mut Reader<'_>, mut section: Section<'_, '_>, note: Note<'_>) -> ExportConfig {
    let name = name(r, &mut section, "libs", note);
    let mut export = ExportConfig::new(name, check::NO_PATH);
    let before = r.problems.len();
    match section.string(r, "path", "/usr/lib") {
        Some(found) => {
            note("path", found.line);
            if found.value.starts_with('/') {
                export.path = PathBuf::from(found.value);
            } else {
                r.error(Some(found.line), "export.path", absolute(&found.value));
            }
        }
        None if r.problems.len() == before => {
            section.missing(r, "path", "a directory, as in path = \"/usr/lib\"");
        }
        None => {}
    }
    if let Some(found) = section.string(r, "mode", "ro") {
        match found.value.parse() {
            Ok(mode) => export.mode = mode,
            Err(text) => r.error(Some(found.line), "export.mode", text),
        }
    }
    if let Some(found) = section.number(r, "writeback_ms", &limits::WRITEBACK_MS, "ms") {
        if export.mode == Mode::Ro {
            let text = "is of coherent exports only; this one is \"ro\"".to_owned();
            r.error(Some(found.line), "export.writeback_ms", text);
        }
        set32(&mut export.writeback_ms, Some(found));
    }
    if let Some(found) = section.string(r, "group", "libs") {
        note("group", found.line);
        export.group = Some(found.value);
    }
    if let Some(names) = section.strings(r, "allow", "[\"web\", \"db\"] or [\"*\"]") {
        note("allow", names.line);
        export.allow = names.value;
    }
    section.finish(r);
    export
}

fn absolute(path: &str) -> String {
    let shown: String = path.escape_debug().take(200).collect();
    format!("\"{shown}\" does not begin at the root; give the whole path, as in \"/usr/lib\"")
}

impl std::str::FromStr for Mode {
    type Err = String;

    /// The error says which modes there are.
    fn from_str(mode: &str) -> Result<Self, String> {
        match mode {
            "ro" => return Ok(Self::Ro),
            "coherent" => return Ok(Self::Coherent),
            _ => {}
        }
        let shown: String = mode.escape_debug().take(40).collect();
        if MODES_LATER.contains(&mode) {
            return Err(format!(
                "mode \"{shown}\" is not built yet; this version has \"ro\" and \"coherent\""
            ));
        }
        let meant = nearest(mode, &MODES).map_or(String::new(), |known| {
            format!("; did you mean \"{known}\"?")
        });
        Err(format!(
            "\"{shown}\" is no mode; give \"ro\" or \"coherent\"{meant}"
        ))
    }
}

impl std::str::FromStr for BackendChoice {
    type Err = String;

    /// The error says which there are.
    fn from_str(backend: &str) -> Result<Self, String> {
        match backend {
            "auto" => Ok(Self::Auto),
            "local" => Ok(Self::Local),
            "xen" => Ok(Self::Xen),
            other => {
                let shown: String = other.escape_debug().take(40).collect();
                Err(format!(
                    "\"{shown}\" is no backend; give \"auto\", \"local\" or \"xen\""
                ))
            }
        }
    }
}

impl std::fmt::Display for BackendChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Local => "local",
            Self::Xen => "xen",
        })
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ro => "ro",
            Self::Coherent => "coherent",
        })
    }
}
