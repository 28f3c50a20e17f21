//! What can be done for a page now.

use super::{Page, Pages, Place, Want, Work};
use crate::limits::DRIFT_PERMILLE;
use crate::strict::page::{Holder, Leaving};
use crate::strict::{Action, DAEMON, Table};
use copage_grants::{Access, Epoch, FrameNo};

impl Pages {
    pub(super) fn advance(
        &mut self,
        place: Place,
        page: &mut Page,
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) {
        // Who waits for the daemon waits for its next step only.
        while page.work.is_none() && !page.holders.contains_key(&DAEMON) {
            if page.holders.is_empty() {
                page.shared_rw = false;
            }
            if page.moving || page.unsaved() {
                if page.failed && page.wants.is_empty() {
                    return;
                }
                page.failed = false;
                if !self.put_in_order(place, page, table, out) {
                    return;
                }
            }
            let go_on = match page.wants.front().copied() {
                None => false,
                Some(Want::Take { ticket }) => self.take(place, page, ticket, table, out),
                Some(Want::Hold {
                    epoch,
                    ticket,
                    access,
                }) => self.hold(place, page, (epoch, ticket, access), table, out),
            };
            if !go_on {
                return;
            }
        }
    }

    /// First the page leaves a frame that somebody who is gone may write to, then what is in it is saved:
    /// what is saved would not stay what is read otherwise. `false`: that takes time.
    fn put_in_order(
        &mut self,
        place: Place,
        page: &mut Page,
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) -> bool {
        let Some(frame) = page.frame else {
            page.moving = false;
            page.dirty = false;
            return true;
        };
        if page.moving {
            let all = page.all();
            self.recall(place, page, &all, table, out);
            if page.holders.is_empty() {
                page.work = Some(Work::Placing);
                out.push(Action::Copy { place, from: frame });
            }
        } else {
            page.work = Some(Work::Saving);
            let version = page.version;
            out.push(Action::Save {
                place,
                frame,
                version,
            });
        }
        false
    }

    /// `true`: done, or there is something else to do first.
    fn take(
        &mut self,
        place: Place,
        page: &mut Page,
        ticket: u64,
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) -> bool {
        if !page.holders.is_empty() {
            let all = page.all();
            self.recall(place, page, &all, table, out);
            return page.holders.is_empty();
        }
        self.pop_want(place, page);
        let frame = page.frame.take();
        let version = page.version;
        out.push(Action::Taken {
            ticket,
            place,
            frame,
            version,
        });
        if let Some(frame) = frame {
            self.drop_frame(frame, out);
        }
        true
    }

    /// `true`: done, or there is something else to do first.
    fn hold(
        &mut self,
        place: Place,
        page: &mut Page,
        (epoch, ticket, access): (Epoch, u64, Access),
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) -> bool {
        let writes = access == Access::ReadWrite;
        let own = page.holders.get(&epoch).copied();
        if own.is_some_and(|own| own.leaving.is_some()) {
            return false;
        }
        if writes && self.now_ms < self.grace_until_ms {
            self.due.insert((self.grace_until_ms, place));
            return false;
        }
        let Some(frame) = page.frame else {
            page.work = Some(Work::Placing);
            out.push(Action::Fill { place });
            return false;
        };
        let bounced = writes && page.bounces >= self.config.bounces_max;
        if bounced && self.config.share_in_place && page.is_exclusive() {
            page.shared_rw = true;
        }
        let against = page.against(epoch, access, self.config.share_in_place);
        if !against.is_empty() {
            if against.iter().any(|who| *who != epoch)
                && let Some(until_ms) = self.kept_until(place, page, frame, table)
            {
                self.due.insert((until_ms, place));
                return false;
            }
            self.recall(place, page, &against, table, out);
            let stands = |who| page.holders.contains_key(who);
            return !against.iter().any(stands);
        }
        let writes_already = own.is_some_and(|own| own.access == Access::ReadWrite);
        if writes && !writes_already && !page.shared_rw && self.lost.contains_key(&frame) {
            page.work = Some(Work::Placing);
            out.push(Action::Copy { place, from: frame });
            return false;
        }
        if bounced && epoch != DAEMON && page.holders.is_empty() {
            page.shared_rw = table.can_share(place);
        }
        self.grant(place, page, frame, (epoch, ticket, access), table, out);
        true
    }

