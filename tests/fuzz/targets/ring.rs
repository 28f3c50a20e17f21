//! A ring whose other end writes anything anywhere: every call ends, within bounds, with a typed error
//! or with what fits; and an honest ring is a queue whatever the order of calls.
//!
//! Cannot show: the mappings and event channels of a real ring. The Xen laboratory does.
#![no_main]

use copage_grants::channel::layout::TO_DAEMON;
use copage_grants::channel::limits::RING_MESSAGE_BYTES_MAX;
use copage_grants::channel::ring::{Consumer, Lane, Popped, Producer};
use copage_grants::channel::{HeapMemory, announced};
use libfuzzer_sys::fuzz_target;
use std::collections::VecDeque;

mod seeds;

fn good() -> Vec<Vec<u8>> {
    let honest = [0u8, 0, 9, 1, 0, 200, 2, 0, 0, 0, 255, 1, 1, 2, 255];
    let hostile = [1u8, 3, 0, 255, 3, 9, 9, 2, 255, 0, 30, 3, 17, 200, 2, 255];
    vec![honest.to_vec(), hostile.to_vec()]
}

fuzz_target!(init: seeds::write(good()), |data: &[u8]| {
    let Some((&hostile, steps)) = data.split_first() else {
        return;
    };
    let hostile = hostile & 1 == 1;
    let (index, bytes) = (HeapMemory::new(4096), HeapMemory::new(4096));
    let (index, bytes) = (index.all(), bytes.all());
    let lane = Lane::new(index, bytes, TO_DAEMON).expect("a lane");
    let (mut sender, mut receiver) = (Producer::default(), Consumer::default());
    let mut sent = VecDeque::new();
    let mut buf = vec![0; RING_MESSAGE_BYTES_MAX];
    for step in steps.chunks_exact(2) {
        let (what, value) = (step[0], step[1]);
        match what % if hostile { 4 } else { 3 } {
            0 => {
                let message = vec![value; 1 + usize::from(value) * 40];
                match sender.push(&lane, &message) {
                    Ok(pushed) if pushed.taken => sent.push_back(message),
                    Ok(_) => {}
                    Err(error) => assert!(hostile, "{error}"),
                }
            }
            1 => assert!(sender.flush(&lane).is_ok() || hostile),
            2 => match receiver.pop(&lane, &mut buf, &mut false) {
                Ok(Popped::Message(len)) if !hostile => {
                    assert_eq!(sent.pop_front().as_deref(), Some(&buf[..len]));
                }
                Ok(Popped::Message(len)) => assert!(len <= buf.len()),
                Ok(_) => {}
                Err(error) => assert!(hostile, "{error}"),
            },
            _ => {
                let at = [TO_DAEMON.producer, TO_DAEMON.consumer, TO_DAEMON.waits, 0, 4];
                let word = u32::from(value).wrapping_mul(0x0101_0071);
                let at = at.get(usize::from(what >> 2) % 8);
                match at {
                    Some(&at) => assert!(index.write_u32(at, word)),
                    None => assert!(bytes.write_u32(usize::from(value) * 16, word)),
                }
                let _ = announced(index);
            }
        }
    }
});
