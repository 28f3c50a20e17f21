//! Memory when N guests map one file.

use crate::daemon::{Daemon, DaemonOptions};
use crate::files::{self, TestFile};
use crate::guest::{self, Guest, Order};
use crate::limits::PAGES_PER_MIB;
use crate::process::Memory;
use crate::reader;
use crate::setting::Setting;
use crate::table::{Row, Unit, show};
use anyhow::Result;
use copage_grants::PAGE_SIZE;

const NAME: &str = "memory";
/// How many guests.
const GUESTS: [usize; 3] = [1, 4, 16];
/// A file that is brought before anything is counted.
const WARM_UP: &str = "warm-up";

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("memory")?;
    let file = TestFile::make(&dir, "file", setting.sizes.memory_pages, 61)?;
    TestFile::make(&dir, WARM_UP, 8 * PAGES_PER_MIB, 62)?;
    let mut grown = Vec::new();
    for count in GUESTS {
        grown.push(shared(setting, &file, count, rows)?);
    }
    let fixed = fixed_per_frame(setting)?;
    books(&file, &grown, fixed, rows);
    Ok(())
}

/// What each frame of the budget costs in a daemon that has just started: from two budgets.
fn fixed_per_frame(setting: &Setting) -> Result<f64> {
    const BUDGETS_MIB: [u64; 2] = [64, 1088];
    let dir = setting.subdir("memory")?;
    let mut anonymous = [0.0; 2];
    for (sum, frames_mib) in anonymous.iter_mut().zip(BUDGETS_MIB) {
        let daemon = Daemon::start(setting, &dir, DaemonOptions::ro(frames_mib, false))?;
        *sum = Memory::of(daemon.pid())?.anonymous as f64;
    }
    let frames = (BUDGETS_MIB[1] - BUDGETS_MIB[0]) * PAGES_PER_MIB;
    Ok((anonymous[1] - anonymous[0]) / frames as f64)
}

/// What the daemon's own memory grew by.
struct Grown {
    guests: usize,
    /// Sessions, opens and maps of all guests, nothing granted.
    sessions: f64,
    /// The first guest's pages brought and granted.
    first: f64,
    /// The same pages granted to all the others.
    others: f64,
    /// Grants in the end.
    grants: u64,
}

fn shared(setting: &Setting, file: &TestFile, count: usize, rows: &mut Vec<Row>) -> Result<Grown> {
    let dir = setting.subdir("memory")?;
    files::chill(&file.path)?;
    // More than enough: nothing is to be reclaimed meanwhile.
    let frames_mib = 4 * (file.pages / PAGES_PER_MIB).max(8);
    let daemon = Daemon::start(setting, &dir, DaemonOptions::ro(frames_mib, false))?;
    let anonymous = || -> Result<f64> { Ok(Memory::of(daemon.pid())?.anonymous as f64) };
    let begin = anonymous()?;
    let mut guests = Guest::spawn_connected(count, &daemon.socket())?;
    // Buffers of the threads that read files are no cost of a frame: they are there after this.
    guest::order_all(
        &mut guests[..1],
        &Order::Map {
            name: WARM_UP.to_owned(),
        },
    )?;
    guest::order_all(&mut guests[..1], &Order::Populate)?;
    guest::order_all(
        &mut guests,
        &Order::Map {
            name: file.name().to_owned(),
        },
    )?;
    let frames_before = daemon.stats()?.frames_used;
    let connected = anonymous()?;
    let tables_before = page_tables(&guests)?;
    let (first, others) = guests.split_at_mut(1);
    guest::order_all(first, &Order::Populate)?;
    let one = anonymous()?;
    guest::order_all(others, &Order::Populate)?;
    let all = anonymous()?;
    let tables = page_tables(&guests)? - tables_before;
    let stats = daemon.stats()?;
    let left = files::cached_bytes(&file.path)?;
    for answer in guest::order_all(&mut guests, &Order::Sum)? {
        reader::check("a file mapped by many guests", answer.sum, file.sum())?;
    }
    let daemon_tables = Memory::of(daemon.pid())?.page_tables;
    drop(guests);

    let natives = native(file, count)?;
    let frames = (stats.frames_used - frames_before.min(stats.frames_used)) * PAGE_SIZE as u64;
    let held = frames + left.unwrap_or(0);
    let show = |bytes: u64| show(bytes as f64, Unit::Bytes);
    rows.push(
        Row::new(
            NAME,
            format!("frames and page cache, {count} guest(s) map one file"),
            Unit::Bytes,
        )
        .value(held as f64)
        .against_value("the file's size", file.bytes() as f64)
        .ratio_at_most(1.0)
        .note(format!(
            "frames {}, left in the host's page cache {}; page tables: guests {}, daemon {}; \
                 {count} native mapping(s): page cache {}, page tables {}",
            show(frames),
            left.map_or("not told by this kernel".into(), show),
            show(tables),
            show(daemon_tables),
            natives.0.map_or("not told by this kernel".into(), show),
            show(natives.1),
        )),
    );
    Ok(Grown {
        guests: count,
        sessions: connected - begin,
        first: one - connected,
        others: all - one,
        grants: stats.grants,
    })
}