    fn grant(
        &mut self,
        place: Place,
        page: &mut Page,
        frame: FrameNo,
        (epoch, ticket, access): (Epoch, u64, Access),
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) {
        self.pop_want(place, page);
        let had = page.holders.get(&epoch).map(|holder| holder.access);
        let access = match had {
            Some(Access::ReadWrite) => Access::ReadWrite,
            _ => access,
        };
        let mut granted = table.grant(epoch, place, frame, access, page.shared_rw);
        if granted.is_err() && page.shared_rw && page.holders.is_empty() {
            // As there is no room where all could have it, one has it.
            page.shared_rw = false;
            page.bounces = 0;
            granted = table.grant(epoch, place, frame, access, false);
        }
        if let Err(errno) = granted {
            return out.push(Action::Refuse { ticket, errno });
        }
        if access == Access::ReadWrite && had != Some(Access::ReadWrite) {
            if page.holders.is_empty() {
                page.version = self.next_version();
            }
            if epoch != DAEMON {
                self.count_bounce(page, epoch);
            }
            page.dirty = true;
        }
        if epoch != DAEMON {
            page.since_ms = self.now_ms;
            page.settling = (self.config.map_ms > 0).then_some((epoch, false));
        }
        self.add_holder(place, page, epoch, access);
        out.push(Action::Grant {
            ticket,
            epoch,
            place,
            frame,
            access,
            version: page.version,
        });
    }

    /// Until when nobody can have the page from who got it last: who has not mapped it yet would lose it
    /// before it did anything with it, again and again.
    fn kept_until(
        &self,
        place: Place,
        page: &mut Page,
        frame: FrameNo,
        table: &mut impl Table,
    ) -> Option<u64> {
        if let Some((latest, waited)) = page.settling {
            let late_ms = page.since_ms.saturating_add(self.config.map_ms.into());
            let holds = page.holders.contains_key(&latest);
            if holds && self.now_ms < late_ms && !table.is_mapped(latest, place, frame) {
                page.settling = Some((latest, true));
                let next_ms = self.now_ms + u64::from(self.config.look_again_ms).max(1);
                return Some(next_ms.min(late_ms));
            }
            page.settling = None;
            if waited {
                page.since_ms = self.now_ms;
            }
        }
        let until_ms = page.since_ms.saturating_add(self.config.hold_ms.into());
        (self.now_ms < until_ms).then_some(until_ms)
    }

    /// Do pages that bounce get shared?
    pub(super) const fn bounces(&self) -> bool {
        self.config.bounces_max < u32::MAX
    }

    fn count_bounce(&self, page: &mut Page, epoch: Epoch) {
        if page.writer.is_some_and(|(last, _)| last != epoch) {
            // Not how long it took to come here: that may be long where the machine is slow.
            page.bounces = if page.wanted_soon {
                page.bounces.saturating_add(1)
            } else {
                0
            };
        }
        page.writer = Some((epoch, self.now_ms));
        page.wanted_soon = self.bounces() && page.wants.iter().any(|w| w.is_to_write_beside(epoch));
    }

    /// Takes a page from those whom the table shows without it, and asks the others, once.
    pub(super) fn recall(
        &mut self,
        place: Place,
        page: &mut Page,
        whom: &[Epoch],
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) {
        let term_ms = u64::from(self.config.unmap_deadline_ms);
        let until_ms = self.now_ms + term_ms + term_ms * DRIFT_PERMILLE / 1000;
        for &epoch in whom {
            let asked = |holder: &Holder| holder.leaving.is_some();
            if page.holders.get(&epoch).is_none_or(asked) || self.try_end(place, page, epoch, table)
            {
                continue;
            }
            let look_ms = None;
            self.set_leaving(page, epoch, Leaving { until_ms, look_ms });
            self.due.insert((until_ms, place));
            out.push(Action::Recall { epoch, place });
        }
    }
}
