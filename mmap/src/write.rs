//! Changing a file of a `coherent` export by message.

use crate::client::unexpected;
use crate::error::{MmapError, Result};
use crate::file::File;
use crate::rebase::rebase;
use crate::session::Session;
use copage_coherence::msg::{DATA_BYTES_MAX, FileToken, Reply, Request};

impl File {
    /// Asks once. What changes a file must not be asked for again: somebody may have changed it since.
    fn once<T>(&self, ask: impl Fn(&Session, FileToken) -> Result<T>) -> Result<T> {
        let line = &self.client().shared().line;
        loop {
            let session = line.session()?;
            let token = match self.inner().token(&session) {
                // It ended meanwhile, and nothing was asked for.
                Err(MmapError::Lost(_)) => continue,
                other => other?,
            };
            return ask(&session, token).map_err(|error| match error {
                MmapError::Lost(_) => line.lost().map_or(MmapError::Unanswered, MmapError::Lost),
                other => other,
            });
        }
    }

    fn check_writable(&self) -> Result<()> {
        match self.is_writable() {
            true => Ok(()),
            false => Err(MmapError::Access(
                "the file was not opened for writing (Node::open_for_writing)".into(),
            )),
        }
    }

    /// Stores bytes at `offset`, beyond the end of the file too, which grows. They are seen by everybody
    /// from then on and survive the daemon, not the machine: see [`File::sync`]. Fewer than given when the rest
    /// failed.
    ///
    /// Large writes are several messages: what others store between them may lie in between.
    /// [`MmapError::Unanswered`]: the daemon was gone before it had answered, and the bytes are there or not.
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<usize> {
        self.check_writable()?;
        let mut done = 0;
        for part in data.chunks(DATA_BYTES_MAX as usize) {
            let at = offset.checked_add(done as u64);
            let at = at.ok_or_else(|| MmapError::Invalid("the file would be too long".into()));
            let wrote = at.and_then(|at| self.write_part(part, at));
            match wrote {
                Ok(count) => {
                    done += count;
                    if count < part.len() {
                        break;
                    }
                }
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn write_part(&self, data: &[u8], offset: u64) -> Result<usize> {
        self.once(|session, file| {
            let answer = session.call(&Request::Write { file, offset, data })?;
            match answer.reply()? {
                Reply::Wrote { count, .. } if count as usize <= data.len() => Ok(count as usize),
                Reply::Wrote { .. } => Err(MmapError::Protocol(
                    "more bytes were written than were given".into(),
                )),
                other => Err(unexpected("Wrote", &other)),
            }
        })
    }

    /// Gives the file another length. Nobody can use what was cut off any more: an access to it is SIGBUS.
    pub fn set_len(&self, bytes: u64) -> Result<()> {
        self.check_writable()?;
        self.once(|session, file| {
            let answer = session.call(&Request::Truncate { file, bytes })?;
            match answer.reply()? {
                Reply::Done => Ok(()),
                other => Err(unexpected("Done", &other)),
            }
        })
    }

    /// Has everything that anybody stored in the file by now put on the disk: by [`File::write_at`] or
    /// through a mapping, of any guest.
    ///
    /// [`MmapError::WritesLost`], once: the daemon was started again since the last `sync`, and stores
    /// through mappings of this file may be lost.
    pub fn sync(&self) -> Result<()> {
        self.client().shared().in_session(|session| {
            let (shared, now) = (self.client().shared(), session.number());
            let file = self.inner().token(session)?;
            let is_old = self.inner().content.lock().stamp.session() < now;
            if is_old || shared.space.lock().any_before(now) {
                // The worker is about to show what there is now, and sees what is lost. What is stored before
                // it has, in whichever open, is lost with the rest; what is stored after this call is not.
                shared.settle()?;
                let content = self.inner().content.lock().clone();
                rebase(shared, self.inner(), content);
            }
            if self.inner().take_lost() {
                return Err(MmapError::WritesLost);
            }
            let site = self.inner().content.lock().site.clone();
            let before = site.as_ref().map(|site| site.before_sync());
            let answer = session.call(&Request::Sync { file })?;
            match answer.reply()? {
                Reply::Done => {
                    if let (Some(site), Some(before)) = (site, before) {
                        site.synced(&before);
                    }
                    Ok(())
                }
                other => Err(unexpected("Done", &other)),
            }
        })
    }
}
