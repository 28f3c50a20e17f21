//! What a test needs of the machine.
//!
//! A test whose need is not met fails with words that say how to meet it: a suite that passes by
//! leaving out its attacks shows nothing. With `COPAGE_TESTS_UNPRIVILEGED=1` such tests are left
//! out instead, each with a line on standard error, for machines where there is no more to be had.

/// Are tests that need more than an ordinary user to be left out?
fn may_leave_out() -> bool {
    std::env::var_os("COPAGE_TESTS_UNPRIVILEGED").is_some_and(|v| v == "1")
}

fn met(there: bool, what: &str, how: &str) -> bool {
    if there {
        return true;
    }
    assert!(
        may_leave_out(),
        "this test needs {what}: {how}, or set COPAGE_TESTS_UNPRIVILEGED=1 to leave such tests out"
    );
    eprintln!("left out: needs {what}");
    false
}

/// Root: guests of other users, mounts, read-only frame files. `false`: leave the test out.
pub fn root() -> bool {
    met(
        rustix::process::geteuid().is_root(),
        "root",
        "run it as root (sudo)",
    )
}

/// A FUSE mount by root. `false`: leave the test out.
pub fn fuse() -> bool {
    root()
        && met(
            std::path::Path::new("/dev/fuse").exists(),
            "FUSE",
            "modprobe fuse",
        )
}