fn page_tables(guests: &[Guest]) -> Result<u64> {
    guests
        .iter()
        .map(|guest| Ok(Memory::of(guest.pid())?.page_tables))
        .sum()
}

/// The same with native mappings: page cache, and page tables of the mapping processes.
fn native(file: &TestFile, count: usize) -> Result<(Option<u64>, u64)> {
    let mut guests = (0..count)
        .map(|_| Guest::spawn())
        .collect::<Result<Vec<_>>>()?;
    guest::order_all(
        &mut guests,
        &Order::MapNative {
            path: file.path.clone(),
        },
    )?;
    let before = page_tables(&guests)?;
    for answer in guest::order_all(&mut guests, &Order::Sum)? {
        reader::check("a file mapped natively", answer.sum, file.sum())?;
    }
    let tables = page_tables(&guests)? - before;
    let cached = files::cached_bytes(&file.path)?;
    drop(guests);
    files::chill(&file.path)?;
    Ok((cached, tables))
}

/// Bytes of one grant entry: the hypervisor's table, which here is the daemon's own memory too.
const ENTRY_BYTES: f64 = 8.0;

/// What a grant and a frame cost in the daemon's own memory, from the growth at the largest number
/// of guests. The entry itself is counted beside, as on Xen it is the hypervisor's.
fn books(file: &TestFile, grown: &[Grown], fixed: f64, rows: &mut Vec<Row>) {
    let Some(most) = grown.last() else { return };
    let pages = file.pages as f64;
    let later_grants = (most.grants as f64 - pages).max(1.0);
    let with_entry = most.others / later_grants;
    let per_frame = most.first / pages - with_entry;
    let in_use = fixed + per_frame.max(0.0);
    let sessions = grown
        .iter()
        .map(|g| format!("{}: {}", g.guests, show(g.sessions, Unit::Bytes)))
        .collect::<Vec<_>>()
        .join(", ");
    rows.push(
        Row::new(NAME, "the daemon's own memory for each frame", Unit::Bytes)
            .value(in_use)
            .value_at_most(64.0)
            .note(format!(
                "{} of it from the start for every frame of the budget; RssAnon grew by {} for {} \
                 pages with one grant each; sessions of N guests and the first file took {sessions}",
                show(fixed, Unit::Bytes),
                show(most.first, Unit::Bytes),
                file.pages
            )),
    );
    rows.push(
        Row::new(NAME, "the daemon's own memory for each grant", Unit::Bytes)
            .value(with_entry - ENTRY_BYTES)
            .value_at_most(16.0)
            .note(format!(
                "and {ENTRY_BYTES} B for its entry in the grant table; RssAnon grew by {} for \
                 {later_grants} more grants ({} in all)",
                show(most.others, Unit::Bytes),
                most.grants
            )),
    );
}
