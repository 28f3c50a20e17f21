//! Opening, pinning and closing files.

use crate::cache::{Cache, now_ms};
use crate::config::{ExportMode, Holder};
use crate::error::CacheError;
use crate::events::{CacheEvent, OpenHow};
use crate::file::{CachedFile, Charge, FileKey, Home, Inner, WaitKind, Waiter};
use crate::fill::Job;
use crate::frames::{FrameState, FrameTable};
use crate::limits::{FILE_WAITERS_MAX, FILES_IDLE_MAX, OLD_HOMES_PINNED_MAX, PIN_RESERVE_DIVISOR};
use crate::tree::{Kind, NodeRef};
use copage_grants::{DomId, TrustClass};
use rustix::fs::{Advice, Mode, OFlags};
use rustix::io::Errno;
use std::sync::Arc;

impl Cache {
    /// Opens a regular file for `who`, to `write` to it or not; [`CacheEvent::Opened`] answers. Each open
    /// that succeeded is ended by one [`Cache::close`] of the same kind (or by the end of the session).
    pub fn open(&self, ticket: u64, node: NodeRef, how: OpenHow, who: Holder, write: bool) {
        let life = self.life(who.dom);
        let grants_max = self.frames.lock().accounts.of(who.guest).limits.grants_max;
        self.backend.set_grants_max(who.dom, grants_max);
        self.guests.lock().insert(who.dom, who.guest);
        if self
            .fill_pool
            .push(Job::Open {
                ticket,
                node,
                how,
                who,
                write,
                life,
            })
            .is_err()
        {
            self.events.send(CacheEvent::Opened {
                ticket,
                result: Err(CacheError::Stopped),
            });
        }
    }

    pub(crate) fn run_open(
        &self,
        ticket: u64,
        node: NodeRef,
        how: OpenHow,
        who: Holder,
        write: bool,
        life: u64,
    ) {
        match self.prepare_open(ticket, node, how, (who, write), life) {
            Ok(file) => self.advance(&file, true),
            Err(error) => self.events.send(CacheEvent::Opened {
                ticket,
                result: Err(error),
            }),
        }
    }

    fn prepare_open(
        &self,
        ticket: u64,
        node: NodeRef,
        how: OpenHow,
        (who, write): (Holder, bool),
        life: u64,
    ) -> Result<Arc<CachedFile>, CacheError> {
        match node.kind {
            Kind::Regular => {}
            Kind::Directory => return Err(CacheError::IsDirectory),
            _ => return Err(CacheError::NotRegular),
        }
        loop {
            let (group, mode) = self.exports.group_and_mode(node.export)?;
            let coherent = mode == ExportMode::Coherent;
            if write && !coherent {
                return Err(CacheError::ReadOnlyExport);
            }
            if how == OpenHow::Pin && (coherent || !self.descriptors) {
                return Err(CacheError::PinNoDescriptor);
            }
            let class = match how {
                // One file for all.
                _ if coherent => TrustClass::OWN,
                // A hypervisor keeps guests apart: each maps by entries of its own.
                _ if !self.descriptors => TrustClass::OWN,
                OpenHow::Map => who.class,
                OpenHow::Pin if who.class != TrustClass::OWN => TrustClass::PINNED,
                OpenHow::Pin | OpenHow::Read => TrustClass::OWN,
            };
            let key = FileKey {
                group,
                class,
                dev: node.dev,
                ino: node.ino,
                coherent,
            };
            let file = match coherent {
                true => self.coherent_file_of(key, &node, who.class)?,
                false => self.file_of(key, &node)?,
            };
            if let Some(coherent) = file.coherent.as_ref().filter(|_| write) {
                coherent
                    .writable
                    .map_err(|e| CacheError::io("open for writing", e))?;
            }
            let mut inner = file.inner.lock();
            if inner.dead {
                continue; // Buried between the look into the map and the lock; it is out of the map.
            }
            // Under the file's lock: the end of a session or an export comes by here afterwards.
            if self.life(who.dom) != life {
                return Err(CacheError::SessionEnded);
            }
            self.exports.check_live(node.export)?;
            if inner.waiters.len() >= FILE_WAITERS_MAX {
                return Err(CacheError::Busy("on this file"));
            }
            let kind = WaitKind::Open { how, node };
            inner.waiters.push(Waiter {
                ticket,
                who,
                kind,
                since_ms: now_ms(),
                issued: false,
            });
            if inner.state.generation == 0 {
                self.settle_now(&file, &mut inner);
            } else {
                self.check_host(&file, &mut inner);
            }
            self.look_at(&file, &inner);
            drop(inner);
            return Ok(file);
        }
    }

