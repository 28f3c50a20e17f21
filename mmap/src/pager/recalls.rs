//! Pages of `coherent` files that the daemon has asked back and that are not said to be unmapped yet.
//!
//! Until then none of them is asked for, and no answer that the worker has is used: it would be mapped behind
//! the unmapping and before the word, and the daemon would take a page back that is being stored to.

use super::Pager;
use super::faults::Waiter;
use super::worker::Job;
use crate::file::FileInner;
use crate::granted::Pages;
use crate::mapped::Mapped;
use crate::session::Recall;
use crate::site::Site;
use crate::stamp::Stamp;
use copage_coherence::msg::PageRange;
use copage_grants::PageIndex;
use std::ops::Range;
use std::sync::Arc;

struct OnItsWay {
    file: Arc<FileInner>,
    site: Arc<Site>,
    pages: Pages,
}

/// See the module. The pager's alone.
#[derive(Default)]
pub(super) struct Recalls(Vec<OnItsWay>);

impl Recalls {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Shortens `pages`, which begin at or before `page`, so that none of them is on its way back.
    fn clip(&self, site: &Arc<Site>, page: u64, pages: Range<u64>) -> Range<u64> {
        let of_site = self.0.iter().filter(|r| Arc::ptr_eq(&r.site, site));
        of_site.fold(pages, |pages, r| {
            if r.pages.first > page {
                pages.start..pages.end.min(r.pages.first)
            } else {
                pages.start.max(r.pages.end().min(page))..pages.end
            }
        })
    }

    fn holds(&self, site: &Arc<Site>, page: u64) -> bool {
        self.0
            .iter()
            .any(|r| Arc::ptr_eq(&r.site, site) && (r.pages.first..r.pages.end()).contains(&page))
    }
}

impl Pager {
    /// Pages are asked back; the worker unmaps them.
    pub(super) fn give_back(
        &mut self,
        file: Arc<FileInner>,
        stamp: Stamp,
        range: PageRange,
        recall: Option<Recall>,
    ) {
        let pages = Pages {
            stamp,
            first: range.first.0,
            count: range.count.into(),
        };
        let site = file.content.lock().site.clone();
        if let Some(site) = site {
            match recall {
                Some(_) => self.faults.spoil_answered(&pages),
                None => self.faults.spoil(&pages),
            }
            let file = Arc::clone(&file);
            self.recalls.0.push(OnItsWay { file, site, pages });
        }
        let _ = self.shared.jobs.send(Job::Invalidate {
            file,
            stamp,
            range,
            recall,
        });
    }

    /// A page that we have for writing is a hole: the daemon took it by force. As if it had asked for it.
    pub(super) fn torn_out(&mut self, mapped: &Arc<Mapped>, page: u64) {
        let file = Arc::clone(mapped.file());
        let site = file.content.lock().site.clone();
        if site.is_some_and(|site| self.recalls.holds(&site, page)) {
            return;
        }
        let range = PageRange {
            first: PageIndex(page),
            count: 1,
        };
        self.give_back(file, mapped.stamp(), range, None);
    }

    /// Is the page that is waited for just being given back?
    pub(super) fn is_recalled(&self, waiter: &Waiter) -> bool {
        if self.recalls.0.is_empty() {
            return false;
        }
        let site = waiter.mapped.file().content.lock().site.clone();
        site.is_some_and(|site| self.recalls.holds(&site, waiter.page))
    }

    /// What of `pages` around the one that is waited for may be asked for.
    pub(super) fn unrecalled(&self, waiter: &Waiter, pages: Range<u64>) -> Range<u64> {
        if self.recalls.0.is_empty() {
            return pages;
        }
        match waiter.mapped.file().content.lock().site.clone() {
            Some(site) => self.recalls.clip(&site, waiter.page, pages),
            None => pages,
        }
    }

    /// The word was said: whoever waits for the pages asks for them again.
    pub(super) fn given_back(&mut self, file: &Arc<FileInner>, pages: &Pages) {
        let same = |r: &OnItsWay| r.pages == *pages && Arc::ptr_eq(&r.file, file);
        let Some(at) = self.recalls.0.iter().position(same) else {
            return;
        };
        let ended = self.recalls.0.swap_remove(at);
        let Ok(uffd) = &self.shared.uffd else { return };
        let mappings = self.shared.of_site(&ended.site);
        // A range came as one.
        let count = u32::try_from(ended.pages.count).unwrap_or(u32::MAX);
        for mapped in mappings {
            mapped.wake(uffd, ended.pages.first, count);
        }
    }
}
