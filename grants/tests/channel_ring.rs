//! The ring of the xen control channel, in memory of this process: against a plain queue, against
//! an other end that writes anything anywhere, and between threads. What it cannot show: event
//! channels and grants (the Xen laboratory does).
#![allow(clippy::unwrap_used, clippy::panic)] // Tests.

use copage_grants::channel::layout::{
    DAEMON_LIVES_AT, GUEST_LIVES_AT, MAGIC_AT, ORDER_AT, REFS_AT, TO_DAEMON, TO_GUEST,
};
use copage_grants::channel::limits::RING_MESSAGE_BYTES_MAX;
use copage_grants::channel::ring::{Consumer, Lane, Nonsense, Popped, Producer};
use copage_grants::channel::{Channel, ChannelError, HeapMemory, announced, begin, is_accepted};
use copage_grants::volatile::VolatileBytesMut;
use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;

/// Memory of a ring that a test owns.
struct Memory {
    index: HeapMemory,
    bytes: HeapMemory,
}

impl Memory {
    fn new(ring_bytes: usize) -> Self {
        Self {
            index: HeapMemory::new(4096),
            bytes: HeapMemory::new(ring_bytes),
        }
    }

    /// Views of both, as the two ends have them.
    fn views(&self) -> (VolatileBytesMut<'_>, VolatileBytesMut<'_>) {
        (self.index.all(), self.bytes.all())
    }
}

fn lane<'m>((index, bytes): (VolatileBytesMut<'m>, VolatileBytesMut<'m>)) -> Lane<'m> {
    Lane::new(index, bytes, TO_DAEMON).unwrap()
}

fn message(number: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + number * 7) as u8).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Send(usize),
    Flush,
    Receive(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop_oneof![1usize..40, 4000usize..4200, 1usize..20_000];
    let step = prop_oneof![
        len.clone().prop_map(Step::Send),
        Just(Step::Flush),
        prop_oneof![Just(RING_MESSAGE_BYTES_MAX), len].prop_map(Step::Receive),
    ];
    prop::collection::vec(step, 1..80)
}

