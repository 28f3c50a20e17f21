//! The daemon killed at two hundred random points while guests store, write and sync: after each kill every
//! store that was acknowledged is in the host's file, read there by nobody of copage.
//!
//! Cannot show: what a power failure does (the host's kernel lives on), nor stores that nobody acknowledged,
//! which may be lost.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use copage_tests::acked::missing;
use copage_tests::daemon::{Daemon, Setup};
use copage_tests::guest::Guest;
use copage_tests::orders::{Answer, Order};
use copage_tests::tree::Tree;
use copage_tests::wait;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const PAGE: u64 = 4096;
/// Each store goes to the next of these pages.
const PAGES: u64 = 8;
/// Daemons beside each other: most of the time each waits for a term to pass, as after every restart.
const LANES: u64 = 4;
const KILLS_A_LANE: u64 = 50;
const LEASE_TTL_MS: u32 = 1000;
/// How a guest makes its stores.
const BY_MAPPING: u64 = 0;
const BY_MESSAGE: u64 = 1;

/// What one guest does until it is told to stop.
struct Writer {
    acked: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Writer {
    fn start(tree: &Tree, socket: &Path, how: u64) -> Self {
        let (acked, stop) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (root, socket) = (tree.root().to_owned(), socket.to_owned());
        let (seen, told) = (Arc::clone(&acked), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut lives = 0;
            while !told.load(Ordering::SeqCst) {
                // A guest that the machine starved past its term is lost for good, and its file begun anew.
                write_on(&root, &socket, how, &seen, &told);
                lives += 1;
            }
            lives
        });
        Self {
            acked,
            stop,
            thread: Some(thread),
        }
    }
}

fn name(how: u64) -> String {
    format!("f{how}")
}

/// A guest with the file open and mapped. `None`: the daemon was killed just now, before it had a session.
fn begin(root: &Path, socket: &Path, how: u64) -> Option<(Guest, usize, usize)> {
    let mut guest = Guest::named(root, &format!("w{how}"));
    let connect = guest.connect_order(socket, "best");
    let Answer::Connected { .. } = guest.try_ask(&connect)? else {
        return None;
    };
    let open = Order::Open {
        export: "export".into(),
        path: name(how),
        map: true,
        write: true,
    };
    let Answer::Opened { file, .. } = guest.try_ask(&open)? else {
        return None;
    };
    let map = Order::MapFile {
        file,
        writable: true,
        len: 0,
    };
    match guest.try_ask(&map)? {
        Answer::Mapped { mapping, .. } => Some((guest, file, mapping)),
        _ => None,
    }
}

/// Stores 1, 2, 3, … and counts those that were acknowledged.
fn write_on(root: &Path, socket: &Path, how: u64, acked: &AtomicU64, stop: &AtomicBool) {
    let Some((mut guest, file, mapping)) = begin(root, socket, how) else {
        return std::thread::sleep(Duration::from_millis(10));
    };
    while !stop.load(Ordering::SeqCst) {
        let n = acked.load(Ordering::SeqCst) + 1;
        let offset = n % PAGES * PAGE;
        let orders = if how == BY_MESSAGE {
            // Acknowledged means that no crash of the daemon undoes it: no sync.
            vec![Order::WriteAt {
                file,
                offset,
                bytes: n.to_ne_bytes().to_vec(),
            }]
        } else {
            let value = n;
            vec![
                Order::StoreWord {
                    mapping,
                    offset,
                    value,
                },
                Order::Sync { file },
            ]
        };
        let mut done = true;
        for order in &orders {
            match guest.try_ask(order) {
                Some(Answer::Failed { errno, .. }) if errno == libc::EIO => done = false,
                Some(Answer::Failed { .. }) | None => return,
                Some(_) => {}
            }
        }
        if done {
            acked.store(n, Ordering::SeqCst);
        }
    }
}

/// Every store up to `acked` is there, or a later one to the same page.
fn all_there(path: &Path, acked: u64) {
    let bytes = std::fs::read(path).unwrap();
    if let Some((n, found)) = missing(&bytes, PAGES, acked) {
        panic!(
            "{path:?}: store {n} was acknowledged (the last was {acked}), and {found:?} is there"
        );
    }
}

fn lane(number: u64) -> (u64, u64) {
    let tree = Tree::new();
    let files = [BY_MAPPING, BY_MESSAGE].map(|how| tree.file(&name(how)));
    for path in &files {
        std::fs::write(path, vec![0; (PAGES * PAGE) as usize]).unwrap();
    }
    let setup = Setup {
        coherent: true,
        lease_ttl_ms: LEASE_TTL_MS,
        invalidate_deadline_ms: LEASE_TTL_MS,
        ..Setup::default()
    };
    let mut daemon = Daemon::start(&tree, &setup);
    let mut writers =
        [BY_MAPPING, BY_MESSAGE].map(|how| Writer::start(&tree, &daemon.socket(), how));
    let mut draw = 0x9e37_79b9 + number;
    for _ in 0..KILLS_A_LANE {
        let before = writers.each_ref().map(|w| w.acked.load(Ordering::SeqCst));
        wait::until(Duration::from_secs(60), "stores to go on", || {
            let more = writers.iter().zip(before);
            more.fold(true, |all, (w, n)| {
                all & (w.acked.load(Ordering::SeqCst) > n)
            })
        });
        draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros((draw >> 40) % 20_000));
        daemon.kill();
        for (writer, path) in writers.iter().zip(&files) {
            all_there(path, writer.acked.load(Ordering::SeqCst));
        }
        daemon = Daemon::start(&tree, &setup);
    }
    for writer in &writers {
        writer.stop.store(true, Ordering::SeqCst);
    }
    let lives = writers
        .each_mut()
        .map(|w| w.thread.take().unwrap().join().unwrap());
    daemon.audit_clean();
    let acked = writers.each_ref().map(|w| w.acked.load(Ordering::SeqCst));
    for (acked, path) in acked.iter().zip(&files) {
        all_there(path, *acked);
    }
    (acked.iter().sum(), lives.iter().sum())
}

#[test]
fn local_two_hundred_kills_lose_nothing_that_was_acknowledged() {
    let lanes: Vec<_> = (0..LANES)
        .map(|number| std::thread::spawn(move || lane(number)))
        .collect();
    let (mut acked, mut lives) = (0, 0);
    for lane in lanes {
        let (a, l) = lane.join().unwrap();
        acked += a;
        lives += l;
    }
    println!(
        "{} kills, {acked} acknowledged stores of {} guests ({lives} sessions' programs), all there each time",
        LANES * KILLS_A_LANE,
        2 * LANES
    );
}

#[test]
#[should_panic(expected = "was acknowledged")]
fn local_a_store_that_is_lost_is_seen() {
    let tree = Tree::new();
    let path = tree.file("f");
    let mut bytes = vec![0; (PAGES * PAGE) as usize];
    for n in 1_u64..=100 {
        let at = (n % PAGES * PAGE) as usize;
        bytes[at..at + 8].copy_from_slice(&n.to_ne_bytes());
    }
    std::fs::write(&path, &bytes).unwrap();
    all_there(&path, 100);
    all_there(&path, 101);
}
