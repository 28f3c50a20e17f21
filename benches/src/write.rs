//! Files that guests write: what it costs to take a page from its readers, to get it back, and to
//! write one page from two processes.

use crate::broadcast::Broadcast;
use crate::daemon::{Daemon, DaemonOptions, Mode};
use crate::files::TestFile;
use crate::guest::{self, Guest, Order};
use crate::limits::PAGES_PER_MIB;
use crate::pattern::LINE_BYTES;
use crate::reader;
use crate::setting::Setting;
use crate::stats::Samples;
use crate::table::{Row, Unit};
use anyhow::Result;
use std::path::Path;

const NAME: &str = "write";
/// How many guests read a page that another takes.
const READERS: [usize; 4] = [1, 4, 16, 64];
/// Where a plain shared page is.
const IN_MEMORY: &str = "/dev/shm";

fn plain_name() -> String {
    format!("copage-bench-{}", std::process::id())
}

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    for force in [true, false] {
        unshare(setting, force, rows)?;
    }
    faults(setting, rows)?;
    together(setting, rows)
}

fn options(mode: Mode, force: bool) -> DaemonOptions {
    DaemonOptions {
        frames_mib: 64,
        huge: false,
        mode,
        force,
    }
}

/// Guests of a daemon with a small coherent file, each with the file mapped as `order` says.
fn mapped(daemon: &Daemon, count: usize, order: &Order) -> Result<Vec<Guest>> {
    let mut guests = Guest::spawn_connected(count, &daemon.socket())?;
    guest::order_all(&mut guests, order)?;
    Ok(guests)
}

/// One store takes a page from so many readers; beside it one message to each and one back.
fn unshare(setting: &Setting, force: bool, rows: &mut Vec<Row>) -> Result<()> {
    let (dir_name, how) = if force {
        ("unshare-force", "taken by force")
    } else {
        ("unshare-asked", "each asked, as on Xen")
    };
    let dir = setting.subdir(dir_name)?;
    let pages = setting.sizes.unshare_pages;
    let daemon = Daemon::start(setting, &dir, options(Mode::Coherent, force))?;
    for count in READERS {
        let file = TestFile::make(&dir, &format!("file-{count}"), pages, 61)?;
        let name = file.name().to_owned();
        let mut readers = mapped(&daemon, count, &Order::Map { name: name.clone() })?;
        let mut writer = mapped(&daemon, 1, &Order::MapWritable { name })?;
        let before = reader::expected_touch(file.seed, 0..pages);
        for answer in guest::order_all(&mut readers, &Order::Touch)? {
            reader::check("readers before the store", answer.sum, before)?;
        }
        let answers = guest::order_all(&mut writer, &Order::StoreEach { value: 1 })?;
        let after = guest::stored_sum(1, pages);
        for answer in guest::order_all(&mut readers, &Order::Touch)? {
            reader::check("readers after the store", answer.sum, after)?;
        }
        drop((readers, writer));
        let ours = samples(answers.iter().flat_map(|a| &a.latencies_ns));
        let bare = samples(Broadcast::start(count)?.rounds(pages)?.iter());
        let row = Row::new(
            NAME,
            format!("a store takes a page from {count} reader(s), {how}"),
            Unit::Seconds,
        );
        let row = row
            .copage(&ours)
            .against("a message to each of them and one back", &bare);
        rows.push(if count == 64 {
            row.ratio_at_most(2.0)
        } else {
            row
        });
    }
    Ok(())
}

fn samples<'a>(ns: impl Iterator<Item = &'a u64>) -> Samples {
    let mut all = Samples::default();
    all.extend(ns.map(|ns| *ns as f64 * 1e-9));
    all
}

/// A page that nobody has becomes writable; another guest reads it back.
fn faults(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("write-faults")?;
    let pages = setting.sizes.unshare_pages * 8;
    let file = TestFile::make(&dir, "file", pages, 62)?;
    let daemon = Daemon::start(setting, &dir, options(Mode::Coherent, true))?;
    let name = file.name().to_owned();
    let mut reader = mapped(&daemon, 1, &Order::Map { name: name.clone() })?;
    let mut writer = mapped(&daemon, 1, &Order::MapWritable { name })?;
    let mut timed = |what: &str, guest: &mut Guest, order: &Order| -> Result<()> {
        let answer = guest.order(order)?;
        let all = samples(answer.latencies_ns.iter());
        for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
            let row = Row::new(NAME, format!("{what}, {name}"), Unit::Seconds);
            rows.push(match all.percentile(share) {
                Some(value) => row.value(value),
                None => row.note("not here: nothing was timed"),
            });
        }
        Ok(())
    };
    let store = |value| Order::StoreEach { value };
    timed("a store to a page on the disk", &mut writer[0], &store(3))?;
    let what = "a read of a page that another just wrote";
    timed(what, &mut reader[0], &Order::TouchEach)?;
    let what = "a store to a page that another reads";
    timed(what, &mut writer[0], &store(4))?;
    let seen = reader[0].order(&Order::Touch)?.sum;
    reader::check("what was stored", seen, guest::stored_sum(4, pages))?;
    Ok(())
}

/// Two guests store to words of one page as fast as they can; beside it, two processes with a plain
/// shared page.
fn together(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("write-together")?;
    let file = TestFile::make(&dir, "file", PAGES_PER_MIB, 63)?;
    let daemon = Daemon::start(setting, &dir, options(Mode::Coherent, true))?;
    let name = file.name().to_owned();
    let mut writers = mapped(&daemon, 2, &Order::MapWritable { name })?;
    let plain_file = TestFile::make(Path::new(IN_MEMORY), &plain_name(), 1, 64)?;
    let path = plain_file.path.clone();
    let mut rivals = vec![Guest::spawn()?, Guest::spawn()?];
    let native = guest::order_all(&mut rivals, &Order::MapNativeWritable { path });
    std::fs::remove_file(&plain_file.path)?;
    native?;
    let stores = setting.sizes.together_stores;
    let (mut ours, mut plain) = (Samples::default(), Samples::default());
    for _ in 0..setting.sizes.reps {
        for (guests, samples) in [(&mut writers, &mut ours), (&mut rivals, &mut plain)] {
            for (guest, offset) in guests.iter_mut().zip([0, LINE_BYTES * 2]) {
                guest.send(&Order::StoreLoop { offset, stores })?;
            }
            for guest in guests {
                samples.push(guest.receive()?.seconds / stores as f64);
            }
        }
    }
    let row = Row::new(
        NAME,
        "a store to a page that two guests write at once",
        Unit::Seconds,
    );
    rows.push(
        row.copage(&ours)
            .against("the same in a plain shared page", &plain)
            .note("the page goes to and fro; each has it for 1 ms at least"),
    );
    Ok(())
}
