//! The ledger: for every frame its grants, for every domain its grants from old to new, and counts.
//!
//! Arrays only. A grant is a *slot*: its entry's place counted through all tables. Of each slot the
//! ledger has 14 bytes, in arrays of their own, because granting writes six of them only:
//!
//! * `next` is the frame's list, newest grant first, from `heads[frame]`. The last slot's is the
//!   frame itself, marked by [`FRAME`], so that a slot leads to its frame without asking the table;
//!   a free slot's is 0;
//! * `whose` is who holds it, and how;
//! * [`Ages`] is the domain's list, in age order. Granting slots in a row does not touch it.
//!
//! Slot 0 is a reserved entry and so stands for "none", which lets all arrays begin as zeros that
//! cost no memory before they are used. The ledger does not know the table: comparing the two
//! means something.

use crate::ages::{AgeList, Ages};
use crate::backend::Access;
use crate::ids::{DomId, FrameNo};
use crate::limits::{ENTRIES_MAX, FRAMES_MAX, GRANTS_PER_DOMAIN_DEFAULT};
use crate::span::Span;
use std::ops::Range;
use zerocopy::FromZeros;

/// A place in the ledger and in the tables; 0 is none.
pub(crate) type Slot = u32;

/// Marks a link that is not a slot but the frame whose list ends here.
const FRAME: u32 = 1 << 31;
const _: () = assert!(FRAMES_MAX <= FRAME && ENTRIES_MAX <= FRAME);

/// The bit of `whose` below the domid, which is 15 bits long.
const WRITABLE: u16 = 1;
const _: () = assert!(DomId::FIRST_RESERVED <= 1 << 15);

#[derive(Clone, Copy, Debug)]
struct Domain {
    ages: AgeList,
    count: u64,
    grants_max: u64,
}

impl Domain {
    const NEW: Self = Self {
        ages: AgeList {
            oldest: 0,
            newest: 0,
        },
        count: 0,
        grants_max: GRANTS_PER_DOMAIN_DEFAULT,
    };
}

/// One grant as the ledger has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub dom: DomId,
    pub frame: FrameNo,
    pub access: Access,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    next: Vec<u32>,
    whose: Vec<u16>,
    ages: Ages,
    heads: Vec<Slot>,
    domains: Vec<Domain>,
    spans: Vec<Span>,
}

impl Ledger {
    /// Adds the slots of a table of `entries` entries behind those there are, the first `reserved`
    /// of them never to be used. Gives its first slot; `None` when there is no room or memory.
    pub(crate) fn add_span(&mut self, entries: u32, reserved: u32) -> Option<Slot> {
        let base = self.slots();
        let end = base
            .checked_add(entries)
            .filter(|&end| end <= ENTRIES_MAX)?;
        grow_zeroed(&mut self.next, end)?;
        self.ages.grow(end)?;
        // The last: its length is the number of slots.
        grow_zeroed(&mut self.whose, end)?;
        let at = base.saturating_add(reserved).min(end);
        self.spans.push(Span::new(at, end));
        Some(base)
    }

    /// Takes slots of a span that holds no grant, `is_out` tells which, out of use; all others in `slots`
    /// are free. [`Ledger::put_back`] ends that.
    pub(crate) fn leave_out(
        &mut self,
        span: usize,
        slots: Range<Slot>,
        is_out: impl Fn(Slot) -> bool,
    ) {
        let Range { start, end } = slots;
        self.spans[span] = Span::of_free(start, end, &mut self.ages, |slot| !is_out(slot));
    }

    /// Takes all free slots of a span out of use; gives `false`, and does nothing, when others than the
    /// reserved ones are in use.
    pub(crate) fn close_span(&mut self, span: usize, slots: u32) -> bool {
        let Some(span) = self.spans.get_mut(span) else {
            return false;
        };
        let whole = span.free() == slots;
        // Run by run: taking one clears the links that kept it.
        while whole && span.free() > 0 {
            let run = span.top(&mut self.ages);
            span.take(run.len() as u32);
        }
        whole
    }

    /// All slots from `start` to `end` of a closed span are free.
    pub(crate) fn open_span(&mut self, span: usize, Range { start, end }: Range<Slot>) {
        self.spans[span] = Span::new(start, end);
    }