    /// The cached file of an inode, made when there is none.
    fn file_of(&self, key: FileKey, node: &NodeRef) -> Result<Arc<CachedFile>, CacheError> {
        if let Some(file) = self.files.lock().get(&key) {
            return Ok(file.clone());
        }
        let path = node.proc_path();
        // Not blocking: another process' lease on the file must not hold a thread of the pool.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let open = |more| rustix::fs::open(&path, flags | more, Mode::empty());
        let data = match open(OFlags::NOATIME) {
            Err(Errno::PERM) => open(OFlags::empty()),
            other => other,
        }
        .map_err(|e| CacheError::io("open", e))?;
        let direct = match open(OFlags::NOATIME | OFlags::DIRECT) {
            Err(Errno::PERM) => open(OFlags::DIRECT),
            other => other,
        };
        // Advice only: without it the kernel reads ahead what nobody asked for.
        let _ = rustix::fs::fadvise(&data, 0, None, Advice::Random);
        let id = self.new_file_id();
        let fresh = Arc::new(CachedFile::new(
            id,
            key,
            node.clone(),
            data,
            direct.ok(),
            None,
        ));
        let file = self
            .files
            .lock()
            .entry(key)
            .or_insert_with(|| fresh.clone())
            .clone();
        if Arc::ptr_eq(&file, &fresh) {
            let mut inner = file.inner.lock();
            if !inner.dead {
                inner.watch = self.watches.add(&file);
            }
            drop(inner);
        }
        Ok(file)
    }

    /// Takes the newest generation into a pinned open, within the limits.
    pub(crate) fn begin_pin(&self, inner: &mut Inner, who: Holder) -> Result<(), CacheError> {
        if inner.old.len() >= OLD_HOMES_PINNED_MAX {
            return Err(CacheError::Changing);
        }
        let Some(home) = inner.live.as_mut() else {
            return Err(CacheError::Changing);
        };
        let pages = home.pages();
        if pages > self.config.pin_file_pages_max {
            let pages_max = self.config.pin_file_pages_max;
            return Err(CacheError::PinTooLarge { pages, pages_max });
        }
        let mut table = self.frames.lock();
        table.pin_moves += 1;
        if !home.charges.iter().any(|c| c.guest == who.guest) {
            let account = *table.accounts.of(who.guest);
            let wanted = account.pinned + account.quarantined + pages;
            if wanted > account.limits.pinned_pages_max {
                let pages_max = account.limits.pinned_pages_max;
                return Err(CacheError::PinOverLimit { wanted, pages_max });
            }
        }
        if !home.reserved {
            let quarantined = u64::from(table.count(FrameState::Quarantined));
            let wanted = table.pin_pages + quarantined + pages;
            let budget = table.budget();
            if wanted > u64::from(budget - budget / PIN_RESERVE_DIVISOR) {
                return Err(CacheError::PinNoRoom {
                    wanted,
                    frames_max: budget,
                });
            }
            table.pin_pages += pages;
            home.reserved = true;
        }
        if !home.charges.iter().any(|c| c.guest == who.guest) {
            home.charges.push(Charge {
                guest: who.guest,
                quarantined: false,
            });
            table.accounts.of(who.guest).pinned += pages;
        }
        if !home.holds_frames() {
            for frame in home.index.frames() {
                table.set_state(frame, FrameState::Held);
            }
        }
        home.pinners.push(who.dom);
        Ok(())
    }

    /// Ends one pin of `dom` on a generation. Once nobody pins it, its frames come free when the
    /// kernel says that nobody has it open.
    pub(crate) fn unpin(
        &self,
        file: &Arc<CachedFile>,
        inner: &mut Inner,
        dom: DomId,
        generation: u32,
    ) {
        let now_ms = now_ms();
        let is_live = inner.state.generation == generation;
        let Some(home) = inner.home_of(generation) else {
            return;
        };
        let Some(at) = home.pinners.iter().position(|d| *d == dom) else {
            return;
        };
        home.pinners.swap_remove(at);
        if home.is_pinned() {
            return;
        }
        home.since_ms = now_ms;
        home.poll_ms = now_ms;
        if is_live {
            self.unhold(home, now_ms);
        } else {
            self.drain_old(file, inner, now_ms);
        }
    }

