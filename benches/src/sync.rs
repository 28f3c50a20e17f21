//! Putting pages on the disk that a guest has stored to, beside one process that writes as many by pwrite and
//! fdatasync.

use crate::daemon::{Daemon, DaemonOptions};
use crate::files::TestFile;
use crate::guest::{self, Order};
use crate::setting::Setting;
use crate::stats;
use crate::table::{Row, Unit};
use crate::write::{NAME, mapped};
use anyhow::{Result, ensure};
use copage_grants::PAGE_SIZE;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

/// How many pages are dirty.
const DIRTY: [u64; 4] = [1, 16, 256, 1024];

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("write-sync")?;
    let most = DIRTY.iter().copied().max().unwrap_or(1);
    let file = TestFile::make(&dir, "file", most, 65)?;
    let native_file = TestFile::make(&dir, "native", most, 65)?;
    let native = File::options().write(true).open(&native_file.path)?;
    let daemon = Daemon::start(setting, &dir, DaemonOptions::coherent())?;
    let name = file.name().to_owned();
    let mut guests = mapped(&daemon, 1, &Order::MapWritable { name })?;
    let guest = &mut guests[0];
    let mut value = 0;
    for pages in DIRTY {
        let samples = stats::interleaved::<2>(setting.sizes.reps, |side, _| {
            value += 1;
            if side == 0 {
                let stored = guest.order(&Order::StoreAndSync { value, pages })?;
                let disk = std::fs::read(&file.path)?;
                let there = guest::is_stored(&disk, value, pages);
                ensure!(
                    there,
                    "WRONG BYTES: what was synced is not in the host's file"
                );
                return Ok(stored.seconds_of_sync);
            }
            let page = [value as u8; PAGE_SIZE];
            let begin = Instant::now();
            for index in 0..pages {
                native.write_all_at(&page, index * PAGE_SIZE as u64)?;
            }
            native.sync_data()?;
            Ok(begin.elapsed().as_secs_f64())
        })?;
        let [ours, bare] = samples;
        rows.push(
            Row::new(
                NAME,
                format!("sync of {pages} page(s) that were stored to"),
                Unit::Seconds,
            )
            .copage(&ours)
            .against("pwrite of as many and fdatasync", &bare),
        );
    }
    Ok(())
}
