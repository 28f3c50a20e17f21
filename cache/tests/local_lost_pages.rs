//! Taking pages out of a 2 MiB frame fails half-way, and pages that nobody took are gone: they are
//! never served as zeros. The kernel is made to refuse the write by a limit of file sizes, which
//! holds for the whole process: this is the only test here.
//!
//! Cannot show: other reasons for which the kernel refuses to put pages back.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::time::Duration;

#[test]
fn local_pages_lost_with_a_huge_frame_are_read_anew() {
    // Threads of the cache inherit that; the signal would end the process.
    copage_grants::sys::block_signals(&[libc::SIGXFSZ]).unwrap();
    let mut rig = Rig::with(local(false), config(2048));
    let data = content(1, 512 * PAGE);
    rig.write("f", &data);
    let a = who(1);
    let file = rig.map("f", a);
    rig.fault(&file, a, 0, 512).unwrap();
    for _ in 0..200 {
        rig.pump(Duration::from_millis(1));
    }
    if rig.cache.stats().huge_units == 0 {
        println!("skipped: this kernel backs nothing by huge frames");
        return;
    }
    let before = getrlimit(Resource::Fsize);
    let none = Rlimit {
        current: Some(0),
        maximum: before.maximum,
    };
    setrlimit(Resource::Fsize, none).unwrap();
    rig.cache.reclaim(10);
    for _ in 0..20 {
        rig.pump(Duration::from_millis(1));
    }
    setrlimit(Resource::Fsize, before).unwrap();
    assert!(rig.recalls > 0);
    rig.audit();
    for page in [0, 9, 10, 300, 511_usize] {
        let seen = rig.read(&file, a, (page * PAGE) as u64, PAGE as u32);
        assert!(
            seen.unwrap() == data[page * PAGE..(page + 1) * PAGE],
            "page {page}"
        );
        rig.check(&file, a, page as u64, &data);
    }
    rig.audit();
}
