//! What comes over the channel.

use super::Pager;
use super::worker::Job;
use crate::error::LostWhy;
use crate::limits::MESSAGES_BURST_MAX;
use crate::session::Answer;
use copage_coherence::msg::{FrameKind, Notice, Reply, Request, decode_header};
use copage_grants::channel::ChannelError;
use std::os::fd::OwnedFd;

impl Pager {
    pub(super) fn messages(&mut self) {
        for _ in 0..MESSAGES_BURST_MAX {
            let mut inbound = std::mem::take(&mut self.inbound);
            let received = self.shared.session.channel.try_recv(&mut inbound);
            let more = match received {
                Ok(message) => {
                    self.message(&inbound[..message.len], message.fd);
                    !self.ending
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
        if frame.epoch != self.shared.session.epoch() {
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
                    self.shared
                        .session
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
                // From when it was sent: the daemon counts from when it came, which is later.
                self.lease.ttl_ms = u64::from(lease_ttl_ms).max(3);
                self.lease.ends_ms = sent_ms + self.lease.ttl_ms;
                self.lease.renew_ms = sent_ms + self.lease.ttl_ms / 3;
                self.shared.session.set_lease(self.lease.ends_ms);
            }
            Ok(other) => {
                let error = crate::client::unexpected("Renewed", &other);
                self.lose(LostWhy::Protocol(error.to_string()));
            }
            Err(e) => self.lose(LostWhy::Protocol(format!("the lease was not renewed: {e}"))),
        }
    }

    fn notice(&mut self, notice: Notice, fd: Option<OwnedFd>) {
        match notice {
            Notice::Invalidate {
                recall,
                file,
                generation,
                range,
                ..
            } => {
                match self.shared.file(file) {
                    Some(file) => {
                        let job = Job::Invalidate {
                            file,
                            generation,
                            range,
                            recall,
                        };
                        let _ = self.shared.jobs.send(job);
                    }
                    // Closed meanwhile: nothing is mapped.
                    None => self.shared.session.post(&Request::Ack { recall }),
                }
            }
            Notice::Rebase {
                recall,
                file,
                generation,
                version,
                bytes,
                ..
            } => match self.shared.file(file) {
                Some(file) => {
                    self.newer(file, (generation, version, bytes), fd, Some(recall));
                }
                None => self.shared.session.post(&Request::Ack { recall }),
            },
            Notice::Fenced { reason } => self.lose(LostWhy::Fenced(reason)),
            Notice::Goodbye => self.lose(LostWhy::Stopped),
        }
    }
}
