//! The end of a session: the daemon dies, fences, stops, is deaf or talks nonsense; forks.

use super::fake::{Fake, Seen, word};
use super::*;
use crate::{LostWhy, MmapError};
use copage_coherence::msg::{FenceReason, Notice};
use std::sync::Arc;

const BYTES: u64 = (600 * PAGE_SIZE) as u64;

/// A mapping can be read by the kernel at `page`.
fn reachable(mapping: &Mapping, page: usize) -> bool {
    let (_read, write) = rustix::pipe::pipe().unwrap();
    let at = mapping.as_ptr().wrapping_add(page * PAGE_SIZE);
    // SAFETY: within the mapping, which lives; the kernel copies from it.
    (unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&write), at.cast(), 8) }) == 8
}

fn ends_with(end: impl FnOnce(&Fake), ttl_ms: u32) -> LostWhy {
    let fake = Fake::start_with(BYTES, ttl_ms);
    let client = connect_for(&fake, 0);
    let file = open(&client, OpenHow::Map);
    let mapping = file.map(&MapOptions::shared()).unwrap();
    let mine = file.map(&MapOptions::private()).unwrap();
    assert_eq!(page_word(mapping.as_volatile(), 3), word(1, 3));
    store(&mine, 0, 1);
    let (sender, told) = crossbeam_channel::unbounded();
    let early = sender.clone();
    client.on_lost(move |why| early.send(why.clone()).unwrap());
    // A thread that waits in a fault, and one that waits for an answer.
    fake.state.lock().stuck = true;
    std::thread::scope(|scope| {
        let fault = scope.spawn(|| reachable(&mapping, 400));
        let call = scope.spawn(|| mapping.populate(500 * PAGE_SIZE..501 * PAGE_SIZE));
        fake.wait("both", |s| {
            s.seen
                .iter()
                .filter(|s| matches!(s, Seen::Fault { .. }))
                .count()
                >= 3
        });
        end(&fake);
        assert!(!fault.join().unwrap(), "a fault was answered by nobody");
        assert!(matches!(call.join().unwrap(), Err(MmapError::Lost(_))));
    });
    let why = told.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(client.lost(), Some(why.clone()));
    // The pages that were there, and those that were stored to, too.
    assert!(!reachable(&mapping, 3) && !reachable(&mine, 0) && !reachable(&mine, 100));
    assert_eq!(mapping.last_error().unwrap().offset, None);
    let lost = |e: MmapError| assert_eq!(e, MmapError::Lost(why.clone()));
    lost(client.exports().unwrap_err());
    lost(file.map(&MapOptions::shared()).unwrap_err());
    lost(mapping.populate(0..1).unwrap_err());
    lost(file.read_at(&mut [0; 9], 0).unwrap_err());
    client.on_lost(move |why| sender.send(why.clone()).unwrap());
    assert_eq!(
        told.recv_timeout(Duration::from_secs(1)).unwrap(),
        why,
        "told at once"
    );
    // It can connect again, while the old mappings live.
    fake.state.lock().stuck = false;
    fake.state.lock().deaf = false;
    let again = connect(&fake);
    let fresh = map(&again, &MapOptions::shared());
    assert_eq!(page_word(fresh.as_volatile(), 3), word(1, 3));
    why
}

#[test]
fn local_the_daemon_dies() {
    assert_eq!(ends_with(Fake::die, 60_000), LostWhy::HungUp);
}

#[test]
fn local_the_session_is_fenced() {
    let reason = FenceReason::DeadlineMissed;
    let why = ends_with(|fake| fake.notify(&Notice::Fenced { reason }, None), 60_000);
    assert_eq!(why, LostWhy::Fenced(reason));
}

#[test]
fn local_the_daemon_stops() {
    assert_eq!(
        ends_with(|fake| fake.notify(&Notice::Goodbye, None), 60_000),
        LostWhy::Stopped
    );
}

