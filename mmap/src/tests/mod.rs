//! The library against a fake daemon over a real channel, with real userfaultfds and the frame files
//! of the real `local` backend.
//!
//! What these cannot show: that the real daemon keeps its side (its ledger is not used here), what a
//! full or slow machine does, kernels other than this one, and anything of Xen.

mod coherent;
mod coherent_granted;
mod coherent_races;
mod fake;
mod fake_coherent;
mod fake_files;
mod faults;
mod granted;
mod granted_races;
mod lost;
mod private;
mod rebase;
mod returns;
mod returns_late;

use crate::{Client, ConnectOptions, File, MapOptions, Mapping, OpenHow, UserfaultPolicy};
use copage_grants::{PAGE_SIZE, volatile::VolatileBytes};
use fake::Fake;
use std::time::{Duration, Instant};

fn connect(fake: &Fake) -> Client {
    Client::connect(&fake.socket(), &ConnectOptions::named("guest")).unwrap()
}

/// To a fake that shares by grants.
fn connect_granted(fake: &Fake) -> Client {
    connect_granted_for(fake, ConnectOptions::default().reconnect_ms)
}

/// One that looks `reconnect_ms` for its daemon, over descriptors or grants.
fn connect_for(fake: &Fake, reconnect_ms: u32) -> Client {
    let options = ConnectOptions {
        reconnect_ms,
        ..ConnectOptions::named("guest")
    };
    Client::connect(&fake.socket(), &options).unwrap()
}

fn connect_granted_for(fake: &Fake, reconnect_ms: u32) -> Client {
    let options = ConnectOptions {
        reconnect_ms,
        ..ConnectOptions::named("guest")
    };
    let device = fake.state.lock().standin.clone().unwrap();
    Client::connect_with_device(&fake.socket(), &options, device).unwrap()
}

fn connect_with(fake: &Fake, userfault: UserfaultPolicy) -> Client {
    let options = ConnectOptions {
        name: "guest".into(),
        userfault,
        ..ConnectOptions::default()
    };
    Client::connect(&fake.socket(), &options).unwrap()
}

fn open(client: &Client, how: OpenHow) -> File {
    client
        .attach("all")
        .unwrap()
        .root()
        .lookup(b"f")
        .unwrap()
        .open(how)
        .unwrap()
}

fn map(client: &Client, options: &MapOptions) -> Mapping {
    open(client, OpenHow::Map).map(options).unwrap()
}

/// The words of one page; fails if they differ: a torn page.
fn page_word(bytes: VolatileBytes<'_>, page: usize) -> u64 {
    let mut data = [0; PAGE_SIZE];
    assert_eq!(bytes.read_into(page * PAGE_SIZE, &mut data), PAGE_SIZE);
    let first = u64::from_le_bytes(data[..8].try_into().unwrap());
    for chunk in data.chunks_exact(8) {
        assert_eq!(chunk, first.to_le_bytes(), "page {page} is torn");
    }
    first
}

/// The first word of a page, by one access.
fn peek(bytes: VolatileBytes<'_>, page: usize) -> u64 {
    bytes.read_u64(page * PAGE_SIZE).unwrap()
}

fn store(mapping: &Mapping, at: usize, value: u8) {
    assert!(at < mapping.len());
    // SAFETY: `at` is within the mapping, see above.
    let pointer = unsafe { mapping.as_ptr().add(at) };
    // SAFETY: the mapping is a private one, hence writable, and lives; no reference into it exists.
    unsafe { pointer.write_volatile(value) };
}

fn eventually(what: &str, mut test: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !test() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs `child` in a forked process, which ends with what it returns; gives (exit code, signal).
/// Only for children that allocate little and take no locks that other threads may hold.
fn in_child(child: impl FnOnce() -> i32) -> (Option<i32>, Option<i32>) {
    // SAFETY: the child calls `child` and then _exit; it is the tests' task that `child` does what
    // a forked child of a threaded process may do.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let code = child();
        // SAFETY: ends the child without running the parent's destructors.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: `status` lives; `pid` is our child.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if libc::WIFEXITED(status) {
        (Some(libc::WEXITSTATUS(status)), None)
    } else {
        (None, Some(libc::WTERMSIG(status)))
    }
}
