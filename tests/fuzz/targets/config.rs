//! The daemon's configuration: no text makes the parser panic, and an error always has words.
//!
//! Cannot show: that a configuration which is accepted means what its author meant.
#![no_main]

use libfuzzer_sys::fuzz_target;

mod seeds;

/// One of each kind, and one that is wrong in many ways.
fn good() -> Vec<Vec<u8>> {
    let whole = "frames_mib = 64\nlease_ttl_ms = 5000\ninvalidate_deadline_ms = 5000\nfill_threads = 2\n\
        force = true\n[limits]\ngrants_max = 10\nhandles_max = 10\nfiles_max = 10\npinned_mib = 1\n\
        [[guest]]\nname = \"web\"\nuid = 1001\n[guest.limits]\ngrants_max = 5\n\
        [[export]]\nname = \"libs\"\npath = \"/usr/lib\"\nmode = \"ro\"\nallow = [\"*\"]\ngroup = \"libs\"\n";
    let wrong =
        "frames_mib = -1\nunknown = {a = [1, 2.5, 2020-01-01]}\n[[export]]\nmode = \"shm\"\n";
    vec![whole.into(), wrong.into()]
}

fuzz_target!(init: seeds::write(good()), |data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Err(error) = copage::config::Config::parse(text) {
        assert!(!error.to_string().is_empty());
    }
});
