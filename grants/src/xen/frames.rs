//! Where frames are: in which cache domain, under which number there, and whom entries name.

use super::config::Layout;
use super::lib::ForeignMap;
use super::records::Records;
use crate::error::GrantError;
use crate::ids::{DomId, FrameNo, PAGE_SIZE, TableId};
use crate::table::Placement;
use crate::volatile::VolatileBytesMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

/// A session that no domain was bound to.
const NOBODY: u16 = u16::MAX;

/// Which domain of the hypervisor each session is.
pub(super) struct Bindings(Box<[AtomicU16]>);

impl Bindings {
    pub(super) fn new() -> Self {
        Self(
            (0..DomId::FIRST_RESERVED)
                .map(|_| AtomicU16::new(NOBODY))
                .collect(),
        )
    }

    /// The domain of a session; `None`: none was bound.
    pub(super) fn of(&self, dom: DomId) -> Option<u16> {
        let domid = self.0.get(usize::from(dom.0))?.load(Ordering::Relaxed);
        (domid != NOBODY).then_some(domid)
    }

    pub(super) fn set(&self, dom: DomId, domid: u16) -> Result<(), GrantError> {
        let session = self.0.get(usize::from(dom.0));
        match session.filter(|_| domid < DomId::FIRST_RESERVED) {
            Some(session) => session.store(domid, Ordering::Relaxed),
            None => {
                return Err(GrantError::BadRange(format!(
                    "session {} cannot be domain {domid}",
                    dom.0
                )));
            }
        }
        Ok(())
    }
}

/// Frames in order: those of the first cache domain, those of the second, and so on. Each domain's
/// table has the domain's number.
pub(super) struct Spread {
    pub layout: Layout,
    pub bindings: Arc<Bindings>,
}

impl Spread {
    /// The cache domain of a frame and the frame's number there.
    #[inline]
    pub(super) fn locate(layout: Layout, frame: FrameNo) -> (u32, u32) {
        (frame.0 / layout.frames, frame.0 % layout.frames)
    }
}

impl Placement for Spread {
    #[inline]
    fn place(&self, frame: FrameNo) -> (TableId, u32) {
        let (number, within) = Self::locate(self.layout, frame);
        // At most CACHE_DOMAINS_MAX; a frame past them is in no table.
        let table = u16::try_from(number).unwrap_or(u16::MAX);
        (TableId(table), self.layout.gfn(within))
    }

    #[inline]
    fn domid(&self, dom: DomId) -> DomId {
        DomId(self.bindings.of(dom).unwrap_or(NOBODY))
    }
}

/// The cache domains there are, by number, which is that of the domain's table.
pub(super) struct Domains {
    layout: Layout,
    all: Vec<Option<CacheDomain>>,
}

impl Domains {
    pub(super) fn new(layout: Layout) -> Self {
        Self {
            layout,
            all: Vec::new(),
        }
    }

    /// The cache domain of a frame and the frame's number there.
    #[inline]
    pub(super) fn of(&self, frame: FrameNo) -> Result<(&CacheDomain, u32), GrantError> {
        let (number, within) = Spread::locate(self.layout, frame);
        self.get(number)
            .map(|domain| (domain, within))
            .ok_or_else(|| GrantError::BadRange(format!("frame {} is in no domain", frame.0)))
    }

    pub(super) fn get(&self, number: u32) -> Option<&CacheDomain> {
        self.all.get(number as usize)?.as_ref()
    }

    /// All, from the lowest number up.
    pub(super) fn there(&self) -> impl DoubleEndedIterator<Item = &CacheDomain> {
        self.all.iter().flatten()
    }

    /// Frames are below this.
    pub(super) fn end(&self) -> u32 {
        let last = self.there().next_back();
        last.map_or(0, |domain| (domain.number + 1) * self.layout.frames)
    }

    pub(super) fn put(&mut self, domain: CacheDomain) {
        let number = domain.number as usize;
        while self.all.len() <= number {
            self.all.push(None);
        }
        self.all[number] = Some(domain);
    }

    pub(super) fn take(&mut self, number: u32) -> Option<CacheDomain> {
        self.all.get_mut(number as usize)?.take()
    }
}

/// One cache domain, mapped.
pub(super) struct CacheDomain {
    pub number: u32,
    pub domid: u16,
    pub layout: Layout,
    pub memory: ForeignMap,
}

impl CacheDomain {
    fn bytes(&self, range: std::ops::Range<usize>) -> Result<VolatileBytesMut<'_>, GrantError> {
        self.memory
            .bytes_mut()
            .and_then(|memory| memory.range(range))
            .ok_or_else(|| GrantError::BadRange("past the end of a cache domain".to_owned()))
    }

    /// The frames in it.
    pub(super) fn frames(&self) -> impl Iterator<Item = FrameNo> + use<> {
        let first = self.number * self.layout.frames;
        (first..first + self.layout.frames).map(FrameNo)
    }

    /// All that is mapped, from the header on.
    pub(super) fn whole(&self) -> Result<VolatileBytesMut<'_>, GrantError> {
        self.bytes(0..self.memory.pages() * PAGE_SIZE)
    }

    pub(super) fn records(&self) -> Result<Records<'_>, GrantError> {
        self.bytes(self.layout.record_bytes()).map(Records::new)
    }

    /// The page of a frame, numbered within the domain.
    pub(super) fn frame(&self, within: u32) -> Result<VolatileBytesMut<'_>, GrantError> {
        let from = self.layout.frame_page(within) * PAGE_SIZE;
        self.bytes(from..from + PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xen::config::XenConfig;

    #[test]
    fn entries_name_the_bound_domain_and_the_domains_own_frame() {
        let layout = Layout::of(&XenConfig {
            cache_domain_mib: 16,
            frames_max: 8000,
            ..XenConfig::default()
        })
        .unwrap();
        let bindings = Arc::new(Bindings::new());
        let spread = Spread {
            layout,
            bindings: Arc::clone(&bindings),
        };
        assert_eq!(bindings.of(DomId(5)), None);
        assert!(spread.domid(DomId(5)).0 >= DomId::FIRST_RESERVED, "nobody");
        bindings.set(DomId(5), 3).unwrap();
        bindings.set(DomId(6), 3).unwrap();
        assert_eq!(spread.domid(DomId(6)), DomId(3));
        assert!(bindings.set(DomId(DomId::FIRST_RESERVED), 3).is_err());
        assert!(bindings.set(DomId(1), DomId::FIRST_RESERVED).is_err());
        let last = FrameNo(layout.frames - 1);
        assert_eq!(spread.place(FrameNo(0)), (TableId(0), layout.gfn(0)));
        assert_eq!(spread.place(last), (TableId(0), layout.gfn(last.0)));
        assert_eq!(
            spread.place(FrameNo(layout.frames)),
            (TableId(1), layout.gfn(0))
        );
    }
}
