//! Granting, with ledger and quota, against nothing but storing entries.

use crate::setting::Setting;
use crate::stats::interleaved;
use crate::table::{Row, Unit};
use anyhow::{Result, ensure};
use copage_grants::local::{LocalBackend, LocalConfig};
use copage_grants::{Access, Backend, DomId, FrameNo, Grant};
use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::Instant;

const NAME: &str = "grant";
/// Entries written by one call.
const BATCHES: [usize; 3] = [1, 16, 512];
/// `GTF_permit_access | GTF_readonly` (xen/include/public/grant_table.h).
const PERMIT_READONLY: u32 = 1 | 1 << 2;

/// `struct grant_entry_v1`: flags and domid in the first word, the frame in the second.
#[derive(Default)]
struct RawEntry {
    head: AtomicU32,
    frame: AtomicU32,
}

/// Writes entries as Xen wants them: the frame first, a barrier, then what makes the entry valid.
#[inline(never)]
fn store_raw(table: &[RawEntry], dom: DomId, frames: &[FrameNo]) {
    let head = u32::from(dom.0) << 16 | PERMIT_READONLY;
    for (entry, frame) in table.iter().zip(frames) {
        entry.frame.store(frame.0, Ordering::Relaxed);
        fence(Ordering::Release);
        entry.head.store(head, Ordering::Relaxed);
    }
}

/// Runs the bench.
pub fn run(setting: &Setting, rows: &mut Vec<Row>) -> Result<()> {
    let count = setting.sizes.grant_frames;
    let backend = match LocalBackend::new(LocalConfig::default()) {
        Ok(backend) => backend,
        Err(error) => {
            rows.push(
                Row::new(NAME, "grants a second", Unit::PerSecond)
                    .note(format!("not here: {error}")),
            );
            return Ok(());
        }
    };
    let frames: Vec<FrameNo> = (0..count as u32).map(FrameNo).collect();
    let table: Vec<RawEntry> = frames.iter().map(|_| RawEntry::default()).collect();
    let mut out: Vec<Grant> = Vec::with_capacity(frames.len());
    // Pages that are touched the first time, by either side, are not what is measured.
    grant_all(&backend, DomId(1), &frames, 512, &mut out)?;
    for batch in BATCHES {
        let [copage, raw] = interleaved::<2>(setting.sizes.reps, |side, rep| {
            let dom = DomId(2 + rep as u16);
            if side == 0 {
                return grant_all(&backend, dom, &frames, batch, &mut out);
            }
            let begin = Instant::now();
            for (run, at) in frames.chunks(batch).zip((0..).step_by(batch)) {
                store_raw(black_box(&table[at..at + run.len()]), dom, black_box(run));
            }
            let seconds = begin.elapsed().as_secs_f64();
            let expected = u32::from(dom.0) << 16 | PERMIT_READONLY;
            ensure!(
                table
                    .iter()
                    .all(|e| e.head.load(Ordering::Relaxed) == expected),
                "WRONG BYTES: raw entries"
            );
            Ok(count as f64 / seconds)
        })?;
        rows.push(
            Row::new(
                NAME,
                format!("grants a second, ledger and quota, batches of {batch}"),
                Unit::PerSecond,
            )
            .copage(&copage)
            .against("storing raw entries", &raw)
            .ratio_at_least(0.5),
        );
    }
    Ok(())
}

/// Grants every frame, checks that ledger and table agree, and takes all back.
fn grant_all(
    backend: &LocalBackend,
    dom: DomId,
    frames: &[FrameNo],
    batch: usize,
    out: &mut Vec<Grant>,
) -> Result<f64> {
    backend.set_grants_max(dom, frames.len() as u64);
    out.clear();
    let begin = Instant::now();
    for run in frames.chunks(batch) {
        backend.grant(dom, Access::ReadOnly, run, out)?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    let held = backend.grant_count(dom);
    let audit = backend.audit();
    ensure!(
        held == frames.len() as u64 && out.len() == frames.len() && audit.differences.is_empty(),
        "WRONG ENTRIES: {held} of {} held, {:?}",
        frames.len(),
        audit.differences.first()
    );
    backend.domain_ended(dom);
    Ok(frames.len() as f64 / seconds)
}