    /// Gives the frames of an unpinned live home back to the queues, when nobody has it open.
    pub(crate) fn unhold(&self, home: &mut Home, now_ms: u64) {
        if home.is_pinned() || now_ms < home.poll_ms {
            return;
        }
        if home.exposed && self.backend.home_in_use(home.id).unwrap_or(true) {
            home.poll_ms = now_ms + self.poll_after(home, now_ms);
            return;
        }
        home.exposed = false;
        let mut table = self.frames.lock();
        for frame in home.index.frames() {
            table.set_state(frame, self.resident_state(frame));
        }
        Self::uncharge(&mut table, home);
    }

    pub(crate) fn uncharge(table: &mut FrameTable, home: &mut Home) {
        let pages = home.pages();
        table.pin_moves += 1;
        for charge in home.charges.drain(..) {
            let account = table.accounts.of(charge.guest);
            let count = if charge.quarantined {
                &mut account.quarantined
            } else {
                &mut account.pinned
            };
            *count = count.saturating_sub(pages);
        }
        if std::mem::take(&mut home.reserved) {
            table.pin_pages = table.pin_pages.saturating_sub(pages);
        }
    }

    /// Ends one open. The guest has unmapped the file: its grants of it end with its last open that
    /// maps. A close of what is not open does nothing.
    pub fn close(&self, file: &Arc<CachedFile>, how: OpenHow, who: Holder) {
        let mut inner = file.inner.lock();
        if !inner.drop_open(who, how) {
            return;
        }
        if how == OpenHow::Pin {
            // The oldest first: which of several it was matters to nobody, the kernel is asked.
            let pinned = inner
                .old
                .iter()
                .chain(&inner.live)
                .find(|h| h.pinners.contains(&who.dom));
            if let Some(generation) = pinned.map(|h| h.generation) {
                self.unpin(file, &mut inner, who.dom, generation);
            }
        }
        if !inner.may_hold_grants(who.dom) {
            self.drop_waiters(file, &mut inner, who.dom, how);
            if file.is_coherent() {
                self.end_arenas(&mut inner, who.dom);
            } else {
                self.settle_grants(&mut inner, who);
            }
        }
        self.settle_idle(file, &mut inner);
        self.look_at(file, &inner);
        drop(inner);
        self.trim_idle();
    }

    fn drop_waiters(&self, file: &Arc<CachedFile>, inner: &mut Inner, dom: DomId, how: OpenHow) {
        for waiter in std::mem::take(&mut inner.waiters) {
            let is_fault = matches!(waiter.kind, WaitKind::Fault { .. });
            if waiter.who.dom == dom && is_fault && how != OpenHow::Read {
                self.fail(file, inner, waiter, CacheError::NotOpen(dom));
            } else {
                inner.waiters.push(waiter);
            }
        }
    }

    /// A file that nobody has open goes at once when it holds nothing, else when there are many.
    pub(crate) fn settle_idle(&self, file: &Arc<CachedFile>, inner: &mut Inner) {
        if inner.dead || !inner.is_idle() {
            return self.forget_idle(inner);
        }
        let empty = inner
            .live
            .as_ref()
            .is_none_or(|h| h.index.is_empty() && h.busy == 0);
        if empty {
            self.bury(file, inner, now_ms());
        } else if inner.idle_seq == 0 {
            inner.idle_seq = self.new_idle_seq();
            self.idle.lock().insert(inner.idle_seq, file.key);
        }
    }

    pub(crate) fn forget_idle(&self, inner: &mut Inner) {
        if inner.idle_seq != 0 {
            self.idle.lock().remove(&inner.idle_seq);
            inner.idle_seq = 0;
        }
    }

    /// Buries the files that have been idle longest when there are too many. No lock is held.
    pub(crate) fn trim_idle(&self) {
        loop {
            let (key, seq) = {
                let mut idle = self.idle.lock();
                if idle.len() <= FILES_IDLE_MAX {
                    return;
                }
                let Some((seq, key)) = idle.pop_first() else {
                    return;
                };
                (key, seq)
            };
            let Some(file) = self.files.lock().get(&key).cloned() else {
                continue;
            };
            let mut inner = file.inner.lock();
            if inner.idle_seq == seq && inner.is_idle() {
                if file.is_coherent() {
                    inner.idle_seq = 0;
                    self.leave(&file, &mut inner);
                } else {
                    self.bury(&file, &mut inner, now_ms());
                }
            }
        }
    }
}