proptest! {
    /// Whatever is sent comes out, whole and in order, wherever the indexes begin.
    #[test]
    fn a_ring_is_a_queue(
        steps in steps(),
        order in 0u32..2,
        start in prop_oneof![Just(0), Just(u32::MAX - 5000), any::<u32>()],
    ) {
        let memory = Memory::new(4096 << order);
        let (index, bytes) = memory.views();
        prop_assert!(index.write_u32(TO_DAEMON.producer, start));
        prop_assert!(index.write_u32(TO_DAEMON.consumer, start));
        let lane = lane((index, bytes));
        let (mut sender, mut receiver) = (Producer::from_index(start), Consumer::from_index(start));
        let mut queue = VecDeque::new();
        let mut buf = vec![0; RING_MESSAGE_BYTES_MAX];
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Send(len) => {
                    let bytes = message(number, len);
                    let waiting = sender.has_rest();
                    let pushed = sender.push(&lane, &bytes).unwrap();
                    prop_assert!(!pushed.taken || pushed.moved);
                    prop_assert!(pushed.taken || waiting || !queue.is_empty());
                    if pushed.taken {
                        queue.push_back(bytes);
                    }
                }
                Step::Flush => {
                    sender.flush(&lane).unwrap();
                }
                Step::Receive(room) => {
                    let mut moved = false;
                    match receiver.pop(&lane, &mut buf[..room], &mut moved).unwrap() {
                        Popped::Message(len) => {
                            let sent = queue.pop_front().unwrap();
                            prop_assert_eq!(&sent, &buf[..len]);
                        }
                        Popped::TooLong(len) => {
                            prop_assert!(len > room);
                            prop_assert_eq!(queue.pop_front().map(|m| m.len()), Some(len));
                        }
                        Popped::Nothing => prop_assert!(queue.is_empty() || sender.has_rest()),
                    }
                }
            }
        }
        // All of it comes when both go on.
        for _ in 0..10_000 {
            sender.flush(&lane).unwrap();
            let mut moved = false;
            if let Popped::Message(len) = receiver.pop(&lane, &mut buf, &mut moved).unwrap() {
                let sent = queue.pop_front().unwrap();
                            prop_assert_eq!(&sent, &buf[..len]);
            }
            if queue.is_empty() {
                break;
            }
        }
        prop_assert!(queue.is_empty() && !sender.has_rest());
    }

    /// The other end, and anybody else who has the pages, writes anything anywhere between any two
    /// calls: each call ends, with a typed error or with bytes within bounds.
    #[test]
    fn nothing_that_is_written_into_a_ring_does_harm(
        steps in steps(),
        writes in prop::collection::vec((0usize..3, any::<u32>(), any::<usize>()), 1..120),
    ) {
        let memory = Memory::new(4096);
        let (index, bytes) = memory.views();
        let lane = lane((index, bytes));
        let (mut sender, mut receiver) = (Producer::default(), Consumer::default());
        let mut buf = vec![0; RING_MESSAGE_BYTES_MAX];
        let shared = [TO_DAEMON.producer, TO_DAEMON.consumer, TO_DAEMON.waits];
        for (number, (step, write)) in steps.iter().zip(writes.iter().cycle()).enumerate() {
            let (what, value, at) = *write;
            match what {
                // An index near what it may be, or anywhere.
                0 => prop_assert!(index.write_u32(shared[at % 3], value)),
                1 => {
                    let word = shared[at % 3];
                    let near = index.read_only().read_u32(word).unwrap();
                    prop_assert!(index.write_u32(word, near.wrapping_add(value % 9000)));
                }
                // A length, or any other bytes.
                _ => prop_assert!(bytes.write_u32(at % 4092, value % 300_000)),
            }
            match *step {
                Step::Send(len) => {
                    let _ = sender.push(&lane, &message(number, len));
                }
                Step::Flush => {
                    let _ = sender.flush(&lane);
                }
                Step::Receive(room) => {
                    let mut moved = false;
                    if let Ok(Popped::Message(len)) =
                        receiver.pop(&lane, &mut buf[..room], &mut moved)
                    {
                        prop_assert!(len <= room);
                    }
                }
            }
        }
    }

    /// Index pages that are no index pages.
    #[test]
    fn what_a_guest_announces_is_checked(
        writes in prop::collection::vec((0usize..1024, any::<u32>()), 0..30),
        order in any::<u32>(),
    ) {
        let memory = Memory::new(8);
        let (index, _) = memory.views();
        prop_assert!(announced(index).is_err());
        begin(index, 2, &[7; 8]).unwrap();
        prop_assert_eq!(announced(index).unwrap(), vec![7; 8]);
        prop_assert!(!is_accepted(index));
        prop_assert!(index.write_u32(ORDER_AT, order));
        match announced(index) {
            Ok(refs) => prop_assert!(order <= 4 && refs.len() == 2 << order),
            Err(Nonsense::NotARing(_)) => prop_assert!(order > 4),
            Err(other) => prop_assert!(false, "{other}"),
        }
        for (at, value) in writes {
            prop_assert!(index.write_u32(at * 4, value));
            if let Ok(refs) = announced(index) {
                prop_assert!(refs.len() <= 32);
            }
        }
    }
}