    /// A slot that was left out, or whose grant has ended, is free.
    #[inline]
    pub(crate) fn put_back(&mut self, span: usize, slot: Slot) {
        self.spans[span].give(slot, &mut self.ages);
    }

    /// Free slots of a span; none of one that there is not.
    #[inline]
    pub(crate) fn available(&self, span: usize) -> u32 {
        self.spans.get(span).map_or(0, Span::free)
    }

    /// Slots of all spans, used or not, reserved ones included.
    pub(crate) fn slots(&self) -> u32 {
        // add_span keeps it below ENTRIES_MAX.
        self.whose.len() as u32
    }

    /// Makes room for frames below `end` (at most [`FRAMES_MAX`]).
    #[inline]
    pub(crate) fn reserve_frames(&mut self, end: u32) {
        if end as usize > self.heads.len() {
            let len = (end as usize).next_power_of_two().max(1024);
            self.heads.resize(len, 0);
        }
    }

    fn domain_now(&self, dom: DomId) -> Domain {
        self.domains
            .get(usize::from(dom.0))
            .copied()
            .unwrap_or(Domain::NEW)
    }

    /// Grants of `dom`.
    pub(crate) fn count(&self, dom: DomId) -> u64 {
        self.domain_now(dom).count
    }

    /// How many `dom` may have.
    pub(crate) fn grants_max(&self, dom: DomId) -> u64 {
        self.domain_now(dom).grants_max
    }

    pub(crate) fn set_grants_max(&mut self, dom: DomId, grants_max: u64) {
        account(&mut self.domains, dom).grants_max = grants_max;
    }

    /// Domains that ever had an account are below this.
    pub(crate) fn domains(&self) -> u16 {
        // Indexed by u16 domids below the reserved ones.
        self.domains.len() as u16
    }

    #[inline]
    fn head(&self, frame: FrameNo) -> Slot {
        self.heads.get(frame.0 as usize).copied().unwrap_or(0)
    }

