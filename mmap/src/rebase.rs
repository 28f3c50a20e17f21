//! Showing a file's newer content. On any thread but the pager.

use crate::file::{Content, FileInner};
use crate::granted::Pages;
use crate::pager::told::Told;
use crate::shared::Shared;
use crate::stamp::Stamp;
use copage_coherence::msg::{OpenHow, PageRange, Request};
use copage_grants::{PageIndex, pages_for};
use std::sync::Arc;

/// Makes `content` the file's, if it is newer than what is known, brings every mapping of the file
/// to the newest content that is known, and says that nothing of the older one is mapped any more.
/// Of a `coherent` file's home there is nothing to say: all of it was asked back before another took its
/// place, and another open of it here may have shown that one for long.
pub(crate) fn rebase(shared: &Shared, file: &Arc<FileInner>, content: Content) {
    let (newest, older) = {
        let mut known = file.content.lock();
        let older = (content.stamp > known.stamp).then(|| {
            file.note_successor(&known, &content);
            std::mem::replace(&mut *known, content)
        });
        (known.clone(), older)
    };
    // Whoever maps from here on maps the newest; what was entered before is in the table.
    let mappings = shared.space.lock().of_file(file);
    for mapped in mappings {
        mapped.rebase(shared, &newest);
    }
    // What is pinned stays mapped, by whomever has its descriptor, until it is closed.
    let said = file.how() != OpenHow::Pin && (file.granted() || !file.coherent());
    if let Some(older) = older.filter(|_| said) {
        if file.is_counted() {
            let pages = Pages {
                stamp: older.stamp,
                first: 0,
                count: pages_for(older.bytes),
            };
            let file = Arc::clone(file);
            return shared.tell(Told::TakenBack {
                file,
                pages,
                recall: None,
            });
        }
        unmapped(shared, file, older.stamp, 0, pages_for(older.bytes));
    }
}

/// Nobody vouches any more for what the file's mappings show: every page that was not stored to becomes a
/// hole, where accesses wait. (Not a hole in a file: that would be longer than RLIMIT_FSIZE may allow.)
pub(crate) fn hollow(shared: &Shared, file: &Arc<FileInner>) {
    let known = file.content.lock().clone();
    let content = Content {
        stamp: known.stamp.hollowed(),
        home: None,
        ..known
    };
    rebase(shared, file, content);
}

/// Says that `pages` pages from `first` are not mapped any more, if that means anything to the daemon
/// that is there now.
pub(crate) fn unmapped(shared: &Shared, file: &FileInner, stamp: Stamp, first: u64, pages: u64) {
    let Some(session) = shared.line.present() else {
        return;
    };
    let (Some(generation), Some(token)) = (
        stamp.within(session.number()),
        file.token_in(session.number()),
    ) else {
        return;
    };
    let mut at = first;
    let end = first.saturating_add(pages);
    while at < end {
        let count = u32::try_from(end - at).unwrap_or(u32::MAX);
        let range = PageRange {
            first: PageIndex(at),
            count,
        };
        session.post(&Request::Unmapped {
            file: token,
            generation,
            range,
        });
        at += u64::from(count);
    }
}