#[test]
fn local_the_daemon_answers_no_renewal() {
    assert_eq!(
        ends_with(|fake| fake.state.lock().deaf = true, 1500),
        LostWhy::LeaseExpired
    );
}

#[test]
fn local_the_daemon_talks_nonsense() {
    let why = ends_with(|fake| fake.garbage(b"what is this"), 60_000);
    assert!(matches!(why, LostWhy::Protocol(_)), "{why:?}");
}

#[test]
fn local_the_lease_is_renewed() {
    // Long enough for a loaded machine to renew it; past it nothing is lost.
    const TERM_MS: u32 = 1500;
    let fake = Fake::start_with(BYTES, TERM_MS);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::shared());
    std::thread::sleep(Duration::from_millis(u64::from(TERM_MS) + 500));
    assert_eq!(client.lost(), None);
    assert_eq!(page_word(mapping.as_volatile(), 3), word(1, 3));
}

#[test]
fn local_closing_ends_everything_and_calls_nobody() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let mapping = map(&client, &MapOptions::shared());
    client.on_lost(|why| panic!("called: {why}"));
    client.close();
    eventually("closed", || client.lost() == Some(LostWhy::Closed));
    eventually("refused", || !reachable(&mapping, 0));
    fake.wait("bye", |s| s.seen.contains(&Seen::Bye));
}

/// The outcome as a process sees it: it dies of SIGBUS, and nobody else.
#[test]
fn local_a_process_that_reads_on_after_the_daemons_death_dies_of_sigbus() {
    let (code, signal) = in_process("reads_on_after_death");
    assert_eq!((code, signal), (None, Some(libc::SIGBUS)));
}

/// Runs one ignored test of this program in a process of its own.
fn in_process(test: &str) -> (Option<i32>, Option<i32>) {
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            &format!("tests::lost::child_{test}"),
        ])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    (
        status.code(),
        std::os::unix::process::ExitStatusExt::signal(&status),
    )
}

#[test]
#[ignore = "dies of SIGBUS: the child of another test"]
fn child_reads_on_after_death() {
    let fake = Fake::start(BYTES);
    let client = connect_for(&fake, 0);
    let mapping = map(&client, &MapOptions::shared());
    assert_eq!(page_word(mapping.as_volatile(), 3), word(1, 3));
    fake.die();
    eventually("SIGBUS", || {
        page_word(mapping.as_volatile(), 3) != word(1, 3)
    });
}

#[test]
fn local_a_forked_child_has_no_session_and_the_parent_keeps_its_own() {
    let fake = Fake::start(BYTES);
    let client = connect(&fake);
    let file = open(&client, OpenHow::Map);
    let mapping = file.map(&MapOptions::private()).unwrap();
    let error = Arc::new(MmapError::Forked);
    let child = in_child(|| {
        let calls = [
            client.exports().err(),
            client.attach("all").err(),
            mapping.populate(0..4096).err(),
            file.map(&MapOptions::shared()).err(),
            file.read_at(&mut [0; 4], 0).err(),
        ];
        let right = calls.iter().all(|e| e.as_ref() == Some(&*error));
        // Dropping tells nobody and unmaps nothing.
        drop(mapping);
        drop(file);
        drop(client.clone());
        i32::from(!right)
    });
    assert_eq!(child, (Some(0), None));
    // `mapping` and `file` were moved into the child's closure, and dropped here when it ended.
    let mapping = map(&client, &MapOptions::private());
    assert_eq!(page_word(mapping.as_volatile(), 3), word(1, 3));
    let child = in_child(|| {
        let at = mapping.as_ptr();
        // SAFETY: not mapped in the child: SIGSEGV, which is what is tested.
        i32::from(unsafe { at.read_volatile() })
    });
    assert_eq!(child, (None, Some(libc::SIGSEGV)));
    assert_eq!(page_word(mapping.as_volatile(), 9), word(1, 9));
}
