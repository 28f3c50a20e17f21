//! What a hostile program in a guest does with grants: its own use of the driver, without the library.

use super::library::word;
use anyhow::{Context, Result, bail, ensure};
use copage_coherence::msg::OpenHow;
use copage_grants::PAGE_SIZE;
use copage_grants::xen::lib::{Gnttab, GrantMap};
use copage_tests::raw::Raw;
use std::fs;
use std::io::Error;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

/// `granted.s`, which says how it is made.
const CODE: &[u8] = include_bytes!("granted.bin");
/// Where numbers are put into it.
const COPY_REF: usize = 0x145;
const COPY_DOMID: usize = 0x14b;
const DOMID: usize = 0x165;
const REF: usize = 0x169;
const HOW: usize = 0x16d;
/// `PROT_*`, `MAP_*` of linux/mman.h.
const READ: u32 = 1;
const WRITE: u32 = 2;
const EXECUTE: u32 = 4;
const SHARED: u32 = 1;
const PRIVATE: u32 = 2;
/// What is done with the page.
const NOTHING: u32 = 0;
const STORE: u32 = 1;
const RUN: u32 = 2;
const COPY_TO: u32 = 3;

/// What is tried: name; protection, flags, protection later (0: no mprotect), action.
const WAYS: [(&str, [u32; 4]); 9] = [
    ("read", [READ, SHARED, 0, NOTHING]),
    ("map-writable", [READ | WRITE, SHARED, 0, STORE]),
    ("map-private-writable", [READ | WRITE, PRIVATE, 0, STORE]),
    ("make-writable", [READ, SHARED, READ | WRITE, STORE]),
    ("nothing-then-writable", [0, SHARED, READ | WRITE, STORE]),
    ("copy-to", [READ, SHARED, 0, COPY_TO]),
    // These may be the end of the guest.
    ("map-executable", [READ | EXECUTE, SHARED, 0, RUN]),
    ("make-executable", [READ, SHARED, READ | EXECUTE, RUN]),
    ("make-all", [READ, SHARED, READ | WRITE | EXECUTE, RUN]),
];

/// A program that does with this entry what is said; an ELF file of one segment.
fn program(domid: u16, gref: u32, how: [u32; 4]) -> Vec<u8> {
    const AT: u64 = 0x40_0000;
    const HEAD: u64 = 64 + 56;
    let bytes = HEAD + CODE.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // e_type EXEC, e_machine x86-64, e_version.
    for (word, len) in [(2u64, 2), (62, 2), (1, 4)] {
        file.extend(&word.to_le_bytes()[..len]);
    }
    // e_entry, e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum, e_sh….
    for (word, len) in [
        (AT + HEAD, 8),
        (64, 8),
        (0, 8),
        (0, 4),
        (64, 2),
        (56, 2),
        (1, 2),
    ] {
        file.extend(&word.to_le_bytes()[..len]);
    }
    file.extend([0; 6]);
    // PT_LOAD, rwx, offset, vaddr, paddr, filesz, memsz, align.
    for (word, len) in [
        (1u64, 4),
        (7, 4),
        (0, 8),
        (AT, 8),
        (AT, 8),
        (bytes, 8),
        (bytes, 8),
        (4096, 8),
    ] {
        file.extend(&word.to_le_bytes()[..len]);
    }
    let mut code = CODE.to_vec();
    let mut put = |at: usize, bytes: &[u8]| code[at..at + bytes.len()].copy_from_slice(bytes);
    put(COPY_REF, &gref.to_le_bytes());
    put(COPY_DOMID, &domid.to_le_bytes());
    put(DOMID, &u32::from(domid).to_le_bytes());
    put(REF, &gref.to_le_bytes());
    for (n, word) in how.iter().enumerate() {
        put(HOW + 4 * n, &word.to_le_bytes());
    }
    file.extend(code);
    file
}

fn session(export: &str, file: &str, pages: u64) -> Result<(Raw, u16, Vec<u32>)> {
    let mut raw = Raw::try_hello_xen("").map_err(Error::from_raw_os_error)?;
    let file = raw.open(export, file, OpenHow::Map);
    let refs = raw.refs(&file, pages);
    let (granter, refs) = refs.map_err(Error::from_raw_os_error)?;
    Ok((raw, granter, refs))
}

