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

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let dir = setting.subdir("memory")?;
    let file = TestFile::make(&dir, "file", setting.sizes.memory_pages, 61)?;
    let mut grown = Vec::new();
    for count in GUESTS {
        grown.push(shared(setting, &file, count, rows)?);
    }
    books(&file, &grown, rows);
    Ok(())
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

fn shared(
    setting: &Setting,
    file: &TestFile,
    count: usize,
    rows: &mut Vec<Row>,
) -> Result<Grown> {
    let dir = setting.subdir("memory")?;
    files::chill(&file.path)?;
    let frames_mib = 2 * (file.pages / PAGES_PER_MIB).max(4);
    let daemon = Daemon::start(setting, &dir, DaemonOptions { frames_mib, huge: false })?;
    let anonymous = || -> Result<f64> { Ok(Memory::of(daemon.pid())?.anonymous as f64) };
    let begin = anonymous()?;
    let mut guests = Guest::spawn_connected(count, &daemon.socket())?;
    guest::order_all(&mut guests, &Order::Map { name: file.name().to_owned() })?;
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
    let frames = stats.frames_used * PAGE_SIZE as u64;
    let held = frames + left.unwrap_or(0);
    let show = |bytes: u64| show(bytes as f64, Unit::Bytes);
    rows.push(
        Row::new(NAME, format!("frames and page cache, {count} guest(s) map one file"), Unit::Bytes)
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
    guests.iter().map(|guest| Ok(Memory::of(guest.pid())?.page_tables)).sum()
}

/// The same with native mappings: page cache, and page tables of the mapping processes.
fn native(file: &TestFile, count: usize) -> Result<(Option<u64>, u64)> {
    let mut guests = (0..count).map(|_| Guest::spawn()).collect::<Result<Vec<_>>>()?;
    guest::order_all(&mut guests, &Order::MapNative { path: file.path.clone() })?;
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

/// What a grant and a frame cost in the daemon's own memory, from the growth at the largest number
/// of guests.
fn books(file: &TestFile, grown: &[Grown], rows: &mut Vec<Row>) {
    let Some(most) = grown.last() else { return };
    let pages = file.pages as f64;
    let later_grants = most.grants as f64 - pages;
    let per_grant = most.others / later_grants.max(1.0);
    let per_frame = most.first / pages - per_grant;
    let sessions = grown
        .iter()
        .map(|g| format!("{}: {}", g.guests, show(g.sessions, Unit::Bytes)))
        .collect::<Vec<_>>()
        .join(", ");
    rows.push(
        Row::new(NAME, "the daemon's own memory for each frame", Unit::Bytes)
            .value(per_frame)
            .value_at_most(64.0)
            .note(format!(
                "RssAnon grew by {} for {} pages with one grant each; sessions of N guests took {sessions}",
                show(most.first, Unit::Bytes),
                file.pages
            )),
    );
    rows.push(
        Row::new(NAME, "the daemon's own memory for each grant", Unit::Bytes)
            .value(per_grant)
            .value_at_most(16.0)
            .note(format!(
                "RssAnon grew by {} for {later_grants} more grants ({} in all)",
                show(most.others, Unit::Bytes),
                most.grants
            )),
    );
}
