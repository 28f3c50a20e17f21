//! Showing a file's newer content. On any thread but the pager.

use crate::file::{Content, FileInner};
use crate::granted::{Pages, Told};
use crate::session::Shared;
use copage_coherence::msg::{FileToken, Generation, OpenHow, PageRange, Request};
use copage_grants::{PageIndex, pages_for};
use std::sync::Arc;

/// Makes `content` the file's, if it is newer than what is known, brings every mapping of the file
/// to the newest content that is known, and says that nothing of the older one is mapped any more.
pub(crate) fn rebase(shared: &Shared, file: &Arc<FileInner>, content: Content) {
    let (newest, older) = {
        let mut known = file.content.lock();
        let older = (content.generation > known.generation)
            .then(|| std::mem::replace(&mut *known, content));
        (known.clone(), older)
    };
    // Whoever maps from here on maps the newest; what was entered before is in the table.
    let mappings = shared.space.lock().of_file(file);
    for mapped in mappings {
        mapped.rebase(shared, &newest);
    }
    // What is pinned stays mapped, by whomever has its descriptor, until it is closed.
    if let Some(older) = older.filter(|_| file.how() != OpenHow::Pin) {
        if file.granted() {
            let pages = Pages {
                generation: older.generation,
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
        unmapped(
            shared,
            file.token,
            older.generation,
            0,
            pages_for(older.bytes),
        );
    }
}

/// Says that `pages` pages from `first` are not mapped any more.
pub(crate) fn unmapped(
    shared: &Shared,
    file: FileToken,
    generation: Generation,
    first: u64,
    pages: u64,
) {
    let mut at = first;
    let end = first.saturating_add(pages);
    while at < end {
        let count = u32::try_from(end - at).unwrap_or(u32::MAX);
        let range = PageRange {
            first: PageIndex(at),
            count,
        };
        shared.session.post(&Request::Unmapped {
            file,
            generation,
            range,
        });
        at += u64::from(count);
    }
}
