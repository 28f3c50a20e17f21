//! For tests: a backend that fails when it is told to, and that watches how it is used.
//!
//! What a backend trusts its caller to do is checked here: that pages are zero past the end of
//! their file, that no page is put into a frame that is granted or holds another one, that only
//! what is there is granted, read, or taken out.

mod backend;

use crate::backend::{Backend, Where};
use crate::error::GrantError;
use crate::ids::{FrameNo, HomeId, PAGE_SIZE, PAGE_SIZE_U64, PageIndex};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

/// A call that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// [`Backend::make_frames`]
    MakeFrames,
    /// [`Backend::open_home`]
    OpenHome,
    /// [`Backend::home_descriptor`]
    HomeDescriptor,
    /// [`Backend::store`]
    Store,
    /// [`Backend::load`]
    Load,
    /// [`Backend::discard`]
    Discard,
    /// [`Backend::grant`]
    Grant,
    /// [`Backend::force_out`]
    ForceOut,
    /// [`Backend::arena`]
    Arena,
    /// [`Backend::common`]
    Common,
    /// [`Backend::place`]
    Place,
    /// [`Backend::load_at`]
    LoadAt,
    /// [`Backend::write_at`]
    WriteAt,
    /// [`Backend::resize_home`]
    ResizeHome,
}

/// The error that a call fails with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailWith {
    /// [`GrantError::NoMemory`]
    NoMemory,
    /// [`GrantError::TableFull`]
    TableFull,
    /// [`GrantError::Sys`] with this errno.
    Errno(i32),
}

impl FailWith {
    fn error(self) -> GrantError {
        match self {
            Self::NoMemory => GrantError::NoMemory(io::Error::from_raw_os_error(libc::ENOSPC)),
            Self::TableFull => GrantError::TableFull { entries: 0 },
            Self::Errno(errno) => GrantError::Sys {
                call: "a call that was told to fail",
                source: io::Error::from_raw_os_error(errno),
            },
        }
    }
}

#[derive(Default)]
struct Watch {
    calls: HashMap<Call, u64>,
    /// The number of the call that fails, and whether all later ones do too.
    plans: HashMap<Call, (u64, bool, FailWith)>,
    home_bytes: HashMap<HomeId, u64>,
    /// What each frame holds, and where.
    content: HashMap<FrameNo, (HomeId, u64, Where)>,
    violations: Vec<String>,
}

impl Watch {
    fn says_fail(&mut self, call: Call) -> Result<(), GrantError> {
        let count = self.calls.entry(call).or_default();
        *count += 1;
        match self.plans.get(&call) {
            Some(&(at, ever, with)) if *count == at || ever && *count > at => Err(with.error()),
            _ => Ok(()),
        }
    }

    fn violation(&mut self, text: String) {
        // Enough to see what went wrong.
        if self.violations.len() < 100 {
            self.violations.push(text);
        }
    }

    fn check_content(&mut self, what: &str, home: HomeId, first: PageIndex, frames: &[FrameNo]) {
        for (&frame, page) in frames.iter().zip(first.0..) {
            let held = self.content.get(&frame).copied();
            if held.is_none_or(|held| (held.0, held.1) != (home, page)) {
                self.violation(format!(
                    "{what} of page {page} of {home:?} in {frame:?}, which holds {held:?}"
                ));
            }
        }
    }

    fn check_place(
        &mut self,
        (home, page): (HomeId, PageIndex),
        frame: FrameNo,
        (from, to): (Where, Where),
        leave: bool,
    ) {
        let there = |at| move |held: &(HomeId, u64, Where)| *held == (home, page.0, at);
        let held = self.content.get(&frame).copied();
        let is_right = if leave {
            held.is_none() && self.content.values().any(there(from))
        } else {
            held.as_ref().is_some_and(there(from))
        };
        if !is_right {
            self.violation(format!(
                "page {} of {home:?} goes from {from:?} to {to:?} (left: {leave}) in {frame:?}, \
                 which holds {held:?}",
                page.0
            ));
        }
        if self.content.values().any(there(to)) {
            self.violation(format!(
                "page {} of {home:?} goes to {to:?}, where it is",
                page.0
            ));
        }
    }

