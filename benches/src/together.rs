//! Two guests that store to one page as fast as they can, beside two processes with a plain shared page.

use crate::daemon::{Daemon, DaemonOptions};
use crate::files::TestFile;
use crate::guest::{self, Guest, Order};
use crate::limits::PAGES_PER_MIB;
use crate::pattern::LINE_BYTES;
use crate::setting::Setting;
use crate::stats::Samples;
use crate::table::{Row, Unit};
use crate::write::{NAME, mapped};
use anyhow::Result;
use std::path::Path;

/// Where a plain shared page is.
const IN_MEMORY: &str = "/dev/shm";

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    for shared in [false, true] {
        together(setting, shared, rows)?;
    }
    Ok(())
}

/// So many processes with one plain shared file of so many pages in memory, which are all there.
pub fn plain(processes: usize, pages: u64) -> Result<Vec<Guest>> {
    let name = format!("copage-bench-{}", std::process::id());
    let file = TestFile::make(Path::new(IN_MEMORY), &name, pages, 64)?;
    let path = file.path.clone();
    let guests: Result<Vec<_>> = (0..processes).map(|_| Guest::spawn()).collect();
    let mapped = guests.and_then(|mut guests| {
        guest::order_all(&mut guests, &Order::MapNativeWritable { path })?;
        Ok(guests)
    });
    std::fs::remove_file(&file.path)?;
    mapped
}

fn together(setting: &Setting, shared: bool, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir(if shared {
        "write-shared"
    } else {
        "write-bounced"
    })?;
    let file = TestFile::make(&dir, "file", PAGES_PER_MIB, 63)?;
    let mut options = DaemonOptions::coherent();
    options.share_bounced = shared;
    let daemon = Daemon::start(setting, &dir, options)?;
    let name = file.name().to_owned();
    let mut writers = mapped(&daemon, 2, &Order::MapWritable { name })?;
    let mut rivals = plain(2, 1)?;
    let stores = setting.sizes.together_stores;
    let (mut ours, mut bare) = (Samples::default(), Samples::default());
    for _ in 0..setting.sizes.reps {
        for (guests, samples) in [(&mut writers, &mut ours), (&mut rivals, &mut bare)] {
            for (guest, offset) in guests.iter_mut().zip([0, LINE_BYTES * 2]) {
                guest.send(&Order::StoreLoop { offset, stores })?;
            }
            for guest in guests {
                samples.push(guest.receive()?.seconds / stores as f64);
            }
        }
    }
    let counted = daemon.stats()?.strict;
    let what = if shared {
        "a store to a page that two guests share for writing"
    } else {
        "a store to a page that two guests write in turn"
    };
    let how = if shared {
        "share_bounced, for trials"
    } else {
        "each has it for 1 ms at least"
    };
    rows.push(
        Row::new(NAME, what, Unit::Seconds)
            .copage(&ours)
            .against("the same in a plain shared page", &bare)
            .note(format!(
                "{how}: granted {} times to one, {} times to several",
                counted.granted_write, counted.granted_shared,
            )),
    );
    Ok(())
}