#[test]
fn lengths_that_cannot_be_are_errors() {
    for length in [0, RING_MESSAGE_BYTES_MAX as u32 + 1, u32::MAX] {
        let memory = Memory::new(4096);
        let (index, bytes) = memory.views();
        let lane = lane((index, bytes));
        assert!(bytes.write_u32(0, length) && index.write_u32(TO_DAEMON.producer, 4));
        let got = Consumer::default().pop(&lane, &mut [0; 64], &mut false);
        assert_eq!(got, Err(Nonsense::Length { bytes: length }));
    }
    let memory = Memory::new(4096);
    let lane = lane(memory.views());
    let mut sender = Producer::default();
    assert!(sender.push(&lane, b"").is_err());
    assert!(
        sender
            .push(&lane, &vec![0; RING_MESSAGE_BYTES_MAX + 1])
            .is_err()
    );
    // A lane whose words are not in the page, or whose size is none.
    let memory = Memory::new(4096);
    let (index, bytes) = memory.views();
    assert!(Lane::new(index.range(..130).unwrap(), bytes, TO_DAEMON).is_none());
    assert!(Lane::new(index, bytes.range(..4088).unwrap(), TO_GUEST).is_none());
}

#[test]
fn channels_over_a_ring_keep_what_has_no_room_and_carry_no_descriptors() {
    let (guest, daemon) = Channel::ring_pair(0).unwrap();
    assert!(!guest.carries_descriptors() && Channel::ring_pair(5).is_err());
    let mut buf = vec![0; RING_MESSAGE_BYTES_MAX];
    assert!(matches!(
        daemon.try_recv(&mut buf),
        Err(ChannelError::WouldBlock)
    ));
    let long = message(3, 100_000);
    daemon.try_send(&long, None).unwrap();
    assert!(daemon.has_rest());
    assert!(matches!(
        daemon.try_send(b"next", None),
        Err(ChannelError::WouldBlock)
    ));
    assert!(matches!(
        daemon.try_send(b"fd", Some(daemon.read_fd())),
        Err(ChannelError::NoDescriptors)
    ));
    let mut rounds = 0;
    let len = loop {
        match guest.try_recv(&mut buf) {
            Ok(received) => break received.len,
            Err(ChannelError::WouldBlock) => {}
            Err(e) => panic!("{e}"),
        }
        assert!(readable(&daemon, true), "room came");
        let _ = daemon.flush();
        rounds += 1;
    };
    assert_eq!(buf[..len], long);
    assert!(rounds > 10 && !daemon.has_rest(), "{rounds}");
    // What was sent before the end is heard, and then the end, by both.
    guest.try_send(b"bye", None).unwrap();
    drop(guest);
    assert!(readable(&daemon, false));
    assert_eq!(daemon.try_recv(&mut buf).unwrap().len, 3);
    assert!(matches!(
        daemon.try_recv(&mut buf),
        Err(ChannelError::Closed)
    ));
    assert!(matches!(
        daemon.try_send(b"x", None),
        Err(ChannelError::Closed)
    ));
}

fn readable(channel: &Channel, room: bool) -> bool {
    let fd = if room {
        channel.write_fd()
    } else {
        channel.read_fd()
    };
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&now)).unwrap() == 1
}

/// A message stays announced until it was taken, and events without messages are one wake-up each
/// turn however many there were.
#[test]
fn a_storm_of_events_is_one_wake_up_a_turn() {
    let (guest, daemon) = Channel::ring_pair(0).unwrap();
    let mut buf = vec![0; 4096];
    assert!(!readable(&daemon, false));
    for number in 0..3 {
        guest.try_send(&[number; 8], None).unwrap();
    }
    for number in 0..3 {
        assert!(readable(&daemon, false));
        assert_eq!(daemon.try_recv(&mut buf).unwrap().len, 8);
        assert_eq!(buf[0], number);
    }
    assert!(daemon.try_recv(&mut buf).is_err() && !readable(&daemon, false));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let storm = scope.spawn(|| {
            let mut events = 0u64;
            // An end that only rings.
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                guest.ring();
                events += 1;
            }
            events
        });
        let mut turns = 0u64;
        while turns < 2000 {
            if readable(&daemon, false) {
                assert!(matches!(
                    daemon.try_recv(&mut buf),
                    Err(ChannelError::WouldBlock)
                ));
                turns += 1;
                // The rest of a turn of the loop.
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let events = storm.join().unwrap();
        assert!(events > turns * 3, "{events} events, {turns} turns");
        println!("{events} events were {turns} wake-ups");
    });
}

