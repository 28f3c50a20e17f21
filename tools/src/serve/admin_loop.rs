//! The administrator's requests: the quick ones are answered here, the slow ones handed on.

use super::admin_run::{Done, Job, Names, Tables};
use super::admin_types::{
    AdminReply, AdminRequest, CacheDomainEntry, ChannelEntry, ChargesEntry, GuestEntry, StatsEntry,
    XenEntry,
};
use super::core::Core;
use super::limits::{ACCEPTS_PER_TURN, GRANT_LINES_DEFAULT, GRANT_LINES_MAX};
use super::poll::{Interest, Ready, Source};
use crate::config::mib_to_pages;
use copage_cache::CacheStats;
use copage_grants::TableInfo;
use copage_grants::channel::Peer;
use std::collections::BTreeMap;

/// What a request leads to at once.
enum Now {
    Reply(AdminReply),
    Job(Job),
}

fn error(errno: i32, text: impl Into<String>) -> Now {
    Now::Reply(AdminReply::Error {
        errno,
        text: text.into(),
    })
}

fn now(result: Result<AdminReply, (i32, String)>) -> Now {
    match result {
        Ok(reply) => Now::Reply(reply),
        Err((errno, text)) => error(errno, text),
    }
}

impl Core {
    pub(super) fn admin_accept(&mut self) {
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(id) = self.admin.accept(self.ctx.own_uid) else {
                return;
            };
            if let Some(conn) = self.admin.conns.get(&id)
                && self
                    .poller
                    .add(&conn.socket, Source::Admin(id), Interest::READ)
                    .is_err()
            {
                self.admin.conns.remove(&id);
            }
        }
    }

    pub(super) fn admin_ready(&mut self, id: u64, ready: Ready) {
        let Some(conn) = self.admin.conns.get_mut(&id) else {
            return;
        };
        if ready.write {
            conn.flush();
        }
        if ready.read || ready.hung_up {
            conn.fill();
        }
        self.admin_next(id);
    }

    /// Looks at requests until one takes long or there is none.
    fn admin_next(&mut self, id: u64) {
        while let Some(conn) = self.admin.conns.get_mut(&id) {
            let Some(request) = conn.next_request() else {
                break;
            };
            let now = match request {
                Ok(request) => self.admin_request(request),
                Err(reply) => Now::Reply(reply),
            };
            self.act();
            let Some(conn) = self.admin.conns.get_mut(&id) else {
                return;
            };
            match now {
                Now::Reply(reply) => conn.reply(&reply),
                Now::Job(job) => {
                    conn.busy = true;
                    if !self.admin.runner.submit(id, job) {
                        conn.busy = false;
                        let text = "too many slow requests are being worked on".to_owned();
                        conn.reply(&AdminReply::Error {
                            errno: libc::EBUSY,
                            text,
                        });
                    }
                }
            }
        }
        self.admin_settle(id);
    }

    fn admin_settle(&mut self, id: u64) {
        let Some(conn) = self.admin.conns.get_mut(&id) else {
            return;
        };
        let wanted = conn.wanted();
        let watched = wanted == conn.interest
            || self
                .poller
                .change(&conn.socket, Source::Admin(id), wanted)
                .is_ok();
        conn.interest = wanted;
        if conn.is_over() || !watched {
            self.poller.remove(&conn.socket);
            self.admin.conns.remove(&id);
        }
    }

    /// Passes on what the thread for slow requests found.
    pub(super) fn admin_answers(&mut self) {
        while let Ok((id, done)) = self.admin.runner.done.try_recv() {
            let reply = match done {
                Done::Reply(AdminReply::Pages(mut entry)) => {
                    self.show_strict(&mut entry);
                    AdminReply::Pages(entry)
                }
                Done::Reply(reply) => reply,
                Done::Stats(stats, tables) => AdminReply::Stats(self.stats(&stats, &tables)),
                Done::Added(export, entry) => {
                    self.ctx.exports.insert(export, entry);
                    AdminReply::Done
                }
            };
            if let Some(conn) = self.admin.conns.get_mut(&id) {
                conn.busy = false;
                conn.reply(&reply);
                self.admin_next(id);
            }
        }
    }

    fn admin_request(&mut self, request: AdminRequest) -> Now {
        match request {
            AdminRequest::Guests => Now::Reply(AdminReply::Guests {
                guests: self.guests(),
            }),
            AdminRequest::ExportList => Now::Reply(AdminReply::Exports {
                exports: self.ctx.exports.list(),
            }),
            AdminRequest::ExportAdd(entry) => Now::Job(Job::ExportAdd(entry)),
            AdminRequest::ExportRemove { name } => match self.ctx.exports.remove(&name) {
                Some(id) => Now::Job(Job::ExportRemove(id)),
                None => error(libc::ENOENT, format!("there is no export {name:?}")),
            },
            AdminRequest::Pages { path } => Now::Job(Job::Pages {
                path,
                exports: self.ctx.exports.ids(),
                names: self.names(),
            }),
            AdminRequest::Grants { guest, entries_max } => {
                if let Some(name) = &guest
                    && self.ctx.guests.by_name(name).is_none()
                {
                    return error(libc::ENOENT, format!("there is no guest {name:?}"));
                }
                let most = entries_max
                    .unwrap_or(GRANT_LINES_DEFAULT)
                    .min(GRANT_LINES_MAX);
                Now::Job(Job::Grants {
                    guest,
                    entries_max: most as usize,
                    names: self.names(),
                })
            }
            AdminRequest::Leases { path, pages_max } => {
                let most = pages_max
                    .unwrap_or(GRANT_LINES_DEFAULT)
                    .min(GRANT_LINES_MAX);
                Now::Reply(AdminReply::Leases(
                    self.leases(path.as_deref(), most as usize),
                ))
            }
            AdminRequest::Audit => Now::Job(Job::Audit),
            AdminRequest::Stats => Now::Job(Job::Stats),
            AdminRequest::Reclaim { pages } => Now::Job(Job::Reclaim { pages }),
            AdminRequest::SetBudget { frames_mib } => {
                match u32::try_from(mib_to_pages(frames_mib)) {
                    Ok(frames) => Now::Job(Job::SetBudget { frames }),
                    Err(_) => error(libc::EINVAL, format!("{frames_mib} MiB is no budget")),
                }
            }
            AdminRequest::Drop => Now::Job(Job::Drop),
            AdminRequest::Attach { domain, exports } => now(self.attach(&domain, &exports)),
            AdminRequest::Detach { domain, exports } => now(self.detach(&domain, &exports)),
            AdminRequest::Fence { guest } => match self.fence_guest(&guest) {
                0 => error(libc::ENOENT, format!("guest {guest:?} has no session")),
                sessions => Now::Reply(AdminReply::Fenced { sessions }),
            },
            AdminRequest::Stop => {
                self.wake.stop();
                Now::Reply(AdminReply::Done)
            }
        }
    }

    fn names(&self) -> Names {
        let sessions = self.conns.values().filter_map(|c| c.session.as_ref());
        sessions.map(|s| (s.who.dom, s.name.to_string())).collect()
    }

    fn guests(&self) -> Vec<GuestEntry> {
        let now_ms = self.ctx.now_ms;
        let mut guests: Vec<GuestEntry> = self
            .conns
            .values()
            .filter_map(|conn| conn.session.as_ref().map(|s| (conn, s)))
            .map(|(conn, s)| {
                let standing = self.ctx.machine.sessions().standing(now_ms, s.epoch);
                let (lease_left_ms, recalls) = standing.unwrap_or_default();
                let (uid, pid, domain) = match &conn.peer {
                    Peer::Process(p) => (Some(p.uid), i32::try_from(p.pid).ok(), None),
                    Peer::Domain(domain) => (None, None, Some(domain.into())),
                };
                GuestEntry {
                    name: s.name.to_string(),
                    dom: s.who.dom.0,
                    epoch: s.epoch.0,
                    uid,
                    pid,
                    domain,
                    connected_ms: now_ms.saturating_sub(s.connected_ms),
                    lease_left_ms,
                    handles: s.handles.len() as u64,
                    files: s.files.len() as u64,
                    grants: self.ctx.backend.grant_count(s.who.dom),
                    recalls: recalls as u64,
                    in_flight: s.in_flight as u64,
                    requests: s.requests,
                }
            })
            .collect();
        guests.sort_by(|a, b| (&a.name, a.dom).cmp(&(&b.name, b.dom)));
        guests
    }

    fn stats(&self, cache: &CacheStats, tables: &Tables) -> StatsEntry {
        let grants = tables.grants;
        let counts = &self.ctx.counts;
        let counters = [
            ("connections", counts.connections),
            ("sessions", counts.sessions),
            ("sessions_refused", counts.sessions_refused),
            ("sessions_ended", counts.ended),
            ("fenced_lease_expired", counts.fenced_lease),
            ("fenced_deadline_missed", counts.fenced_deadline),
            ("fenced_protocol", counts.fenced_protocol),
            ("fenced_removed", counts.fenced_removed),
            ("requests", counts.requests),
            ("messages_bad", counts.messages_bad),
            ("notices", counts.notices),
            ("loop_rounds", counts.rounds),
            ("fault_hits", cache.fault_hits),
            ("fault_misses", cache.fault_misses),
            ("fault_stale", cache.fault_stale),
            ("fills", cache.fills),
            ("fill_errors", cache.fill_errors),
            ("fills_dropped", cache.fills_dropped),
            ("filled_pages", cache.pages_filled),
            ("refilled_pages", cache.pages_refilled),
            ("read_direct_bytes", cache.bytes_direct),
            ("read_buffered_bytes", cache.bytes_buffered),
            ("reclaimed_idle_pages", cache.reclaimed_idle),
            ("reclaimed_granted_pages", cache.reclaimed_granted),
            ("reclaim_calls", cache.reclaim_calls),
            ("recalls", cache.recalls),
            ("generations_retired", cache.generations_retired),
            ("leases_broken", cache.leases_broken),
            ("now_files_open", cache.files_open),
            ("now_files_host_bounded", cache.files_host_bounded),
            ("now_homes_retired", cache.homes_retired),
            ("now_nodes", cache.nodes),
            ("now_faults_waiting", cache.waiting),
            ("fills_parked", cache.parked),
            ("now_metadata_bytes", cache.metadata_bytes),
        ];
        let used = cache.frames_max.saturating_sub(cache.frames_free);
        let mut charges: Vec<ChargesEntry> = cache
            .guests
            .iter()
            .filter(|g| g.frames + g.pinned_pages + g.quarantined_pages > 0)
            .map(|g| ChargesEntry {
                guest: self
                    .ctx
                    .guests
                    .get(g.guest)
                    .map_or_else(String::new, |e| e.name.to_string()),
                frames: g.frames,
                pinned_pages: g.pinned_pages,
                quarantined_pages: g.quarantined_pages,
            })
            .collect();
        charges.sort_by(|a, b| a.guest.cmp(&b.guest));
        StatsEntry {
            backend: self.ctx.backend.name().to_owned(),
            force: self.ctx.backend.capabilities().forced_revoke,
            epoch: self.epoch,
            uptime_ms: self.ctx.now_ms.saturating_sub(self.started_ms),
            pid: std::process::id(),
            frames_max: cache.frames_max.into(),
            frames_used: used.into(),
            frames_quarantined: cache.frames_quarantined.into(),
            frames_pinned: cache.frames_pinned.into(),
            frames_huge: cache.huge_units * u64::from(copage_cache::limits::HUGE_PAGES),
            grants,
            files: cache.files,
            sessions: self.ctx.machine.sessions().len() as u64,
            counters: counters
                .map(|(k, v)| (k.to_owned(), v))
                .into_iter()
                .collect::<BTreeMap<_, _>>(),
            strict: self.ctx.coherent.entry(),
            xen: self.xen_stats(cache, tables),
            charges,
        }
    }

    fn xen_stats(&self, cache: &CacheStats, tables: &Tables) -> Option<XenEntry> {
        let stats = self.xen.as_ref()?.listener.stats();
        let of_table = |info: &TableInfo| {
            // A bank is what has the table of its number.
            let mut banks = cache.banks.iter();
            let bank = banks.find(|bank| bank.bank == u32::from(info.table.0));
            Some(CacheDomainEntry {
                table: info.table.0,
                domid: info.granter?.0,
                entries_used: info.entries_used.into(),
                entries_max: info.entries_max.into(),
                frames: bank.map_or(0, |bank| bank.frames.into()),
                frames_used: bank.map_or(0, |bank| bank.frames_used.into()),
                draining: bank.is_some_and(|bank| bank.is_leaving),
            })
        };
        Some(XenEntry {
            cache_domains: tables.tables.iter().filter_map(of_table).collect(),
            channel: ChannelEntry {
                domains_now: stats.attached_now,
                accepted: stats.accepted,
                refused: stats.refused,
                store_events: stats.events,
                floods: stats.floods,
            },
        })
    }
}