    /// The frame's slots, newest first.
    #[inline]
    pub(crate) fn slots_of(&self, frame: FrameNo) -> impl Iterator<Item = Slot> + '_ {
        chain(&self.next, self.head(frame))
    }

    /// `dom`'s slots, oldest first.
    pub(crate) fn slots_by_age(&self, dom: DomId) -> impl Iterator<Item = Slot> + '_ {
        self.ages.iter(self.domain_now(dom).ages)
    }

    /// `dom`'s oldest grant.
    pub(crate) fn oldest(&self, dom: DomId) -> Option<Slot> {
        let AgeList { oldest, .. } = self.domain_now(dom).ages;
        (oldest != 0).then_some(oldest)
    }

    /// The frame's newest grant.
    #[inline]
    pub(crate) fn newest_of(&self, frame: FrameNo) -> Option<Slot> {
        let head = self.head(frame);
        (head != 0).then_some(head)
    }

    /// `dom`'s grant of `frame`.
    #[inline]
    pub(crate) fn find(&self, frame: FrameNo, dom: DomId) -> Option<Slot> {
        find(&self.next, &self.whose, self.head(frame), dom)
    }

    /// Who holds the slot's grant.
    #[inline]
    pub(crate) fn dom_of(&self, slot: Slot) -> DomId {
        dom_of(self.whose[slot as usize])
    }

    #[inline]
    pub(crate) fn access_of(&self, slot: Slot) -> Access {
        access(self.whose[slot as usize])
    }

    /// Whose frame the slot's grant is of.
    pub(crate) fn frame_of(&self, slot: Slot) -> FrameNo {
        let mut link = self.next[slot as usize];
        while link & FRAME == 0 && link != 0 {
            link = self.next[link as usize];
        }
        FrameNo(link & !FRAME)
    }

    /// The slot's grant; `None` for a slot that is free.
    pub(crate) fn held(&self, slot: Slot) -> Option<Held> {
        (*self.next.get(slot as usize)? != 0).then(|| Held {
            dom: self.dom_of(slot),
            frame: self.frame_of(slot),
            access: self.access_of(slot),
        })
    }

    /// Records grants of all of `frames` to `dom`, in slots in a row; gives these. `None`, and
    /// nothing changed, where that cannot be: `dom` holds one of them already or would hold more
    /// than it may, one is named twice or is past the room for frames, or the topmost run of free
    /// slots is too short. Then [`Ledger::add`] is the way.
    #[inline]
    pub(crate) fn add_all(
        &mut self,
        span: usize,
        frames: &[FrameNo],
        dom: DomId,
        access: Access,
    ) -> Option<Range<Slot>> {
        let account = account(&mut self.domains, dom);
        let over = account.count.saturating_add(frames.len() as u64) > account.grants_max;
        let free = self.spans.get_mut(span)?.top(&mut self.ages);
        if over || frames.len() > free.len() {
            return None;
        }
        let linked = self.link(free.start, frames, dom);
        if (linked as usize) < frames.len() {
            self.unlink_again(free.start, &frames[..linked as usize]);
            return None;
        }
        Some(self.take(span, linked, dom, access))
    }

    /// Records grants of the first of `frames` to `dom`: as many as come before one that `dom` holds
    /// already, and as fit into the topmost run of free slots. Gives their slots, which are in a
    /// row. The caller has seen that the span has a free slot, that there is room for the frames,
    /// and that `dom` may hold them.
    pub(crate) fn add(
        &mut self,
        span: usize,
        frames: &[FrameNo],
        dom: DomId,
        access: Access,
    ) -> Range<Slot> {
        let free = self.spans[span].top(&mut self.ages);
        let fit = frames.len().min(free.len());
        let linked = self.link(free.start, &frames[..fit], dom);
        self.take(span, linked, dom, access)
    }

    /// Puts free slots from `first` on into the lists of `frames`, up to a frame that `dom` holds
    /// already. Gives how many. There are as many free slots in a row.
    #[inline]
    fn link(&mut self, first: Slot, frames: &[FrameNo], dom: DomId) -> u32 {
        if self.link_row(first, frames) {
            return frames.len() as u32; // No longer than a run of slots.
        }
        let mut slot = first;
        for &frame in frames {
            let Some(head) = self.heads.get_mut(frame.0 as usize) else {
                break;
            };
            let mut next = FRAME | frame.0;
            if *head != 0 {
                // Linked a moment ago, in this call: the frame is named twice.
                let twice = head.wrapping_sub(first) < slot - first;
                if twice || find(&self.next, &self.whose, *head, dom).is_some() {
                    break;
                }
                next = *head;
            }
            self.next[slot as usize] = next;
            *head = slot;
            slot += 1;
        }
        slot - first
    }

    /// [`Ledger::link`] of frames in a row that nobody holds, as fills get them: going along arrays
    /// without looking at each place. `false`, and nothing changed, for other frames.
    #[inline]
    fn link_row(&mut self, first: Slot, frames: &[FrameNo]) -> bool {
        let (Some(from), Some(to)) = (frames.first(), frames.last()) else {
            return true;
        };
        let (from, len) = (from.0, frames.len());
        let end = (from as usize).saturating_add(len);
        if end != to.0 as usize + 1 {
            return false;
        }
        let Some(heads) = self.heads.get_mut(from as usize..end) else {
            return false;
        };
        // No way out of these loops before their end: they are done many places at a time.
        let apart = (from..).zip(frames).fold(0, |or, (n, f)| or | (n ^ f.0));
        if apart | heads.iter().fold(0, |or, head| or | head) != 0 {
            return false;
        }
        let next = &mut self.next[first as usize..][..len];
        (from..).zip(next).for_each(|(n, next)| *next = FRAME | n);
        (first..).zip(heads).for_each(|(slot, head)| *head = slot);
        true
    }

    /// Undoes [`Ledger::link`].
    #[cold]
    fn unlink_again(&mut self, first: Slot, frames: &[FrameNo]) {
        for (slot, frame) in (first..).zip(frames) {
            let next = std::mem::take(&mut self.next[slot as usize]);
            self.heads[frame.0 as usize] = if next & FRAME == 0 { next } else { 0 };
        }
    }

    /// Makes the first `count` slots of the topmost run, which are linked to their frames, `dom`'s.
    #[inline]
    fn take(&mut self, span: usize, count: u32, dom: DomId, access: Access) -> Range<Slot> {
        let first = self.spans[span].take(count);
        if count > 0 {
            self.whose[first as usize..][..count as usize].fill(whose(dom, access));
            let account = account(&mut self.domains, dom);
            account.count += u64::from(count);
            self.ages
                .append(&mut account.ages, first, first + count - 1);
        }
        first..first + count
    }

    /// Ends a grant of `frame`. Its slot is not free before [`Ledger::put_back`].
    #[inline]
    pub(crate) fn remove(&mut self, slot: Slot, frame: FrameNo) {
        let next = self.next[slot as usize];
        let head = &mut self.heads[frame.0 as usize];
        if *head == slot {
            *head = if next & FRAME == 0 { next } else { 0 };
        } else {
            let before = chain(&self.next, *head).find(|&other| self.next[other as usize] == slot);
            // A used slot is in its frame's list; the audit would tell if it were not.
            if let Some(before) = before {
                self.next[before as usize] = next;
            }
        }
        let account = account(&mut self.domains, dom_of(self.whose[slot as usize]));
        account.count -= 1;
        self.ages.unlink(&mut account.ages, slot);
        self.next[slot as usize] = 0;
    }

    /// Makes a grant its domain's newest.
    pub(crate) fn renew(&mut self, slot: Slot) {
        let ages = &mut account(&mut self.domains, dom_of(self.whose[slot as usize])).ages;
        self.ages.unlink(ages, slot);
        self.ages.append(ages, slot, slot);
    }

    /// Checks the links around one used slot; a line that says what is wrong.
    pub(crate) fn check_slot(&self, slot: Slot) -> Option<String> {
        let dom = self.dom_of(slot);
        let frame = self.frame_of(slot);
        if !self.slots_of(frame).any(|other| other == slot) {
            return Some(format!(
                "grant {slot} is not in the list of its frame {}",
                frame.0
            ));
        }
        let own = |slot| self.held(slot).is_some_and(|held| held.dom == dom);
        (!self.ages.is_whole(self.domain_now(dom).ages, slot, own))
            .then(|| format!("grant {slot} is not in the age list of {dom}"))
    }

    /// Checks that `dom`'s list has as many grants as its count says, all of them its own.
    pub(crate) fn check_domain(&self, dom: DomId) -> Option<String> {
        let Domain { count, .. } = self.domain_now(dom);
        let own = |&slot: &Slot| self.held(slot).is_some_and(|held| held.dom == dom);
        // Bounded, should the list be a ring.
        let listed = self
            .slots_by_age(dom)
            .take(count as usize + 1)
            .filter(own)
            .count() as u64;
        (listed != count)
            .then(|| format!("{dom} has {listed} grants in its list and counts {count}"))
    }
}

