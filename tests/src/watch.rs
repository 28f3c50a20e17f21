//! A reader of pattern files that checks every word of every page, and whether versions only rise.

use crate::orders::{Watched, WrongPage};
use copage::demo::pattern::{self, PageContent};
use copage_grants::volatile::VolatileBytes;
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Numbers that repeat from run to run.
#[derive(Clone, Debug)]
pub struct Draw(u64);

impl Draw {
    /// A sequence of its own for each `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(seed ^ 0x243f_6a88_85a3_08d3)
    }

    /// The next number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        // The upper half is the better one.
        (self.0 >> 32) % end
    }
}

fn describe(bytes: &[u8], page: (usize, u64), before: u32) -> WrongPage {
    let version =
        |word: Option<&[u8; 8]>| word.map_or(0, |w| (u64::from_le_bytes(*w) >> 32) as u32);
    WrongPage {
        page,
        zero_words: bytes
            .chunks(8)
            .filter(|w| w.iter().all(|&b| b == 0))
            .count(),
        versions: (version(bytes.first_chunk()), version(bytes.last_chunk())),
        before,
    }
}

/// Reads runs of `run_pages` pages of `views` at random places until `stop`; `seen` is kept up to date.
pub fn watch(
    views: &[VolatileBytes<'_>],
    run_pages: u64,
    seed: u64,
    stop: &AtomicBool,
    seen: &Mutex<Watched>,
) {
    let mut draw = Draw::new(seed);
    let mut last: Vec<Vec<u32>> = views.iter().map(|v| vec![0; v.len() / PAGE_SIZE]).collect();
    let mut page_bytes = [0; PAGE_SIZE];
    while !stop.load(Ordering::Relaxed) {
        let which = draw.below(views.len() as u64) as usize;
        let (view, last) = (&views[which], &mut last[which]);
        let pages = view.len() as u64 / PAGE_SIZE_U64;
        let first = draw.below(pages);
        let mut run = Watched::default();
        let begin = Instant::now();
        for page in first..(first + run_pages).min(pages) {
            let at = page as usize;
            let copied = view.read_into(at * PAGE_SIZE, &mut page_bytes);
            run.pages += 1;
            match (copied, pattern::check(&page_bytes, page)) {
                (PAGE_SIZE, PageContent::Whole(version)) => {
                    run.backwards += u64::from(version < last[at]);
                    last[at] = version;
                    run.newest = run.newest.max(version);
                }
                (PAGE_SIZE, PageContent::Crossed { old, .. }) if old >= last[at] => {
                    // The page was replaced between two loads: what is there now must be whole.
                    view.read_into(at * PAGE_SIZE, &mut page_bytes);
                    match pattern::check(&page_bytes, page) {
                        PageContent::Whole(version) => last[at] = version,
                        // Replaced once more; the next visit will tell.
                        PageContent::Crossed { old: next, .. } if next > old => {}
                        PageContent::Crossed { .. } | PageContent::Wrong => run.wrong += 1,
                    }
                }
                _ => {
                    run.wrong += 1;
                    let wrong = describe(&page_bytes, (which, page), last[at]);
                    run.first_wrong = run.first_wrong.or(Some(wrong));
                }
            }
        }
        run.slowest_ms = begin.elapsed().as_millis() as u64;
        let oldest = last.iter().copied().filter(|&v| v != 0).min().unwrap_or(0);
        let mut seen = seen.lock().expect("nobody panics holding it");
        *seen = Watched {
            oldest,
            ..seen.and(run)
        };
    }
}