    fn check_at(&mut self, what: &str, home: HomeId, page: PageIndex, frame: FrameNo, at: Where) {
        self.check_content(what, home, page, &[frame]);
        let held = self.content.get(&frame).map(|held| held.2);
        if held.is_some_and(|held| held != at) {
            self.violation(format!("{what} of {frame:?} at {at:?}, it is at {held:?}"));
        }
    }

    fn check_nothing_at(&mut self, what: &str, home: HomeId, at: Where) {
        let mut held = self.content.values();
        if held.any(|held| (held.0, held.2) == (home, at)) {
            self.violation(format!("{what} of {home:?} with pages at {at:?}"));
        }
    }
}

/// See the module.
pub struct FailingBackend {
    inner: Arc<dyn Backend>,
    watch: Mutex<Watch>,
}

impl FailingBackend {
    /// Watches `inner`; nothing fails yet.
    pub fn new(inner: Arc<dyn Backend>) -> Self {
        Self {
            inner,
            watch: Mutex::default(),
        }
    }

    /// The `nth` call from now (1 is the next one) fails, before it does anything.
    pub fn fail_nth(&self, call: Call, nth: u64, with: FailWith) {
        self.plan(call, nth, false, with);
    }

    /// The `nth` call from now and all behind it fail, until [`Self::fail_none`].
    pub fn fail_from(&self, call: Call, nth: u64, with: FailWith) {
        self.plan(call, nth, true, with);
    }

    /// Ends what was planned for a call.
    pub fn fail_none(&self, call: Call) {
        self.watch.lock().plans.remove(&call);
    }

    fn plan(&self, call: Call, nth: u64, ever: bool, with: FailWith) {
        let watch = &mut *self.watch.lock();
        let done = watch.calls.get(&call).copied().unwrap_or(0);
        watch
            .plans
            .insert(call, (done.saturating_add(nth), ever, with));
    }

    /// How often a call was made, failed ones included.
    pub fn calls(&self, call: Call) -> u64 {
        self.watch.lock().calls.get(&call).copied().unwrap_or(0)
    }

    /// What the caller did that no backend allows, at most a hundred lines.
    pub fn violations(&self) -> Vec<String> {
        self.watch.lock().violations.clone()
    }

    /// Frames that hold a page.
    pub fn frames_filled(&self) -> usize {
        self.watch.lock().content.len()
    }

