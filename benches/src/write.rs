//! Files that guests write: what it costs to take a page from its readers, to get one for writing, to read what
//! another has just stored.
//!
//! Pages are touched from the last to the first, so that each is a fault of its own: whoever goes forward gets
//! several at a time.

use crate::broadcast::Broadcast;
use crate::daemon::{Daemon, DaemonOptions};
use crate::files::TestFile;
use crate::guest::{self, Guest, Order};
use crate::reader;
use crate::setting::Setting;
use crate::stats::Samples;
use crate::table::{Row, Unit};
use crate::{sync, together};
use anyhow::{Result, ensure};

/// What all rows of files that are written stand under.
pub const NAME: &str = "write";
/// How many guests read a page that another takes.
const READERS: [usize; 4] = [1, 4, 16, 64];

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    for force in [true, false] {
        unshare(setting, force, rows)?;
    }
    faults(setting, rows)?;
    together::run(setting, rows)?;
    sync::run(setting, rows)
}

/// Guests of a daemon, each with a file mapped as `order` says.
pub fn mapped(daemon: &Daemon, count: usize, order: &Order) -> Result<Vec<Guest>> {
    let mut guests = Guest::spawn_connected(count, &daemon.socket())?;
    guest::order_all(&mut guests, order)?;
    Ok(guests)
}

/// From nanoseconds.
pub fn samples<'a>(ns: impl IntoIterator<Item = &'a u64>) -> Samples {
    let mut all = Samples::default();
    all.extend(ns.into_iter().map(|ns| *ns as f64 * 1e-9));
    all
}

/// One store takes a page from so many readers; beside it, one message to each, which lets go, and one back.
fn unshare(setting: &Setting, force: bool, rows: &mut Vec<Row>) -> Result<()> {
    let (dir_name, how) = if force {
        ("unshare-force", "by force")
    } else {
        ("unshare-asked", "each asked, as on Xen")
    };
    let dir = setting.subdir(dir_name)?;
    let pages = setting.sizes.unshare_pages;
    let mut options = DaemonOptions::coherent();
    options.force = force;
    let daemon = Daemon::start(setting, &dir, options)?;
    for count in READERS {
        let file = TestFile::make(&dir, &format!("file-{count}"), pages, 61)?;
        let name = file.name().to_owned();
        let mut readers = mapped(&daemon, count, &Order::Map { name: name.clone() })?;
        let mut writer = mapped(&daemon, 1, &Order::MapWritable { name })?;
        // Each is granted each page; what is only touched may be there without the daemon's knowing.
        guest::order_all(&mut readers, &Order::Populate)?;
        let before = reader::expected_touch(file.seed, 0..pages);
        for answer in guest::order_all(&mut readers, &Order::Touch)? {
            reader::check("readers before the store", answer.sum, before)?;
        }
        let earlier = daemon.stats()?.strict;
        let stored = writer[0].order(&Order::StoreEach { value: 1 })?;
        let counted = daemon.stats()?.strict;
        let after = guest::stored_sum(1, pages);
        for answer in guest::order_all(&mut readers, &Order::Touch)? {
            reader::check("readers after the store", answer.sum, after)?;
        }
        drop((readers, writer));
        let row = Row::new(
            NAME,
            format!("a store takes a page from {count} reader(s), {how}"),
            Unit::Seconds,
        )
        .copage(&samples(&stored.latencies_ns))
        .against(
            "a message to each, madvise there, one back",
            &samples(&Broadcast::start(count, pages)?.let_go()?),
        )
        .note(format!(
            "{} pages granted for writing, {} asked for",
            counted.granted_write - earlier.granted_write,
            counted.recalls - earlier.recalls,
        ));
        rows.push(if count == 64 {
            row.ratio_at_most(2.0)
        } else {
            row
        });
    }
    Ok(())
}

/// The p50 and the p99 of some latencies, each beside the same of another's.
fn percentiles(rows: &mut Vec<Row>, what: &str, ns: &[u64], name: &str, others: &Samples) {
    let all = samples(ns);
    for (share, percentile) in [(0.5, "p50"), (0.99, "p99")] {
        let row = Row::new(NAME, format!("{what}, {percentile}"), Unit::Seconds);
        rows.push(match (all.percentile(share), others.percentile(share)) {
            (Some(value), Some(other)) => row.value(value).against_value(name, other),
            _ => row.note("not here: nothing was timed"),
        });
    }
}

/// What a page costs that is not the guest's yet, by who has it.
fn faults(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("write-faults")?;
    let pages = setting.sizes.unshare_pages * 8;
    let native = native_faults(pages)?;
    let socket = samples(&Broadcast::start(1, 1)?.rounds(pages)?);
    let (fault, trip) = (
        "a minor fault of a native shared mapping",
        "a bare round trip over a socket",
    );

    let file = TestFile::make(&dir, "file", pages, 62)?;
    let daemon = Daemon::start(setting, &dir, DaemonOptions::coherent())?;
    let name = file.name().to_owned();
    let write = Order::MapWritable { name: name.clone() };
    let mut reader = mapped(&daemon, 1, &Order::Map { name })?;
    let mut first = mapped(&daemon, 1, &write)?;
    let mut second = mapped(&daemon, 1, &write)?;
    let mut last = mapped(&daemon, 1, &write)?;

    let ns = first[0].order(&Order::StoreEach { value: 3 })?.latencies_ns;
    percentiles(rows, "a store to a page on the disk", &ns, trip, &socket);
    let read = reader[0].order(&Order::TouchEach)?;
    reader::check(
        "what was just stored",
        read.sum,
        guest::stored_sum(3, pages),
    )?;
    let what = "a read of what another has just stored";
    percentiles(rows, what, &read.latencies_ns, trip, &socket);
    let ns = first[0].order(&Order::StoreEach { value: 4 })?.latencies_ns;
    let what = "a store to a page that another reads, by force";
    percentiles(rows, what, &ns, fault, &native);
    let ns = second[0]
        .order(&Order::StoreEach { value: 5 })?
        .latencies_ns;
    let what = "a store to a page that another writes";
    percentiles(rows, what, &ns, fault, &native);
    percentiles(rows, what, &ns, trip, &socket);
    // Those that have pages go: the pages stay.
    drop((first, second, reader));
    let ns = last[0].order(&Order::StoreEach { value: 6 })?.latencies_ns;
    let what = "a store to a page in memory that nobody has";
    percentiles(rows, what, &ns, fault, &native);
    percentiles(rows, what, &ns, trip, &socket);
    let seen = last[0].order(&Order::Touch)?.sum;
    reader::check("what was stored last", seen, guest::stored_sum(6, pages))
}

/// How long the first store to each page of a file in memory takes by a native mapping: a minor fault each. (Of a
/// file on a disk, many pages are one folio and come by one fault, so that most stores would be none.)
fn native_faults(pages: u64) -> Result<Samples> {
    let mut guests = together::plain(1, pages)?;
    let stored = guests[0].order(&Order::StoreEach { value: 2 })?;
    let (minor, _) = stored.faults;
    ensure!(minor >= pages, "{minor} minor faults for {pages} pages");
    Ok(samples(&stored.latencies_ns))
}
