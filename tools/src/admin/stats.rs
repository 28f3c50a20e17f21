//! `copage stats`.

use super::client::{Admin, AdminError, Where};
use super::host_cache::{self, HostCache};
use crate::output::{self, bytes, duration_ms, pages};
use crate::serve::admin_types::{AdminReply, AdminRequest, StatsEntry};
use anyhow::{Result, bail};
use serde::Serialize;
use std::process::ExitCode;
use std::time::Duration;

/// Shows the daemon's numbers: frames, memory, faults, fills, reclaim, sessions.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage stats
  copage stats --watch               one line a second of what changes
  copage stats --watch 10 --json     one JSON document a line, every ten seconds
  copage stats --host-cache          also what the host's page cache holds of the exported files
  copage stats --json | jq '.frames_used * 4096'")]
pub struct Args {
    #[command(flatten)]
    at: Where,
    /// Again and again, every so many seconds
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    watch: Option<u64>,
    /// Look through the exports for what the host's page cache holds of them (may take a while)
    #[arg(long, conflicts_with = "watch")]
    host_cache: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// What is shown: the daemon's words, and what the kernel says of it.
#[derive(Serialize)]
struct Shown<'s> {
    #[serde(flatten)]
    stats: &'s StatsEntry,
    #[serde(flatten)]
    memory: Memory,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_cache: Option<HostCache>,
}

/// The daemon's own memory, `/proc/PID/status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// Its heap, stacks and tables.
    pub(crate) rss_anon_bytes: Option<u64>,
    /// Its program's text.
    rss_file_bytes: Option<u64>,
    /// Frames that it has mapped itself.
    rss_shmem_bytes: Option<u64>,
    pub(crate) page_tables_bytes: Option<u64>,
}

