//! How holdings end.

use super::{Page, Pages, Place};
use crate::strict::page::Leaving;
use crate::strict::{Action, DAEMON, Table};
use copage_grants::{Access, Epoch, FrameNo};

impl Pages {
    pub(super) fn acked(
        &mut self,
        epoch: Epoch,
        place: Place,
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) {
        let look_ms = self.now_ms + u64::from(self.config.look_again_ms).max(1);
        self.with(place, table, out, |all, page, table, _| {
            let Some(Leaving { until_ms, .. }) = page.holders.get(&epoch).and_then(|h| h.leaving)
            else {
                return;
            };
            if !all.try_end(place, page, epoch, table) {
                let look_ms = Some(look_ms);
                all.set_leaving(page, epoch, Leaving { until_ms, look_ms });
                all.due.extend(look_ms.map(|at| (at, place)));
            }
        });
    }

    /// Ends a holding if the table shows that the page is not mapped. `false`: it is.
    pub(super) fn try_end(
        &mut self,
        place: Place,
        page: &mut Page,
        epoch: Epoch,
        table: &mut impl Table,
    ) -> bool {
        let Some(frame) = page.frame.filter(|_| page.holders.contains_key(&epoch)) else {
            return true;
        };
        let ended = epoch == DAEMON || table.revoke(epoch, place, frame);
        if ended {
            self.remove_holder(place, page, epoch);
        }
        ended
    }

    /// Looks at those of a page who should have let go.
    pub(super) fn look_again(
        &mut self,
        page: &mut Page,
        place: Place,
        table: &mut impl Table,
        out: &mut Vec<Action>,
    ) {
        let leaving: Vec<(Epoch, Leaving)> = page
            .holders
            .iter()
            .filter_map(|(epoch, holder)| Some((*epoch, holder.leaving?)))
            .collect();
        for (epoch, Leaving { until_ms, look_ms }) in leaving {
            let due = until_ms <= self.now_ms || look_ms.is_some_and(|at| at <= self.now_ms);
            if !due || (look_ms.is_some() && self.try_end(place, page, epoch, table)) {
                continue;
            }
            if until_ms <= self.now_ms {
                out.push(Action::Fence { epoch });
            } else if look_ms.is_some() {
                let next_ms = self.now_ms + u64::from(self.config.look_again_ms).max(1);
                let look_ms = Some(next_ms);
                self.set_leaving(page, epoch, Leaving { until_ms, look_ms });
                self.due.insert((next_ms, place));
            }
        }
    }

    pub(super) fn gone(&mut self, epoch: Epoch, table: &mut impl Table, out: &mut Vec<Action>) {
        self.end_wants(epoch);
        let account = self.accounts.remove(&epoch).unwrap_or_default();
        for &place in account.places() {
            self.with(place, table, out, |all, page, table, _| {
                let (Some(holder), Some(frame)) = (page.holders.remove(&epoch), page.frame) else {
                    return;
                };
                if !table.seize(epoch, place, frame) {
                    all.lost.entry(frame).or_default().insert(epoch);
                    page.moving |= holder.access == Access::ReadWrite;
                }
            });
        }
    }

    pub(super) fn drained(&mut self, epoch: Epoch, frame: FrameNo, out: &mut Vec<Action>) {
        let Some(epochs) = self.lost.get_mut(&frame) else {
            return;
        };
        epochs.remove(&epoch);
        if epochs.is_empty() {
            self.lost.remove(&frame);
            if self.dropped.remove(&frame) {
                out.push(Action::Free { frame });
            }
        }
    }
}
