//! How much to ask for at a fault: one page where nothing is known, growing windows where a thread
//! reads on. Pure logic; pages are counted in the file.

use crate::limits::{
    STREAM_REACH_PAGES, STREAM_START_REACH_PAGES, STREAMS_MAX, WINDOW_PAGES_FIRST,
};
use copage_coherence::msg::FaultHint;

/// What to ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// The page that faulted, or one before it where a window is more than a page.
    pub(crate) first: u64,
    /// At least 1, at most what one Fault may ask for.
    pub(crate) count: u32,
    pub(crate) hint: FaultHint,
}

/// One reader that goes forward.
#[derive(Clone, Copy, Debug)]
struct Stream {
    /// The page behind its last window.
    next: u64,
    /// Its last window, in pages.
    pages: u32,
    /// When it last faulted, in faults of the mapping.
    used: u64,
}

/// The readers of one mapping.
#[derive(Clone, Debug)]
pub(crate) struct Windows {
    streams: Vec<Stream>,
    faults: u64,
    /// The window of a fault from which nothing follows, in pages: a power of two, and where such a
    /// window lies is a multiple of it.
    least: u32,
    /// The largest window, in pages: a power of two, too.
    most: u32,
}

impl Windows {
    /// `least`: pages of a window where nothing is known; `most`: of any, at most what
    /// one Fault may ask for. Powers of two.
    pub(crate) fn new(least: u32, most: u32) -> Self {
        Self {
            streams: Vec::new(),
            faults: 0,
            least,
            most,
        }
    }

