//! Asking sessions for pages of read-only files and telling them of newer contents, and what they answer.

use super::core::Core;
use super::ctx::Ctx;
use super::session::{Conn, Session};
use copage_cache::{CachedFile, OpenHow, RecallEnd};
use copage_coherence::msg::{FileToken, Generation, InvalidateReason, Notice, PageRange};
use copage_coherence::session::{Action, Event, RecallOutcome, Subject};
use copage_coherence::strict::Output;
use copage_grants::{DomId, Epoch, PageIndex};
use std::collections::HashMap;
use std::sync::Arc;

/// What is unanswered.
#[derive(Debug, Default)]
pub(super) struct Recalls {
    joins: HashMap<u64, Join>,
    asked: HashMap<u64, AskedOf>,
}

/// One recall of the cache from one domain, asked through each of the domain's opens of the file.
#[derive(Debug)]
struct Join {
    file: Arc<CachedFile>,
    generation: u32,
    first: PageIndex,
    count: u32,
    dom: DomId,
    left: usize,
}

/// Which recall of the machine is for what.
#[derive(Clone, Copy, Debug)]
enum Asked {
    Pages { join: u64 },
    Rebase,
}

#[derive(Clone, Copy, Debug)]
struct AskedOf {
    conn: u64,
    token: FileToken,
    what: Asked,
}

impl Ctx {
    /// Asks a session something back through one of its opens.
    fn ask(
        &mut self,
        conn: u64,
        session: &mut Session,
        token: FileToken,
        subject: Subject,
        what: Asked,
    ) -> bool {
        let before = self.actions.len();
        let epoch = session.epoch;
        self.event(Event::Recall { epoch, subject });
        let number = self.actions.iter().skip(before).find_map(|out| match out {
            Output::Session(Action::Ask {
                epoch: whose,
                recall,
                subject: asked,
            }) if *whose == epoch && *asked == subject => Some(*recall),
            _ => None,
        });
        let (Some(recall), Some(open)) = (number, session.files.get_mut(&token)) else {
            return false;
        };
        open.asked.push(recall);
        if matches!(what, Asked::Rebase) {
            open.rebase = Some(recall);
        }
        self.recalls
            .asked
            .insert(recall, AskedOf { conn, token, what });
        true
    }

    /// The cache wants pages back from one domain.
    pub(super) fn recall_pages(
        &mut self,
        conn: Option<&mut Conn>,
        file: &Arc<CachedFile>,
        pages: (u32, PageIndex, u32),
        dom: DomId,
        reason: InvalidateReason,
    ) {
        let (generation, first, count) = pages;
        let mut left = 0;
        let join = self.number();
        let mut is_live = false;
        if let Some(conn) = conn
            && let Some(mut session) = conn.session.take()
        {
            let id = conn.id;
            let tokens: Vec<FileToken> = self
                .openers
                .get(&file.id)
                .map(|all| {
                    all.iter()
                        .filter(|(c, _)| *c == id)
                        .map(|&(_, t)| t)
                        .collect()
                })
                .unwrap_or_default();
            for token in tokens {
                let maps = session
                    .files
                    .get(&token)
                    .is_some_and(|o| o.how != OpenHow::Read);
                let subject = Subject::Pages {
                    file: token,
                    generation: Generation(generation),
                    range: PageRange { first, count },
                    reason,
                };
                if maps && self.ask(id, &mut session, token, subject, Asked::Pages { join }) {
                    left += 1;
                }
            }
            is_live = self.machine.sessions().counts(self.now_ms, session.epoch);
            conn.session = Some(session);
        }
        if left == 0 {
            // Nobody to ask: the file was closed meanwhile, or the session is gone.
            let end = if is_live {
                RecallEnd::Acked
            } else {
                RecallEnd::Fenced
            };
            self.cache
                .recall_done(file, generation, first, count, dom, end);
        } else {
            let join = (
                join,
                Join {
                    file: file.clone(),
                    generation,
                    first,
                    count,
                    dom,
                    left,
                },
            );
            self.recalls.joins.insert(join.0, join.1);
        }
    }