impl Memory {
    pub(crate) fn of(pid: u32) -> Self {
        // Not there: it has just ended, or is in another PID namespace.
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default())
    }

    fn parse(status: &str) -> Self {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line
                .trim_start_matches(':')
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()?;
            Some(kib * 1024)
        };
        Self {
            rss_anon_bytes: field("RssAnon"),
            rss_file_bytes: field("RssFile"),
            rss_shmem_bytes: field("RssShmem"),
            page_tables_bytes: field("VmPTE"),
        }
    }
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut admin = args.at.connect()?;
    match args.watch {
        Some(seconds) => watch(&mut admin, Duration::from_secs(seconds), args.json)?,
        None => once(&mut admin, args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn ask(admin: &mut Admin) -> Result<StatsEntry> {
    match admin.ask(&AdminRequest::Stats)? {
        AdminReply::Stats(stats) => Ok(stats),
        _ => bail!(AdminError::Other),
    }
}

fn once(admin: &mut Admin, args: &Args) -> Result<()> {
    let stats = ask(admin)?;
    let memory = Memory::of(stats.pid);
    let host_cache = if args.host_cache {
        host_cache_of(admin)?
    } else {
        None
    };
    if args.json {
        return output::json(&Shown {
            stats: &stats,
            memory,
            host_cache,
        });
    }
    output::line(&text(&stats, memory))?;
    match host_cache {
        Some(sum) => output::line(&format!(
            "host cache  {} of {} in {} exported files are in the host's page cache{}",
            bytes(sum.cached_bytes),
            bytes(sum.file_bytes),
            sum.files,
            match sum.unreadable {
                0 => String::new(),
                n => format!(" ({n} could not be looked at)"),
            }
        )),
        None if args.host_cache => {
            output::line("host cache  this kernel cannot tell (Linux 6.5 can)")
        }
        None => Ok(()),
    }
}

fn host_cache_of(admin: &mut Admin) -> Result<Option<HostCache>> {
    match admin.ask(&AdminRequest::ExportList)? {
        AdminReply::Exports { exports } => {
            // Whoever opens a coherent file takes it from all guests.
            let quiet = exports.into_iter().filter(|export| export.mode == "ro");
            let roots: Vec<_> = quiet.map(|export| export.path).collect();
            Ok(host_cache::look(&roots))
        }
        _ => bail!(AdminError::Other),
    }
}

fn counter(stats: &StatsEntry, name: &str) -> u64 {
    stats.counters.get(name).copied().unwrap_or(0)
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        "-".to_owned()
    } else {
        format!("{:.1} %", part as f64 * 100.0 / whole as f64)
    }
}

fn text(stats: &StatsEntry, memory: Memory) -> String {
    let of = |name: &str| counter(stats, name);
    let known = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), output::bytes);
    let (hits, misses) = (of("fault_hits"), of("fault_misses"));
    let mut lines = vec![
        format!(
            "daemon      {} backend, process {}, up {}, epoch {}, {}",
            stats.backend,
            stats.pid,
            duration_ms(stats.uptime_ms),
            stats.epoch,
            if stats.force {
                "takes pages back by force"
            } else {
                "without force, as Xen is"
            }
        ),
        format!(
            "frames      {} of {} used ({}), {} free",
            pages(stats.frames_used),
            pages(stats.frames_max),
            percent(stats.frames_used, stats.frames_max),
            pages(stats.frames_max.saturating_sub(stats.frames_used))
        ),
        format!(
            "            {} pinned, {} in quarantine, {} in 2 MiB frames",
            pages(stats.frames_pinned),
            pages(stats.frames_quarantined),
            pages(stats.frames_huge)
        ),
        format!(
            "memory      {} of the daemon's own ({} of it for frames and indexes), {} page tables, {} program",
            known(memory.rss_anon_bytes),
            bytes(of("now_metadata_bytes")),
            known(memory.page_tables_bytes),
            known(memory.rss_file_bytes)
        ),
        format!(
            "guests      {} sessions, {} grants, {} files ({} open, {} host-bounded)",
            stats.sessions,
            stats.grants,
            stats.files,
            of("now_files_open"),
            of("now_files_host_bounded")
        ),
        format!(
            "faults      {} hits, {} misses ({} hit), {} with an old generation",
            hits,
            misses,
            percent(hits, hits + misses),
            of("fault_stale")
        ),
        format!(
            "fills       {} reads: {} pages, {} of them again, {} past and {} through the page cache, {} failed",
            of("fills"),
            of("filled_pages"),
            of("refilled_pages"),
            bytes(of("read_direct_bytes")),
            bytes(of("read_buffered_bytes")),
            of("fill_errors")
        ),
        format!(
            "reclaim     {} idle, {} granted, {} recalls",
            pages(of("reclaimed_idle_pages")),
            pages(of("reclaimed_granted_pages")),
            of("recalls")
        ),
        format!(
            "versions    {} generations ended, {} leases broken by the host",
            of("generations_retired"),
            of("leases_broken")
        ),
    ];
    let strict = &stats.strict;
    if strict.now_files + strict.granted_read + strict.granted_write > 0 {
        lines.push(format!(
            "coherent    {} files; {} pages granted for reading, {} for writing, {} for writing by several",
            strict.now_files, strict.granted_read, strict.granted_write, strict.granted_shared
        ));
        lines.push(format!(
            "            {} recalls, {} saves ({} failed), {} syncs, {} lengths changed; writers waited {} ms (p50), {} ms (p99)",
            strict.recalls,
            strict.saves,
            strict.saves_failed,
            strict.syncs,
            strict.resizes,
            strict.write_wait_p50_ms,
            strict.write_wait_p99_ms
        ));
    }
    let fenced: u64 = stats
        .counters
        .iter()
        .filter(|(k, _)| k.starts_with("fenced_"))
        .map(|(_, v)| v)
        .sum();
    if let Some(xen) = &stats.xen {
        for (n, t) in xen.cache_domains.iter().enumerate() {
            lines.push(format!(
                "{:<12}domain {}: {} of {} used, {} of {} entries{}",
                if n == 0 { "cache" } else { "" },
                t.domid,
                pages(t.frames_used),
                pages(t.frames),
                t.entries_used,
                t.entries_max,
                if t.draining { ", draining" } else { "" }
            ));
        }
        let channel = &xen.channel;
        lines.push(format!(
            "domains     {} attached and here; {} sessions accepted, {} refused, {} floods",
            channel.domains_now, channel.accepted, channel.refused, channel.floods
        ));
    }
    lines.push(format!(
        "sessions    {} begun, {} refused, {} ended, {} fenced, {} bad messages",
        of("sessions"),
        of("sessions_refused"),
        of("sessions_ended"),
        fenced,
        of("messages_bad")
    ));
    lines.join("\n")
}

/// Lines between two headings.
const HEAD_EVERY: u64 = 20;

