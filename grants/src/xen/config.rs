//! What the backend is told, and what follows from it: how cache domains are laid out.

use super::records::{Header, RECORDS_PER_PAGE};
use crate::error::GrantError;
use crate::ids::PAGE_SIZE;
use crate::limits::{
    CACHE_DOMAIN_MIB_DEFAULT, CACHE_DOMAIN_MIB_MAX, CACHE_DOMAIN_MIB_MIN, CACHE_DOMAINS_MAX,
    ENTRIES_PER_FRAME_DEFAULT, FRAMES_MAX, GRANT_FRAMES_MAX, GREF_REST_MS_DEFAULT,
};
use std::ops::Range;
use std::path::PathBuf;

/// How the Xen backend is to be.
#[derive(Clone, Debug)]
pub struct XenConfig {
    /// The frames that may be used, in 4 KiB: as many cache domains are made as hold them.
    pub frames_max: u32,
    /// Memory of one cache domain, in MiB. All of one host have the same.
    pub cache_domain_mib: u32,
    /// Grant table of one cache domain, in frames of 512 entries; `None`: four entries for each frame,
    /// within what Xen allows by `gnttab_max_frames` at most 512.
    pub grant_frames: Option<u32>,
    /// How long an entry's number rests before it is used again, in ms: longer than a session's term,
    /// after which a guest that was told it and did not map it maps nothing more.
    pub gref_rest_ms: u64,
    /// A directory that outlives the daemon's process, for the domains' configuration.
    pub run_dir: PathBuf,
    /// The toolstack's program.
    pub xl: PathBuf,
    /// Cache domains are called this, a dash and a number. Nobody else may use such names.
    pub name_prefix: String,
}

impl Default for XenConfig {
    /// 1 GiB in four domains.
    fn default() -> Self {
        Self {
            frames_max: 262_144,
            cache_domain_mib: CACHE_DOMAIN_MIB_DEFAULT,
            grant_frames: None,
            gref_rest_ms: GREF_REST_MS_DEFAULT,
            run_dir: PathBuf::from("/run/copage"),
            xl: PathBuf::from("xl"),
            name_prefix: "copage-cache".to_owned(),
        }
    }
}

/// The first page of a cache domain that is used, as the domain's own frame number (gfn).
///
/// How we know: the domain builder gives a PVH domain its memory from gfn 0 on without a gap up to
/// what was asked for, and puts there: the kernel where its headers say (the stub's one page at
/// 1 MiB), and right behind it the start info, module list and command line
/// (tools/libs/guest/xg_dom_boot.c and xg_dom_x86.c). 2 MiB are past all that. Its rings, its
/// identity map and its ACPI tables are in special pages below 4 GiB, outside of the memory asked
/// for (`X86_HVM_END_SPECIAL_REGION`, xg_dom_x86.c; `ACPI_INFO_PHYSICAL_ADDRESS`, libxl). All pages are
/// mapped at the start, and a page that is not there fails that.
const FIRST_GFN: u32 = 512;

/// Pages at the end that are not used: where the toolstack can get no memory beyond what was asked for,
/// it takes the pages for the ACPI tables (a handful) from the end (`populate_acpi_pages`,
/// tools/libs/guest/xg_dom_core.c).
const END_PAGES: u32 = 64;

/// Where things are in a cache domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub mib: u32,
    pub grant_frames: u32,
    /// Pages of records, behind the header's page.
    pub record_pages: u32,
    /// Frames, behind the records.
    pub frames: u32,
}

impl Layout {
    pub(super) fn of(config: &XenConfig) -> Result<Self, GrantError> {
        let mib = config.cache_domain_mib;
        if !(CACHE_DOMAIN_MIB_MIN..=CACHE_DOMAIN_MIB_MAX).contains(&mib) {
            return Err(GrantError::BadRange(format!(
                "a cache domain has {CACHE_DOMAIN_MIB_MIN} to {CACHE_DOMAIN_MIB_MAX} MiB, not {mib}"
            )));
        }
        let pages = mib * 256 - FIRST_GFN - END_PAGES - 1;
        let record_pages = pages.div_ceil(RECORDS_PER_PAGE + 1);
        let frames = pages - record_pages;
        let entries_per_frame = (PAGE_SIZE / size_of::<crate::entry::Entry>()) as u32;
        let wanted = (frames * ENTRIES_PER_FRAME_DEFAULT).div_ceil(entries_per_frame);
        let grant_frames = config.grant_frames.unwrap_or(wanted.min(GRANT_FRAMES_MAX));
        let layout = Self {
            mib,
            grant_frames,
            record_pages,
            frames,
        };
        if grant_frames == 0 {
            return Err(GrantError::BadRange(format!(
                "a cache domain of {mib} MiB needs a grant table"
            )));
        }
        layout.domains(config.frames_max)?;
        Ok(layout)
    }

