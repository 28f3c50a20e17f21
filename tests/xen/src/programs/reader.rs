//! A guest that reads a mapped file for ever, through deaths of the daemon.

use super::library::{next, version_of};
use anyhow::{Context, Result};
use copage_grants::PAGE_SIZE;
use copage_mmap::{Client, ConnectOptions, DaemonAt, MapOptions, OpenHow};
use std::io::Write as _;
use std::time::Duration;

/// `reader EXPORT FILE`: connects when a daemon is there, says `session`, maps the file and checks pages of
/// it at random. SIGBUS, when the daemon died, is for whoever started it; a wrong page ends it with 1.
pub fn reader(arguments: &[&str]) -> Result<()> {
    let [export, file] = arguments else {
        anyhow::bail!("reader EXPORT FILE");
    };
    let client = loop {
        match Client::connect_at(&DaemonAt::Xen, &ConnectOptions::default()) {
            Ok(client) => break client,
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    };
    let node = client.attach(export)?.resolve(file.as_bytes())?;
    let mapping = node.open(OpenHow::Map)?.map(&MapOptions::shared())?;
    let pages = mapping.len() / PAGE_SIZE;
    let mut x = u64::from(std::process::id());
    let mut said = false;
    loop {
        let page = next(&mut x, pages);
        if let Err(wrong) = version_of(mapping.as_volatile(), page, 1) {
            println!("WRONG {wrong:#}");
            return Err(wrong).context("a wrong page");
        }
        if !said {
            // Not before it has read: a session that only connects shows nothing.
            println!("session");
            std::io::stdout().flush()?;
            said = true;
        }
    }
}