/// `dom`'s account, made when it is first needed.
#[inline]
fn account(domains: &mut Vec<Domain>, dom: DomId) -> &mut Domain {
    let at = usize::from(dom.0);
    if at >= domains.len() {
        grow_domains(domains, at + 1);
    }
    &mut domains[at]
}

#[cold]
fn grow_domains(domains: &mut Vec<Domain>, len: usize) {
    domains.resize(len, Domain::NEW);
}

/// The slots of the frame whose newest is `head`.
#[inline]
fn chain(next: &[u32], head: Slot) -> impl Iterator<Item = Slot> + '_ {
    let mut link = head;
    std::iter::from_fn(move || {
        if link == 0 || link & FRAME != 0 {
            return None;
        }
        let slot = link;
        link = next[slot as usize];
        Some(slot)
    })
}

#[inline(never)]
fn find(next: &[u32], whose: &[u16], head: Slot, dom: DomId) -> Option<Slot> {
    chain(next, head).find(|&slot| dom_of(whose[slot as usize]) == dom)
}

fn whose(dom: DomId, access: Access) -> u16 {
    let writable = match access {
        Access::ReadOnly => 0,
        Access::ReadWrite => WRITABLE,
    };
    (dom.0 << 1) | writable
}

fn dom_of(whose: u16) -> DomId {
    DomId(whose >> 1)
}

fn access(whose: u16) -> Access {
    if whose & WRITABLE == 0 {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    }
}

/// Makes an array `len` long with zeros. Those of a new array are the allocator's: not touched, and
/// so not there, before they are used. `None`: no memory, nothing changed.
pub(crate) fn grow_zeroed<T: FromZeros>(array: &mut Vec<T>, len: u32) -> Option<()> {
    let more = (len as usize).saturating_sub(array.len());
    if array.is_empty() {
        *array = T::new_vec_zeroed(more).ok()?;
    } else {
        T::extend_vec_zeroed(array, more).ok()?;
    }
    Some(())
}