    /// A file that this session has open has a newer content.
    pub(super) fn rebase(&mut self, conn: &mut Conn, token: FileToken) {
        let id = conn.id;
        let Some(mut session) = conn.session.take() else {
            return;
        };
        if let Some(open) = session.files.get_mut(&token)
            && !open.withdrawn
            && open.how != OpenHow::Read
        {
            if open.rebase.is_some() {
                open.rebase_again = true;
            } else if !conn.has_room() {
                // Many files can change at once, and one that reads slowly is not dead.
                if !std::mem::replace(&mut open.rebase_again, true) {
                    conn.rebases.push_back(token);
                }
            } else {
                let state = self.cache.current(&open.file);
                let subject = Subject::Rebase {
                    file: token,
                    generation: Generation(state.generation),
                    version: state.version,
                    bytes: state.bytes,
                };
                self.ask(id, &mut session, token, subject, Asked::Rebase);
            }
        }
        conn.session = Some(session);
    }

    /// A recall has ended. `conn` is whose it was; `true`: the file changed meanwhile, ask again.
    pub(super) fn settled(
        &mut self,
        conn: Option<&mut Conn>,
        recall: u64,
        outcome: RecallOutcome,
    ) -> Option<FileToken> {
        let asked = self.recalls.asked.remove(&recall)?;
        let mut again = None;
        let open = conn
            .and_then(|c| c.session.as_mut())
            .and_then(|s| s.files.get_mut(&asked.token));
        if let Some(open) = open {
            open.asked.retain(|&r| r != recall);
            if open.rebase == Some(recall) {
                open.rebase = None;
                if std::mem::take(&mut open.rebase_again) {
                    again = Some(asked.token);
                }
            }
        }
        if let Asked::Pages { join } = asked.what {
            let done = match outcome {
                RecallOutcome::Fenced => Some(RecallEnd::Fenced),
                // A process that is gone maps nothing.
                RecallOutcome::Acked | RecallOutcome::Ended => {
                    self.recalls.joins.get_mut(&join).and_then(|j| {
                        j.left -= 1;
                        (j.left == 0).then_some(RecallEnd::Acked)
                    })
                }
            };
            if let Some(end) = done
                && let Some(j) = self.recalls.joins.remove(&join)
            {
                self.cache
                    .recall_done(&j.file, j.generation, j.first, j.count, j.dom, end);
            }
        }
        again
    }

    /// Whose recall it is.
    pub(super) fn asked_conn(&self, recall: u64) -> Option<u64> {
        self.recalls.asked.get(&recall).map(|a| a.conn)
    }

    /// Sends what a recall asks.
    pub(super) fn send_recall(
        &mut self,
        conn: &mut Conn,
        epoch: Epoch,
        recall: u64,
        subject: Subject,
    ) {
        let deadline_ms = self.machine.sessions().config().invalidate_deadline_ms;
        match subject {
            Subject::Pages {
                file,
                generation,
                range,
                reason,
            } => {
                let notice = Notice::Invalidate {
                    recall,
                    file,
                    generation,
                    range,
                    reason,
                    deadline_ms,
                };
                self.notify(conn, epoch, &notice, None);
            }
            // Sent with others of its run.
            Subject::Place(_) => {}
            Subject::Rebase {
                file,
                generation,
                version,
                bytes,
            } => {
                let open = conn.session.as_ref().and_then(|s| s.files.get(&file));
                // A pinned open keeps its content; only those with a fault handler get the new home,
                // which has holes.
                let maps = open.filter(|o| o.how == OpenHow::Map);
                let fd = maps.and_then(|o| self.cache.descriptor(&o.file, generation.0).ok());
                let notice = Notice::Rebase {
                    recall,
                    file,
                    generation,
                    version,
                    bytes,
                    deadline_ms,
                };
                self.notify(conn, epoch, &notice, fd);
            }
        }
    }
}

impl Core {
    /// A recall has ended; a session whose file changed meanwhile is told again.
    pub(super) fn settled(&mut self, recall: u64, outcome: RecallOutcome) {
        let conn = self
            .ctx
            .asked_conn(recall)
            .and_then(|id| self.conns.get_mut(&id));
        let id = conn.as_ref().map(|c| c.id);
        let again = self.ctx.settled(conn, recall, outcome);
        if let (Some(id), Some(token)) = (id, again)
            && let Some(conn) = self.conns.get_mut(&id)
        {
            self.ctx.rebase(conn, token);
        }
    }
}
