//! One grant entry under every order of the granter's and the hypervisor's steps. Runs with
//! `RUSTFLAGS="--cfg loom" cargo test -p copage-grants --test loom_entry --release`; otherwise this
//! file is empty. What it cannot show: that the hypervisor does what `Entry::map` does.
#![allow(clippy::unwrap_used, clippy::panic)] // Tests.
#![cfg(loom)]

use copage_grants::entry::Entry;
use copage_grants::{Access, DomId};
use loom::sync::Arc;
use loom::thread;

const DOM: DomId = DomId(3);

#[test]
fn whoever_sees_the_flags_sees_the_frame() {
    loom::model(|| {
        let entry = Arc::new(Entry::new());
        let granter = {
            let entry = entry.clone();
            thread::spawn(move || entry.publish(DOM, Access::ReadOnly, 77, false))
        };
        if let Some(frame) = entry.map(DOM, Access::ReadOnly) {
            assert_eq!(frame, 77);
        }
        granter.join().unwrap();
    });
}

#[test]
fn what_is_revoked_is_not_mapped_and_the_other_way_round() {
    loom::model(|| {
        let entry = Arc::new(Entry::new());
        entry.publish(DOM, Access::ReadOnly, 77, false);
        let mapper = {
            let entry = entry.clone();
            thread::spawn(move || entry.map(DOM, Access::ReadOnly))
        };
        let revoked = entry.revoke();
        let mapped = mapper.join().unwrap().is_some();
        assert_ne!(revoked, mapped);
    });
}

/// Revoked and written again for another frame: a mapper gets one or the other, and when it got the
/// first the entry was never revoked.
#[test]
fn a_reused_entry_is_never_mapped_as_what_it_was() {
    loom::model(|| {
        let entry = Arc::new(Entry::new());
        entry.publish(DOM, Access::ReadOnly, 1, false);
        let mapper = {
            let entry = entry.clone();
            thread::spawn(move || entry.map(DOM, Access::ReadOnly))
        };
        let revoked = entry.revoke();
        if revoked {
            entry.publish(DOM, Access::ReadOnly, 2, false);
        }
        match mapper.join().unwrap() {
            Some(1) => assert!(!revoked),
            Some(frame) => assert_eq!((frame, revoked), (2, true)),
            None => assert!(revoked),
        }
    });
}

#[test]
fn the_last_use_comes_before_the_end_of_the_grant() {
    use loom::sync::atomic::{AtomicU32, Ordering};
    loom::model(|| {
        let entry = Arc::new(Entry::new());
        let frame = Arc::new(AtomicU32::new(0));
        entry.publish(DOM, Access::ReadWrite, 1, true);
        let guest = {
            let (entry, frame) = (entry.clone(), frame.clone());
            thread::spawn(move || {
                frame.store(1, Ordering::Relaxed);
                entry.clear_mapped();
            })
        };
        if entry.revoke() {
            assert_eq!(frame.load(Ordering::Relaxed), 1);
        }
        guest.join().unwrap();
    });
}

const WRITER: DomId = DomId(4);

/// A page is taken from its reader and given to a writer, in the same entry: not while the reader maps it,
/// and the reader never writes.
#[test]
fn a_writer_gets_the_frame_when_no_reader_has_it() {
    loom::model(|| {
        let entry = Arc::new(Entry::new());
        entry.publish(DOM, Access::ReadOnly, 77, false);
        let reader = {
            let entry = entry.clone();
            thread::spawn(move || {
                assert_eq!(entry.map(DOM, Access::ReadWrite), None);
                entry.map(DOM, Access::ReadOnly).is_some()
            })
        };
        let mut writes = false;
        if entry.revoke() {
            entry.publish(WRITER, Access::ReadWrite, 77, false);
            writes = entry.map(WRITER, Access::ReadWrite).is_some();
            assert!(writes);
            assert!(!entry.revoke(), "its writer has it");
        }
        assert_ne!(reader.join().unwrap(), writes);
    });
}

/// What the writer stored is seen by whoever revoked its entry, whether it mapped for reading or for writing.
#[test]
fn a_writers_last_store_comes_before_the_end_of_its_grant() {
    use loom::sync::atomic::{AtomicU32, Ordering};
    loom::model(|| {
        let entry = Arc::new(Entry::new());
        let frame = Arc::new(AtomicU32::new(0));
        entry.publish(DOM, Access::ReadWrite, 1, false);
        let guest = {
            let (entry, frame) = (entry.clone(), frame.clone());
            thread::spawn(move || {
                if entry.map(DOM, Access::ReadWrite).is_some() {
                    frame.store(1, Ordering::Relaxed);
                    entry.clear_mapped();
                    return true;
                }
                false
            })
        };
        let revoked = entry.revoke();
        let seen = frame.load(Ordering::Relaxed);
        let wrote = guest.join().unwrap();
        if revoked {
            assert_eq!(seen == 1, wrote);
        }
    });
}

/// A writer of an earlier life lets go while its entry is withdrawn: nobody maps it again, and it can be freed.
#[test]
fn a_withdrawn_writers_entry_ends_with_its_mapping() {
    loom::model(|| {
        let entry = Arc::new(Entry::new());
        entry.publish(DOM, Access::ReadWrite, 1, true);
        let guest = {
            let entry = entry.clone();
            thread::spawn(move || entry.clear_mapped())
        };
        if !entry.revoke() {
            entry.withdraw();
        }
        guest.join().unwrap();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            assert_eq!(entry.map(DOM, access), None);
        }
        assert!(entry.revoke());
        assert!(entry.state().is_free());
    });
}