    /// The window for a fault at `page`; `end` is the first page that cannot be asked for, above
    /// `page`.
    ///
    /// A fault just behind a stream's last window, or a little further (pages that others brought
    /// do not fault), goes on with that stream and its window grows by four, up to 2 MiB. A window
    /// ends where its size divides the page number, so that the largest are whole huge frames. Any
    /// other fault asks for the least window around it and may be the start of a stream.
    ///
    /// "A little" stays little however large the window: faults at random in a file of some
    /// thousand pages would else be taken for streams, each window widening the trap for the next.
    pub(crate) fn choose(&mut self, page: u64, end: u64) -> Window {
        self.faults += 1;
        let used = self.faults;
        let found = self.streams.iter_mut().find(|s| {
            let reach = if s.pages == self.least {
                STREAM_START_REACH_PAGES
            } else {
                STREAM_REACH_PAGES
            };
            page >= s.next && page - s.next <= reach
        });
        let (first, pages, hint) = match found {
            Some(stream) => {
                let pages = stream.pages.saturating_mul(4);
                let pages = pages.max(WINDOW_PAGES_FIRST).min(self.most);
                let aligned = (page + u64::from(pages)) / u64::from(pages) * u64::from(pages);
                // `aligned` is above `page` by at most `pages`.
                let count = (aligned.min(end.max(page + 1)) - page) as u32;
                *stream = Stream {
                    next: page + u64::from(count),
                    pages,
                    used,
                };
                (page, count, FaultHint::Sequential)
            }
            None => {
                let least = u64::from(self.least);
                let first = page / least * least;
                let next = (first + least).min(end.max(page + 1));
                let stream = Stream {
                    next,
                    pages: self.least,
                    used,
                };
                if self.streams.len() < STREAMS_MAX {
                    self.streams.push(stream);
                } else if let Some(oldest) = self.streams.iter_mut().min_by_key(|s| s.used) {
                    *oldest = stream;
                }
                // At most `least`.
                (first, (next - first) as u32, FaultHint::Random)
            }
        };
        Window {
            first,
            count: pages,
            hint,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::WINDOW_PAGES_MAX;

    const END: u64 = 1 << 30;

    #[test]
    fn a_sequential_reader_gets_growing_aligned_windows() {
        let mut windows = Windows::new(1, WINDOW_PAGES_MAX);
        let mut page = 0;
        let mut counts = Vec::new();
        for _ in 0..8 {
            let w = windows.choose(page, END);
            assert_eq!(w.first, page);
            counts.push(w.count);
            page += u64::from(w.count);
        }
        // 1, up to 16, up to 64, up to 256, up to 512, then whole huge frames.
        assert_eq!(counts, [1, 15, 48, 192, 256, 512, 512, 512]);
        assert_eq!(page % u64::from(WINDOW_PAGES_MAX), 0);
    }

    #[test]
    fn windows_grow_as_far_as_they_may() {
        let mut windows = Windows::new(1, 16);
        let mut page = 0;
        for _ in 0..8 {
            page += u64::from(windows.choose(page, END).count);
        }
        assert_eq!(page, 7 * 16);
        assert_eq!(windows.choose(page, END).count, 16);
    }

    #[test]
    fn random_faults_ask_for_one_page() {
        let mut windows = Windows::new(1, WINDOW_PAGES_MAX);
        let mut x = 1u64;
        for _ in 0..1000 {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let page = (x >> 34) * 1000;
            assert_eq!(windows.choose(page, u64::MAX).count, 1);
        }
        assert_eq!(windows.streams.len(), STREAMS_MAX);
    }

    #[test]
    fn random_faults_in_a_small_file_stay_almost_all_of_one_page() {
        // 16 MiB of which half is resident: pages that were brought fault no more for a while.
        const PAGES: u64 = 4096;
        let mut windows = Windows::new(1, WINDOW_PAGES_MAX);
        let (mut x, mut asked) = (1u64, 0);
        for _ in 0..20_000 {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            asked += u64::from(windows.choose((x >> 33) % PAGES, PAGES).count);
        }
        assert!(
            asked < 20_000 * 3 / 2,
            "{asked} pages asked for by 20000 faults"
        );
    }

    #[test]
    fn several_streams_grow_side_by_side() {
        let mut windows = Windows::new(1, WINDOW_PAGES_MAX);
        let mut at: Vec<u64> = (0..STREAMS_MAX as u64).map(|i| i * 1_000_000).collect();
        for _ in 0..8 {
            for page in &mut at {
                *page += u64::from(windows.choose(*page, END).count);
            }
        }
        for page in &mut at {
            assert!(windows.choose(*page, END).count > 256);
        }
    }

    #[test]
    fn a_stream_survives_pages_that_others_brought_but_not_a_jump() {
        let mut windows = Windows::new(1, WINDOW_PAGES_MAX);
        windows.choose(0, END);
        windows.choose(1, END);
        assert_eq!(windows.choose(40, END).hint, FaultHint::Sequential);
        assert_eq!(windows.choose(100_000, END).hint, FaultHint::Random);
        assert_eq!(windows.choose(3, END).hint, FaultHint::Random, "backwards");
    }

    #[test]
    fn granted_files_are_read_in_aligned_windows_from_the_first() {
        let mut windows = Windows::new(16, WINDOW_PAGES_MAX);
        let w = windows.choose(37, END);
        assert_eq!((w.first, w.count, w.hint), (32, 16, FaultHint::Random));
        let counts: Vec<(u64, u32)> = [48, 64, 256]
            .map(|page| windows.choose(page, END))
            .map(|w| (w.first, w.count))
            .to_vec();
        assert_eq!(counts, [(48, 16), (64, 192), (256, 256)]);
        let last = windows.choose(1003, 1005);
        assert_eq!((last.first, last.count), (992, 13));
    }

    #[test]
    fn windows_end_with_the_file() {
        let mut windows = Windows::new(1, WINDOW_PAGES_MAX);
        windows.choose(0, 3);
        assert_eq!(windows.choose(1, 3).count, 2);
        assert_eq!(
            Windows::new(1, WINDOW_PAGES_MAX).choose(7, 7).count,
            1,
            "never nothing"
        );
        let mut last = Windows::new(1, WINDOW_PAGES_MAX);
        last.choose(u64::MAX / 4096 - 1, u64::MAX / 4096 + 1);
        assert_eq!(last.choose(u64::MAX / 4096, u64::MAX / 4096 + 1).count, 1);
    }
}
