//! The steps of the demo that look otherwise where the guests are domains of a hypervisor: memory that
//! is really saved, and frames as the grant tables show them.

use super::proto::{Answer, Order};
use super::report::mib;
use super::scenario::Scene;
use super::stage::ask_all;
use crate::serve::admin_types::{AdminReply, AdminRequest, GrantLine};
use anyhow::{Result, bail};
use copage_grants::PAGE_SIZE_U64;
use std::collections::BTreeMap;

/// More entries than the demo has.
const ENTRIES_MAX: u32 = 1 << 20;

impl Scene<'_> {
    /// What the guests' own page caches hold, in bytes, one after the other.
    pub fn guest_caches(&mut self) -> Result<Vec<u64>> {
        ask_all(&mut self.guests, &Order::PageCache)?
            .into_iter()
            .map(|answer| match answer {
                Answer::PageCache { bytes } => Ok(bytes),
                other => bail!("a guest answered {other:?}"),
            })
            .collect()
    }

    /// What the shared files cost: once in frames, nothing in the guests.
    pub fn memory_of_domains(&mut self, before: &[u64]) -> Result<()> {
        let frames = self.stats()?.frames_used * PAGE_SIZE_U64;
        let rounded: u64 = self
            .files
            .iter()
            .map(|f| f.bytes.div_ceil(PAGE_SIZE_U64) * PAGE_SIZE_U64)
            .sum();
        let after = self.guest_caches()?;
        let grown = before.iter().zip(&after);
        let grown: u64 = grown.map(|(was, is)| is.saturating_sub(*was)).sum();
        let guests = self.guests.len() as u64;
        self.report.line(
            "memory",
            frames <= rounded + rounded / 50 && grown <= rounded / 10,
            format!(
                "frames {} once in the cache domains + {} more in the {guests} guests' page caches; \
                 {guests} kernels that read the files by themselves would hold {guests} x {} = {}",
                mib(frames),
                mib(grown),
                mib(rounded),
                mib(guests * rounded),
            ),
        );
        Ok(())
    }

    pub(super) fn grant_lines(&self) -> Result<Vec<GrantLine>> {
        let request = AdminRequest::Grants {
            guest: None,
            entries_max: Some(ENTRIES_MAX),
        };
        match self.daemon.ask(&request)? {
            AdminReply::Grants(grants) => Ok(grants.entries),
            other => bail!("grants was answered by {other:?}"),
        }
    }

    /// A frame that every guest maps through an entry of its own, by the bits that only the hypervisor
    /// sets.
    pub fn frame_of_domains(&mut self) -> Result<()> {
        let entries = self.grant_lines()?;
        let mut by_frame: BTreeMap<u32, Vec<&GrantLine>> = BTreeMap::new();
        for line in entries.iter().filter(|line| line.mapped) {
            by_frame.entry(line.frame).or_default().push(line);
        }
        let everywhere = |lines: &[&GrantLine]| {
            let names = self.guests.iter().map(|guest| &guest.part().name);
            names
                .into_iter()
                .all(|name| lines.iter().any(|line| line.guest == *name))
        };
        let shared: Vec<_> = by_frame
            .iter()
            .filter(|(_, lines)| everywhere(lines))
            .collect();
        let text = match shared.get(shared.len() / 2) {
            None => "no frame is mapped by all guests".to_owned(),
            Some((frame, lines)) => {
                let entries: Vec<_> = lines
                    .iter()
                    .map(|line| format!("{} by entry {}", line.guest, line.gref))
                    .collect();
                format!(
                    "frame {frame:#x} is mapped read-only by {}; so are {} frames of {}, as the bits that \
                     Xen sets in the grant table say",
                    entries.join(", "),
                    shared.len(),
                    by_frame.len()
                )
            }
        };
        self.report.line("frame", !shared.is_empty(), text);
        Ok(())
    }
}
