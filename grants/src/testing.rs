//! For this crate's own tests: code in a process of its own.

use rustix::process::{Pid, WaitOptions, WaitStatus};

/// Forks.
fn fork() -> Option<Pid> {
    // SAFETY: tests only; the child runs on in the thread that forked, and the C library keeps its
    // allocator usable in a forked child. The child never returns into the test harness.
    Pid::from_raw(unsafe { libc::fork() })
}

/// Runs `child` in a forked process and panics unless it returned.
pub(crate) fn in_child(child: impl FnOnce()) {
    let status = status_of_child(child);
    assert_eq!(
        status.exit_status(),
        Some(0),
        "the child failed: {status:?}"
    );
}

/// Runs `child` in a forked process; 0 when it returned, 101 when it panicked.
pub(crate) fn status_of_child(child: impl FnOnce()) -> WaitStatus {
    match fork() {
        None => run_and_exit(child),
        Some(pid) => wait(pid),
    }
}

/// Starts `child` in a forked process and returns at once.
pub(crate) fn spawn_child(child: impl FnOnce()) -> Pid {
    match fork() {
        None => {
            // So that none is left behind when the test ends early.
            let _ = rustix::process::set_parent_process_death_signal(Some(
                rustix::process::Signal::KILL,
            ));
            run_and_exit(child)
        }
        Some(pid) => pid,
    }
}

fn run_and_exit(child: impl FnOnce()) -> ! {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
    // SAFETY: _exit ends the process at once and runs nothing of the harness.
    unsafe { libc::_exit(if result.is_ok() { 0 } else { 101 }) }
}

/// Waits until `pid` has ended.
pub(crate) fn wait(pid: Pid) -> WaitStatus {
    loop {
        match rustix::process::waitpid(Some(pid), WaitOptions::empty()) {
            Ok(Some((_, status))) if status.exited() || status.signaled() => return status,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("waitpid: {errno}"),
        }
    }
}

/// Waits until `pid` is stopped.
pub(crate) fn wait_stopped(pid: Pid) {
    let status = rustix::process::waitpid(Some(pid), WaitOptions::UNTRACED).unwrap();
    assert!(
        status.is_some_and(|(_, status)| status.stopped()),
        "{status:?}"
    );
}

/// Is the test run by root? When not, says on the output that `what` was not tested.
pub(crate) fn root_or_skip(what: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped for lack of root: {what}");
    }
    root
}

/// Becomes another user for good: uid and gid `id`, no groups.
pub(crate) fn become_user(id: u32) {
    // SAFETY: an empty list reads nothing.
    assert_eq!(unsafe { libc::setgroups(0, std::ptr::null()) }, 0);
    // SAFETY: takes numbers only.
    assert_eq!(unsafe { libc::setresgid(id, id, id) }, 0);
    // SAFETY: takes numbers only.
    assert_eq!(unsafe { libc::setresuid(id, id, id) }, 0);
}
