//! Showing a file's newer content. On any thread but the pager.

use crate::file::{Content, FileInner};
use crate::session::Shared;
use std::sync::Arc;

/// Makes `content` the file's, if it is newer than what is known, and brings every mapping of the
/// file to the newest content that is known.
pub(crate) fn rebase(shared: &Shared, file: &Arc<FileInner>, content: Content) {
    let newest = {
        let mut known = file.content.lock();
        if content.generation > known.generation {
            *known = content;
        }
        known.clone()
    };
    // Whoever maps from here on maps the newest; what was entered before is in the table.
    let mappings = shared.space.lock().of_file(file);
    for mapped in mappings {
        mapped.rebase(shared, &newest);
    }
}