    fn check_store(&self, home: HomeId, first: PageIndex, frames: &[FrameNo], data: &[u8]) {
        let granted: Vec<FrameNo> = frames
            .iter()
            .copied()
            .filter(|&frame| self.inner.holder_count(frame) != 0)
            .collect();
        let watch = &mut *self.watch.lock();
        for frame in granted {
            watch.violation(format!("store into {frame:?}, which is granted"));
        }
        for &frame in frames {
            if let Some(held) = watch.content.get(&frame).copied() {
                watch.violation(format!("store into {frame:?}, which holds {held:?}"));
            }
        }
        let bytes = watch.home_bytes.get(&home).copied().unwrap_or(0);
        for (page, number) in data.chunks(PAGE_SIZE).zip(first.0..) {
            let within = bytes.saturating_sub(number.saturating_mul(PAGE_SIZE_U64));
            let tail = usize::try_from(within).unwrap_or(PAGE_SIZE).min(page.len());
            if page[tail..].iter().any(|&byte| byte != 0) {
                watch.violation(format!(
                    "page {number} of {home:?} is not zero past byte {tail}"
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Access, HomeSpec};
    use crate::ids::DomId;
    use crate::local::{LocalBackend, LocalConfig};

    fn backend() -> FailingBackend {
        FailingBackend::new(Arc::new(LocalBackend::new(LocalConfig::default()).unwrap()))
    }

    #[test]
    fn local_the_nth_call_fails_and_no_other() {
        let backend = backend();
        let home = backend
            .open_home(&HomeSpec {
                label: "f".into(),
                bytes: 8 * 4096,
                class: crate::TrustClass::OWN,
            })
            .unwrap();
        backend.fail_nth(Call::Store, 2, FailWith::NoMemory);
        let page = [1; PAGE_SIZE];
        let store = |n: u32| backend.store(home, PageIndex(n.into()), &[FrameNo(n)], &page);
        store(0).unwrap();
        assert!(matches!(store(1), Err(GrantError::NoMemory(_))));
        store(1).unwrap();
        backend.fail_from(Call::Store, 1, FailWith::Errno(libc::EIO));
        assert_eq!(store(2).unwrap_err().errno(), libc::EIO);
        assert_eq!(store(2).unwrap_err().errno(), libc::EIO);
        backend.fail_none(Call::Store);
        store(2).unwrap();
        assert_eq!(
            (backend.calls(Call::Store), backend.frames_filled()),
            (6, 3)
        );
        assert_eq!(backend.violations(), Vec::<String>::new());
    }

    #[test]
    fn local_what_no_backend_allows_is_seen() {
        let backend = backend();
        let home = backend
            .open_home(&HomeSpec {
                label: "f".into(),
                bytes: 4096 + 10,
                class: crate::TrustClass::OWN,
            })
            .unwrap();
        let frames = [FrameNo(0), FrameNo(1)];
        backend
            .store(home, PageIndex(0), &frames, &[1; 2 * PAGE_SIZE])
            .unwrap();
        assert_eq!(backend.violations().len(), 1, "the tail");
        backend
            .grant(DomId(1), Access::ReadOnly, &frames[..1], &mut Vec::new())
            .unwrap();
        backend
            .store(home, PageIndex(0), &frames[..1], &[1; PAGE_SIZE])
            .unwrap();
        assert_eq!(backend.violations().len(), 3, "granted, and holds a page");
        backend
            .grant(DomId(1), Access::ReadOnly, &[FrameNo(9)], &mut Vec::new())
            .unwrap();
        assert_eq!(backend.violations().len(), 4, "empty");
        backend
            .load(home, PageIndex(1), FrameNo(0), &mut [0; PAGE_SIZE])
            .unwrap();
        backend.close_home(home).unwrap();
        assert_eq!(
            backend.violations().len(),
            6,
            "the wrong frame; not emptied"
        );
    }

    #[test]
    fn local_what_is_done_with_pages_that_are_elsewhere_is_seen() {
        let backend = backend();
        let home = backend
            .open_home(&HomeSpec {
                label: "f".into(),
                bytes: 4 * 4096,
                class: crate::TrustClass::OWN,
            })
            .unwrap();
        let (page, frame, arena) = (PageIndex(1), FrameNo(1), Where::Arena(DomId(1)));
        let data = [1; PAGE_SIZE];
        backend.store(home, page, &[frame], &data).unwrap();
        backend.arena(home, DomId(1)).unwrap();
        let place = |frame, from, to, leave| backend.place(home, page, frame, from, to, leave);
        place(frame, Where::Home, arena, false).unwrap();
        place(FrameNo(2), arena, Where::Spare, true).unwrap();
        backend.write_at(home, page, frame, arena, 1, b"x").unwrap();
        assert_eq!(backend.violations(), Vec::<String>::new());
        assert!(place(frame, Where::Home, Where::Common, false).is_err());
        assert_eq!(backend.violations().len(), 1, "it is not there");
        let mut buf = [0; PAGE_SIZE];
        let at = Where::Home;
        assert!(backend.load_at(home, page, frame, at, &mut buf).is_err());
        assert_eq!(backend.violations().len(), 2, "nor to be read");
        place(frame, arena, Where::Spare, false).unwrap();
        assert_eq!(backend.violations().len(), 3, "the copy is there");
        backend.resize_home(home, 4096 + 5).unwrap();
        let written = backend.write_at(home, PageIndex(1), FrameNo(2), Where::Spare, 4, b"xx");
        written.unwrap();
        assert_eq!(backend.violations().len(), 4, "past the end");
        backend.fail_nth(Call::Place, 1, FailWith::NoMemory);
        assert!(place(frame, Where::Spare, arena, false).is_err());
    }
}
