//! A guest that reads a mapped file for ever, through deaths of the daemon.

use super::library::version_of;
use crate::numbers::Numbers;
use anyhow::{Context, Result, ensure};
use copage_grants::PAGE_SIZE;
use copage_mmap::{Client, ConnectOptions, DaemonAt, MapOptions, Mapping, OpenHow};
use std::io::Write as _;

/// Pages of the private mapping that are stored to.
const MINE: usize = 8;

fn mine(mapping: &Mapping, page: usize) -> Result<u64> {
    let word = mapping.as_volatile().read_u64(page * PAGE_SIZE);
    word.context("a page of the private mapping")
}

/// `reader EXPORT FILE`: connects once, maps the file shared and private, stores to pages of the private
/// mapping, and checks pages of both at random. Says `session N` when it has read whole pages with the
/// N-th daemon after the first. A wrong page ends it with 1, SIGBUS by SIGBUS.
pub fn reader(arguments: &[&str]) -> Result<()> {
    let [export, file] = arguments else {
        anyhow::bail!("reader EXPORT FILE");
    };
    let client = Client::connect_at(&DaemonAt::Xen, &ConnectOptions::default())?;
    let node = client.attach(export)?.resolve(file.as_bytes())?;
    let file = node.open(OpenHow::Map)?;
    let mapping = file.map(&MapOptions::shared())?;
    let private = file.map(&MapOptions::private())?;
    let bytes = private.as_volatile_mut().context("a writable mapping")?;
    for page in 0..MINE {
        ensure!(bytes.write_u64(page * PAGE_SIZE, page as u64 + 77));
    }
    let pages = mapping.len() / PAGE_SIZE;
    let mut numbers = Numbers::new(u64::from(std::process::id()));
    let (mut said, mut read) = (None, 0);
    loop {
        let page = numbers.below(pages);
        let wrong = match read % 16 {
            0 if page >= MINE => version_of(private.as_volatile(), page, 1).err(),
            0 => (mine(&private, page)? != page as u64 + 77)
                .then(|| anyhow::anyhow!("what was stored to private page {page} is lost")),
            _ => version_of(mapping.as_volatile(), page, 1).err(),
        };
        if let Some(wrong) = wrong {
            println!("WRONG {wrong:#}");
            return Err(wrong).context("a wrong page");
        }
        read += 1;
        let session = client.reconnects();
        if said != Some(session) {
            // Not before it has read with it: a session that only connects shows nothing.
            (said, read) = (Some(session), 0);
        } else if read == 64 {
            println!("session {session}");
            std::io::stdout().flush()?;
        }
    }
}
