//! What guests write down lies in frames of a domain of the laboratory's own, which outlives them, and is stamped
//! by a word that all of them map.
//!
//! Clocks of domains differ, and by how much cannot be said well enough: what a wrong order of two operations makes
//! of a history is a false alarm, or a mistake not seen. So a stamp is a number drawn from one word, by one
//! instruction that no other comes between. Of two stamps the greater was drawn later, whatever clocks say:
//! an operation whose last stamp is less than another's first was over before that began. Nothing of copage's
//! daemon is in it, nor its cache domains: only one frame that several domains have mapped since before the run.

use crate::checks::frames::{config, grant_as};
use crate::lab::Lab;
use anyhow::{Context, Result};
use copage_grants::volatile::VolatileBytesMut;
use copage_grants::xen::lib::{Gnttab, GrantMap};
use copage_grants::{
    Access, Backend, DomId, FrameNo, HomeId, HomeSpec, PAGE_SIZE, PageIndex, TrustClass, Where,
    XenBackend, XenConfig,
};
use copage_tests::history::Clock;
use std::io::{Error, ErrorKind, Write};

/// Of each log: some 2,000 operations.
const LOG_PAGES: u32 = 64;
/// Logs that there are at most.
pub const LOGS: u32 = 24;
/// Dom0 as it is granted the clock: the sessions of guests are numbered from 0.
const DOM0: DomId = DomId(1000);

/// All of it, in dom0.
pub struct Records {
    backend: XenBackend,
    home: HomeId,
    clock: GrantMap,
}

impl Records {
    /// Makes the domain.
    pub fn new(lab: &Lab) -> Result<Self> {
        let pages = 1 + LOGS * LOG_PAGES;
        let backend = XenBackend::new(XenConfig {
            name_prefix: "lab-records".to_owned(),
            ..config(lab.work(), pages)
        })?;
        let home = backend.open_home(&HomeSpec {
            label: "records".into(),
            bytes: u64::from(pages) * PAGE_SIZE as u64,
            class: TrustClass::OWN,
        })?;
        for page in 0..pages {
            let zeros = [0; PAGE_SIZE];
            backend.store(home, PageIndex(page.into()), &[FrameNo(page)], &zeros)?;
        }
        backend.bind(DOM0, 0)?;
        let told = grant_as(&backend, DOM0, Access::ReadWrite, &[FrameNo(0)])?;
        let clock = map(&told)?;
        Ok(Self {
            backend,
            home,
            clock,
        })
    }

    /// Grants log `number` to a guest, and the clock: what its program is told.
    pub fn grant(&self, number: u32, domid: u16) -> Result<String> {
        let session = DomId(u16::try_from(number)?);
        self.backend.bind(session, domid)?;
        let frames: Vec<FrameNo> = std::iter::once(0)
            .chain(log_frames(number))
            .map(FrameNo)
            .collect();
        grant_as(&self.backend, session, Access::ReadWrite, &frames)
    }

    /// What a guest has written down up to now, dead or alive.
    pub fn log(&self, number: u32) -> Result<String> {
        let mut bytes = Vec::new();
        for frame in log_frames(number) {
            let mut page = [0; PAGE_SIZE];
            let at = PageIndex(frame.into());
            self.backend
                .load_at(self.home, at, FrameNo(frame), Where::Home, &mut page)?;
            bytes.extend(page);
        }
        let end = bytes.iter().position(|byte| *byte == 0);
        bytes.truncate(end.unwrap_or(bytes.len()));
        Ok(String::from_utf8(bytes)?)
    }

    /// The clock, in dom0.
    pub fn clock(&self) -> Result<SharedClock<'_>> {
        Ok(SharedClock(self.clock.bytes_mut().context("not writable")?))
    }

    /// A stamp of dom0's.
    pub fn stamp_ns(&self) -> Result<u64> {
        Ok(self.clock()?.stamp_ns())
    }
}

fn log_frames(number: u32) -> std::ops::Range<u32> {
    let first = 1 + number * LOG_PAGES;
    first..first + LOG_PAGES
}

/// Maps what [`Records::grant`] granted, in the domain that it was granted to.
pub fn map(told: &str) -> Result<GrantMap> {
    let (granter, refs) = told.split_once(' ').context("GRANTER REF,REF…")?;
    let refs = refs.split(',').map(str::parse);
    let refs = refs.collect::<Result<Vec<u32>, _>>()?;
    Ok(Gnttab::open()?.map(granter.parse()?, &refs, true)?)
}

/// The word. Its stamps are near the wall clock, in ns, so that a person can read a history.
pub struct SharedClock<'a>(pub VolatileBytesMut<'a>);

impl Clock for SharedClock<'_> {
    /// Xen's wall clock: that of domains of one host differs by little.
    fn now_ns(&self) -> u64 {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
    }

    fn stamp_ns(&self) -> u64 {
        let mut last = self.0.read_only().read_u64(0).unwrap_or(0);
        loop {
            let next = self.now_ns().max(last + 1);
            match self.0.swap_if_u64(0, last, next) {
                Some(found) if found != last => last = found,
                _ => return next,
            }
        }
    }
}

/// A log in its pages: a text, and zeros behind it.
pub struct LogPages<'a> {
    bytes: VolatileBytesMut<'a>,
    len: usize,
}

impl<'a> LogPages<'a> {
    /// Empty.
    pub const fn new(bytes: VolatileBytesMut<'a>) -> Self {
        Self { bytes, len: 0 }
    }
}

impl Write for LogPages<'_> {
    /// All of it is in the pages when this returns, or nothing.
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() - self.len < text.len() {
            return Err(Error::new(ErrorKind::StorageFull, "the log is full"));
        }
        self.bytes.write_from(self.len, text);
        self.len += text.len();
        Ok(text.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