/// Whoever takes one message and polls again hears of those behind it.
#[test]
fn messages_that_came_with_one_event_are_all_announced() {
    let (guest, daemon) = Channel::ring_pair(0).unwrap();
    let mut buf = vec![0; 4096];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..20_000u32 {
                while guest.try_send(&number.to_le_bytes(), None).is_err() {
                    std::thread::yield_now();
                }
            }
        });
        let second = Timespec {
            tv_sec: 5,
            tv_nsec: 0,
        };
        for number in 0..20_000u32 {
            loop {
                let mut fds = [PollFd::from_borrowed_fd(daemon.read_fd(), PollFlags::IN)];
                assert_eq!(poll(&mut fds, Some(&second)).unwrap(), 1, "at {number}");
                match daemon.try_recv(&mut buf) {
                    Ok(_) => break,
                    Err(ChannelError::WouldBlock) => {}
                    Err(e) => panic!("{e}"),
                }
            }
            assert_eq!(buf[..4], number.to_le_bytes());
        }
    });
}

/// Blocking ends in two threads: no wake-up is lost, with messages shorter and longer than the ring.
#[test]
fn threads_talk_over_a_ring() {
    for (order, len_max, count) in [(0, 9000, 3000usize), (3, 300, 30_000)] {
        let (guest, daemon) = Channel::ring_pair(order).unwrap();
        std::thread::scope(|scope| {
            let echo = scope.spawn(move || {
                let mut buf = vec![0; RING_MESSAGE_BYTES_MAX];
                while let Ok(received) = daemon.recv(&mut buf) {
                    daemon.send(&buf[..received.len], None).unwrap();
                }
            });
            let guest = &guest;
            let sender = scope.spawn(move || {
                for number in 0..count {
                    let len = 1 + number * 2_654_435_761 % len_max;
                    guest.send(&message(number, len), None).unwrap();
                }
            });
            let mut buf = vec![0; RING_MESSAGE_BYTES_MAX];
            for number in 0..count {
                let len = 1 + number * 2_654_435_761 % len_max;
                let received = guest.recv(&mut buf).unwrap();
                assert_eq!(buf[..received.len], message(number, len));
            }
            sender.join().unwrap();
            guest.shutdown();
            echo.join().unwrap();
        });
    }
}

/// One end of a ring over the whole channel, the other a scribbler.
#[test]
fn a_channel_whose_other_end_scribbles_closes() {
    let memory = Memory::new(4096);
    let (index, bytes) = memory.views();
    let lane = lane((index, bytes));
    let mut receiver = Consumer::default();
    assert!(index.write_u32(TO_DAEMON.producer, 4097));
    let got = receiver.pop(&lane, &mut [0; 64], &mut false);
    assert_eq!(
        got,
        Err(Nonsense::Produced {
            bytes: 4097,
            ring_bytes: 4096
        })
    );
    let mut sender = Producer::default();
    assert!(index.write_u32(TO_DAEMON.consumer, 1));
    assert!(matches!(
        sender.push(&lane, b"x"),
        Err(Nonsense::Consumed { .. })
    ));
    // The byte map is what docs/protocol.md says.
    assert_eq!(
        (MAGIC_AT, ORDER_AT, GUEST_LIVES_AT, DAEMON_LIVES_AT),
        (0, 4, 8, 32)
    );
    assert_eq!(
        (TO_DAEMON.producer, TO_DAEMON.waits, TO_DAEMON.consumer),
        (64, 68, 128)
    );
    assert_eq!(
        (TO_GUEST.producer, TO_GUEST.waits, TO_GUEST.consumer),
        (192, 196, 256)
    );
    assert_eq!(REFS_AT, 1024);
}
