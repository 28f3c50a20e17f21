//! What comes over the channel.

use super::Pager;
use super::worker::Job;
use crate::error::LostWhy;
use crate::limits::MESSAGES_BURST_MAX;
use crate::session::{Answer, Recall};
use crate::stamp::Stamp;
use copage_coherence::msg::{FrameKind, Notice, Reply, decode_header};
use copage_grants::channel::ChannelError;
use std::os::fd::OwnedFd;
use std::sync::Arc;

impl Pager {
    pub(super) fn messages(&mut self) {
        for _ in 0..MESSAGES_BURST_MAX {
            let mut inbound = std::mem::take(&mut self.inbound);
            let received = self.session.channel.try_recv(&mut inbound);
            let more = match received {
                Ok(message) => {
                    self.message(&inbound[..message.len], message.fd);
                    self.speaks()
                }
                Err(ChannelError::WouldBlock) => false,
                Err(ChannelError::Closed) => {
                    self.lose(LostWhy::HungUp);
                    false
                }
                Err(e) => {
                    self.lose(LostWhy::Protocol(e.to_string()));
                    false
                }
            };
            self.inbound = inbound;
            if !more {
                return;
            }
        }
    }

    fn message(&mut self, bytes: &[u8], fd: Option<OwnedFd>) {
        let frame = match decode_header(bytes) {
            Ok(frame) => frame,
            Err(e) => return self.lose(LostWhy::Protocol(e.to_string())),
        };
        if frame.epoch != self.session.epoch() {
            // Of an earlier session; it counts for nothing.
            return;
        }
        match frame.kind {
            FrameKind::Reply => {
                if self
                    .lease
                    .asked
                    .is_some_and(|(number, _)| number == frame.request)
                {
                    self.renewed(&Answer::new(bytes.to_vec(), None));
                } else if let Some(flight) = self.faults.remove(frame.request) {
                    self.answered(frame.request, flight, bytes.to_vec(), fd);
                } else if let Some((mapped, page)) = self.faults.remove_restore(frame.request) {
                    self.restored(mapped, page, &Answer::new(bytes.to_vec(), None));
                } else {
                    self.session
                        .answer(frame.request, Answer::new(bytes.to_vec(), fd));
                }
            }
            FrameKind::Notice => match Notice::decode(&frame) {
                Ok(notice) => self.notice(notice, fd),
                Err(e) => self.lose(LostWhy::Protocol(e.to_string())),
            },
            FrameKind::Request => {
                self.lose(LostWhy::Protocol("the daemon sent a request".into()));
            }
        }
    }

    fn renewed(&mut self, answer: &Answer) {
        let Some((_, sent_ms)) = self.lease.asked.take() else {
            return;
        };
        match answer.reply() {
            Ok(Reply::Renewed { lease_ttl_ms }) => {
                self.lease.granted(&self.session, sent_ms, lease_ttl_ms);
            }
            Ok(other) => {
                let error = crate::client::unexpected("Renewed", &other);
                self.lose(LostWhy::Protocol(error.to_string()));
            }
            Err(e) => self.lose(LostWhy::Protocol(format!("the lease was not renewed: {e}"))),
        }
    }

    fn notice(&mut self, notice: Notice, fd: Option<OwnedFd>) {
        let number = self.session.number();
        let recall = |recall| Recall {
            session: Arc::clone(&self.session),
            number: recall,
        };
        match notice {
            Notice::Invalidate {
                recall: asked,
                file,
                generation,
                range,
                ..
            } => {
                let recall = recall(asked);
                match self.shared.file(number, file) {
                    Some(file) => {
                        let stamp = Stamp::new(number, generation);
                        self.give_back(file, stamp, range, Some(recall));
                    }
                    // Closed meanwhile: nothing is mapped.
                    None => recall.ack(),
                }
            }
            Notice::Rebase {
                recall: asked,
                file,
                generation,
                version,
                bytes,
                ..
            } => {
                let recall = recall(asked);
                match self.shared.file(number, file) {
                    Some(file) => {
                        self.newer(file, (generation, version, bytes), fd, Some(recall));
                    }
                    None => recall.ack(),
                }
            }
            Notice::Resized { file, bytes } => {
                if let Some(file) = self.shared.file(number, file) {
                    // Known from here on; what was refused behind the old end is not any more when the
                    // worker gets to it.
                    file.content.lock().bytes = bytes;
                    let _ = self.shared.jobs.send(Job::Resized(file));
                }
            }
            Notice::Fenced { reason } => self.lose(LostWhy::Fenced(reason)),
            Notice::Goodbye => self.lose(LostWhy::Stopped),
        }
    }
}
