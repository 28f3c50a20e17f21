//! What the demo shows, a line a step. Every figure is measured while it runs.

use super::cast::{Part, Scale};
use super::files::Chosen;
use super::memory::{own_bytes, page_cache_bytes};
use super::pattern;
use super::proto::{Answer, Order, Watched};
use super::report::{Report, mib};
use super::stage::{DaemonProcess, Guest, ask_all, wait_until};
use crate::serve::admin_types::{AdminReply, AdminRequest, StatsEntry};
use anyhow::{Context, Result, bail};
use copage_grants::PAGE_SIZE_U64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What the steps share.
pub struct Scene<'a> {
    /// The screen.
    pub report: &'a mut Report,
    /// How large it is.
    pub scale: Scale,
    /// The guests are domains of a hypervisor.
    pub hypervisor: bool,
    /// The daemon.
    pub daemon: &'a mut DaemonProcess,
    /// The guests, connected.
    pub guests: Vec<Guest>,
    /// The machine's files that are shared.
    pub files: &'a [Chosen],
    /// The directory of the files that the demo writes, exported as `scratch`.
    pub scratch: PathBuf,
    /// The directory that guests write to.
    pub written: PathBuf,
}

impl Scene<'_> {
    pub(super) fn stats(&self) -> Result<StatsEntry> {
        match self.daemon.ask(&AdminRequest::Stats)? {
            AdminReply::Stats(stats) => Ok(stats),
            other => bail!("stats was answered by {other:?}"),
        }
    }

    /// Grants of the guest with this name; `None` when the daemon knows no session of it.
    pub(super) fn grants_of(&self, name: &str) -> Result<Option<u64>> {
        match self.daemon.ask(&AdminRequest::Guests)? {
            AdminReply::Guests { guests } => Ok(guests
                .iter()
                .find(|guest| guest.name == name)
                .map(|guest| guest.grants)),
            other => bail!("guests was answered by {other:?}"),
        }
    }

    /// All guests map and read everything; their checksums must be the host's. Returns what the
    /// reading left in the host's page cache, in bytes.
    pub fn share_files(&mut self) -> Result<Option<u64>> {
        let hosts = || self.files.iter().map(|file| file.host.as_path());
        let bytes: u64 = self.files.iter().map(|file| file.bytes).sum();
        let cached_before = page_cache_bytes(hosts())?;
        let begin = Instant::now();
        let paths = self.files.iter().map(|file| file.path.clone()).collect();
        ask_all(
            &mut self.guests,
            &Order::Map {
                export: "demo".into(),
                paths,
            },
        )?;
        let answers = ask_all(&mut self.guests, &Order::Checksum)?;
        let took = begin.elapsed();
        let left = match (cached_before, page_cache_bytes(hosts())?) {
            (Some(before), Some(after)) => Some(after.saturating_sub(before)),
            _ => None,
        };
        let mut expected = Vec::new();
        for file in self.files {
            let content = std::fs::read(&file.host).with_context(|| file.path.clone())?;
            expected.push(xxhash_rust::xxh3::xxh3_64(&content));
        }
        let equal = answers.iter().all(|answer| match answer {
            Answer::Checksums { xxh3 } => *xxh3 == expected,
            _ => false,
        });
        self.report.line(
            "files",
            equal,
            format!(
                "{} guests mapped {} files, {}, in {:.2} s: {} checksums, {}",
                self.guests.len(),
                self.files.len(),
                mib(bytes),
                took.as_secs_f64(),
                self.guests.len() * self.files.len(),
                if equal {
                    "all equal to the host's"
                } else {
                    "NOT equal to the host's"
                },
            ),
        );
        Ok(left)
    }

    /// The three columns of memory, all three with the pages of the same files touched.
    pub fn memory(&mut self, left_in_page_cache: Option<u64>) -> Result<()> {
        let guests = self.guests.len() as u64;
        let frames = self.stats()?.frames_used * PAGE_SIZE_U64;
        let pids = self
            .guests
            .iter()
            .map(Guest::pid)
            .chain([self.daemon.pid()]);
        let shared = own_bytes(pids);
        let left = left_in_page_cache.unwrap_or(0);
        let socket = self.daemon.guest_socket();
        let mut native = (0..guests)
            .map(|n| Guest::start(&Part::process(&socket, &format!("native{}", n + 1))?))
            .collect::<Result<Vec<_>>>()?;
        let paths = self
            .files
            .iter()
            .map(|f| f.host.to_string_lossy().into_owned())
            .collect();
        ask_all(&mut native, &Order::MapNative { paths })?;
        ask_all(&mut native, &Order::Checksum)?;
        let natives = own_bytes(native.iter().map(Guest::pid));
        let cached = page_cache_bytes(self.files.iter().map(|file| file.host.as_path()))?;
        let rounded: u64 = self
            .files
            .iter()
            .map(|f| f.bytes.div_ceil(PAGE_SIZE_U64) * PAGE_SIZE_U64)
            .sum();
        let cached = cached.unwrap_or(rounded);
        self.report.line(
            "memory",
            frames <= rounded + rounded / 50 && left <= rounded / 10,
            format!(
                "copage: frames {} once + processes {} + left in the host's page cache {} = {}",
                mib(frames),
                mib(shared),
                left_in_page_cache.map_or("(the kernel does not tell)".into(), mib),
                mib(frames + shared + left),
            ),
        );
        self.report.line(
            "",
            true,
            format!(
                "the same processes mapping natively: page cache {} once + processes {} = {}",
                mib(cached),
                mib(natives),
                mib(cached + natives),
            ),
        );
        self.report.line(
            "",
            true,
            format!(
                "{guests} guest kernels with caches of their own would hold {guests} x {} = {} \
                 (that is what copage saves on a hypervisor; here one kernel shares anyway)",
                mib(cached),
                mib(guests * cached),
            ),
        );
        Ok(())
    }

    /// One page, one physical frame, in all guests.
    pub fn frame(&mut self) -> Result<()> {
        let largest = (0..self.files.len())
            .max_by_key(|&n| self.files[n].bytes)
            .unwrap_or(0);
        let page = self.files[largest].bytes / PAGE_SIZE_U64 / 2;
        let order = Order::Frame {
            mapping: largest,
            page,
        };
        let frames: Vec<u64> = ask_all(&mut self.guests, &order)?
            .iter()
            .map(|answer| match answer {
                Answer::Frame { pfn } => *pfn,
                _ => 0,
            })
            .collect();
        let what = format!("page {page} of {}", self.files[largest].path);
        if frames.contains(&0) {
            let text = format!("{what}: this kernel tells frame numbers only to CAP_SYS_ADMIN");
            self.report.line("frame", true, text);
        } else {
            let same = frames.iter().all(|pfn| *pfn == frames[0]);
            let list: Vec<_> = frames.iter().map(|pfn| format!("{pfn:#x}")).collect();
            self.report.line(
                "frame",
                same,
                format!("{what} is physical frame {}", list.join(" = ")),
            );
        }
        Ok(())
    }

    /// A file is rewritten on the host under guests that read it all the time.
    pub fn host_change(&mut self) -> Result<()> {
        let path = self.scratch.join("changed");
        std::fs::write(&path, pattern::file(self.scale.changed_pages, 1))?;
        let mapping = self.files.len();
        let order = Order::Map {
            export: "scratch".into(),
            paths: vec!["changed".into()],
        };
        ask_all(&mut self.guests, &order)?;
        ask_all(
            &mut self.guests,
            &Order::Watch {
                mapping,
                random: false,
            },
        )?;
        std::thread::sleep(Duration::from_millis(self.scale.watch_ms / 3));
        let file = std::fs::File::options().write(true).open(&path)?;
        file.write_all_at(&pattern::file(self.scale.changed_pages, 2), 0)?;
        drop(file);
        let written_ns = super::monotonic_ns();
        std::thread::sleep(Duration::from_millis(self.scale.watch_ms));
        let seen = watched(ask_all(&mut self.guests, &Order::Stop)?)?;
        let pages: u64 = seen.iter().map(|watched| watched.pages).sum();
        let wrong: u64 = seen
            .iter()
            .map(|watched| watched.wrong + watched.backwards)
            .sum();
        let crossed: u64 = seen.iter().map(|watched| watched.crossed).sum();
        let all_new = seen.iter().all(|watched| watched.version == 2);
        let last_ns = seen
            .iter()
            .map(|watched| watched.newest_seen_ns)
            .max()
            .unwrap_or(0);
        // The guests' clocks are the host's only where they are its processes.
        let delay = if self.hypervisor {
            String::new()
        } else {
            let delay_ms = last_ns.saturating_sub(written_ns) as f64 / 1e6;
            format!(", the last {delay_ms:.1} ms after the write")
        };
        self.report.line(
            "change",
            wrong == 0 && all_new,
            format!(
                "{} rewritten on the host under {} readers: version 2 seen by {}{delay}; {pages} pages \
                 checked, {wrong} torn or old again ({crossed} replaced while being copied)",
                mib(self.scale.changed_pages * PAGE_SIZE_U64),
                seen.len(),
                if all_new { "all" } else { "NOT all" },
            ),
        );
        Ok(())
    }

    /// The budget is cut to half of what the guests read at random.
    pub fn budget(&mut self) -> Result<()> {
        let path = self.scratch.join("load");
        super::write_durably(&path, &pattern::file(self.scale.load_pages, 1))?;
        ask_all(&mut self.guests, &Order::Unmap)?;
        let order = Order::Map {
            export: "scratch".into(),
            paths: vec!["load".into()],
        };
        ask_all(&mut self.guests, &order)?;
        self.daemon.ask(&AdminRequest::Drop)?;
        let set = self.scale.load_pages * PAGE_SIZE_U64;
        // Once through, so that the first figure is of warm pages.
        ask_all(&mut self.guests, &Order::Checksum)?;
        let full = self.watch_for(Duration::from_millis(self.scale.watch_ms))?;
        let half_mib = set / 2 / (1 << 20);
        ask_all(
            &mut self.guests,
            &Order::Watch {
                mapping: 0,
                random: true,
            },
        )?;
        let begin = Instant::now();
        self.daemon.ask(&AdminRequest::SetBudget {
            frames_mib: half_mib,
        })?;
        let within = wait_until(self.scale.soon(), || {
            Ok(self.stats()?.frames_used * PAGE_SIZE_U64 <= set / 2)
        })?;
        let took = begin.elapsed();
        std::thread::sleep(Duration::from_millis(self.scale.watch_ms / 2));
        let during = watched(ask_all(&mut self.guests, &Order::Stop)?)?;
        let half = self.watch_for(Duration::from_millis(self.scale.watch_ms))?;
        let used = self.stats()?.frames_used * PAGE_SIZE_U64;
        self.daemon.ask(&AdminRequest::SetBudget {
            frames_mib: self.scale.frames_mib,
        })?;
        let wrong: u64 = [&full, &during, &half]
            .into_iter()
            .flatten()
            .map(|w| w.wrong + w.backwards)
            .sum();
        self.report.line(
            "budget",
            wrong == 0 && within.is_some() && used <= set / 2,
            format!(
                "{} read at random by {} guest{}; budget cut to {half_mib} MiB in {:.0} ms: {} wrong pages; \
                 {:.0} pages/s before, {:.0} after (each other page comes from the {} again)",
                mib(set),
                self.guests.len(),
                if self.guests.len() == 1 { "" } else { "s" },
                took.as_secs_f64() * 1e3,
                wrong,
                rate(&full),
                rate(&half),
                // What a hypervisor's control domain has its files on, nobody told.
                if self.hypervisor { "host's file" } else { "disk" },
            ),
        );
        Ok(())
    }

    fn watch_for(&mut self, time: Duration) -> Result<Vec<Watched>> {
        ask_all(
            &mut self.guests,
            &Order::Watch {
                mapping: 0,
                random: true,
            },
        )?;
        std::thread::sleep(time);
        watched(ask_all(&mut self.guests, &Order::Stop)?)
    }

    /// The daemon's books against the grant table and the frame files.
    pub fn audit(&mut self) -> Result<()> {
        let AdminReply::Audit(audit) = self.daemon.ask(&AdminRequest::Audit)? else {
            bail!("audit was answered by something else");
        };
        let checked: u64 = audit.checks.iter().map(|check| check.checked).sum();
        let differences: usize = audit
            .checks
            .iter()
            .map(|check| check.differences.len())
            .sum();
        self.report.line(
            "audit",
            audit.ok && differences == 0,
            format!(
                "{} checks over {checked} entries, frames and pages: {differences} differences",
                audit.checks.len()
            ),
        );
        Ok(())
    }
}

