//! What guests do over the control channel: a session that lasts, and attacks.

use crate::numbers::Numbers;
use anyhow::{Context, Result, bail, ensure};
use copage_grants::channel::layout::{REFS_AT, TO_DAEMON, TO_GUEST};
use copage_grants::channel::{Channel, begin};
use copage_grants::xen::lib::{Evtchn, GrantShare, Store};
use copage_mmap::{Client, ConnectOptions, DaemonAt};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long an attack goes on.
const ATTACK: Duration = Duration::from_secs(4);

/// A session that lasts until it is lost.
pub fn session(_: &[&str]) -> Result<()> {
    let options = ConnectOptions {
        userfault: copage_mmap::UserfaultPolicy::None,
        // The end of its daemon is what is waited for.
        reconnect_ms: 0,
        ..ConnectOptions::default()
    };
    let client = Client::connect_at(&DaemonAt::Xen, &options)?;
    let (sender, lost) = mpsc::channel();
    client.on_lost(move |why| {
        let _ = sender.send(why.to_string());
    });
    println!("up");
    println!("lost: {}", lost.recv()?);
    Ok(())
}

/// The attacks, by name.
pub fn hostile(arguments: &[&str]) -> Result<()> {
    match arguments {
        ["nodes"] => nodes(),
        ["ring"] => ring(),
        ["flood"] => flood(),
        ["storm"] => storm(),
        _ => bail!("nodes, ring, flood or storm"),
    }
}

/// Sessions whose nodes make no sense, slowly enough to be looked at.
fn nodes() -> Result<()> {
    let store = Store::open()?;
    let mut numbers = Numbers::new(1);
    let values: [&[u8]; 9] = [
        b"",
        b"-1",
        b"4294967295",
        b"1",
        b"8",
        b"999999999999999999999",
        b"\xff\xfe\0\0",
        b"1 ",
        &[b'9'; 1000],
    ];
    let begin = Instant::now();
    let mut tries = 0;
    while begin.elapsed() < ATTACK {
        let dir = format!("data/copage/evil-{tries}");
        for node in ["version", "ring-ref", "port-to-daemon", "port-to-guest"] {
            let value = values[numbers.below(values.len())];
            if !numbers.once_in(8) {
                store.write(&format!("{dir}/{node}"), value)?;
            }
        }
        store.write(&format!("{dir}/version"), b"1")?;
        store.write(&format!("{dir}/state"), b"ready")?;
        std::thread::sleep(Duration::from_millis(100));
        store.remove(&dir)?;
        tries += 1;
    }
    println!("{tries} sessions of garbage");
    Ok(())
}

/// Real rings, with garbage in them from the moment they are accepted.
fn ring() -> Result<()> {
    let mut numbers = Numbers::new(2);
    let start = Instant::now();
    let (mut rings, mut accepted) = (0, 0);
    while start.elapsed() < ATTACK {
        let (reads, writes) = (Evtchn::open()?, Evtchn::open()?);
        let (to_guest, to_daemon) = (reads.bind_unbound(0)?, writes.bind_unbound(0)?);
        let shares = GrantShare::open()?;
        let index = shares.share_notifying(0, true, 8, to_daemon)?;
        let bytes = shares.share(0, 2, true)?;
        let words = index.bytes_mut().context("a page")?;
        begin(words, 0, bytes.refs())?;
        if rings % 4 == 3 {
            ensure!(words.write_u32(REFS_AT + 4, numbers.any()));
        }
        let store = Store::open()?;
        let dir = format!("data/copage/ring-{rings}");
        store.write(&format!("{dir}/version"), b"1")?;
        for (node, value) in [
            ("ring-ref", index.refs()[0]),
            ("port-to-daemon", to_daemon),
            ("port-to-guest", to_guest),
        ] {
            store.write(&format!("{dir}/{node}"), value.to_string().as_bytes())?;
        }
        store.write(&format!("{dir}/state"), b"ready")?;
        let begin = Instant::now();
        let is_in = || copage_grants::channel::is_accepted(words);
        while !is_in() && begin.elapsed() < Duration::from_millis(500) {
            std::thread::sleep(Duration::from_millis(5));
        }
        accepted += u32::from(is_in());
        let data = bytes.bytes_mut().context("pages")?;
        for _ in 0..40 {
            match numbers.any() % 3 {
                0 => {
                    ensure!(words.write_u32(TO_DAEMON.producer, numbers.any()));
                    ensure!(words.write_u32(TO_GUEST.consumer, numbers.any()));
                }
                1 => ensure!(words.write_u32(TO_DAEMON.producer, numbers.any() % 4096)),
                _ => ensure!(data.write_u32(numbers.any() as usize % 4092, numbers.any() % 200)),
            }
            writes.notify(to_daemon)?;
            reads.notify(to_guest)?;
        }
        store.remove(&dir)?;
        rings += 1;
    }
    println!("{rings} rings of garbage, {accepted} accepted");
    Ok(())
}

/// Writes into xenstore as fast as can be.
fn flood() -> Result<()> {
    let store = Store::open()?;
    let begin = Instant::now();
    let mut writes = 0u64;
    while begin.elapsed() < ATTACK {
        store.write("data/copage/flood/state", b"ready")?;
        writes += 1;
    }
    store.remove("data/copage/flood")?;
    println!("{writes} writes");
    Ok(())
}

/// A good ring that rings without end.
fn storm() -> Result<()> {
    let channel = Channel::connect_xen()?;
    let begin = Instant::now();
    let mut events = 0u64;
    while begin.elapsed() < ATTACK {
        channel.ring();
        events += 1;
    }
    println!("{events} events");
    Ok(())
}