fn watch(admin: &mut Admin, every: Duration, json: bool) -> Result<()> {
    let mut before = ask(admin)?;
    for number in 0.. {
        std::thread::sleep(every);
        let now = ask(admin)?;
        if json {
            // One document a line, whatever reads it.
            let shown = Shown {
                stats: &now,
                memory: Memory::of(now.pid),
                host_cache: None,
            };
            output::line(&serde_json::to_string(&shown)?)?;
        } else {
            let text = watched(&before, &now);
            let from = usize::from(number % HEAD_EVERY != 0);
            for line in text.lines().skip(from) {
                output::line(line)?;
            }
        }
        before = now;
    }
    Ok(())
}

/// A heading and one line of what happened between two moments, of fixed width.
fn watched(before: &StatsEntry, now: &StatsEntry) -> String {
    let since = |name: &str| counter(now, name).saturating_sub(counter(before, name));
    let read = since("read_direct_bytes") + since("read_buffered_bytes");
    let back = since("reclaimed_idle_pages") + since("reclaimed_granted_pages");
    let cells = [
        ("USED", pages(now.frames_used)),
        ("QUARANTINE", pages(now.frames_quarantined)),
        ("GUESTS", now.sessions.to_string()),
        ("GRANTS", now.grants.to_string()),
        ("HITS", since("fault_hits").to_string()),
        ("MISSES", since("fault_misses").to_string()),
        ("FILLED", pages(since("filled_pages"))),
        ("READ", bytes(read)),
        ("RECLAIMED", pages(back)),
        ("RECALLS", since("recalls").to_string()),
    ];
    let put = |f: &dyn Fn(&(&'static str, String)) -> String| {
        cells
            .iter()
            .map(|cell| format!("{:>10}", f(cell)))
            .collect::<Vec<_>>()
            .join(" ")
    };
    format!(
        "{}\n{}",
        put(&|cell| cell.0.to_owned()),
        put(&|cell| cell.1.clone())
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(hits: u64) -> StatsEntry {
        let counters = [
            ("fault_hits".to_owned(), hits),
            ("fault_misses".to_owned(), 10),
        ];
        StatsEntry {
            backend: "local".into(),
            force: true,
            frames_max: 1024,
            frames_used: 512,
            counters: counters.into_iter().collect(),
            ..StatsEntry::default()
        }
    }

    #[test]
    fn memory_is_read_from_status() {
        let status =
            "Name:\tcopage\nVmPTE:\t      12 kB\nRssAnon:\t    1000 kB\nRssFile:\t  20 kB\n";
        let memory = Memory::parse(status);
        assert_eq!(memory.rss_anon_bytes, Some(1_024_000));
        assert_eq!(memory.page_tables_bytes, Some(12_288));
        assert_eq!(memory.rss_shmem_bytes, None);
        assert!(Memory::of(std::process::id()).rss_anon_bytes > Some(0));
    }

    #[test]
    fn what_changed_is_shown() {
        let text = watched(&stats(5), &stats(12));
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|l| l.split_whitespace().collect())
            .collect();
        assert_eq!(lines[0][..4], ["USED", "QUARANTINE", "GUESTS", "GRANTS"]);
        assert!(
            text.lines()
                .nth(1)
                .unwrap()
                .starts_with("   2.0 MiB        0 B          0")
        );
        assert!(lines[1].contains(&"7"));
        // A daemon that began anew in between: nothing below zero.
        assert!(watched(&stats(12), &stats(5)).lines().count() == 2);
    }

    #[test]
    fn the_page_of_numbers() {
        let text = text(&stats(30), Memory::default());
        assert!(text.contains("2.0 MiB of 4.0 MiB used (50.0 %)"), "{text}");
        assert!(text.contains("30 hits, 10 misses (75.0 % hit)"), "{text}");
        assert!(text.contains("unknown of the daemon's own"), "{text}");
    }

    #[test]
    fn json_is_flat_with_units_last() {
        let stats = stats(1);
        let shown = Shown {
            stats: &stats,
            memory: Memory::default(),
            host_cache: None,
        };
        let value = serde_json::to_value(&shown).unwrap();
        assert_eq!(value["frames_used"], 512);
        assert!(value.get("rss_anon_bytes").is_some() && value.get("host_cache").is_none());
    }
}