/// `granted EXPORT FILE WAY`: gets FILE's first page and does one of [`WAYS`] with it, by itself; says how
/// that ended.
pub fn granted(arguments: &[&str]) -> Result<()> {
    let [export, file, way] = arguments else {
        bail!("granted EXPORT FILE WAY");
    };
    let how = WAYS.iter().find(|w| w.0 == *way).context("no such way")?.1;
    let (mut raw, granter, refs) = session(export, file, 1)?;
    let before = Gnttab::open()?.map(granter, &refs, false)?.bytes().to_vec();
    let path = format!("/tmp/{way}");
    fs::write(&path, program(granter, refs[0], how))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    let status = Command::new(&path).status()?;
    match (status.code(), status.signal()) {
        (Some(code), _) => println!("{way}: exit {code}"),
        (_, signal) => println!("{way}: signal {}", signal.unwrap_or_default()),
    }
    ensure!(raw.renew(), "the lease is lost");
    let after = Gnttab::open()?.map(granter, &refs, false)?.bytes().to_vec();
    ensure!(before == after, "{way}: the page has changed");
    Ok(())
}

fn shows(map: &GrantMap, page: u64) -> bool {
    let bytes = map.bytes();
    let last = bytes.len() - 8;
    [0, last]
        .iter()
        .all(|at| bytes.read_u64(*at) == Some(word(1, page)))
}

/// `guess EXPORT FILE PAGES ENTRIES DOMID…`: with PAGES entries of its own, tries all others of the granter
/// up to ENTRIES, and the first of the domains DOMID; maps one of its own as often as it can.
pub fn guess(arguments: &[&str]) -> Result<()> {
    let [export, file, pages, entries, domids @ ..] = arguments else {
        bail!("guess EXPORT FILE PAGES ENTRIES DOMID…");
    };
    let (mut raw, granter, refs) = session(export, file, pages.parse()?)?;
    let gnttab = Gnttab::open()?;
    for (page, gref) in (0..).zip(&refs) {
        let map = gnttab.map(granter, &[*gref], false)?;
        ensure!(shows(&map, page), "page {page}");
        ensure!(
            gnttab.map(granter, &[*gref], true).is_err(),
            "{gref} is writable"
        );
    }
    let mut tried = 0_u32;
    let mut refused = |domid: u16, gref: u32| -> Result<()> {
        let mut page = [0; PAGE_SIZE];
        ensure!(
            gnttab.map(domid, &[gref], false).is_err(),
            "{domid}: {gref} maps"
        );
        ensure!(
            gnttab.map(domid, &[gref], true).is_err(),
            "{domid}: {gref} maps writable"
        );
        let copied = gnttab.copy_from(domid, gref, &mut page);
        ensure!(copied.is_err(), "{domid}: {gref} is copied");
        tried += 1;
        Ok(())
    };
    for gref in 0..entries.parse()? {
        if !refs.contains(&gref) {
            refused(granter, gref)?;
        }
        if gref % 32 == 0 {
            ensure!(raw.renew(), "the lease is lost");
        }
    }
    for gref in [u32::MAX, u32::MAX / 2, 1 << 20, 1 << 16] {
        refused(granter, gref)?;
    }
    for domid in domids {
        for gref in 0..64 {
            refused(domid.parse()?, gref)?;
        }
    }
    // One that is not its own spoils all of a call.
    let mixed = gnttab.map(granter, &[refs[0], 1], false);
    ensure!(mixed.is_err(), "entry 1 maps beside others");
    ensure!(raw.renew(), "the lease is lost");
    let mut held = Vec::new();
    while held.len() < 1000 {
        match gnttab.map(granter, &refs[..1], false) {
            Ok(map) => held.push(map),
            Err(_) => break,
        }
    }
    ensure!(held.iter().all(|map| shows(map, 0)), "another page");
    println!(
        "{tried} entries that are not its own refused, one of its own mapped {} times at once",
        held.len()
    );
    drop(held);
    ensure!(
        gnttab.map(granter, &refs[..1], false).is_ok(),
        "none after that"
    );
    Ok(())
}
