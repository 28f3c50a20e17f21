//! The machine's view of the grant tables.

use super::Coherent;
use copage_coherence::strict::{DAEMON, Place, Table};
use copage_grants::{Access, Epoch, FrameNo};

impl Table for Coherent {
    fn grant(
        &mut self,
        epoch: Epoch,
        place: Place,
        frame: FrameNo,
        access: Access,
        shared: bool,
    ) -> Result<(), i32> {
        if epoch == DAEMON {
            // It has no entry: it reads and writes the frame itself, before anything else is done.
            return Ok(());
        }
        let (Some(&who), Some(file)) = (self.who.get(&epoch), self.file_of(place)) else {
            return Err(libc::ESTALE);
        };
        let granted = self
            .cache
            .strict_grant(who, &file.file, place.page, frame, access, shared);
        match granted {
            Ok(grant) => {
                self.granted.insert((epoch, place), grant);
                Ok(())
            }
            Err(error) => {
                tracing::debug!(%error, dom = who.dom.0, "a page was not granted");
                Err(error.errno())
            }
        }
    }

    fn revoke(&mut self, epoch: Epoch, place: Place, frame: FrameNo) -> bool {
        self.end(epoch, place, |cache, file, dom| {
            cache.strict_revoke(dom, file, place.page, frame)
        })
    }

    fn can_share(&mut self, place: Place) -> bool {
        let file = self.file_of(place);
        file.is_some_and(|file| self.cache.strict_can_share(&file.file))
    }

    fn is_mapped(&mut self, epoch: Epoch, _place: Place, frame: FrameNo) -> bool {
        let who = self.who.get(&epoch);
        who.is_none_or(|who| self.cache.strict_is_mapped(who.dom, frame))
    }

    fn seize(&mut self, epoch: Epoch, place: Place, frame: FrameNo) -> bool {
        self.end(epoch, place, |cache, file, dom| {
            cache.strict_seize(dom, file, place.page, frame)
        })
    }
}

impl Coherent {
    fn end(
        &mut self,
        epoch: Epoch,
        place: Place,
        how: impl FnOnce(
            &copage_cache::Cache,
            &std::sync::Arc<copage_cache::CachedFile>,
            copage_grants::DomId,
        ) -> bool,
    ) -> bool {
        if epoch == DAEMON {
            return true;
        }
        // Without either there was never an entry.
        let (Some(who), Some(file)) = (self.who.get(&epoch), self.file_of(place)) else {
            return true;
        };
        let ended = how(&self.cache, &file.file, who.dom);
        if ended {
            self.granted.remove(&(epoch, place));
            self.ended.push((epoch, place));
        }
        ended
    }
}
