//! A guest that does things at random and writes down what.
//!
//! Words are used for a short time each (a *slot*), by all guests at once: what a checker has to look at
//! for one word is short then, however long a run is.

use super::{Call, Clock, Log, Outcome};
use crate::watch::Draw;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

/// Words in a page.
const WORDS: u64 = copage_grants::PAGE_SIZE_U64 / 8;

/// What one guest is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Its number; no other process of the run has it.
    pub guest: u32,
    /// When the first slot begins, in ns: the same for all.
    pub start_ns: u64,
    /// How long a slot is, in ns.
    pub slot_ns: u64,
    /// How many slots there are; no more than a page has words.
    pub slots: u64,
    /// Things to do in a slot.
    pub ops: u32,
    /// Pages that are used all the time.
    pub pages: u64,
    /// Pages behind these that come and go. They are used by messages only, since a load past the end of
    /// a file ends a process, and only who makes them come and go writes them, since a write past the end
    /// would make the file longer.
    pub tail_pages: u64,
    /// How often in a thousand it stores, rather than loads.
    pub store_permille: u64,
    /// How often in a thousand it does so by a message.
    pub message_permille: u64,
    /// How often in a thousand it syncs.
    pub sync_permille: u64,
    /// How often in a thousand it makes the file shorter or longer; not 0 for one guest at most.
    pub resize_permille: u64,
}

/// A guest's file, by mapping and by messages. Offsets are in bytes; errors are errnos.
pub trait Memory {
    /// A plain load.
    fn load(&self, offset: u64) -> Result<u64, i32>;
    /// A plain store.
    fn store(&self, offset: u64, value: u64) -> Result<(), i32>;
    /// By message; `None`: past the end.
    fn read(&self, offset: u64) -> Result<Option<u64>, i32>;
    /// By message.
    fn write(&self, offset: u64, value: u64) -> Result<(), i32>;
    /// All that was stored is to be on the disk.
    fn sync(&self) -> Result<(), i32>;
    /// The file gets so many bytes.
    fn resize(&self, bytes: u64) -> Result<(), i32>;
    /// How often a daemon was found again.
    fn reconnects(&self) -> u64;
}

/// Does what is planned, writes it down in `to`, and answers how many things that were.
pub fn record(
    plan: &Plan,
    memory: &dyn Memory,
    clock: &dyn Clock,
    to: impl std::io::Write,
) -> std::io::Result<u64> {
    let mut log = Log::new(to, clock);
    let mut draw = Draw::new(u64::from(plan.guest) << 32 ^ plan.start_ns);
    let (mut done, mut reconnects) = (0, memory.reconnects());
    // Another guest's values differ in the upper half.
    let mut value = u64::from(plan.guest + 1) << 32;
    let mut in_slot = (0, 0);
    let mut is_long = plan.resize_permille > 0;
    loop {
        let now = clock.now_ns();
        let slot = now.saturating_sub(plan.start_ns) / plan.slot_ns.max(1);
        if slot >= plan.slots.min(WORDS) {
            return Ok(done);
        }
        if slot != in_slot.0 {
            in_slot = (slot, 0);
        }
        if now < plan.start_ns || in_slot.1 >= plan.ops {
            let next = plan.start_ns + (slot + u64::from(now >= plan.start_ns)) * plan.slot_ns;
            std::thread::sleep(Duration::from_nanos(next - now));
            continue;
        }
        // Spread over the slot, so that guests meet at different points of what they do.
        let pause_ns = plan.slot_ns / (2 * u64::from(plan.ops.max(1)));
        std::thread::sleep(Duration::from_nanos(draw.below(pause_ns.max(1))));
        value += 1;
        let call = next_call(plan, &mut draw, (slot, value), is_long);
        log.begin(call)?;
        let outcome = carry_out(call, memory);
        log.end(outcome)?;
        if let Call::Resize { pages } = call {
            is_long = pages > plan.pages && outcome == Outcome::Done;
        }
        in_slot.1 += 1;
        done += 1;
        if reconnects != memory.reconnects() {
            reconnects = memory.reconnects();
            log.anew()?;
        }
    }
}

fn next_call(plan: &Plan, draw: &mut Draw, (word, value): (u64, u64), is_long: bool) -> Call {
    if draw.below(1000) < plan.sync_permille {
        return Call::Sync;
    }
    if draw.below(1000) < plan.resize_permille {
        let longer = draw.below(2) * plan.tail_pages;
        let pages = plan.pages + longer;
        return Call::Resize { pages };
    }
    let page = draw.below(plan.pages + plan.tail_pages);
    let stores = draw.below(1000) < plan.store_permille;
    let by_message = page >= plan.pages || draw.below(1000) < plan.message_permille;
    match (stores, by_message) {
        (true, false) => Call::Store { page, word, value },
        (false, false) => Call::Load { page, word },
        (true, true) if page < plan.pages || is_long => Call::Write { page, word, value },
        _ => Call::Read { page, word },
    }
}

fn carry_out(call: Call, memory: &dyn Memory) -> Outcome {
    let at = |page, word| page * copage_grants::PAGE_SIZE_U64 + word * 8;
    // A store may wait in the processor behind the reading of the clock, and a load may run ahead of it.
    fence(Ordering::SeqCst);
    let done = match call {
        Call::Store { page, word, value } => memory.store(at(page, word), value).map(|()| None),
        Call::Load { page, word } => memory.load(at(page, word)).map(|v| Some(Some(v))),
        Call::Write { page, word, value } => memory.write(at(page, word), value).map(|()| None),
        Call::Read { page, word } => memory.read(at(page, word)).map(Some),
        Call::Sync => memory.sync().map(|()| None),
        Call::Resize { pages } => memory
            .resize(pages * copage_grants::PAGE_SIZE_U64)
            .map(|()| None),
    };
    fence(Ordering::SeqCst);
    match done {
        Ok(None) => Outcome::Done,
        Ok(Some(value)) => Outcome::Value(value),
        Err(errno) => Outcome::Failed(errno),
    }
}