    /// Domains that hold `frames_max` frames.
    pub(super) fn domains(self, frames_max: u32) -> Result<u32, GrantError> {
        let domains = frames_max.div_ceil(self.frames);
        if frames_max > FRAMES_MAX || domains > CACHE_DOMAINS_MAX {
            return Err(GrantError::BadRange(format!(
                "{frames_max} frames would be {domains} cache domains of {} MiB: at most \
                 {CACHE_DOMAINS_MAX} are made (larger ones hold more: cache_domain_mib)",
                self.mib
            )));
        }
        Ok(domains)
    }

    /// Entries of a domain's grant table.
    pub(super) fn entries(self) -> usize {
        self.grant_frames as usize * (PAGE_SIZE / size_of::<crate::entry::Entry>())
    }

    /// All pages that are used, in the order in which they are mapped.
    pub(super) fn gfns(self) -> Range<u64> {
        let pages = 1 + self.record_pages + self.frames;
        u64::from(FIRST_GFN)..u64::from(FIRST_GFN + pages)
    }

    /// Where the records are in the mapped pages, in bytes.
    pub(super) fn record_bytes(self) -> Range<usize> {
        PAGE_SIZE..self.frame_page(0) * PAGE_SIZE
    }

    /// A frame's place among the mapped pages.
    pub(super) fn frame_page(self, frame: u32) -> usize {
        (1 + self.record_pages + frame) as usize
    }

    /// What entries call a frame.
    #[inline]
    pub(super) fn gfn(self, frame: u32) -> u32 {
        FIRST_GFN + 1 + self.record_pages + frame
    }

    /// The frame that entries call `gfn`.
    pub(super) fn frame_of(self, gfn: u32) -> Option<u32> {
        gfn.checked_sub(self.gfn(0))
            .filter(|&frame| frame < self.frames)
    }

    pub(super) fn header(self, number: u32) -> Header {
        Header {
            mib: self.mib,
            grant_frames: self.grant_frames,
            number,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_has_a_record_and_a_page_of_its_own() {
        for mib in [16, 64, 256, 1024] {
            let config = XenConfig {
                cache_domain_mib: mib,
                frames_max: 1,
                ..XenConfig::default()
            };
            let layout = Layout::of(&config).unwrap();
            assert!(
                layout.record_pages * RECORDS_PER_PAGE >= layout.frames,
                "{layout:?}"
            );
            assert!((layout.record_pages - 1) * RECORDS_PER_PAGE < layout.frames);
            assert_eq!(layout.gfns().end, u64::from(mib * 256 - END_PAGES));
            let last = layout.frames - 1;
            assert_eq!(u64::from(layout.gfn(last)) + 1, layout.gfns().end);
            assert_eq!(layout.frame_of(layout.gfn(last)), Some(last));
            assert_eq!(layout.frame_of(layout.gfn(last) + 1), None);
            assert_eq!(layout.frame_of(layout.gfn(0) - 1), None);
            assert_eq!(layout.domains(layout.frames).unwrap(), 1);
            assert_eq!(layout.domains(layout.frames + 1).unwrap(), 2);
        }
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let of = |mib, frames_max| {
            Layout::of(&XenConfig {
                cache_domain_mib: mib,
                frames_max,
                ..XenConfig::default()
            })
        };
        assert!(of(0, 1).is_err());
        assert!(of(1 << 20, 1).is_err());
        assert!(of(256, FRAMES_MAX + 1).is_err());
        assert!(of(16, 1 << 28).is_err(), "too many domains");
    }
}
