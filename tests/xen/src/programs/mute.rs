//! A guest that holds what it was given: it renews its lease, and unmaps nothing that is asked back.

use super::library::{say, word};
use anyhow::{Context, Result, bail, ensure};
use copage_coherence::msg::{Notice, OpenHow, Request};
use copage_grants::PAGE_SIZE;
use copage_grants::xen::lib::{Gnttab, GrantMap};
use copage_tests::raw::Raw;
use std::io::Error;
use std::path::Path;
use std::time::{Duration, Instant};

/// Told by the files that are there.
pub const UNMAP: &str = "/tmp/unmap";
pub const AGAIN: &str = "/tmp/again";

fn check(map: &GrantMap, version: u64) -> Result<()> {
    let bytes = map.bytes();
    for page in 0..bytes.len() / PAGE_SIZE {
        let first = bytes.read_u64(page * PAGE_SIZE);
        let last = bytes.read_u64((page + 1) * PAGE_SIZE - 8);
        let wanted = Some(word(version, page as u64));
        ensure!(
            first == wanted && last == wanted,
            "page {page}: {first:x?} to {last:x?}"
        );
    }
    Ok(())
}

/// Opens and maps all of a file of `pages` pages.
fn take(raw: &mut Raw, export: &str, file: &str, pages: u64) -> Result<GrantMap> {
    let file = raw.open(export, file, OpenHow::Map);
    let refs = raw.refs(&file, pages);
    let (granter, refs) = refs.map_err(Error::from_raw_os_error)?;
    Ok(Gnttab::open()?.map(granter, &refs, false)?)
}

/// `mute EXPORT FILE PAGES VERSION never|acks`: maps FILE, which is of VERSION, and lets nothing go. With
/// `acks` it says that it did. When [`AGAIN`] is there it connects once more and wants the file that this
/// names; when [`UNMAP`] is, it unmaps. It waits to be killed.
pub fn mute(arguments: &[&str]) -> Result<()> {
    let [export, file, pages, version, how] = arguments else {
        bail!("mute EXPORT FILE PAGES VERSION never|acks");
    };
    let (pages, version) = (pages.parse()?, version.parse()?);
    let acks = match *how {
        "never" => false,
        "acks" => true,
        _ => bail!("never or acks"),
    };
    let mut raw = Raw::try_hello_xen("").map_err(Error::from_raw_os_error)?;
    let mut map = Some(take(&mut raw, export, file, pages)?);
    let mut session = Some(raw);
    let (mut asked, mut acked) = (None, 0);
    say("mapped")?;
    loop {
        if let Some(map) = &map {
            // What it has mapped stays as it was for as long as it likes.
            check(map, version)?;
        }
        if let Some(raw) = &mut session {
            let mut lost = !raw.renew();
            while let Some(notice) = next_notice(raw) {
                match notice {
                    Notice::Invalidate { recall, .. } | Notice::Rebase { recall, .. } => {
                        asked.get_or_insert_with(Instant::now);
                        if acks {
                            raw.tell(&Request::Ack { recall });
                            acked += 1;
                            say(&format!("{acked} acks"))?;
                        }
                    }
                    Notice::Fenced { reason } => {
                        let ms = asked.map_or(0, |at: Instant| at.elapsed().as_millis());
                        say(&format!("fenced {reason:?} after {ms} ms"))?;
                        lost = true;
                    }
                    Notice::Resized { .. } => {}
                    Notice::Goodbye => bail!("the daemon stops"),
                }
            }
            if lost {
                session = None;
                say("lost")?;
            }
        }
        if let Ok(file) = std::fs::read_to_string(AGAIN) {
            std::fs::remove_file(AGAIN)?;
            again(export, file.trim(), pages)?;
        }
        if Path::new(UNMAP).exists() && map.take().is_some() {
            say("unmapped")?;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The next notice, within a short time; other messages do not matter.
fn next_notice(raw: &mut Raw) -> Option<Notice> {
    if !raw.notices.is_empty() {
        return Some(raw.notices.remove(0));
    }
    let until = Instant::now() + Duration::from_millis(200);
    while let Some(came) = raw.hear_within(until.saturating_duration_since(Instant::now())) {
        if let Some(notice) = came.notice() {
            return Some(notice);
        }
    }
    None
}

/// Another session of the same guest: what it gets of `file`.
fn again(export: &str, file: &str, pages: u64) -> Result<()> {
    let mut raw = Raw::try_hello_xen("").map_err(Error::from_raw_os_error)?;
    let file = raw.open(export, file, OpenHow::Map);
    match raw.refs(&file, pages) {
        Ok((_, refs)) => say(&format!("again: {} pages", refs.len()))?,
        Err(errno) => say(&format!(
            "again: refused, {}",
            Error::from_raw_os_error(errno)
        ))?,
    }
    raw.tell(&Request::Bye).context("a good end")?;
    Ok(())
}
