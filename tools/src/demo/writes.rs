//! A file that every guest may write: what a store does to those who read, and what a daemon that dies
//! in the middle of it does to what was stored.

use super::pattern::{self, PageContent};
use super::proto::{Answer, Order};
use super::scenario::Scene;
use super::stage::ask_all;
use anyhow::{Context, Result, bail};
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// The export that guests write to.
pub const EXPORT: &str = "written";
const NAME: &str = "file";
/// Its length, in pages.
const PAGES: u64 = 64;
/// Who writes first, and where.
const WRITER: usize = 1;
const PAGE: u64 = 7;

impl Scene<'_> {
    /// One guest stores to a page that all have mapped.
    pub fn write(&mut self) -> Result<()> {
        let host = self.written.join(NAME);
        super::write_durably(&host, &pattern::file(PAGES, 1))?;
        // As many before it as in every guest: the shared files and the one that the host changed.
        let mapping = self.files.len() + 1;
        for (n, guest) in self.guests.iter_mut().enumerate() {
            guest.ask(&Order::MapWritten {
                export: EXPORT.into(),
                path: NAME.into(),
                writable: n == WRITER,
            })?;
        }
        let read = Order::Read {
            mapping,
            page: PAGE,
        };
        // Where there is no telling a load from a store, the writer would have the page by looking at it.
        let mut before = Vec::new();
        for (n, guest) in self.guests.iter_mut().enumerate() {
            if n != WRITER {
                before.push(guest.ask(&read)?);
            }
        }
        let before = versions(before)?;
        let asked = self.stats()?.strict.recalls;
        let writer = self.guests.get_mut(WRITER).context("a guest that writes")?;
        let name = writer.part().name.clone();
        let stored = writer.ask(&Order::Store {
            mapping,
            page: PAGE,
            version: 2,
        })?;
        let Answer::Stored { ns } = stored else {
            bail!("a store was answered by {stored:?}");
        };
        let asked = self.stats()?.strict.recalls - asked;
        let after = versions(ask_all(&mut self.guests, &read)?)?;
        let begin = Instant::now();
        let writer = self.guests.get_mut(WRITER).context("a guest that writes")?;
        writer.ask(&Order::Sync { mapping })?;
        let synced = begin.elapsed();
        let mut page = [0; PAGE_SIZE];
        std::fs::File::open(&host)?.read_exact_at(&mut page, PAGE * PAGE_SIZE_U64)?;
        let on_disk = pattern::check(&page, PAGE) == PageContent::Whole(2);
        let (old, new) = (
            before.iter().all(|version| *version == 1),
            after.iter().all(|version| *version == 2),
        );
        let readers = self.guests.len() - 1;
        self.report.line(
            "write",
            old && new && on_disk,
            format!(
                "{name} stored to page {PAGE}, which {readers} others had mapped: taken from them in {:.2} ms ({}); \
                 they read {}; synced in {:.1} ms, {}",
                ns as f64 / 1e6,
                match asked {
                    0 if self.hypervisor => "nobody was asked".to_owned(),
                    0 => "by force, nobody was asked".to_owned(),
                    asked => format!("{asked} asked, each let go"),
                },
                if new { "the new page" } else { "SOMETHING ELSE" },
                synced.as_secs_f64() * 1e3,
                if on_disk { "the host's file has it" } else { "the host's file HAS IT NOT" },
            ),
        );
        Ok(())
    }

    /// The daemon is killed while a guest stores and syncs, and started again.
    pub fn daemon_killed(&mut self) -> Result<()> {
        let mapping = self.files.len() + 1;
        // Whoever wrote first may be gone by now, and its mapping with it.
        let writer = self.guests.first_mut().context("a guest that writes")?;
        let name = writer.part().name.clone();
        writer.ask(&Order::MapWritten {
            export: EXPORT.into(),
            path: NAME.into(),
            writable: true,
        })?;
        let mapping = mapping + 1;
        writer.ask(&Order::WriteOn { mapping })?;
        std::thread::sleep(Duration::from_millis(self.scale.watch_ms));
        let begin = Instant::now();
        self.daemon.restart()?;
        let back = begin.elapsed();
        std::thread::sleep(Duration::from_millis(
            self.scale.watch_ms + u64::from(self.scale.lease_ttl_ms) * 3 / 2,
        ));
        let writer = self.guests.first_mut().context("a guest that writes")?;
        let Answer::Wrote {
            acked,
            at_kill,
            again,
        } = writer.ask(&Order::Stop)?
        else {
            bail!("a writing guest answered something else");
        };
        let file = std::fs::read(self.written.join(NAME))?;
        let lost = (0..PAGES).filter(|page| !has(&file, *page, acked)).count();
        self.report.line(
            "crash",
            lost == 0 && at_kill > 0 && acked > at_kill,
            format!(
                "kill -9 of the daemon while {name} stored and synced, up again {:.0} ms later: {at_kill} synced stores before, \
                 {acked} in all; the host's file has all but {lost} of them ({again} stores were not synced yet, and made again)",
                back.as_secs_f64() * 1e3,
            ),
        );
        Ok(())
    }
}

/// Does a page hold the last of the stores up to `acked` that went to it, or a later one?
fn has(file: &[u8], page: u64, acked: u64) -> bool {
    let at = (page * PAGE_SIZE_U64) as usize;
    let word = file.get(at..).and_then(|bytes| bytes.first_chunk());
    let last = (1..=acked)
        .rev()
        .take(PAGES as usize)
        .find(|n| n % PAGES == page);
    match (last, word) {
        (None, _) => true,
        (Some(last), Some(word)) => {
            let found = u64::from_le_bytes(*word);
            found >= last && found % PAGES == page
        }
        (Some(_), None) => false,
    }
}

fn versions(answers: Vec<Answer>) -> Result<Vec<u32>> {
    let version = |answer| match answer {
        Answer::Page { version } => Ok(version),
        other => bail!("a reading guest answered {other:?}"),
    };
    answers.into_iter().map(version).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_store_is_seen() {
        let mut file = vec![0; (PAGES * PAGE_SIZE_U64) as usize];
        for n in 1..=100_u64 {
            let at = (n % PAGES * PAGE_SIZE_U64) as usize;
            file[at..at + 8].copy_from_slice(&n.to_le_bytes());
        }
        assert!((0..PAGES).all(|page| has(&file, page, 100)));
        assert!((0..PAGES).all(|page| has(&file, page, 90)));
        assert!(!has(&file, 101 % PAGES, 101));
        file[..8].copy_from_slice(&65_u64.to_le_bytes());
        assert!(!has(&file, 0, 100), "another page's word");
    }
}
