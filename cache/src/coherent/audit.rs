//! The audit of coherent files.

use crate::cache::Cache;
use crate::file::Home;
use crate::report::AuditReport;
use copage_grants::{FrameNo, PageIndex, Where};
use std::collections::HashMap;

impl Cache {
    /// Where pages that somebody writes are, for the look at the grants of all.
    pub(crate) fn audit_places(
        &self,
        home: &Home,
        id: u64,
        places: &mut HashMap<FrameNo, Where>,
        report: &mut AuditReport,
    ) {
        for (page, at) in &home.places {
            match home.index.get(*page) {
                Some(frame) => {
                    places.insert(frame, *at);
                }
                None => report.differs(format!(
                    "file {id} page {page} is said to be in {at:?} and in no frame"
                )),
            }
        }
        for (frame, (page, at)) in &home.lost {
            if home.index.get(*page) == Some(*frame) {
                report.differs(format!(
                    "{frame:?} of file {id} page {page} is lost and not"
                ));
            }
            places.insert(*frame, *at);
        }
    }

    /// Pages of a home that are where lost frames are.
    pub(crate) fn lost_pages(home: &Home) -> impl Iterator<Item = (PageIndex, FrameNo)> {
        let lost = home.lost.iter();
        lost.map(|(frame, (page, _))| (PageIndex((*page).into()), *frame))
    }
}