fn watched(answers: Vec<Answer>) -> Result<Vec<Watched>> {
    answers
        .into_iter()
        .map(|answer| match answer {
            Answer::Watched(watched) => Ok(watched),
            other => bail!("a watching guest answered {other:?}"),
        })
        .collect()
}

/// Pages a second, of all together.
fn rate(watched: &[Watched]) -> f64 {
    watched
        .iter()
        .map(|w| w.pages as f64 / w.seconds.max(1e-9))
        .sum()
}

/// The configuration of the demo's daemon. `domains`: the hypervisor's guests, by name.
pub fn config(scale: &Scale, dirs: [(&str, &Path, &str); 3], domains: Option<&[Part]>) -> String {
    // TOML's basic strings take a path when quotes and backslashes are escaped.
    let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
    let mut text = format!(
        "backend = \"{}\"\nframes_mib = {}\nlease_ttl_ms = {2}\ninvalidate_deadline_ms = {2}\n\n",
        if domains.is_some() { "xen" } else { "local" },
        scale.frames_mib,
        scale.lease_ttl_ms
    );
    if domains.is_some() {
        text.push_str("[xen]\ncache_domain_mib = 64\n\n");
    }
    for part in domains.unwrap_or_default() {
        let name = quoted(&part.name);
        text.push_str(&format!("[[guest]]\nname = {name}\ndomain = {name}\n\n"));
    }
    for (name, path, mode) in dirs {
        let path = quoted(&path.to_string_lossy());
        text.push_str(&format!(
            "[[export]]\nname = \"{name}\"\npath = {path}\nmode = \"{mode}\"\nallow = [\"*\"]\n\n"
        ));
    }
    text
}
