//! The handles of one session: what it was given, and nothing else.

use copage_cache::{ExportId, NodeRef};
use copage_coherence::msg::Handle;
use copage_grants::Epoch;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

/// Draws tags that a guest cannot tell beforehand.
#[derive(Debug, Default)]
pub(super) struct Tags {
    /// SipHash with a key that the system drew.
    keyed: RandomState,
    drawn: u64,
}

impl Tags {
    fn draw(&mut self) -> u32 {
        self.drawn += 1;
        let hash = self.keyed.hash_one(self.drawn);
        // Half of a keyed hash of a counter.
        (hash >> 32) as u32
    }
}

#[derive(Debug)]
struct Slot {
    tag: u32,
    held: Option<Held>,
}

#[derive(Debug)]
struct Held {
    node: NodeRef,
    references: u64,
}

/// See the module. One node has one handle however often it is looked up.
#[derive(Debug)]
pub(super) struct Handles {
    epoch: Epoch,
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_node: HashMap<(ExportId, u64, u64), u32>,
}

/// The session holds as many handles as it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

fn key(node: &NodeRef) -> (ExportId, u64, u64) {
    (node.export, node.dev, node.ino)
}

impl Handles {
    pub(super) fn new(epoch: Epoch) -> Self {
        Self {
            epoch,
            slots: Vec::new(),
            free: Vec::new(),
            by_node: HashMap::new(),
        }
    }

    /// Handles held.
    pub(super) fn len(&self) -> usize {
        self.by_node.len()
    }

    /// Would this node need a new slot?
    pub(super) fn is_new(&self, node: &NodeRef) -> bool {
        !self.by_node.contains_key(&key(node))
    }

    /// Counts one more reference to a node.
    pub(super) fn insert(&mut self, node: NodeRef, tags: &mut Tags) -> Result<Handle, Full> {
        let slot = match self.by_node.get(&key(&node)) {
            Some(&slot) => slot,
            None => {
                let slot = match self.free.pop() {
                    Some(slot) => slot,
                    None => {
                        let slot = u32::try_from(self.slots.len()).map_err(|_| Full)?;
                        self.slots.push(Slot { tag: 0, held: None });
                        slot
                    }
                };
                self.by_node.insert(key(&node), slot);
                slot
            }
        };
        // by_node and free name slots that there are.
        let Some(place) = self.slots.get_mut(slot as usize) else {
            return Err(Full);
        };
        match &mut place.held {
            Some(held) => held.references = held.references.saturating_add(1),
            None => {
                place.tag = tags.draw();
                place.held = Some(Held {
                    node,
                    references: 1,
                });
            }
        }
        Ok(Handle {
            slot,
            tag: place.tag,
            epoch: self.epoch.0,
        })
    }

    /// The node of a handle that this session was given and has not given back.
    pub(super) fn get(&self, handle: Handle) -> Option<&NodeRef> {
        let slot = self.slots.get(handle.slot as usize)?;
        let held = slot.held.as_ref()?;
        (slot.tag == handle.tag && handle.epoch == self.epoch.0).then_some(&held.node)
    }

    /// Gives back references. `true`: the handle is gone. `None`: there is no such handle.
    pub(super) fn forget(&mut self, handle: Handle, count: u64) -> Option<bool> {
        self.get(handle)?;
        let slot = self.slots.get_mut(handle.slot as usize)?;
        let held = slot.held.as_mut()?;
        held.references = held.references.saturating_sub(count);
        if held.references > 0 {
            return Some(false);
        }
        self.by_node.remove(&key(&held.node));
        slot.held = None;
        self.free.push(handle.slot);
        Some(true)
    }
}
